"""What one call sends: a bounded queue of live events, and followers that are fed from the record when it is full."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from chassis import identity, lifecycle
from netra import errors
from netra.events.v1 import events_pb2
from services.events import announce, fanout, log

MAX_BATCH_EVENTS = 256
MAX_BATCH_BYTES = 256 * 1024
_MAX_QUEUED_EVENTS = 4096
_MAX_QUEUED_BYTES = 4 * 1024 * 1024
_MAX_HELD_EVENTS = 256
_TICK_S = 1.0
_RETRY_S = 0.5


class Pages(Protocol):
    """One user's record."""

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a user's record, up to a cursor, and whether there was `more` when it was read.

    `truncated_to` is set when something is gone that was to come before: the record begins there now.
    """

    events: list[log.Recorded]
    through: int
    more: bool
    truncated_to: int


class Follower:
    """One user on one stream: what was queued, what was sent, and by whose leave."""

    def __init__(self, stream: Stream, topic: fanout.Topic, sent: int, *, behind: bool, run_id: str = "") -> None:
        self.stream, self.topic, self.run_id = stream, topic, run_id
        self.user_id = topic.user_id
        self.queued_to = self.sent_to = sent
        self.queued = 0
        self.behind = behind
        self.gone = False
        self.oldest = 1
        self.grants: dict[str, float] = {}
        self._held: list[log.Recorded] | None = None
        self._begun = False

    def grant(self, principal: identity.Principal) -> None:
        """A session of the user vouches for following."""
        self.grants[principal.session_id] = principal.expires_at + identity.LEEWAY_S

    def offer(self, events: Sequence[log.Recorded]) -> None:
        """The next live events. When the stream's queue is full, the follower goes on from the record."""
        if self.behind or self.run_id or events[0].cursor != self.queued_to + 1:
            for event in events:
                self._offer(event)
            return
        taken = self.stream.push(self, events)
        self.queued_to += taken
        if taken < len(events):
            self._fall_behind()

    def _offer(self, event: log.Recorded) -> None:
        if event.cursor <= self.queued_to:
            return
        if self.behind:
            self._hold(event)
        elif event.cursor == self.queued_to + 1 and (not self._wants(event) or self.stream.push(self, (event,))):
            self.queued_to = event.cursor
        else:
            self._fall_behind()

    def _fall_behind(self) -> None:
        # no room; or what is in between was dropped from the record, which the next page tells
        self.behind = True
        self.stream.fall_behind(self)

    def show(self, transient: log.Transient) -> None:
        """What is not recorded, for whoever has got all that is before it and nothing that is after it."""
        if self.run_id in ("", transient.run_id) and transient.cursor == self.queued_to and not self.behind:
            self.stream.show(self, transient)

    def _wants(self, event: log.Recorded) -> bool:
        return not self.run_id or event.run_id == self.run_id

    def _hold(self, event: log.Recorded) -> None:
        if self._held is not None:
            self._held.append(event)
            if len(self._held) > _MAX_HELD_EVENTS:
                self._held = None

    def reset(self) -> None:
        """The record was replaced: this stream must be opened anew."""
        self.stream.fail(errors.Unavailable("The record was replaced. Connect again."))

    async def from_record(self, pages: Pages) -> Piece:
        """The next page; when it reaches the live events, the follower is live again. Raises `Unavailable`."""
        self._held = []
        after = self.queued_to
        page = await pages.page(self.user_id, after, limit=MAX_BATCH_EVENTS, max_bytes=MAX_BATCH_BYTES, run_id=self.run_id)
        events = list(page.events)
        self.queued_to = max(self.queued_to, page.through)
        for event in self._held or ():
            if event.cursor == self.queued_to + 1:
                self.queued_to = event.cursor
                if self._wants(event):
                    events.append(event)
        self._held = None
        self.behind = self.queued_to < self.topic.last
        # at first, 0 is wherever the record begins
        truncated_to = page.position.oldest if after < page.position.oldest - 1 and (after or self._begun) else 0
        self._begun = True
        return Piece(events, self.queued_to, self.behind, truncated_to)


