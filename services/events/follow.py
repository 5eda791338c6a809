"""Follows threads: the events of all runs of one, by run and seq. They always come from the record; the live tail only says when."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chassis import identity, telemetry
from netra import deadline, errors
from services.events import log, progress, together

MAX_POSITIONS = 1_000
_PAGE_EVENTS = 256
_PAGE_BYTES = 256 * 1024
# transactions at a time, of all who follow, and of all who ask for single pages
AT_ONCE = 2
PAGES_AT_ONCE = 2
_SILENCE_S = 10.0
_RETRY_S = 0.5
# so often, or a little oftener, it is looked for runs that were neither known nor heard of, and made so long before the newest
_WIDE_S = 10.0
_MOST_HEARD = 1_000
_following = telemetry.meter.create_up_down_counter("netra.events.followers", description="Streams that follow a thread.")


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads which thread, and until when the grant token and the access token let them."""

    user_id: str
    thread_id: str
    granted_until: float
    signed_in_until: float

    @classmethod
    def of(cls, principal: identity.Principal, grant: identity.Grant) -> Reader:
        """A user with a grant of theirs. Raises `PermissionDenied` when it does not let them read."""
        if not grant.allows("read"):
            raise errors.PermissionDenied("The grant token does not let you read.")
        return cls(
            principal.user_id, grant.resource, grant.expires_at + identity.LEEWAY_S, principal.expires_at + identity.LEEWAY_S
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """What a follower is told next. `truncated` are runs with the last seq that is gone; `ended` says why no more comes."""

    events: Sequence[log.Recorded] = ()
    truncated: Mapping[str, int] = field(default_factory=dict)
    ended: str = ""
    caught_up: bool = False


class Kept(Protocol):
    """The runs and events of threads. What is found is the same whoever reads."""

    async def named(self, reader: Reader, run_ids: Sequence[str]) -> Sequence[progress.Head]: ...
    async def after(self, reader: Reader, run_id: str, many: int) -> Sequence[progress.Head]: ...

    async def going_on(self, reader: Reader, run_ids: Sequence[str], since: str, after: str, many: int) -> Sequence[progress.Head]:
        """Of these runs, those that have not ended, and those with ids after `since`, the first `many` with ids after `after`."""
        ...

    async def head(self, reader: Reader, run_id: str) -> progress.Head: ...

    async def events(self, reader: Reader, wanted: Sequence[progress.Wanted], limit: int, max_bytes: int) -> Sequence[progress.Read]:
        """The next events of runs, one run after the other, as far as there is room; at least one, however big, if there is one."""
        ...


class Cursors(Protocol):
    """How far the records of many users reach."""

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]: ...


class _Ear:
    """What one follower hears of: runs, or that perhaps anything was recorded."""

    __slots__ = ("any", "runs", "woken")

    def __init__(self) -> None:
        self.woken, self.runs, self.any = asyncio.Event(), set[str](), True

    @property
    def heard(self) -> bool:
        """Whether there is something to look for."""
        return self.any or bool(self.runs)

    def taken(self) -> tuple[set[str], bool]:
        """What was heard of, and whether it may be anything; what comes from now on is for the next time."""
        runs, wide, self.runs, self.any = self.runs, self.any, set(), False
        return runs, wide


class _Thread:
    """A thread that is followed here, by whom, and what they ask together: it costs one look, however many they are."""

    __slots__ = ("ears", "together", "wide_at")

    def __init__(self) -> None:
        self.ears: set[_Ear] = set()
        self.together = together.Together()
        self.wide_at = _wide_at()

    def heard(self, run_id: str) -> None:
        for ear in self.ears:
            if len(ear.runs) < _MOST_HEARD:
                ear.runs.add(run_id)
            else:
                ear.any = True
            ear.woken.set()

    def heard_any(self) -> None:
        for ear in self.ears:
            ear.any = True
            ear.woken.set()

    def tick(self) -> None:
        """Have all look for what nobody heard of, when it is time for that."""
        if time.monotonic() >= self.wide_at:
            self.wide_at = _wide_at()
            self.heard_any()


