"""A thread is followed by run and seq, whoever owns its runs: every event once, in order, however it is recorded meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from netra import errors, ids
from services.events import erasure, follow, progress, store_system, store_threads
from tests.integration.events.conftest import Place, Replica, Run, event, now

_FAR = 2**40


class Thread:
    """A thread with two who write in it, on a replica of their own each; what is recorded wakes its followers."""

    def __init__(self, place: Place, replicas: list[Replica]) -> None:
        self.place, self.replicas = place, replicas
        self.thread_id, self.owner, self.grantee = ids.uuid7(), ids.uuid7(), ids.uuid7()
        self.live = follow.Threads(store_threads.Threads(replicas[0].own), store_system.Cursors(replicas[0].crossing))

    def reader(self, user_id: str = "", until: float = _FAR) -> follow.Reader:
        """Whoever has a grant."""
        return follow.Reader(user_id or self.grantee, self.thread_id, until, _FAR)

    async def run(self, user_id: str = "", **more: str) -> Run:
        """A run of the owner, or another, in the thread."""
        whose = user_id or self.owner
        return await self.place.run(self.replicas[whose != self.owner], whose, thread_id=self.thread_id, **more)

    async def append(self, run: Run, many: int = 1, *, end: bool = False) -> None:
        """Record some events, and say so as the live tail does."""
        for number in range(many):
            await run.append(event(data=json.dumps({"n": run.next_seq}).encode()), end=end and number == many - 1)
            self.live.heard(self.thread_id, run.run_id)


@pytest.fixture
async def thread(place: Place) -> Thread:
    """A thread in a database of this test's own."""
    return Thread(place, [await place.replica() for _ in range(2)])


class Seen:
    """What one follower was told."""

    def __init__(self, parts: AsyncIterator[follow.Part]) -> None:
        self.parts = parts
        self.runs: dict[str, list[int]] = {}
        self.truncated: dict[str, int] = {}
        self.last = follow.Part()

    async def part(self) -> follow.Part:
        """The next."""
        async with asyncio.timeout(30):
            self.last = await anext(self.parts)
        self.truncated |= self.last.truncated
        for each in self.last.events:
            assert each.cursor == 0
            self.runs.setdefault(each.run_id, []).append(each.seq)
        return self.last

    async def until(self, wanted: dict[str, int]) -> dict[str, list[int]]:
        """Everything up to these seqs."""
        while {run_id: seqs[-1] for run_id, seqs in self.runs.items() if run_id in wanted} != wanted:
            await self.part()
        return self.runs

    async def caught_up(self) -> dict[str, list[int]]:
        """Everything there is."""
        while not (await self.part()).caught_up:
            pass
        return self.runs


def _seqs(*runs: Run) -> dict[str, list[int]]:
    return {run.run_id: list(range(1, run.next_seq)) for run in runs}


async def test_what_owner_and_grantee_record_at_once_is_seen_whole_and_once_by_both(thread: Thread) -> None:
    first = await thread.run()
    await thread.append(first, 20, end=True)
    mine, theirs = await thread.run(), await thread.run(thread.grantee)
    readers = [Seen(thread.live.follow(thread.reader(user), "", {})) for user in (thread.owner, thread.grantee)]
    async with asyncio.TaskGroup() as group:
        for run in (mine, theirs):
            group.create_task(thread.append(run, 60, end=True))
        for seen in readers:
            group.create_task(seen.until({first.run_id: 20, mine.run_id: 60, theirs.run_id: 60}))
    for seen in readers:
        assert seen.runs == _seqs(first, mine, theirs)
        assert seen.truncated == {}


async def test_other_threads_of_the_same_users_are_not_seen(thread: Thread) -> None:
    shown = await thread.run()
    await thread.append(shown, 2)
    for user in (thread.owner, thread.grantee):
        elsewhere = await thread.place.run(thread.replicas[0], user)
        await elsewhere.append(event())
    for reader in (thread.reader(thread.owner), thread.reader()):
        assert await Seen(thread.live.follow(reader, "", {})).caught_up() == _seqs(shown)
        with pytest.raises(errors.NotFound):
            await thread.live.page(reader, elsewhere.run_id, 0, 10, 2**20)


