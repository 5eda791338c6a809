"""Following a thread: whatever is recorded meanwhile, in whatever order runs begin, and however often the record is away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from chassis import lifecycle
from netra import errors, ids
from services.events import announce, fanout, follow, log

_OWNER = ids.uuid7()
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_READER = follow.Reader(_OWNER, ids.uuid7(), 2.0**40, 2.0**40)


class _Record:
    """The runs of one thread; time goes on with each event, and now and then the record is away."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.runs: dict[str, int] = {}
        self.last_at: dict[str, datetime] = {}
        self.ended: set[str] = set()
        self.gone: dict[str, int] = {}
        self.now = _BEGAN
        self.away = 0.0

    def grow(self, run_id: str, *, end: bool = False) -> None:
        """One event more. What is stamped may be a little older than what was seen before."""
        self.now += timedelta(seconds=self._random.choice((0, 1, 40)))
        self.runs[run_id] = self.runs.get(run_id, 0) + 1
        self.last_at[run_id] = self.now - timedelta(seconds=self._random.choice((0, 20)))
        if end:
            self.ended.add(run_id)

    async def _breathe(self) -> None:
        await asyncio.sleep(0)
        if self._random.random() < self.away:
            raise errors.Unavailable

    def _look(self, run_ids: Iterable[str]) -> follow.Look:
        heads = [
            follow.Head(run_id, _OWNER, "free", _BEGAN, self.last_at[run_id], self.runs[run_id], run_id in self.ended)
            for run_id in sorted(run_ids)
        ]
        return follow.Look(self.now, heads)

    async def named(self, reader: follow.Reader, run_ids: Sequence[str]) -> follow.Look:
        await self._breathe()
        return self._look(run_id for run_id in run_ids if run_id in self.runs)

    async def after(self, reader: follow.Reader, run_id: str, many: int) -> follow.Look:
        await self._breathe()
        return self._look(sorted(one for one in self.runs if one > run_id)[:many])

    async def moved(self, reader: follow.Reader, since: datetime) -> follow.Look:
        await self._breathe()
        return self._look(run_id for run_id, at in self.last_at.items() if at > since)

    async def head(self, reader: follow.Reader, run_id: str) -> follow.Head:
        return self._look([run_id]).heads[0]

    async def events(self, reader: follow.Reader, wanted: Sequence[follow.Wanted], limit: int, max_bytes: int) -> list[follow.Read]:
        await self._breathe()
        found = []
        for one in wanted:
            first = max(one.after, self.gone.get(one.head.run_id, 0)) + 1
            seqs = range(first, min(one.head.last, first + limit - 1) + 1)
            found.append(
                follow.Read(one, [log.Recorded(_OWNER, 0, one.head.run_id, seq, "", "x", b"{}") for seq in seqs])
            )  # fmt: skip
            limit -= len(seqs)
            if limit <= 0:
                break
        return found

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]:
        await self._breathe()
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
    monkeypatch.setattr(follow, "_HEADS", 3)
    monkeypatch.setattr(follow, "_PAGE_EVENTS", 4)


@pytest.mark.parametrize("seed", range(30))
async def test_every_event_comes_once_and_in_order_through_everything(seed: int) -> None:
    chance, record = random.Random(seed), _Record(seed)
    names = [ids.uuid7() for _ in range(12)]
    for _ in range(chance.randrange(40)):
        record.grow(chance.choice(names[:6]))
    threads = follow.Threads(record, record)
    record.away = 0.2
    seen = _Seen()

    async def write() -> None:
        for _ in range(150):
            run_id = chance.choice(names)
            if run_id not in record.ended:
                record.grow(run_id, end=chance.random() < 0.03)
                if chance.random() < 0.9:  # an announcement can be lost
                    threads.heard(_READER.thread_id)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        record.away = 0.0
        threads.heard("")

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        stream, after, positions = threads.follow(_READER, "", {}), "", dict[str, int]()
        while not (writing.done() and seen.runs == record.runs):
            part = await anext(stream)
            seen.take(part)
            if chance.random() < 0.05:
                # the connection broke; of runs up to `after` only those are told that go on
                await stream.aclose()  # type: ignore[attr-defined]
                after = _after(sorted(names), seen.runs)
                positions = {run_id: seq for run_id, seq in seen.runs.items() if run_id > after or run_id not in record.ended}
                positions |= {run_id: seq for run_id, seq in seen.runs.items() if seq < record.runs[run_id]}
                stream = threads.follow(_READER, after, positions)
    await stream.aclose()  # type: ignore[attr-defined]
    assert seen.runs == record.runs


def _after(names: Sequence[str], seen: Mapping[str, int]) -> str:
    """The last run before which none is still to begin."""
    after = ""
    for run_id in names:
        if run_id not in seen:
            break
        after = run_id
    return after


async def test_what_is_forgotten_of_runs_that_ended_is_never_sent_again() -> None:
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
        threads.heard(_READER.thread_id)
        while seen.runs.get(new) != record.runs[new]:
            seen.take(await anext(stream))
    assert seen.runs == record.runs


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

    async def ends(self, streams: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(streams, "0-0")

    async def generation(self) -> str:
        return "v"

    async def read(self, positions: Mapping[str, str], *, block_ms: int) -> list[tuple[str, str, dict[bytes, bytes]]]:
        return [(announce.PARTITIONS[0], "1-0", await self.entries.get())]


async def test_a_thread_is_heard_of_at_once_whoever_records_in_it_and_any_at_each_comparison() -> None:
    valkey, tasks, heard = _Valkey(), lifecycle.Tasks(on_failure=lambda error: None), asyncio.Queue[str]()
    live = fanout.Fanout(valkey, None, _Generation(), tasks, 3600, 3600)  # type: ignore[arg-type]
    live.of_thread = heard.put_nowait
    tasks.spawn(live.run(), "run")
    thread_id = ids.uuid7()
    shown = log.Transient(ids.uuid7(), 1, ids.uuid7(), 1, ids.uuid7(), "agent_delta", b"{}")
    told = [log.Recorded(ids.uuid7(), 1, run_id, 1, thread_id, "x", b"{}") for run_id in (ids.uuid7(), "")]
    fields = announce.encoded(told, [shown])
    valkey.entries.put_nowait({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        assert [await heard.get() for _ in told] == [thread_id] * 2
        tasks.spawn(live.watch(_ignored), "watch")
        assert await heard.get() == ""
    await tasks.close()


async def _ignored(heard: bool) -> None: ...


class _Generation:
    async def generation(self) -> str:
        return "g"