class Stream:
    """What one call sends: a bounded queue of live events, and followers that are fed from the record."""

    def __init__(self, live: fanout.Fanout, pages: Pages, tasks: lifecycle.Tasks) -> None:
        self._live, self._pages, self._tasks = live, pages, tasks
        self.followers: dict[str, Follower] = {}
        self._queue: deque[tuple[Follower, Sequence[log.Recorded] | log.Transient]] = deque()
        # how many are in it
        self._number = 0
        self._shown: list[log.Transient] = []
        self._bytes = 0
        self._behind: deque[Follower] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._read: tuple[Follower, Piece] | None = None
        self._truncated_to = 0
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._ended = False
        self._said: list[events_pb2.TailPosition] = []
        self._expire_at = 0.0

    def follow(self, topic: fanout.Topic, sent: int, *, behind: bool = False, run_id: str = "") -> Follower:
        """Send a user's events after `sent`; the topic is this stream's to release."""
        follower = Follower(self, topic, sent, behind=behind, run_id=run_id)
        self.followers[topic.user_id] = follower
        topic.listeners.add(follower)
        if behind:
            self.fall_behind(follower)
        return follower

    def leave(self, user_id: str) -> bool:
        """Send no more of a user, not even what is queued; whether the user was followed."""
        follower = self.followers.pop(user_id, None)
        if follower is None:
            return False
        follower.gone = True
        follower.topic.listeners.discard(follower)
        self._live.release(follower.topic)
        return True

    def push(self, follower: Follower, events: Sequence[log.Recorded]) -> int:
        """Queue live events; how many had room."""
        if self._number >= _MAX_QUEUED_EVENTS or self._bytes >= _MAX_QUEUED_BYTES:
            return 0
        taken, size = _fitting(events, _MAX_QUEUED_EVENTS - self._number, _MAX_QUEUED_BYTES - self._bytes)
        self._put(follower, taken, len(taken), size)
        return len(taken)

    def show(self, follower: Follower, transient: log.Transient) -> None:
        """Queue what is not recorded, in its place among the events; dropped when the queue is half full."""
        if self._number * 2 >= _MAX_QUEUED_EVENTS or self._bytes * 2 >= _MAX_QUEUED_BYTES:
            announce.missed("busy")
        else:
            self._put(follower, transient, 1, len(transient.frame))

    def _put(self, follower: Follower, told: Sequence[log.Recorded] | log.Transient, number: int, size: int) -> None:
        self._queue.append((follower, told))
        self._count(follower, number, size)
        self._wake.set()

    def _count(self, follower: Follower, number: int, size: int) -> None:
        self._number += number
        self._bytes += size
        follower.queued += number

    def fall_behind(self, follower: Follower) -> None:
        """Feed the follower from the record."""
        self._behind.append(follower)
        self._wake.set()

    def wake(self) -> None:
        """Look again whether anything is to be sent."""
        self._wake.set()

    def fail(self, reason: Exception) -> None:
        """End the stream with an error."""
        self._failure = self._failure or reason
        self._wake.set()

    def end(self) -> None:
        """End the stream well, after the batch at hand."""
        self._ended = True
        self._wake.set()

    def close(self) -> None:
        """Let go of everything."""
        for user_id in tuple(self.followers):
            self.leave(user_id)
        if self._reading is not None:
            self._reading.cancel()

    async def batches(self) -> AsyncIterator[list[log.Recorded]]:
        """Events to send, in order per user; an empty list at least every second, and when woken. Raises what it failed with."""
        while not self._ended:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            self._expire()
            # in this order: a follower that became live with its page has its live events in the queue
            events = self._from_record()
            events += self._queued()
            self._read_on()
            yield events
            if not events:
                await self._woken(_TICK_S)

    async def _woken(self, patience_s: float) -> None:
        try:
            async with asyncio.timeout(patience_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _queued(self) -> list[log.Recorded]:
        events: list[log.Recorded] = []
        shown_to: set[str] = set()
        size, self._shown = 0, []
        while self._queue and len(events) + len(self._shown) < MAX_BATCH_EVENTS and size < MAX_BATCH_BYTES:
            follower, told = self._queue.popleft()
            if isinstance(told, log.Transient):
                self._count(follower, -1, -len(told.frame))
                if not follower.gone:
                    size += len(told.frame)
                    self._shown.append(told)
                    shown_to.add(told.user_id)
            elif follower.gone:
                self._count(follower, -len(told), -_bytes(told))
            elif follower.user_id in shown_to:
                # they come after what is shown, so they go with the next batch
                self._queue.appendleft((follower, told))
                self._wake.set()
                break
            else:
                taken, length = _fitting(told, MAX_BATCH_EVENTS - len(events) - len(self._shown), MAX_BATCH_BYTES - size)
                if len(taken) < len(told):
                    self._queue.appendleft((follower, told[len(taken) :]))
                self._count(follower, -len(taken), -length)
                size += length
                follower.sent_to = taken[-1].cursor
                events += taken
        return events

    def _from_record(self) -> list[log.Recorded]:
        if self._read is None:
            return []
        (follower, piece), self._read = self._read, None
        if follower.gone:
            return []
        follower.sent_to = piece.through
        self._truncated_to = piece.truncated_to
        if piece.more:
            self._behind.append(follower)
            self._wake.set()
        return piece.events

    def _read_on(self) -> None:
        """Read one page of one follower, in turn, while this batch goes out; what a follower has queued goes out before."""
        if self._read is not None or (self._reading is not None and not self._reading.done()):
            return
        for _ in range(len(self._behind)):
            follower = self._behind.popleft()
            if follower.queued:
                self._behind.append(follower)
            elif not follower.gone:
                self._reading = self._tasks.spawn(self._read_page(follower), "feed-page")
                return

    async def _read_page(self, follower: Follower) -> None:
        try:
            self._read = follower, await follower.from_record(self._pages)
        except (errors.Unavailable, errors.DeadlineExceeded):
            await asyncio.sleep(_RETRY_S)
            self._behind.append(follower)
        except Exception as error:
            self.fail(error)
        # here, and not when the task is done: whoever is woken must be able to read on
        self._reading = None
        self._wake.set()

    def take_truncated(self) -> int:
        """Where the record begins now, when something was dropped that was to come in the batch at hand; once."""
        truncated_to, self._truncated_to = self._truncated_to, 0
        return truncated_to

    def take_shown(self) -> list[log.Transient]:
        """What is not recorded and comes after the events of the batch at hand, once."""
        shown, self._shown = self._shown, []
        return shown

    def say(self, position: events_pb2.TailPosition) -> None:
        """Send a word about a user before the next events."""
        self._said.append(position)
        self._wake.set()

    def take_said(self) -> list[events_pb2.TailPosition]:
        """What is to be said before the batch at hand, once."""
        said, self._said = self._said, []
        return said

    def dismiss(self, user_id: str, reason: str, join_id: str = "") -> None:
        """Leave a user, and say so: in answer to a join, or by itself."""
        self.leave(user_id)
        self.say(events_pb2.TailPosition(user_id=user_id, joined=False, reason=reason, join_id=join_id))

    def revoke(self, session_id: str, user_id: str) -> None:
        """Send nothing more on the word of a session that was ended, or of any session of a user."""
        for user, follower in tuple(self.followers.items()):
            vouched = bool(follower.grants)
            if user == user_id:
                follower.grants.clear()
            follower.grants.pop(session_id, None)
            if vouched and not follower.grants:
                self.dismiss(user, "The session has ended.")

    def _expire(self) -> None:
        now = time.time()
        if now < self._expire_at:
            return
        self._expire_at = now + _TICK_S
        for user, follower in tuple(self.followers.items()):
            if follower.grants and max(follower.grants.values()) <= now:
                self.dismiss(user, "The token has expired.")


def _bytes(events: Sequence[log.Recorded]) -> int:
    return sum([len(event.frame) for event in events])


def _fitting(events: Sequence[log.Recorded], most: int, room: int) -> tuple[Sequence[log.Recorded], int]:
    """The first of them, at most so many, until the room (in bytes) is used up; at least one. With how many bytes they have."""
    taken = events[:most]
    if (size := _bytes(taken)) <= room:
        return taken, size
    size = 0
    for at, event in enumerate(taken, 1):
        size += len(event.frame)
        if size >= room:
            return taken[:at], size
    return taken, size