async def test_who_comes_back_goes_on_from_the_positions(thread: Thread) -> None:
    old, running, later = await thread.run(), await thread.run(thread.grantee), await thread.run()
    for run in (old, running, later):
        await thread.append(run, 5)
    seen = Seen(thread.live.follow(thread.reader(), old.run_id, {running.run_id: 3, ids.uuid7(): 0}))
    assert await seen.caught_up() == {running.run_id: [4, 5], later.run_id: [1, 2, 3, 4, 5]}
    # of what was seen whole, nothing more is shown, unless its position is told
    await thread.append(old)
    await thread.append(running, end=True)
    assert (await seen.until({running.run_id: 6})).keys() == {running.run_id, later.run_id}
    again = Seen(thread.live.follow(thread.reader(), later.run_id, {old.run_id: 5, running.run_id: 6}))
    assert await again.caught_up() == {old.run_id: [6]}


async def test_a_run_that_began_earlier_and_is_opened_later_is_not_missed(thread: Thread) -> None:
    waited, ran = ids.uuid7(), await thread.run()
    await thread.append(ran, 3, end=True)
    seen = Seen(thread.live.follow(thread.reader(), "", {}))
    await seen.caught_up()
    late = await thread.run(thread.grantee, run_id=waited)
    await thread.append(late, 2)
    assert await seen.until({waited: 2}) == _seqs(ran, late)


async def test_a_position_beyond_the_record_is_refused(thread: Thread) -> None:
    run = await thread.run()
    await thread.append(run, 2)
    with pytest.raises(errors.FailedPrecondition) as refused:
        await anext(thread.live.follow(thread.reader(), "", {run.run_id: 3}))
    assert refused.value.details["last_seq"] == "2"


