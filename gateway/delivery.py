"""What one socket is owed: live events while it keeps up, pages of the record while it does not; no hole, no double; pure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gateway import envelope, frames, subscriptions
from netra.events.v1 import events_pb2

# the types of the last event of a run
ENDS = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
# how many events may be skipped before the client is told how far it is
_SKIPPED = 256
# how many frames of one stream may wait, and up to which size a frame is one: of larger ones fewer wait
_AHEAD, _ONE_FRAME = 4, 16 * 1024


class Event(NamedTuple):
    """What goes to a socket. `wire` is ready for the line, and shared by all sockets. `cursor` is 0 for what is not in the record."""

    cursor: int
    seq: int
    run_id: str
    thread_id: str
    type: str
    wire: bytes


class Page(NamedTuple):
    """A stretch of the record: events in order, and its bounds and generation when it was read."""

    events: tuple[Event, ...]
    last: int
    oldest: int
    epoch: str = ""


def event(found: events_pb2.Event) -> Event:
    """An event of the record as it goes to sockets."""
    return Event(found.cursor, found.seq, found.run_id, found.thread_id, found.type, envelope.text(found.frame))


def transient(found: events_pb2.TransientEvent) -> Event:
    """What is not in the record, as it goes to sockets."""
    return Event(0, found.after_seq, found.run_id, found.thread_id, found.type, envelope.text(found.frame))


def _nobody() -> None:
    """Nobody sends yet."""


def _frame(kind: str, payload: bytes, cursor: int = 0, run_id: str = "") -> Event:
    return Event(cursor, 0, run_id, "", kind, envelope.text(payload))


def _weight(frame: Event) -> int:
    return 1 + len(frame.wire) // _ONE_FRAME


class Delivery:
    """The outgoing side of one socket.

    `last` is the newest cursor queued, skipped or sent; `sent` the newest that the client was told of; `tail` the newest known to
    exist. `filter` says what is wanted: it may change at any time, and counts for what is queued from then on. `woken` is called
    whenever there may be something to do.
    """

    __slots__ = (
        "_bytes", "_control", "_events", "_max_bytes", "_max_events", "_moved", "_skipped", "_streams", "_turn", "_waiting",
        "behind", "closed", "filter", "generation", "last", "over", "sent", "tail", "woken",
    )  # fmt: skip

    def __init__(self, last: int, tail: int, max_events: int, max_bytes: int) -> None:
        self.last = self.sent = last
        self.tail = max(last, tail)
        self.behind = self.tail > last
        self.closed = self.over = False
        self.generation = 0
        self.filter = subscriptions.Subscriptions()
        self.woken: Callable[[], None] = _nobody
        self._max_events, self._max_bytes = max_events, max_bytes
        self._control: deque[Event] = deque()
        self._events: deque[Event] = deque()
        self._streams: deque[Event] | None = None
        self._waiting: dict[str, int] = {}
        self._moved: asyncio.Event | None = None
        self._bytes = self._skipped = 0
        self._turn = False

    # frames that are not events

    def say(self, frame: bytes) -> None:
        """Queue a frame that is not an event; it goes out before queued events."""
        if not self.over:
            self._control.append(_frame("", frame))
            self.woken()

    @property
    def unsaid(self) -> int:
        """How many frames that are not events wait."""
        return len(self._control)

    async def quiet(self) -> None:
        """Returns when none of them waits, or nobody sends any more."""
        while self._control:
            await self._movement()

    def stream(self, stream_id: str, frame: bytes) -> None:
        """Queue a frame of a stream; those of one stream stay in order, and take turns with events."""
        if not self.over:
            if self._streams is None:
                self._streams = deque()
            queued = _frame("", frame, run_id=stream_id)
            self._streams.append(queued)
            self._waiting[stream_id] = self._waiting.get(stream_id, 0) + _weight(queued)
            self.woken()

    async def room(self, stream_id: str) -> bool:
        """Returns when a stream may queue another frame; false when nobody sends any more."""
        while self._waiting.get(stream_id, 0) >= _AHEAD:
            await self._movement()
        return not self.over

    async def _movement(self) -> None:
        if self._moved is None:
            self._moved = asyncio.Event()
        await self._moved.wait()

    def _move(self) -> None:
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    # events

    @property
    def idle(self) -> bool:
        """Whether no event waits."""
        return not self._events

    def offer(self, event: Event) -> None:
        """A live event. Taken when it is the next one and there is room; else the record will supply it."""
        cursor = event.cursor
        if cursor > self.tail:
            self.tail = cursor
        if self.behind or self.closed or cursor <= self.last:
            return
        if cursor != self.last + 1 or not self._room_for(event):
            self._fall_behind()
        else:
            self._pass(event)

    def hint(self, event: Event, after: int) -> None:
        """Something that is not in the record, for who has all of it up to `after` and nothing that follows.

        Dropped when the socket does not keep up: what follows contains its sum.
        """
        busy = len(self._events) * 2 >= self._max_events or (self._bytes + len(event.wire)) * 2 > self._max_bytes
        here = after == self.last and not (self.behind or self.closed)
        if here and not busy and self.filter.wants(event.run_id, event.thread_id, event.type):
            self._queue(event)

    def _room_for(self, event: Event) -> bool:
        """Whether it may be queued; what is not in the record makes room for it."""
        if self._full(event):
            self._events = deque(queued for queued in self._events if queued.cursor)
            self._bytes = sum(len(queued.wire) for queued in self._events)
        return not self._events or not self._full(event)

    def _full(self, event: Event) -> bool:
        return len(self._events) >= self._max_events or self._bytes + len(event.wire) > self._max_bytes

    def notice(self, cursor: int) -> None:
        """The record is known to reach up to `cursor`."""
        self.tail = max(self.tail, cursor)
        if self.tail > self.last and not self.behind:
            self._fall_behind()

    def rewind(self, after: int) -> None:
        """Go on from `after`, whatever was queued."""
        self.generation += 1
        self._events.clear()
        self._bytes = self._skipped = 0
        self.last = self.sent = after
        self.behind = self.tail > after
        self.woken()

    def fill(self, generation: int, page: Page) -> bool:
        """Take a page that was asked for at `generation`; whether it brought the socket on."""
        if generation != self.generation or self.closed:
            return True
        before = self.last
        self.tail = max(self.tail, page.last)
        if page.oldest > self.last + 1 and page.last > self.last:
            self._truncated(page.oldest)
        for event in page.events:
            if event.cursor == self.last + 1:
                self._pass(event)
        if self.last >= self.tail:
            self.behind = False
        return self.last > before or not self.behind

    def tick(self) -> None:
        """Called at least every 5 s: tell the client how far it is, when that is further than the last event it was sent."""
        if self._skipped and not self.closed:
            self._position()

    def take(self) -> Event | None:
        """The next one to be sent."""
        if self._control:
            said = self._control.popleft()
            if not self._control:
                self._move()
            return said
        if self._streams and (self._turn or not self._events):
            return self._next_of_streams()
        if not self._events:
            return None
        self._turn = True
        event = self._events.popleft()
        if event.cursor:
            self.sent = event.cursor
        self._bytes -= len(event.wire)
        return event

    def stop(self) -> None:
        """Take no more events; what is queued is still sent."""
        self.tick()
        self.closed = True
        self.woken()

    def end(self) -> None:
        """Nobody sends any more: keep nothing, and hold up nobody who waits until something is sent."""
        self.closed = self.over = True
        self._control.clear()
        self._events.clear()
        self._streams = None
        self._waiting.clear()
        self._bytes = 0
        self._move()

    def _next_of_streams(self) -> Event:
        assert self._streams is not None  # noqa: S101 - its caller looked
        self._turn = False
        frame = self._streams.popleft()
        left = self._waiting[frame.run_id] - _weight(frame)
        if left:
            self._waiting[frame.run_id] = left
        else:
            del self._waiting[frame.run_id]
        self._move()
        return frame

    def _pass(self, event: Event) -> None:
        """The next one of the record: queued when it is wanted, else skipped."""
        if not self.filter or self.filter.wants(event.run_id, event.thread_id, event.type):
            if self._skipped:
                self._position()
            self.last = event.cursor
            self._queue(event)
            return
        self.last = event.cursor
        self._skipped += 1
        if self._skipped >= _SKIPPED:
            self._position()

    def _position(self) -> None:
        """Say how far the client is, in its place among the events."""
        self._skipped = 0
        frame = _frame("position", frames.dump({"type": "position", "cursor": self.last}), self.last)
        if self._events and self._events[-1].type == "position":
            self._bytes -= len(self._events.pop().wire)
        self._queue(frame)

    def _truncated(self, oldest: int) -> None:
        self._skipped = 0
        self.last = oldest - 1
        self._queue(_frame("history_truncated", frames.dump({"type": "history_truncated", "oldest": oldest}), oldest - 1))

    def _queue(self, event: Event) -> None:
        self._events.append(event)
        self._bytes += len(event.wire)
        self.woken()

    def _fall_behind(self) -> None:
        self.behind = True
        self.woken()
