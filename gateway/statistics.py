"""What came over the sockets of this process, counted exactly: all of it, and each user's."""

from __future__ import annotations

import datetime
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from chassis import telemetry
from gateway import frames
from netra import ids

_messages = telemetry.meter.create_counter("netra.gateway.messages", description="Messages of clients by kind.")
_deprecated = telemetry.meter.create_counter("netra.gateway.deprecated", description="Frames that came under an old name, by that name.")
_REMEMBERED = 10_000
_KINDS = {"START_AGENT": "start_agent_requests", "USER_MESSAGE": "user_messages", "CHAT": "chat_messages"}


@dataclass(slots=True)
class Counts:
    """How many of what, and when the last message was accepted."""

    messages_processed: int = 0
    start_agent_requests: int = 0
    user_messages: int = 0
    chat_messages: int = 0
    errors: int = 0
    last_processed_time: float | None = None
    deprecated: Counter[str] = field(default_factory=Counter)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        last = self.last_processed_time
        return {
            "messages_processed": self.messages_processed,
            "start_agent_requests": self.start_agent_requests,
            "user_messages": self.user_messages,
            "chat_messages": self.chat_messages,
            "errors": self.errors,
            "last_processed_time": datetime.datetime.fromtimestamp(last, datetime.UTC).isoformat() if last is not None else None,
            "deprecated": dict(self.deprecated),
        }


class Statistics:
    """Counts in one event loop, so none is lost. Of users, those of whom something came last are remembered."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self.process = Counts()
        self._users: OrderedDict[ids.UserId, Counts] = OrderedDict()
        self._remembered = remembered

    def of(self, user_id: ids.UserId) -> Counts:
        """What one user sent; nothing when that is not remembered."""
        return self._users.get(user_id) or Counts()

    def received(self, user_id: ids.UserId, frame: frames.Frame) -> None:
        """A frame that can be read came."""
        kind, name = _KINDS.get(frame.type), frame.alias.upper()
        if kind is None and not name:
            return
        for counts in self._both(user_id):
            if kind is not None:
                setattr(counts, kind, getattr(counts, kind) + 1)
            if name:
                counts.deprecated[name] += 1
        if kind is not None:
            _messages.add(1, {"kind": kind})
        if name:
            _deprecated.add(1, {"name": name})

    def processed(self, user_id: ids.UserId, frame: frames.Frame) -> None:
        """A frame was accepted; messages count."""
        if frame.type in _KINDS:
            now = time.time()
            for counts in self._both(user_id):
                counts.messages_processed += 1
                counts.last_processed_time = now
            _messages.add(1, {"kind": "messages_processed"})

    def refused(self, user_id: ids.UserId) -> None:
        """An error frame was the answer."""
        for counts in self._both(user_id):
            counts.errors += 1
        _messages.add(1, {"kind": "errors"})

    def _both(self, user_id: ids.UserId) -> tuple[Counts, Counts]:
        mine = self._users.get(user_id)
        if mine is None:
            mine = self._users[user_id] = Counts()
            if len(self._users) > self._remembered:
                self._users.popitem(last=False)
        else:
            self._users.move_to_end(user_id)
        return self.process, mine
