"""Following a thread: whatever is recorded meanwhile, in whatever order runs begin, and however often the record is away."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from chassis import lifecycle
from netra import errors, ids
from services.events import announce, fanout, follow, log, progress

_OWNER = ids.uuid7()
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_READER = follow.Reader(_OWNER, ids.uuid7(), 2.0**40, 2.0**40)


def _made(hours: int) -> str:
    """A run id that was made so many hours before now."""
    fresh = ids.uuid7()
    made = int(fresh.replace("-", "")[:12], 16) - hours * 60 * 60 * 1000
    return f"{made >> 16:08x}-{made & 0xFFFF:04x}{fresh[13:]}"


class _Record:
    """The runs of one thread. Its clock steps, what was stamped is committed any time later, and now and then the record is away."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.runs: dict[str, int] = {}
        self.last_at: dict[str, datetime] = {}
        self.ended: set[str] = set()
        self.gone: dict[str, int] = {}
        self.late: dict[str, tuple[datetime, bool]] = {}
        self.now = _BEGAN
        self.away = 0.0
        self.asked = Counter[str]()

    def grow(self, run_id: str, *, end: bool = False, late: bool = False) -> None:
        """One event more; a late one is stamped now, and nobody sees it before it is committed."""
        self.now += timedelta(seconds=self._random.choice((0, 1, 40)))
        self.late[run_id] = (self.now, end)
        if not late:
            self.commit(run_id)

    def commit(self, run_id: str) -> None:
        """Let everybody see what was stamped."""
        self.last_at[run_id], end = self.late.pop(run_id)
        self.runs[run_id] = self.runs.get(run_id, 0) + 1
        if end:
            self.ended.add(run_id)

    async def _breathe(self, asked: str) -> None:
        self.asked[asked] += 1
        await asyncio.sleep(0)
        if self._random.random() < self.away:
            raise errors.Unavailable

    def _heads(self, run_ids: Iterable[str]) -> list[progress.Head]:
        return [
            progress.Head(run_id, _OWNER, "free", _BEGAN, self.last_at[run_id], self.runs[run_id], run_id in self.ended)
            for run_id in sorted(run_ids)
        ]

    async def named(self, reader: follow.Reader, run_ids: Sequence[str]) -> Sequence[progress.Head]:
        await self._breathe("named")
        return self._heads(run_id for run_id in run_ids if run_id in self.runs)

    async def after(self, reader: follow.Reader, run_id: str, many: int) -> Sequence[progress.Head]:
        await self._breathe("after")
        return self._heads(sorted(one for one in self.runs if one > run_id)[:many])

    async def going_on(self, reader: follow.Reader, run_ids: Sequence[str], since: str, after: str, many: int) -> Sequence[progress.Head]:
        await self._breathe("going_on")
        found = (one for one in self.runs if one > after and (one in run_ids or one > since or one not in self.ended))
        return self._heads(sorted(found)[:many])

    async def head(self, reader: follow.Reader, run_id: str) -> progress.Head:
        return self._heads([run_id])[0]

    async def events(self, reader: follow.Reader, wanted: Sequence[progress.Wanted], limit: int, max_bytes: int) -> list[progress.Read]:
        await self._breathe("events")
        found = []
        for one in wanted:
            first = max(one.after, self.gone.get(one.head.run_id, 0)) + 1
            seqs = range(first, min(one.head.last, first + limit - 1) + 1)
            found.append(
                progress.Read(one, [log.Recorded(_OWNER, 0, one.head.run_id, seq, "", "x", b"{}") for seq in seqs])
            )  # fmt: skip
            limit -= len(seqs)
            if limit <= 0:
                break
        return found

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]:
        await self._breathe("positions")
        return {user: log.Position() for user in users}


