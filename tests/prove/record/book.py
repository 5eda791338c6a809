"""What the checker knows: what was acknowledged, and what each client saw."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """An event: its place in its run, its id and what it says."""

    run_id: str
    seq: int
    event_id: str
    digest: str


@dataclass(slots=True)
class Seen:
    """What one client saw: cursor to event, in the order it came; and what was wrong with it."""

    user_id: str
    last: int
    first: int
    events: dict[int, Entry] = field(default_factory=dict)
    delivered: int = 0
    doubles: int = 0
    wrong: list[str] = field(default_factory=list)
    reconnects: int = 0

    def take(self, frame: dict[str, Any]) -> None:
        """Note an event as it came over the socket."""
        cursor, entry = int(frame["cursor"]), entry_of(frame)
        self.delivered += 1
        if frame["user_id"] != self.user_id:
            self.wrong.append(f"leak: an event of {frame['user_id']}")
        if cursor in self.events:
            self.doubles += 1
            if self.events[cursor] != entry:
                self.wrong.append(f"cursor {cursor} has two contents")
        elif cursor != self.last + 1:
            self.wrong.append(f"gap: {cursor} after {self.last}")
        self.events[cursor] = entry
        self.last = max(self.last, cursor)


@dataclass(slots=True)
class Book:
    """Everything of one proof."""

    appended: int = 0
    acknowledged: dict[str, list[Entry]] = field(default_factory=dict)
    clients: list[Seen] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    accepted_runs: dict[str, list[str]] = field(default_factory=dict)

    def acknowledge(self, user_id: str, entries: list[Entry]) -> None:
        """The record has said that it has them."""
        self.acknowledged.setdefault(user_id, []).extend(entries)

    def refused(self, code: str) -> None:
        """An append was refused."""
        self.refusals[code] = self.refusals.get(code, 0) + 1


def entry_of(frame: dict[str, Any]) -> Entry:
    """An event as a client or a page shows it."""
    return Entry(frame["run_id"] or "", int(frame["seq"]), frame["event_id"], digest(frame["data"]))


def digest(data: Any) -> str:
    """Of what an event says, however it is written."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
