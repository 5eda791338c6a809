"""What one socket is owed: live events while it keeps up, pages of the record while it does not; no hole, no double; pure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import frames


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of the record: cursors and frames in order, and the bounds of the record when it was read."""

    events: tuple[tuple[int, bytes], ...]
    last: int
    oldest: int


class Delivery:
    """The outgoing side of one socket. `last` is the newest cursor queued or sent; `tail` the newest known to exist."""

    __slots__ = (
        "_bytes", "_control", "_events", "_max_bytes", "_max_events",
        "behind", "closed", "generation", "last", "over", "quiet", "sent", "tail", "wake",
    )  # fmt: skip

    def __init__(self, last: int, tail: int, max_events: int, max_bytes: int) -> None:
        self.last = self.sent = last
        self.tail = max(last, tail)
        self.behind = self.tail > last
        self.closed = self.over = False
        self.generation = 0
        self.wake = asyncio.Event()
        self.quiet = asyncio.Event()
        self._max_events, self._max_bytes = max_events, max_bytes
        self._control: deque[bytes] = deque()
        self._events: deque[tuple[int, bytes]] = deque()
        self._bytes = 0

    def say(self, frame: bytes) -> None:
        """Queue a frame that is not an event; it goes out before queued events."""
        if self.over:
            return
        self._control.append(frame)
        self.quiet.clear()
        self.wake.set()

    @property
    def unsaid(self) -> int:
        """How many frames that are not events wait."""
        return len(self._control)

    @property
    def idle(self) -> bool:
        """Whether no event waits."""
        return not self._events

    def offer(self, cursor: int, frame: bytes) -> None:
        """A live event. Taken when it is the next one and there is room; else the record will supply it."""
        self.tail = max(self.tail, cursor)
        if self.behind or self.closed or cursor <= self.last:
            return
        full = len(self._events) >= self._max_events or self._bytes + len(frame) > self._max_bytes
        if cursor != self.last + 1 or (full and self._events):
            self._fall_behind()
        else:
            self._queue(cursor, frame)

    def notice(self, cursor: int) -> None:
        """The record is known to reach up to `cursor`."""
        self.tail = max(self.tail, cursor)
        if self.tail > self.last and not self.behind:
            self._fall_behind()

    def rewind(self, after: int) -> None:
        """Go on from `after`, whatever was queued."""
        self.generation += 1
        self._events.clear()
        self._bytes = 0
        self.last = self.sent = after
        self.behind = self.tail > after
        self.wake.set()

    def fill(self, generation: int, page: Page) -> bool:
        """Take a page that was asked for at `generation`; whether it brought the socket on."""
        if generation != self.generation or self.closed:
            return True
        before = self.last
        self.tail = max(self.tail, page.last)
        if page.oldest > self.last + 1 and page.last > self.last:
            self._queue(page.oldest - 1, frames.dump({"type": "history_truncated", "oldest": page.oldest}))
        self._take_over(page.events)
        if self.last >= self.tail:
            self.behind = False
        return self.last > before or not self.behind

    def take(self) -> bytes | None:
        """The next frame to be sent."""
        if self._control:
            return self._control.popleft()
        self.quiet.set()
        if not self._events:
            return None
        self.sent, frame = self._events.popleft()
        self._bytes -= len(frame)
        return frame

    def stop(self) -> None:
        """Take no more events; what is queued is still sent."""
        self.closed = True
        self.wake.set()

    def end(self) -> None:
        """Nobody sends any more: keep nothing, and hold up nobody who waits until all is said."""
        self.closed = self.over = True
        self._control.clear()
        self._events.clear()
        self._bytes = 0
        self.quiet.set()

    def _take_over(self, events: Iterable[tuple[int, bytes]]) -> None:
        for cursor, frame in events:
            if cursor == self.last + 1:
                self._queue(cursor, frame)

    def _queue(self, cursor: int, frame: bytes) -> None:
        self._events.append((cursor, frame))
        self._bytes += len(frame)
        self.last = cursor
        self.wake.set()

    def _fall_behind(self) -> None:
        self.behind = True
        self.wake.set()