class Threads:
    """The threads that are followed on this replica, by so many streams of one user at most."""

    def __init__(self, kept: Kept, cursors: Cursors, per_user: int = 64) -> None:
        self._kept, self._cursors, self._per_user = kept, cursors, per_user
        self._followed: dict[str, _Thread] = {}
        self._followers = Counter[str]()
        self._turns, self._page_turns = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(PAGES_AT_ONCE)
        self._closed = False

    @property
    def followed(self) -> bool:
        """Whether anybody follows any."""
        return bool(self._followed)

    def heard(self, thread_id: str, run_id: str) -> None:
        """Something of a run was recorded in a thread."""
        if (thread := self._followed.get(thread_id)) is not None:
            thread.heard(run_id)

    def heard_any(self) -> None:
        """Something was recorded, perhaps, in any thread."""
        for thread in self._followed.values():
            thread.heard_any()

    def close(self) -> None:
        """End all streams; what they did not send lies in the record."""
        self._closed = True
        self.heard_any()

    async def page(self, reader: Reader, run_id: str, after: int, limit: int, max_bytes: int) -> tuple[Sequence[log.Recorded], int, int]:
        """Events of one run of the thread; up to which seq nothing is missing, and its last seq. Raises `NotFound`."""
        async with self._page_turns:
            head = await self._kept.head(reader, run_id)
            if head.last <= after:
                return (), after, head.last
            (wanted,) = _wanted([(head, after)], await self._cursors.positions([head.user_id]))
            (read,) = await self._kept.events(reader, [wanted], limit, max_bytes)
        return read.events, read.events[-1].seq if read.events else head.last, head.last

    async def follow(self, reader: Reader, after_run_id: str, positions: Mapping[str, int]) -> AsyncIterator[Part]:
        """The thread's events: of runs up to `after_run_id` only those with a position; of each what is after its position.

        Raises `FailedPrecondition` for a position that the record has not reached, `Unauthenticated` when the access token ends,
        `QuotaExceeded` when the user follows too much here.
        """
        # what one asks for all is not to end with the call of that one
        deadline.bind(None)
        sent, caught_up, told_at = progress.Sent(after_run_id, positions), False, time.monotonic()
        with self._following(reader) as (thread, ear):
            while not self._closed:
                thread.tick()
                ear.woken.clear()
                try:
                    async for part in self._recorded(reader, sent, thread, ear):
                        caught_up, told_at = part.caught_up, time.monotonic()
                        yield part
                except (errors.Unavailable, errors.DeadlineExceeded):
                    # what was sent is known: it goes on from there
                    await asyncio.sleep(_RETRY_S)
                    ear.any = True
                if _over(reader):
                    yield Part(ended="token_ended")
                    return
                if not sent.settled or ear.heard:
                    continue
                if not caught_up or time.monotonic() - told_at >= _SILENCE_S:
                    caught_up, told_at = True, time.monotonic()
                    yield Part(caught_up=True)
                now = time.monotonic()
                await _woken(ear.woken, min(told_at + _SILENCE_S - now, thread.wide_at - now, reader.granted_until - time.time()))

    @contextlib.contextmanager
    def _following(self, reader: Reader) -> Iterator[tuple[_Thread, _Ear]]:
        if self._followers[reader.user_id] >= self._per_user:
            message = f"You follow threads with {self._per_user} streams here, and may have no more. End one of them first."
            raise errors.QuotaExceeded(message, limit=self._per_user)
        thread, ear = self._followed.setdefault(reader.thread_id, _Thread()), _Ear()
        thread.ears.add(ear)
        self._followers[reader.user_id] += 1
        _following.add(1)
        try:
            yield thread, ear
        finally:
            _following.add(-1)
            self._followers[reader.user_id] -= 1
            if not self._followers[reader.user_id]:
                del self._followers[reader.user_id]
            thread.ears.discard(ear)
            if not thread.ears:
                del self._followed[reader.thread_id]

    async def _recorded(self, reader: Reader, sent: progress.Sent, thread: _Thread, ear: _Ear) -> AsyncIterator[Part]:
        """What the next look finds that was not sent, in parts; nothing, when there is nothing to look for."""
        if not sent.due:
            if sent.settled:
                if not ear.heard:
                    return
                runs, wide = ear.taken()
                sent.begin(runs, wide=wide)
            heads = await self._look(reader, sent, thread)
            behind = sent.behind(heads)
            sent.looked(heads, _wanted(behind, await self._positions(thread, behind)))
        while sent.due and not _over(reader) and not self._closed:
            read = await self._read(reader, thread, tuple(sent.due))
            truncated = sent.take(read)
            events = [event for one in read for event in one.events]
            yield Part(events, truncated, caught_up=sent.settled and not sent.due)

    async def _look(self, reader: Reader, sent: progress.Sent, thread: _Thread) -> Sequence[progress.Head]:
        if (named := sent.named) is not None:
            async with self._turns:
                return await self._kept.named(reader, named)
        if (wanted := sent.round) is None:
            return await self._after(reader, thread, sent.scanned_to)

        async def look(rounds: Sequence[progress.Round]) -> Sequence[progress.Head]:
            page = progress.joined(rounds)
            async with self._turns:
                return await self._kept.going_on(reader, page.run_ids, page.since, page.after, progress.HEADS)

        return await thread.together.ask(("round", wanted.after), wanted, look)

    async def _after(self, reader: Reader, thread: _Thread, run_id: str) -> Sequence[progress.Head]:
        async def look(_: Sequence[str]) -> Sequence[progress.Head]:
            async with self._turns:
                return await self._kept.after(reader, run_id, progress.HEADS)

        return await thread.together.ask(("after", run_id), run_id, look)

    async def _positions(self, thread: _Thread, behind: Sequence[tuple[progress.Head, int]]) -> Mapping[str, log.Position]:
        async def look(users: Sequence[frozenset[str]]) -> Mapping[str, log.Position]:
            async with self._turns:
                return await self._cursors.positions(frozenset().union(*users))

        if not behind:
            return {}
        return await thread.together.ask("positions", frozenset(head.user_id for head, _ in behind), look)

    async def _read(self, reader: Reader, thread: _Thread, due: tuple[progress.Wanted, ...]) -> Sequence[progress.Read]:
        async def look(_: Sequence[object]) -> Sequence[progress.Read]:
            async with self._turns:
                return await self._kept.events(reader, due, _PAGE_EVENTS, _PAGE_BYTES)

        return await thread.together.ask(due, None, look)


def _wanted(runs: Sequence[tuple[progress.Head, int]], positions: Mapping[str, log.Position]) -> list[progress.Wanted]:
    return [progress.Wanted(head, after, positions.get(head.user_id, log.Position()).oldest) for head, after in runs]


def _wide_at() -> float:
    # not in all threads at the same time
    return time.monotonic() + _WIDE_S * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def _over(reader: Reader) -> bool:
    """Whether the grant token has ended. Raises `Unauthenticated` when the access token has."""
    now = time.time()
    if now >= reader.signed_in_until:
        raise errors.Unauthenticated("The token has expired.")
    return now >= reader.granted_until


async def _woken(ear: asyncio.Event, patience_s: float) -> None:
    try:
        async with asyncio.timeout(max(patience_s, 0.0)):
            await ear.wait()
    except TimeoutError:
        pass
