"""Follows threads: the events of all runs of one, by run and seq. They always come from the record; the live tail only says when."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from chassis import identity, telemetry
from netra import errors
from services.events import log

MAX_POSITIONS = 1_000
_PAGE_EVENTS = 256
_PAGE_BYTES = 256 * 1024
_HEADS = 200
# transactions at a time, of all who follow, and of all who ask for single pages
AT_ONCE = 2
PAGES_AT_ONCE = 2
_SILENCE_S = 10.0
_RETRY_S = 0.5
# so often, or a little oftener, it is looked for runs that were neither known nor heard of, and made so long before the newest
_WIDE_S = 10.0
_WIDE_MS = 60 * 60 * 1000
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
class Head:
    """How far the record of a run is."""

    run_id: str
    user_id: str
    retention: str
    opened_at: datetime
    last_at: datetime
    last: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """The events of a run after a seq; of its owner's record, what is before `oldest` is not shown any more."""

    head: Head
    after: int
    oldest: int


@dataclass(frozen=True, slots=True)
class Read:
    """What was found of what was wanted of a run, as far as there was room for it."""

    wanted: Wanted
    events: Sequence[log.Recorded]


@dataclass(frozen=True, slots=True)
class Part:
    """What a follower is told next. `truncated` are runs with the last seq that is gone; `ended` says why no more comes."""

    events: Sequence[log.Recorded] = ()
    truncated: Mapping[str, int] = field(default_factory=dict)
    ended: str = ""
    caught_up: bool = False


class Kept(Protocol):
    """The runs and events of threads."""

    async def named(self, reader: Reader, run_ids: Sequence[str]) -> Sequence[Head]: ...
    async def after(self, reader: Reader, run_id: str, many: int) -> Sequence[Head]: ...

    async def going_on(self, reader: Reader, run_ids: Sequence[str], since: str, after: str, many: int) -> Sequence[Head]:
        """Of these runs, those that have not ended, and those with ids after `since`, the first `many` with ids after `after`."""
        ...

    async def head(self, reader: Reader, run_id: str) -> Head: ...

    async def events(self, reader: Reader, wanted: Sequence[Wanted], limit: int, max_bytes: int) -> Sequence[Read]:
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


class Threads:
    """The threads that are followed on this replica."""

    def __init__(self, kept: Kept, cursors: Cursors) -> None:
        self._kept, self._cursors = kept, cursors
        self._ears: dict[str, set[_Ear]] = {}
        self._turns, self._page_turns = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(PAGES_AT_ONCE)
        self._closed = False

    def heard(self, thread_id: str, run_id: str) -> None:
        """Something of a run was recorded in a thread."""
        for ear in self._ears.get(thread_id, ()):
            if len(ear.runs) < _MOST_HEARD:
                ear.runs.add(run_id)
            else:
                ear.any = True
            ear.woken.set()

    def heard_any(self) -> None:
        """Something was recorded, perhaps, in any thread."""
        for ears in self._ears.values():
            for ear in ears:
                ear.any = True
                ear.woken.set()

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
            (wanted,) = await self._wanted([(head, after)])
            (read,) = await self._kept.events(reader, [wanted], limit, max_bytes)
        return read.events, read.events[-1].seq if read.events else head.last, head.last

    async def follow(self, reader: Reader, after_run_id: str, positions: Mapping[str, int]) -> AsyncIterator[Part]:
        """The thread's events: of runs up to `after_run_id` only those with a position; of each what is after its position.

        Raises `FailedPrecondition` for a position that the record has not reached, `Unauthenticated` when the access token ends.
        """
        sent, caught_up, told_at = _Sent(after_run_id, positions), False, time.monotonic()
        with self._ear(reader.thread_id) as ear:
            while not self._closed:
                ear.woken.clear()
                try:
                    async for part in self._recorded(reader, sent, ear):
                        caught_up, told_at = part.caught_up, time.monotonic()
                        yield part
                except (errors.Unavailable, errors.DeadlineExceeded):
                    # what was sent is known: it goes on from there
                    await asyncio.sleep(_RETRY_S)
                    ear.any = True
                if _over(reader):
                    yield Part(ended="token_ended")
                    return
                if not sent.settled or ear.any or ear.runs:
                    continue
                if not caught_up or time.monotonic() - told_at >= _SILENCE_S:
                    caught_up, told_at = True, time.monotonic()
                    yield Part(caught_up=True)
                now = time.monotonic()
                await _woken(ear.woken, min(told_at + _SILENCE_S - now, sent.wide_at - now, reader.granted_until - time.time()))

    @contextlib.contextmanager
    def _ear(self, thread_id: str) -> Iterator[_Ear]:
        ear = _Ear()
        self._ears.setdefault(thread_id, set()).add(ear)
        _following.add(1)
        try:
            yield ear
        finally:
            _following.add(-1)
            self._ears[thread_id].discard(ear)
            if not self._ears[thread_id]:
                del self._ears[thread_id]

    async def _recorded(self, reader: Reader, sent: _Sent, ear: _Ear) -> AsyncIterator[Part]:
        """What the next look finds that was not sent, in parts."""
        if not sent.due:
            sent.begin(ear)
            async with self._turns:
                heads = await self._look(reader, sent)
                due = await self._wanted(sent.behind(heads))
            sent.looked(heads, due)
        while sent.due and not _over(reader) and not self._closed:
            async with self._turns:
                read = await self._kept.events(reader, sent.due, _PAGE_EVENTS, _PAGE_BYTES)
            truncated = sent.take(read)
            events = [event for one in read for event in one.events]
            yield Part(events, truncated, caught_up=sent.settled and not sent.due)

    async def _look(self, reader: Reader, sent: _Sent) -> Sequence[Head]:
        if sent.named is not None:
            return await self._kept.named(reader, sent.named)
        if sent.round is not None:
            return await self._kept.going_on(reader, sent.round.run_ids, sent.round.since, sent.round.after, _HEADS)
        return await self._kept.after(reader, sent.scanned_to, _HEADS)

    async def _wanted(self, runs: Sequence[tuple[Head, int]]) -> list[Wanted]:
        if not runs:
            return []
        positions = await self._cursors.positions({head.user_id for head, _ in runs})
        return [Wanted(head, after, positions.get(head.user_id, log.Position()).oldest) for head, after in runs]


