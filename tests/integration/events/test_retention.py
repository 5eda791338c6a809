"""What is kept how long: days in partitions, pages that look into few of them, days that are dropped."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

import pytest

from chassis import postgres
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import days, heads
from tests.integration.events.conftest import Place, Replica, Run, context_of, event, now, whole

_PER_DAY = 3
_MIB = 1024 * 1024


@dataclass
class _Record:
    """A user's record of many days. `noon` is that of the last; `written` are run and class of each event."""

    user: str
    noon: datetime
    written: list[tuple[str, str]]

    def first(self, days_ago: int) -> int:
        """The first cursor of a day."""
        return len(self.written) - (days_ago + 1) * _PER_DAY + 1


async def _record(place: Place, replica: Replica, *tiers: str, partitions: int = 0) -> _Record:
    """A record of twenty days, written in turn by a run of each class; the class `free` has some partitions."""
    user = ids.uuid7()
    runs = [await place.run(replica, user, tier=tier) for tier in tiers]
    written = []
    for number in range(20 * _PER_DAY):
        run = runs[number % len(runs)]
        await run.append(event(), end=number >= 20 * _PER_DAY - len(runs))
        written.append((run.run_id, run.context.tier))
    async with place.admin() as admin:
        today = await admin.value("SELECT (last_at AT TIME ZONE 'UTC')::date FROM events.cursors WHERE user_id = $1", user)
    await place.prepared(replica, "free", today, partitions)
    await place.spread(user, _PER_DAY)
    return _Record(user, datetime.combine(today, time(12), UTC), written)


async def _names(place: Place, pattern: str) -> list[str]:
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'events'::regnamespace AND relkind = 'r' AND relname ~ $1 ORDER BY relname"
    async with place.admin() as admin:
        return [str(row["relname"]) for row in await admin.fetch(query, pattern)]


@pytest.mark.parametrize("tiers", [("free",), ("free", "business")])
async def test_pages_over_many_days_are_complete_and_look_into_few(place: Place, tiers: tuple[str, ...]) -> None:
    replica = await place.replica()
    # some days have a partition, some have none
    record = await _record(place, replica, *tiers, partitions=9)
    for limit in (1, 7, 1000):
        assert [each.cursor for each in await whole(replica, record.user, limit=limit)] == list(range(1, 61))
    for after in (0, 13, 37):
        page = await replica.record.page(record.user, after, limit=1000, max_bytes=_MIB)
        assert [each.cursor for each in page.events] == list(range(after + 1, page.through + 1))
        assert page.through <= after + days.MAX_DAYS * _PER_DAY
    for run_id in {run_id for run_id, _ in record.written}:
        of_run = await whole(replica, record.user, run_id=run_id)
        assert [each.cursor for each in of_run] == [cursor for cursor, (run, _) in enumerate(record.written, 1) if run == run_id]


async def test_days_older_than_their_class_is_kept_are_dropped(place: Place) -> None:
    replica = await place.replica()
    record = await _record(place, replica, "free", "business", partitions=15)
    assert len(await _names(place, "^events_free_2")) == 15
    await replica.sweep({"free": 7, "business": 14}).once(record.noon)
    # free events from after the first business one that is kept stay as long: the record has no hole in the middle
    await _shows(replica, record, from_=record.first(14))
    async with place.admin() as admin:
        query = "SELECT retention, min(recorded_at)::date AS first FROM events.events WHERE user_id = $1 GROUP BY retention"
        left = {row["retention"]: row["first"] for row in await admin.fetch(query, record.user)}
        marked = await admin.value("SELECT min(day) FROM events.days WHERE user_id = $1", record.user)
    assert left == dict.fromkeys(("free", "business"), record.noon.date() - 14 * days.A_DAY)
    assert marked == left["business"]
    assert len(await _names(place, "^events_free_2")) == 7 + 3
    # what was kept for the sake of others goes with them, and so on
    for later in (1, 5, 30):
        await replica.sweep({"free": 7, "business": 14}).once(record.noon + later * days.A_DAY)
        await _shows(replica, record, from_=min(record.first(14 - later), 61))
    async with place.admin() as admin:
        assert await admin.value("SELECT count(*) FROM events.events WHERE user_id = $1", record.user) == 0
    # and the record goes on where it was
    run = await place.run(replica, record.user)
    assert await run.append(event()) == 61


async def _shows(replica: Replica, record: _Record, *, from_: int) -> None:
    assert (await replica.record.page(record.user, 0, limit=1, max_bytes=_MIB)).position.oldest == from_
    assert [each.cursor for each in await whole(replica, record.user)] == list(range(from_, 61))
    for run_id in {run_id for run_id, _ in record.written}:
        wanted = [cursor for cursor, (run, _) in enumerate(record.written, 1) if run == run_id and cursor >= from_]
        assert [each.cursor for each in await whole(replica, record.user, run_id=run_id)] == wanted