async def test_large_threads_come_in_bounded_parts(thread: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_PAGE_EVENTS", 7)
    monkeypatch.setattr(progress, "HEADS", 3)
    runs = [await thread.run() for _ in range(10)]
    for run in runs:
        await thread.append(run, 5)
    seen = Seen(thread.live.follow(thread.reader(), "", {}))
    while not seen.last.caught_up:
        assert len((await seen.part()).events) <= 7
    assert seen.runs == _seqs(*runs)
    large = await thread.run()
    for _ in range(4):
        await large.append(event(data=b'{"x":"%b"}' % (b"x" * 200_000)))
    thread.live.heard(thread.thread_id, large.run_id)
    while large.run_id not in seen.runs or seen.runs[large.run_id][-1] < 4:
        assert sum(len(each.frame) for each in (await seen.part()).events) < follow._PAGE_BYTES + 200_500
    assert seen.runs[large.run_id] == [1, 2, 3, 4]


async def test_the_stream_ends_with_the_grant_and_fails_with_the_session(thread: Thread) -> None:
    run = await thread.run()
    await thread.append(run)
    seen = Seen(thread.live.follow(thread.reader(until=time.time() + 0.5), "", {}))
    assert await seen.caught_up() == _seqs(run)
    while not (part := await seen.part()).ended:
        pass
    assert (part.ended, part.events) == ("token_ended", ())
    with pytest.raises(StopAsyncIteration):
        await seen.part()
    with pytest.raises(errors.Unauthenticated):
        await anext(thread.live.follow(replace(thread.reader(), signed_in_until=time.time() - 1), "", {}))


async def test_what_retention_took_away_is_said_before_the_rest(thread: Thread) -> None:
    replica = thread.replicas[0]
    run, gone, kept = [await thread.run() for _ in range(3)]
    await thread.append(gone, 2, end=True)
    await thread.append(run, 10)
    await thread.append(kept, 2)
    async with thread.place.admin() as admin:
        # as retention does: first nothing of it is shown any more, then it goes
        await admin.execute("UPDATE events.cursors SET oldest = 7 WHERE user_id = $1", thread.owner)
        seen = Seen(thread.live.follow(thread.reader(), "", {}))
        expected = {run.run_id: [5, 6, 7, 8, 9, 10], kept.run_id: [1, 2]}
        assert (await seen.caught_up(), seen.truncated) == (expected, {run.run_id: 4, gone.run_id: 2})
        await admin.execute("DELETE FROM events.events WHERE user_id = $1 AND cursor < 9", thread.owner)
        again = Seen(thread.live.follow(thread.reader(), "", {run.run_id: 2, gone.run_id: 2, kept.run_id: 1}))
        expected = {run.run_id: [7, 8, 9, 10], kept.run_id: [2]}
        assert (await again.caught_up(), again.truncated) == (expected, {run.run_id: 6})
    events, through, last = await thread.live.page(thread.reader(), gone.run_id, 0, 10, 2**20)
    assert (events, through, last) == ((), 2, 2) or (list(events), through, last) == ([], 2, 2)
    events, through, last = await thread.live.page(thread.reader(), run.run_id, 0, 2, 2**20)
    assert ([each.seq for each in events], through, last) == ([7, 8], 8, 10)
    # what its owner erased is of no thread any more
    await run.append(event(), end=True)
    await kept.append(event(), end=True)
    await replica.erasures.erase(thread.owner, "e1", thread.owner)
    assert await Seen(thread.live.follow(thread.reader(), "", {})).caught_up() == {}


async def test_an_outage_of_the_record_delays_and_loses_nothing(thread: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = await thread.run(), await thread.run(thread.grantee)
    await thread.append(run, 3)
    kept = store_threads.Threads(thread.replicas[0].own)
    away = iter([True, False, True, False, True, False])

    class _Shaky(store_threads.Threads):
        async def events(self, *wanted: object) -> list[progress.Read]:
            if next(away, False):
                raise errors.Unavailable
            return list(await kept.events(*wanted))  # type: ignore[arg-type]

    monkeypatch.setattr(follow, "_RETRY_S", 0.0)
    thread.live._kept = _Shaky(thread.replicas[0].own)
    seen = Seen(thread.live.follow(thread.reader(), "", {}))
    assert await seen.caught_up() == _seqs(run)
    await thread.append(other, 2)
    await thread.append(run)
    assert await seen.until({run.run_id: 4, other.run_id: 2}) == _seqs(run, other)


async def test_users_own_cursors_and_days_are_not_touched(thread: Thread) -> None:
    mine, theirs = await thread.run(thread.grantee), await thread.run()
    for run in (mine, theirs):
        await thread.append(run, 4)
    query = "SELECT json_agg(c ORDER BY user_id)::text FROM events.cursors c"
    async with thread.place.admin() as admin:
        before = await admin.value(query)
        seen = Seen(thread.live.follow(thread.reader(), "", {}))
        await seen.caught_up()
        assert await admin.value(query) == before


async def test_streams_end_when_the_service_stops(thread: Thread) -> None:
    seen = Seen(thread.live.follow(thread.reader(), "", {}))
    await seen.caught_up()
    thread.live.close()
    assert [part async for part in seen.parts if part.events] == []


async def test_a_thread_is_erased_from_the_events_of_its_runs_and_they_keep_their_place(thread: Thread) -> None:
    replica = thread.replicas[0]
    run, other, theirs = await thread.run(), await thread.place.run(replica, thread.owner), await thread.run(thread.grantee)
    await run.append(event("agent_started", b'{"secret":"one"}'), steps={"k": b'"secret"'})
    await other.append(event("agent_started", b'{"secret":"two"}'))
    for _ in range(3):
        await run.append(*[event(data=b'{"secret":"three"}') for _ in range(150)])
    with pytest.raises(errors.FailedPrecondition, match=run.run_id):
        await replica.erasures.erase(thread.owner, "e1", thread.owner, thread.thread_id)
    await run.append(event("agent_completed", b'{"secret":"four"}'), end=True)
    await theirs.append(event(data=b'{"secret":"theirs"}'), end=True)
    erased = await replica.erasures.erase(thread.owner, "e1", thread.owner, thread.thread_id)
    assert (erased.events, erased.runs, erased.upto, erased.done) == (452, 1, 453, True)
    assert await replica.erasures.erase(thread.owner, "e1", thread.owner, thread.thread_id) == erased
    assert (await replica.erasures.erase(thread.owner, "e2", thread.owner, thread.thread_id)).events == 0
    with pytest.raises(errors.AlreadyExists):
        await replica.erasures.erase(thread.owner, "e1", thread.owner)
    page = await replica.record.page(thread.owner, 0, limit=1000, max_bytes=2**20)
    assert [each.cursor for each in page.events] == list(range(1, 454))
    frames = [json.loads(each.frame) for each in page.events]
    assert [frame["cursor"] for frame in frames] == list(range(1, 454))
    assert [frame["data"] for frame in frames] == [{"erased": True}, {"secret": "two"}] + [{"erased": True}] * 451
    assert [frame["type"] for frame in frames[:2] + frames[-1:]] == ["agent_started", "agent_started", "agent_completed"]
    async with thread.place.admin() as admin:
        assert await admin.value("SELECT count(*) FROM events.steps WHERE run_id = $1", run.run_id) == 0
    # what another did in the thread is theirs to erase
    seen = Seen(thread.live.follow(thread.reader(), "", {}))
    await seen.caught_up()
    assert seen.runs == _seqs(run, theirs)
    page = await replica.record.page(thread.grantee, 0, limit=10, max_bytes=2**20)
    assert json.loads(page.events[0].frame)["data"] == {"secret": "theirs"}


async def test_the_erasure_of_a_thread_that_a_crash_interrupted_is_carried_on(thread: Thread) -> None:
    replica = thread.replicas[0]
    run = await thread.run()
    await run.append(*[event(data=b'{"secret":"one"}') for _ in range(300)], end=True)
    kept = replica.erasures._kept
    begun = await kept.begin_erasure(thread.owner, "e1", thread.owner, thread.thread_id)
    ((day, retention),) = await kept.days(thread.owner, begun.upto)
    assert await kept.blank(begun, day, retention, 0, 100) == (100, 100)
    later = await thread.run()
    await later.append(event(data=b'{"secret":"later"}'), end=True)
    async with thread.place.admin() as admin:
        await admin.execute("UPDATE events.erasures SET asked_at = asked_at - interval '10 minutes'")
    await replica.sweep({"free": 7}).once(now())
    done: erasure.Erasure = await replica.erasures.erase(thread.owner, "e1", thread.owner, thread.thread_id)
    assert (done.events, done.done) == (300, True)
    page = await replica.record.page(thread.owner, 0, limit=1000, max_bytes=2**20)
    assert [json.loads(each.frame)["data"] for each in page.events] == [{"erased": True}] * 300 + [{"secret": "later"}]


async def test_events_whose_run_lost_its_head_are_emptied_with_their_thread(thread: Thread) -> None:
    replica = thread.replicas[0]
    run, other = await thread.run(), await thread.place.run(replica, thread.owner)
    for each in (run, other):
        await each.append(event(data=b'{"secret":"one"}'), end=True)
    async with thread.place.admin() as admin:
        # as retention does while the day must stay for another class
        await admin.execute("DELETE FROM events.heads WHERE run_id = $1", run.run_id)
    erased = await replica.erasures.erase(thread.owner, "e1", thread.owner, thread.thread_id)
    assert (erased.events, erased.done) == (1, True)
    page = await replica.record.page(thread.owner, 0, limit=10, max_bytes=2**20)
    assert [json.loads(each.frame)["data"] for each in page.events] == [{"erased": True}, {"secret": "one"}]


async def test_two_erasures_of_one_user_wait_for_each_other(thread: Thread) -> None:
    replica = thread.replicas[0]
    run = await thread.run()
    await run.append(*[event(data=b'{"secret":"one"}') for _ in range(20)], end=True)
    kept = replica.erasures._kept
    of_thread = await kept.begin_erasure(thread.owner, "e1", thread.owner, thread.thread_id)
    whole = await kept.begin_erasure(thread.owner, "e2", thread.owner)
    ((day, retention),) = await kept.days(thread.owner, whole.upto)
    async with asyncio.TaskGroup() as group, thread.place.admin() as other:
        await other.execute("BEGIN")
        # the other one in the middle: it has the erasures, and no event yet
        await other.execute("SELECT FROM events.erasures WHERE user_id = $1 FOR UPDATE", thread.owner)
        blanked = group.create_task(kept.blank(of_thread, day, retention, 0, 100))
        await thread.place.somebody_waits()
        # no event is held meanwhile
        await other.execute("SELECT FROM events.events WHERE user_id = $1 FOR UPDATE NOWAIT", thread.owner)
        await other.execute("COMMIT")
        assert await blanked == (20, 20)
    assert await kept.erase(whole, day, retention, 100) == (20, False)


async def test_nothing_of_a_thread_is_seen_without_its_name_in_the_transaction(thread: Thread) -> None:
    run = await thread.run()
    await thread.append(run, 2)
    own = thread.replicas[0].own
    stranger = ids.uuid7()
    for user, within, seen in (
        (stranger, {}, 0),
        (stranger, {"thread_id": ids.uuid7()}, 0),
        (stranger, {"thread_id": thread.thread_id}, 2),
    ):
        async with own.transaction(user, within=within) as transaction:
            assert await transaction.value("SELECT count(*) FROM events.events") == seen
            assert await transaction.value("SELECT count(*) FROM events.cursors") == 0
    async with own.transaction(stranger, within={"thread_id": thread.thread_id}) as transaction:
        # seen, and no more than seen
        assert await transaction.execute("UPDATE events.events SET frame = ''") == "UPDATE 0"
        assert await transaction.execute("DELETE FROM events.events") == "DELETE 0"
        assert await transaction.execute("UPDATE events.heads SET ended = true") == "UPDATE 0"
    with contextlib.suppress(errors.NotFound):
        await thread.live.page(replace(thread.reader(), thread_id=ids.uuid7()), run.run_id, 0, 1, 1)
        raise AssertionError("a run of another thread was shown")