class _Seen:
    """What a follower has: of each run contiguous, from where the record said."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}

    def take(self, part: follow.Part) -> None:
        for run_id, seq in part.truncated.items():
            assert seq > self.runs.get(run_id, 0)
            self.runs[run_id] = seq
        for event in part.events:
            assert event.seq == self.runs.get(event.run_id, 0) + 1
            self.runs[event.run_id] = event.seq


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_RETRY_S", 0.0)
    monkeypatch.setattr(progress, "HEADS", 3)
    monkeypatch.setattr(follow, "_PAGE_EVENTS", 4)


class _Follower:
    """One of several who follow the thread: with a pace of their own, thrown off now and then, also while they wait."""

    def __init__(self, seed: int, record: _Record, threads: follow.Threads, names: Sequence[str]) -> None:
        self._chance, self._record, self._threads, self._names = random.Random(seed), record, threads, sorted(names)
        self.seen = _Seen()
        self._stream = threads.follow(_READER, "", {})

    async def read(self, writing: asyncio.Task[None]) -> None:
        """Everything, until nothing more is written."""
        while not (writing.done() and self.seen.runs == self._record.runs):
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(self._part())
                if self._chance.random() < 0.05:
                    for _ in range(self._chance.randrange(6)):
                        await asyncio.sleep(0)
                    asked.cancel()
            if asked.cancelled():
                self._again()
                continue
            self.seen.take(asked.result())
            if self._chance.random() < 0.05:
                await self._stream.aclose()  # type: ignore[attr-defined]
                self._again()
            for _ in range(self._chance.choice((0, 0, 1, 9))):
                await asyncio.sleep(0)
        await self._stream.aclose()  # type: ignore[attr-defined]

    async def _part(self) -> follow.Part:
        return await anext(self._stream)

    def _again(self) -> None:
        # of runs up to `after` only those are told that go on
        seen, after = self.seen.runs, _after(self._names, self.seen.runs)
        positions = {run_id: seq for run_id, seq in seen.items() if run_id > after or run_id not in self._record.ended}
        positions |= {run_id: seq for run_id, seq in seen.items() if seq < self._record.runs[run_id]}
        self._stream = self._threads.follow(_READER, after, positions)


@pytest.mark.parametrize("seed", range(30))
async def test_every_event_comes_to_each_once_and_in_order_through_everything(seed: int) -> None:
    chance, record = random.Random(seed), _Record(seed)
    names = [_made(hours) for hours in (0, 0, 3, 9) for _ in range(3)]
    for _ in range(chance.randrange(40)):
        record.grow(chance.choice(names[:6]))
    threads = follow.Threads(record, record)
    record.away = 0.2
    followers = [_Follower(seed * 10 + number, record, threads, names) for number in range(1 + seed % 4)]

    def announced(run_id: str) -> None:
        if chance.random() < 0.9:  # an announcement can be lost
            threads.heard(_READER.thread_id, run_id)

    async def write() -> None:
        for _ in range(150):
            run_id = chance.choice(names)
            if run_id not in record.ended and run_id not in record.late:
                record.grow(run_id, end=chance.random() < 0.03, late=chance.random() < 0.3)
                if run_id not in record.late:
                    announced(run_id)
            if record.late and chance.random() < 0.2:
                record.commit(run_id := chance.choice(list(record.late)))
                announced(run_id)
            if chance.random() < 0.02:
                record.now += timedelta(hours=chance.choice((-5, 5)))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        for run_id in list(record.late):
            record.commit(run_id)
        record.away = 0.0
        threads.heard_any()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        for follower in followers:
            group.create_task(follower.read(writing))
    assert [follower.seen.runs for follower in followers] == [record.runs] * len(followers)
    assert (threads._followed, threads._followers) == ({}, {})


def _after(names: Sequence[str], seen: Mapping[str, int]) -> str:
    """The last run before which none is still to begin."""
    after = ""
    for run_id in names:
        if run_id not in seen:
            break
        after = run_id
    return after


async def _until_caught_up(stream: AsyncIterator[follow.Part], seen: _Seen) -> None:
    while True:
        part = await anext(stream)
        seen.take(part)
        if part.caught_up:
            return


@pytest.mark.parametrize("heard", [True, False])
async def test_what_is_committed_long_after_it_was_stamped_is_not_lost(heard: bool) -> None:
    record = _Record(0)
    run_id, other = ids.uuid7(), ids.uuid7()
    record.grow(run_id)
    threads, seen = follow.Threads(record, record), _Seen()
    stream = threads.follow(_READER, "", {})
    await _until_caught_up(stream, seen)
    record.grow(run_id, end=True, late=True)
    for _ in range(5):
        record.now += timedelta(minutes=20)
        record.grow(other)
        threads.heard(_READER.thread_id, other)
        await _until_caught_up(stream, seen)
    record.commit(run_id)
    # of the other one is told, too, or of this one alone: either way it is looked for
    record.grow(other)
    threads.heard(_READER.thread_id, run_id if heard else other)
    await _until_caught_up(stream, seen)
    assert seen.runs == record.runs


async def test_a_run_made_long_ago_that_is_heard_of_once_is_found_though_it_has_ended() -> None:
    record = _Record(0)
    old, new = _made(9), _made(0)
    record.grow(new)
    threads, seen = follow.Threads(record, record), _Seen()
    stream = threads.follow(_READER, "", {})
    await _until_caught_up(stream, seen)
    record.grow(old, end=True, late=True)
    record.now += timedelta(hours=1)
    record.commit(old)
    threads.heard(_READER.thread_id, old)
    await _until_caught_up(stream, seen)
    assert seen.runs == record.runs


@pytest.mark.parametrize("hours", [-5, 5])
async def test_a_clock_that_steps_hides_nothing(hours: int) -> None:
    record = _Record(0)
    runs = [_made(9), _made(0)]
    record.grow(runs[0])
    threads, seen = follow.Threads(record, record), _Seen()
    stream = threads.follow(_READER, "", {})
    await _until_caught_up(stream, seen)
    record.now += timedelta(hours=hours)
    for run_id in runs:
        record.grow(run_id)
    record.now += timedelta(hours=1)
    threads.heard_any()
    await _until_caught_up(stream, seen)
    assert seen.runs == record.runs


async def test_what_was_not_heard_of_is_looked_for_all_the_same_by_and_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_WIDE_S", 0.05)
    record = _Record(0)
    threads, seen = follow.Threads(record, record), _Seen()
    stream = threads.follow(_READER, "", {})
    await _until_caught_up(stream, seen)
    for run_id in (_made(9), _made(0)):
        record.grow(run_id)
    async with asyncio.timeout(10):
        await _until_caught_up(stream, seen)
    assert seen.runs == record.runs


async def test_what_ended_and_was_sent_is_never_sent_again() -> None:
    record = _Record(0)
    old, new = ids.uuid7(), ids.uuid7()
    for number in range(3):
        record.grow(old, end=number == 2)
    threads, seen = follow.Threads(record, record), _Seen()
    stream = threads.follow(_READER, "", {})
    seen.take(await anext(stream))
    for _ in range(20):
        record.now += timedelta(minutes=20)
        record.grow(new)
        threads.heard_any()
        while seen.runs.get(new) != record.runs[new]:
            seen.take(await anext(stream))
    assert seen.runs == record.runs


async def _until(stream: AsyncIterator[follow.Part], seen: _Seen, record: _Record) -> None:
    """Everything there is, and there is more."""
    seen.take(await anext(stream))
    while seen.runs != record.runs:
        seen.take(await anext(stream))


@pytest.mark.parametrize("passes", [0, 3])
async def test_what_several_follow_costs_what_it_costs_for_one(passes: int) -> None:
    record, (first, second) = _Record(0), sorted(ids.uuid7() for _ in range(2))
    record.grow(first)
    threads, seen = follow.Threads(record, record), [_Seen() for _ in range(20)]
    streams = [threads.follow(replace(_READER, user_id=ids.uuid7()), "", {}) for _ in seen]

    async def recorded(run_id: str) -> None:
        # those who read may wait already, or not yet
        for _ in range(passes):
            await asyncio.sleep(0)
        record.grow(run_id)
        threads.heard(_READER.thread_id, run_id)

    before = Counter[str]()
    for number, run_id in enumerate((first, first, first, second, second)):
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(recorded(run_id))
            for stream, one in zip(streams, seen, strict=True):
                group.create_task(_until(stream, one, record))
        if number == 1:
            # at first each looks of itself, too: something may have been missed while it read what there was
            before = record.asked.copy()
    assert record.asked - before == {"going_on": 3, "positions": 3, "events": 3}


async def test_a_look_for_several_finds_what_each_of_them_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_WIDE_S", 3600.0)
    record, old, new = _Record(0), _made(9), _made(0)
    for run_id in (old, new):
        record.grow(run_id)
    threads, seen = follow.Threads(record, record), _Seen()
    # one has not seen the old run and does not want it, the other knows that it goes on
    one, other = threads.follow(_READER, new, {}), threads.follow(_READER, "", {})
    for stream in (one, other):
        await _until_caught_up(stream, seen)
    record.grow(old, end=True)
    threads.heard_any()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        looking = group.create_task(_until_caught_up(one, _Seen()))
        await group.create_task(_until(other, seen, record))
        looking.cancel()
    rounds = [progress.Round(["b"], "5", "p"), progress.Round(["a", "b"], "3", "p"), progress.Round([], "4", "p")]
    assert progress.joined(rounds) == progress.Round(["a", "b"], "3", "p")


async def test_a_user_follows_so_much_at_a_time_and_no_more() -> None:
    record, threads_of = _Record(0), [replace(_READER, thread_id=ids.uuid7()) for _ in range(3)]
    threads = follow.Threads(record, record, 2)
    streams = [threads.follow(reader, "", {}) for reader in threads_of]
    for stream in streams[:2]:
        await anext(stream)
    with pytest.raises(errors.QuotaExceeded, match="2 streams") as refused:
        await anext(streams[2])
    assert refused.value.details["limit"] == "2"
    await anext(threads.follow(replace(_READER, user_id=ids.uuid7()), "", {}))
    await streams[0].aclose()  # type: ignore[attr-defined]
    assert (await anext(threads.follow(threads_of[2], "", {}))).caught_up


async def test_pages_of_runs_do_not_wait_for_those_who_follow() -> None:
    record, held, asked_for = _Record(0), asyncio.Event(), asyncio.Queue[None]()
    run_id = ids.uuid7()
    record.grow(run_id)

    class _Slow(_Record):
        async def after(self, reader: follow.Reader, run_id: str, many: int) -> Sequence[progress.Head]:
            asked_for.put_nowait(None)
            await held.wait()
            return []

    slow = _Slow(0)
    slow.runs, slow.last_at = record.runs, record.last_at
    threads = follow.Threads(slow, record)
    streams = [threads.follow(replace(_READER, thread_id=ids.uuid7()), run_id, {}) for _ in range(follow.AT_ONCE + 1)]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(_until_caught_up(stream, _Seen())) for stream in streams]
        async with asyncio.timeout(10):
            for _ in range(follow.AT_ONCE):
                await asked_for.get()
            events, through, last = await threads.page(_READER, run_id, 0, 10, 1_000)
        assert not any(task.done() for task in asked)
        held.set()
    assert ([event.seq for event in events], through, last) == ([1], 1, 1)


async def test_of_what_is_gone_the_last_is_told_before_the_rest() -> None:
    record = _Record(0)
    part_of_it, all_of_it = ids.uuid7(), ids.uuid7()
    for _ in range(9):
        record.grow(part_of_it)
        record.grow(all_of_it)
    record.gone = {part_of_it: 5, all_of_it: 9}
    seen = _Seen()
    told: dict[str, int] = {}
    async for part in follow.Threads(record, record).follow(_READER, "", {}):
        seen.take(part)
        told |= part.truncated
        if part.caught_up:
            break
    assert (told, seen.runs) == ({part_of_it: 5, all_of_it: 9}, record.runs)


async def test_a_grant_that_does_not_let_read_is_refused() -> None:
    class _Nothing:
        def allows(self, access: str) -> bool:
            return False

    with pytest.raises(errors.PermissionDenied):
        follow.Reader.of(object(), _Nothing())  # type: ignore[arg-type]


class _Valkey:
    """Announces what it is given."""

    def __init__(self) -> None:
        self.entries: asyncio.Queue[dict[bytes, bytes]] = asyncio.Queue()
        self.asked: asyncio.Queue[None] = asyncio.Queue()

    async def ends(self, streams: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(streams, "0-0")

    async def generation(self) -> str:
        return "v"

    async def read(self, positions: Mapping[str, str], *, block_ms: int) -> list[tuple[str, str, dict[bytes, bytes]]]:
        self.asked.put_nowait(None)
        return [(announce.PARTITIONS[0], "1-0", await self.entries.get())]


class _Heard:
    """What those who follow threads are told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.followed = True

    def heard(self, thread_id: str, run_id: str) -> None:
        self.told.put_nowait((thread_id, run_id))

    def heard_any(self) -> None:
        self.told.put_nowait(("", ""))