@pytest.mark.parametrize("partitions", [0, 20])
async def test_after_a_change_of_tier_each_event_stays_as_long_as_it_was_promised(place: Place, partitions: int) -> None:
    replica = await place.replica()
    user, other = ids.uuid7(), await _record(place, replica, "free", partitions=partitions)
    for tier, many in (("enterprise", 30), ("free", 30)):
        run = await place.run(replica, user, tier=tier)
        await run.append(*[event() for _ in range(many)], end=True)
    await place.spread(user, 3)
    # ten days of one tier, then ten of the other, of which all but one have passed
    await replica.sweep({"free": 1, "enterprise": 40}).once(other.noon)
    assert [each.cursor for each in await whole(replica, user)] == list(range(1, 61))
    assert [each.cursor for each in await whole(replica, user, run_id=run.run_id)] == list(range(31, 61))
    assert len(await whole(replica, other.user)) == 6
    # the last of the longer class, and with it what stayed for its sake
    await replica.sweep({"free": 1, "enterprise": 40}).once(other.noon + 30 * days.A_DAY)
    assert [each.cursor for each in await whole(replica, user)] == list(range(28, 61))
    await replica.sweep({"free": 1, "enterprise": 40}).once(other.noon + 31 * days.A_DAY)
    assert await whole(replica, user) == []
    async with place.admin() as admin:
        assert await admin.value("SELECT count(*) FROM events.events") == 0
        assert await admin.value("SELECT count(*) FROM events.days") == 0


async def test_a_class_without_a_policy_is_kept(place: Place) -> None:
    replica = await place.replica()
    record = await _record(place, replica, "free")
    await replica.sweep({"free": 0}).once(record.noon + timedelta(days=5000))
    assert len(await whole(replica, record.user)) == 60


async def test_a_shorter_period_waits_and_can_be_taken_back(place: Place) -> None:
    replica = await place.replica()
    record = await _record(place, replica, "free")
    for kept_for, hours, left in ((30, 0, 60), (7, 1, 60), (7, 24, 60), (30, 25, 60), (7, 26, 60), (7, 49, 60), (7, 51, 18)):
        await replica.sweep({"free": kept_for}, grace_h=24).once(record.noon + timedelta(hours=hours))
        assert len(await whole(replica, record.user)) == left


async def test_days_to_come_get_their_partitions_from_any_replica(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0], tier="early")
    await run.append(event())
    await asyncio.gather(*(replica.sweep({"early": 7, "free": 7}).once(now()) for replica in replicas))
    await replicas[0].sweep({"early": 7, "free": 7}).once(now())
    wanted = [f"events_early_{now() + timedelta(days=ahead):%Y%m%d}" for ahead in (1, 2, 3)]
    assert await _names(place, "^events_[a-z]+_2") == wanted


_CLOSED = "SELECT convalidated FROM pg_constraint WHERE conrelid = 'events.events_free_rest'::regclass AND conname LIKE 'closed_%'"