@dataclass(frozen=True, slots=True)
class _Round:
    """One look for what moved, in pages: at these runs, those that go on, and those with ids after `since`."""

    run_ids: Sequence[str]
    since: str
    after: str = ""


class _Sent:
    """What one follower has of a thread, and what is to be sent next.

    Nothing here goes by the time at which an event was recorded: that is before its commit, by how much nobody knows, and clocks step.
    """

    def __init__(self, after_run_id: str, positions: Mapping[str, int]) -> None:
        self._after = self._newest = after_run_id
        self._runs = dict(positions)
        self._going_on: set[str] = set()
        # runs that are looked for first, once; then those after `after_run_id`; then in rounds those that move
        self.named: Sequence[str] | None = list(positions)
        self.scanned_to = after_run_id
        self._scanned = False
        self.round: _Round | None = None
        self.wide_at = 0.0
        self.due: list[Wanted] = []

    @property
    def settled(self) -> bool:
        """Whether the last look found all there was."""
        return self._scanned and self.round is None

    def begin(self, ear: _Ear) -> None:
        """Begin a round, unless something else is to be looked at first. What is heard of meanwhile is for the next one."""
        if not self.settled:
            return
        since, heard = self._newest, ear.runs
        if ear.any or time.monotonic() >= self.wide_at:
            # not all at the same time
            self.wide_at = time.monotonic() + _WIDE_S * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            ear.any, since = False, _earlier(self._newest)
        ear.runs = set()
        self.round = _Round(sorted(self._going_on | heard), since)

    def behind(self, heads: Sequence[Head]) -> list[tuple[Head, int]]:
        """Runs with more than was sent. Raises `FailedPrecondition` for one with less."""
        found = []
        for head in heads:
            if head.run_id not in self._runs and head.run_id <= self._after:
                continue
            if (after := self._runs.get(head.run_id, 0)) > head.last:
                message = f"The record of run {head.run_id} ends with {head.last}; nothing can be after {after}."
                raise errors.FailedPrecondition(message, run_id=head.run_id, last_seq=head.last)
            if after < head.last:
                found.append((head, after))
            if after < head.last or not head.ended:
                self._going_on.add(head.run_id)
            else:
                self._going_on.discard(head.run_id)
        return found

    def looked(self, heads: Sequence[Head], due: list[Wanted]) -> None:
        """Note what a look has found; what is recorded while it looks is found by a later one."""
        self.due, last = due, heads[-1].run_id if heads else ""
        self._newest = max(self._newest, last)
        if self.named is not None:
            self.named = None
        elif self.round is not None:
            self.round = replace(self.round, after=last) if len(heads) == _HEADS else None
        else:
            self.scanned_to = last or self.scanned_to
            self._scanned = len(heads) < _HEADS

    def take(self, read: Sequence[Read]) -> dict[str, int]:
        """Note what is sent now; the runs of which something before it is gone, with the last seq that is."""
        truncated: dict[str, int] = {}
        left = []
        for one in read:
            head = one.wanted.head
            first, through = (one.events[0].seq, one.events[-1].seq) if one.events else (head.last + 1, head.last)
            if first > one.wanted.after + 1:
                truncated[head.run_id] = first - 1
            self._runs[head.run_id] = through
            if through < head.last:
                left.append(replace(one.wanted, after=through))
            elif head.ended:
                self._going_on.discard(head.run_id)
        self.due = left + self.due[len(read) :]
        return truncated


def _earlier(run_id: str) -> str:
    """An id like one that was made `_WIDE_MS` before (UUIDv7: the time in milliseconds comes first)."""
    made = max(int(run_id.replace("-", "")[:12] or "0", 16) - _WIDE_MS, 0)
    return f"{made >> 16:08x}-{made & 0xFFFF:04x}-0000-0000-000000000000"


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
