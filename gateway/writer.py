"""Sends what a socket is owed: no task of its own, all that waits in one write, and only while the peer takes it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway import close_codes, delivery, envelope, frames, wire

# what is written at once: more only makes the kernel's buffer swell
_AT_ONCE = 64 * 1024


class Owner(Protocol):
    """The socket's session."""

    def end(self, close: close_codes.Close) -> None:
        """Close it now."""

    def feed(self) -> None:
        """Read on from the record."""

    def notified(self, event: delivery.Event) -> None:
        """The last event of a run was sent."""


class Writer:
    """The sending side of one socket."""

    __slots__ = ("_before", "_due", "_finishing", "_line", "_loop", "_owed", "_owner", "_stall", "_stall_s")

    def __init__(self, owed: delivery.Delivery, line: wire.Wire, owner: Owner, stall_s: float) -> None:
        self._owed, self._line, self._owner, self._stall_s = owed, line, owner, stall_s
        self._loop = asyncio.get_running_loop()
        self._due = self._finishing = False
        self._stall: asyncio.TimerHandle | None = None
        self._before = 0
        line.moved(self._moved)
        owed.woken = self.wake
        self.wake()

    def wake(self) -> None:
        """There may be something to send, soon."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def finish(self) -> None:
        """Send what is queued, say where to resume, close."""
        self._finishing = not self._owed.over
        self.wake()

    def close(self) -> None:
        """Send nothing more."""
        self._calm()
        self._owed.end()
        self._owed.woken = _nothing
        self._line.moved(_nothing)

    def _moved(self) -> None:
        self._calm()
        self.wake()

    def _flush(self) -> None:
        self._due = False
        while not self._line.blocked:
            waiting, ended = self._waiting()
            if not waiting:
                self._rest()
                return
            if not self._line.put(waiting):
                self.close()
                return
            for event in ended:
                self._owner.notified(event)
        if self._stall is None and not self._owed.over:
            self._watch()

    def _waiting(self) -> tuple[bytes, list[delivery.Event]]:
        """Frames for one write, and which of them are the last events of runs."""
        parts: list[bytes] = []
        ended: list[delivery.Event] = []
        size = 0
        while size < _AT_ONCE and (event := self._owed.take()) is not None:
            parts.append(event.wire)
            size += len(event.wire)
            if event.type in delivery.ENDS:
                ended.append(event)
        return b"".join(parts), ended

    def _rest(self) -> None:
        """Nothing waits."""
        if self._finishing:
            self._line.put(envelope.text(frames.dump({"type": "draining", "cursor": self._owed.sent})))
            self._owner.end(close_codes.DRAINING)
            self._finishing = False
            self.close()
        elif self._owed.behind and not self._owed.closed:
            self._owner.feed()

    # a peer that takes nothing

    def _watch(self) -> None:
        self._before = self._line.unwritten()
        self._stall = self._loop.call_later(self._stall_s, self._look)

    def _look(self) -> None:
        self._stall = None
        now = self._line.unwritten()
        if self._line.blocked and now >= self._before:
            self._owner.end(close_codes.SLOW_READER)
            self.close()
        elif self._line.blocked:
            self._watch()

    def _calm(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def _nothing() -> None:
    """Nobody sends any more."""