async def test_a_day_is_prepared_without_a_look_through_what_has_none(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(*[event() for _ in range(100)])
    day = now().date() + timedelta(days=2)
    step = "SELECT events.prepare_day('free', $1)"
    async with place.admin() as admin:
        assert [await admin.value(step, day) for _ in range(2)] == ["again", "again"]
        assert await admin.value(_CLOSED)
    await run.append(event())
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        assert await admin.value(step, day) == "made"
        # the lock that nobody passes is held now
        assert await admin.value("SELECT pg_stat_get_xact_tuples_returned('events.events_free_rest'::regclass)") == 0
        await admin.execute("COMMIT")
        assert await admin.row(_CLOSED) is None
        assert await admin.value(step, day) == ""
    await run.append(event())


async def test_a_day_whose_preparation_was_interrupted_is_open_when_a_replica_comes(place: Place) -> None:
    replica = await place.replica()
    await (await place.run(replica)).append(event())
    day = now().date() + timedelta(days=2)
    async with place.admin() as admin:
        assert await admin.value("SELECT events.prepare_day('free', $1)", day) == "again"
        async with asyncio.TaskGroup() as group:
            sweeping = group.create_task(replica.sweep({"free": 7}).run(3600))
            for _ in range(500):
                if await admin.row(_CLOSED) is None:
                    break
                await asyncio.sleep(0.01)
            sweeping.cancel()
        assert await admin.row(_CLOSED) is None


async def test_who_reopens_days_waits_for_who_prepares_one(place: Place) -> None:
    replica = await place.replica()
    day = now().date() + timedelta(days=2)
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        assert await admin.value("SELECT events.prepare_day('free', $1)", day) == "again"
        # what it has just looked at is not taken away before it is done
        with pytest.raises(postgres.Locked):
            await replica.retention.reopen("free")
        await admin.execute("COMMIT")
    await replica.retention.reopen("free")
    async with place.admin() as admin:
        assert await admin.row(_CLOSED) is None


async def test_a_day_that_has_events_already_gets_no_partition_and_stays_open(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    day = now().date() + timedelta(days=2)
    async with place.admin() as admin:
        await admin.execute("UPDATE events.events SET recorded_at = $1", datetime.combine(day, time(12), UTC))
        with pytest.raises(postgres.Unfit):
            await replica.retention.prepare("free", day)
        assert await admin.row(_CLOSED) is None


async def test_heads_and_steps_of_runs_that_ended_go_and_those_of_others_stay(place: Place) -> None:
    replica = await place.replica()
    ended, live = await place.run(replica), await place.run(replica)
    await ended.append(event(), steps={"s": b"1"}, end=True)
    await live.append(event(), steps={"s": b"1"})
    for minutes, left in ((5, {ended.run_id, live.run_id}), (15, {live.run_id})):
        await replica.sweep({"free": 7}).once(now() + timedelta(minutes=minutes))
        async with place.admin() as admin:
            assert {str(row["run_id"]) for row in await admin.fetch("SELECT run_id FROM events.steps")} == left
    await replica.sweep({"free": 7}).once(now() + timedelta(days=9))
    async with place.admin() as admin:
        assert {str(row["run_id"]) for row in await admin.fetch("SELECT run_id FROM events.heads")} == {live.run_id}


def _put_away(until: datetime) -> events_pb2.NewEvent:
    return event("agent_suspended", json.dumps({"waits_for": "message", "until": until.isoformat()}).encode())


@pytest.mark.parametrize("how", ["opened", "guessed", "looked up", "with its first append"])
async def test_a_run_that_waits_keeps_its_steps_and_head_for_as_long_as_it_may(place: Place, how: str) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    if how == "with its first append":
        # its user is known already
        context = context_of(run.user_id)
        run, opens = Run(replica, context), heads.new(context, ids.RunId(context.run_id), "0" * 32)
        first = run.request(event(), _put_away(now() + timedelta(days=7)), steps={"s": b"1"})
        first.open.trace_id = "0" * 32
        assert (await replica.submit(first, opens=opens)).refused is None
    else:
        if how != "opened":
            await run.append(event())
        if how == "looked up":
            for _ in range(2):
                replica.memory.wrong()
        await run.append(event(), _put_away(now() + timedelta(days=7)), steps={"s": b"1"})
    async with place.admin() as admin:
        await admin.execute("UPDATE events.heads SET created_at = now() - interval '25 days', last_at = now() - interval '25 hours'")
        # silent for a day, and it waits: it is still there, and its thread and user are not erased under it
        await replica.sweep({"free": 1}).once(now() + timedelta(days=3))
        held = "SELECT run_id FROM events.steps INTERSECT SELECT run_id FROM events.heads"
        assert [str(row["run_id"]) for row in await admin.fetch(held)] == [run.run_id]
        for thread_id in ("", str(run.context.thread_id)):
            with pytest.raises(errors.FailedPrecondition, match=run.run_id):
                await replica.erasures.erase(run.user_id, f"e{thread_id}"[:9], run.user_id, thread_id)
        # long after the last moment that it could wait for, nobody comes for it any more
        await admin.execute("UPDATE events.heads SET waits_until = now() - interval '25 hours'")
        await replica.sweep({"free": 1}).once(now() + timedelta(days=3))
        assert await admin.fetch("SELECT run_id FROM events.steps") == []


async def test_appends_and_readers_go_on_while_days_are_dropped(place: Place) -> None:
    replica = await place.replica()
    record = await _record(place, replica, "free", partitions=19)
    run = await place.run(replica, record.user)
    dropped = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_drop_day_by_day(replica, record.noon, dropped))
        seen, appended = 0, 0
        while not dropped.is_set():
            assert await run.append(event()) == 61 + appended
            appended += 1
            page = await replica.record.page(record.user, seen, limit=5, max_bytes=_MIB)
            start = max(seen, page.position.oldest - 1)
            assert [each.cursor for each in page.events] == list(range(start + 1, page.through + 1))
            seen = page.through if page.through < page.position.last else 0
    assert len(await _names(place, "^events_free_2")) == 1 + 3


async def _drop_day_by_day(replica: Replica, noon: datetime, dropped: asyncio.Event) -> None:
    for kept in range(18, 0, -1):
        await replica.sweep({"free": kept}).once(noon)
    dropped.set()


async def test_an_unknown_class_is_recorded_and_read(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    async with place.admin() as admin:
        await admin.execute("UPDATE events.heads SET retention = 'gone' WHERE run_id = $1", run.run_id)
    # a class does not change: who saw the head before would not look again
    await Run(await place.replica(), run.context).append(event())
    await replica.sweep({"free": 1}).once(now() + timedelta(days=400))
    assert len(await whole(replica, run.user_id)) == 1
