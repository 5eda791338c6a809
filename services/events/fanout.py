"""One Valkey reader per process, many listeners: each served user's events, contiguous; what is missing comes from the record."""

from __future__ import annotations

import asyncio
import itertools
import operator
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from chassis import lifecycle, telemetry
from chassis import log as log_
from netra import errors
from services.events import announce, log

_log = log_.get(__name__)
_BLOCK_MS = 500
# a reader that has not returned for so long stands still, whatever its connection says
_STILL_S = 2.0
# what a comparison finds missing may be on its way: it is given this long before the record is read
_SETTLE_S = 0.05
_RETRY_S = 0.5
_PAGE_EVENTS = 500
_PAGE_BYTES = 1024 * 1024
# pages that are read at a time because live readers have missed something
CATCH_UPS = 4
# transients of one user that wait until the events before them come from the record
_MAX_WAITING = 32
_gaps = telemetry.meter.create_counter("netra.events.gaps", description="Gaps of the live tail filled from the record.")
_degraded = telemetry.meter.create_gauge("netra.events.degraded", description="1 while the live tail polls the record.")


class Live(Protocol):
    """Valkey's streams."""

    async def ends(self, streams: Sequence[str]) -> dict[str, str]: ...
    async def generation(self) -> str: ...
    async def read(self, positions: Mapping[str, str], *, block_ms: int) -> list[tuple[str, str, dict[bytes, bytes]]]: ...


class Pages(Protocol):
    """One user's record."""

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int) -> log.Page: ...


class Cursors(Protocol):
    """How far the records of many users reach."""

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]: ...
    async def generation(self) -> str: ...


class Listener(Protocol):
    """Wants the events of one user."""

    def offer(self, events: Sequence[log.Recorded]) -> None:
        """Must not wait. Events come in order, without a hole."""
        ...

    def show(self, transient: log.Transient) -> None:
        """Must not wait. It comes after the events up to its cursor, and before those after it."""
        ...

    def reset(self) -> None:
        """The record was replaced by a backup: nothing of what was said holds."""
        ...


class Threads(Protocol):
    """Wants to know in which threads something is recorded."""

    @property
    def followed(self) -> bool:
        """Whether anybody follows any."""
        ...

    def heard(self, thread_id: str, run_id: str) -> None:
        """Must not wait. Something of a run was recorded in a thread."""
        ...

    def heard_any(self) -> None:
        """Must not wait. Something was recorded, perhaps, in any thread: announcements may have been missed."""
        ...


class Topic:
    """One served user: how far this process has delivered, and to whom."""

    __slots__ = ("_waiting", "catching_up", "last", "listeners", "pins", "target", "user_id")

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.pins = 0
        self.last = -1  # not known yet
        self.target = 0
        self.listeners: set[Listener] = set()
        self.catching_up = False
        self._waiting: list[log.Transient] = []

    @property
    def behind(self) -> bool:
        """Whether the record is known to hold more than was delivered."""
        return -1 < self.last < self.target

    def offer(self, events: Sequence[log.Recorded]) -> None:
        """Deliver the next events; drop old ones; remember that later ones exist."""
        # what waits to be shown has its place behind one of them
        if self._is_next(events) and (len(events) == 1 or not self._waiting):
            self.last = events[-1].cursor
            for listener in tuple(self.listeners):
                listener.offer(events)
            if self._waiting:
                self._show_waiting()
        elif len(events) > 1:
            for event in events:
                self.offer((event,))
        elif events[0].cursor > self.last:
            self.target = max(self.target, events[0].cursor)

    def _is_next(self, events: Sequence[log.Recorded]) -> bool:
        # without a hole, and all of them here
        following = self.last
        for event in events:
            following += 1
            if event.cursor != following or not event.frame:
                return False
        return self.last >= 0

    def show(self, transient: log.Transient) -> None:
        """Show it in its place, when that is here or still to come; what comes later contains its sum."""
        if transient.cursor == self.last:
            for listener in tuple(self.listeners):
                listener.show(transient)
        elif 0 <= self.last < transient.cursor and len(self._waiting) < _MAX_WAITING:
            self.target = max(self.target, transient.cursor)
            self._waiting.append(transient)
        else:
            announce.missed("late")

    def _show_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transient in waiting:
            self.show(transient)