async def test_a_run_is_heard_of_at_once_whoever_records_in_its_thread_and_any_when_announcements_may_be_missing() -> None:
    valkey, tasks, heard = _Valkey(), lifecycle.Tasks(on_failure=lambda error: None), _Heard()
    live = fanout.Fanout(valkey, None, _Generation(), tasks, 3600, 3600, heard)  # type: ignore[arg-type]
    tasks.spawn(live.run(), "run")
    thread_id, runs = ids.uuid7(), [ids.uuid7(), ids.uuid7()]
    shown = log.Transient(ids.uuid7(), 1, ids.uuid7(), 1, ids.uuid7(), "agent_delta", b"{}")
    told = [log.Recorded(ids.uuid7(), 1, run_id, 1, thread_id, "x", b"{}") for run_id in (runs[0], "", runs[1], runs[0])]
    fields = announce.encoded(told, [shown])
    valkey.entries.put_nowait({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        assert [await heard.told.get() for _ in runs] == [(thread_id, run_id) for run_id in runs]
        assert heard.told.empty()
        tasks.spawn(live.watch(_ignored), "watch")
        assert await heard.told.get() == ("", "")
    await tasks.close()


async def test_those_who_follow_are_not_all_woken_by_each_comparison() -> None:
    valkey, tasks, heard, compared = _Valkey(), lifecycle.Tasks(on_failure=lambda error: None), _Heard(), _Generation()
    live = fanout.Fanout(valkey, None, compared, tasks, 0.001, 0.001, heard)  # type: ignore[arg-type]
    tasks.spawn(live.run(), "run")
    shown = log.Transient(ids.uuid7(), 1, ids.uuid7(), 1, ids.uuid7(), "agent_delta", b"{}")
    fields = announce.encoded([], [shown])
    valkey.entries.put_nowait({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        for _ in range(2):
            await valkey.asked.get()
        assert not live.degraded
        tasks.spawn(live.watch(_ignored), "watch")
        assert await heard.told.get() == ("", "")
        for _ in range(20):
            await compared.asked.get()
    assert heard.told.empty()
    await tasks.close()


async def _ignored(heard: bool) -> None: ...


class _Generation:
    def __init__(self) -> None:
        self.asked = asyncio.Queue[None]()

    async def generation(self) -> str:
        self.asked.put_nowait(None)
        return "g"