class Fanout:
    """The live tail of this process."""

    def __init__(
        self, live: Live, pages: Pages, cursors: Cursors, tasks: lifecycle.Tasks, compare_s: float, poll_s: float,
        threads: Threads | None = None,
    ) -> None:  # fmt: skip
        self._live, self._pages, self._cursors, self._tasks, self._threads = live, pages, cursors, tasks, threads
        self._compare_s, self._poll_s = compare_s, poll_s
        self._topics: dict[str, Topic] = {}
        self._heard_at = 0.0
        self._hurry = asyncio.Event()
        self._catch_ups = asyncio.Semaphore(CATCH_UPS)
        self.generation = ""

    @property
    def degraded(self) -> bool:
        """Whether Valkey is not heard, so that the record is polled."""
        return time.monotonic() - self._heard_at > _STILL_S

    async def join(self, users: Sequence[str]) -> dict[str, tuple[Topic, log.Position]]:
        """Begin to serve users. Each topic is pinned until `release`. Raises `Unavailable`."""
        topics = {user: self._pinned(user) for user in users}
        try:
            await self.known_generation()
            positions = await self._cursors.positions(topics)
            if any(self._topics.get(user) is not topic for user, topic in topics.items()):
                # nothing would ever come for these
                raise errors.Unavailable("The record was replaced. Connect again.")
        except BaseException:
            for topic in topics.values():
                self.release(topic)
            raise
        joined = {user: (topic, positions.get(user, log.Position())) for user, topic in topics.items()}
        for topic, position in joined.values():
            self._settle(topic, position.last)
        return joined

    async def known_generation(self) -> str:
        """The generation of the record. Raises `Unavailable`."""
        if not self.generation:
            self.generation = await self._cursors.generation()
        return self.generation

    def _pinned(self, user_id: str) -> Topic:
        topic = self._topics.setdefault(user_id, Topic(user_id))
        topic.pins += 1
        return topic

    def release(self, topic: Topic) -> None:
        """Undo one `join`."""
        topic.pins -= 1
        if topic.pins == 0 and self._topics.get(topic.user_id) is topic:
            del self._topics[topic.user_id]

    def _settle(self, topic: Topic, last: int) -> None:
        if topic.last < 0:
            topic.last = last
        topic.target = max(topic.target, last)
        self._catch_up(topic)

    def _catch_up(self, topic: Topic) -> None:
        if topic.behind and not topic.catching_up:
            topic.catching_up = True
            self._tasks.spawn(self._from_record(topic), "fanout-catch-up")

    async def _from_record(self, topic: Topic) -> None:
        _gaps.add(1)
        try:
            while topic.behind and topic.pins:
                wanted = topic.target
                try:
                    async with self._catch_ups:
                        page = await self._pages.page(topic.user_id, topic.last, limit=_PAGE_EVENTS, max_bytes=_PAGE_BYTES)
                except (errors.Unavailable, errors.DeadlineExceeded):
                    await asyncio.sleep(_RETRY_S)
                    continue
                self._deliver(topic, page, wanted)
        finally:
            topic.catching_up = False

    def _deliver(self, topic: Topic, page: log.Page, wanted: int) -> None:
        for event in page.events:
            if event.cursor > topic.last + 1:
                topic.last = event.cursor - 1  # older than retention: nobody can have it
            topic.offer((event,))
        topic.last = max(topic.last, page.through)
        if page.position.last < wanted == topic.target:
            topic.target = page.position.last  # announced, but not in the record: it was replaced by a backup

    async def run(self) -> None:
        """Read Valkey, for ever, through every outage and wipe of it."""
        while True:
            try:
                await self._follow()
            except errors.Unavailable:
                self._heard_at = 0.0
                self._hurry.set()
                await asyncio.sleep(self._poll_s)

    async def _follow(self) -> None:
        generation = await self._live.generation()
        positions = await self._live.ends(announce.PARTITIONS)
        # whatever was committed before these positions is found by comparing
        self._hurry.set()
        checked_at = time.monotonic()
        while True:
            entries = await self._live.read(positions, block_ms=_BLOCK_MS)
            self._heard_at = time.monotonic()
            for stream, identifier, fields in entries:
                positions[stream] = identifier
                self._dispatch(fields)
            if self._heard_at - checked_at > _BLOCK_MS / 1000:
                checked_at = self._heard_at
                if await self._live.generation() != generation:
                    _log.warning("Valkey has lost its data; comparing with the record")
                    return

    def _dispatch(self, fields: Mapping[bytes, bytes]) -> None:
        events, transients = announce.decoded(fields)
        if self._threads is not None and self._threads.followed:
            # each run once, as many follow it
            for thread_id, run_id in dict.fromkeys((event.thread_id, event.run_id) for event in events):
                if run_id:
                    self._threads.heard(thread_id, run_id)
        for user_id, group in itertools.groupby(events, key=operator.attrgetter("user_id")):
            if (topic := self._topics.get(user_id)) is not None:
                topic.offer(list(group))
                self._catch_up(topic)
        for transient in transients:
            if (topic := self._topics.get(transient.user_id)) is not None:
                topic.show(transient)
                self._catch_up(topic)

    async def watch(self, tell: Callable[[bool], Awaitable[None]]) -> None:
        """Compare the served users with the record every 2 s, and oftener while Valkey is not heard; for ever.

        `tell` learns at first, and whenever it changes, whether Valkey is heard.
        """
        told: bool | None = None
        while True:
            degraded = self.degraded
            if degraded is not told:
                await tell(not degraded)
                _degraded.set(int(degraded))
                if told is not None:
                    (_log.warning if degraded else _log.info)("the live tail", degraded=degraded)
                told = degraded
            try:
                async with asyncio.timeout(self._poll_s if degraded else self._compare_s):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            if self._threads is not None and (degraded or self._hurry.is_set()):
                self._threads.heard_any()
            self._hurry.clear()
            try:
                await self._compare()
            except (errors.Unavailable, errors.DeadlineExceeded):
                _log.warning("the record could not be compared")

    async def _compare(self) -> None:
        if (generation := await self._cursors.generation()) != self.generation:
            self._replaced(generation)
        if not self._topics:
            return
        positions = await self._cursors.positions(list(self._topics))
        if not self.degraded:
            await asyncio.sleep(_SETTLE_S)
        for user, position in positions.items():
            if (topic := self._topics.get(user)) is not None and topic.last >= 0:
                topic.target = max(topic.target, position.last)
                self._catch_up(topic)

    def _replaced(self, generation: str) -> None:
        known, self.generation = self.generation, generation
        if not known:
            return
        _log.warning("the record has another generation; all readers start again")
        served, self._topics = self._topics, {}
        for topic in served.values():
            for listener in tuple(topic.listeners):
                listener.reset()
