"""The usual append is one statement, held against the rows as they are: whatever others did meanwhile, no promise is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from chassis import postgres
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import heads
from tests.integration.events.conftest import Place, Replica, Run, context_of, event, whole


@contextlib.contextmanager
def _in_one_statement(replica: Replica) -> Iterator[None]:
    """Whatever its writer and its openings need more than one statement for, fails."""
    with pytest.MonkeyPatch.context() as patched:
        for pool in (replica.crossing, replica.own):
            patched.setattr(pool, "transaction", _no_transaction)
        yield


def _no_transaction(*_arguments: object, **_more: object) -> None:
    raise AssertionError("more than one statement")


async def _opened(run: Run, replica: Replica, epoch: int) -> None:
    await replica.record.open(heads.new(run.context, ids.RunId(run.run_id), "0" * 32), epoch)


async def _ends_well(replica: Replica, run: Run) -> None:
    """The run's record has what was acknowledged, once and in order, and its times do not go back."""
    recorded = await whole(replica, run.user_id)
    assert [each.cursor for each in recorded] == list(range(1, len(recorded) + 1))
    times = [orjson.loads(each.frame)["timestamp"] for each in recorded]
    assert times == sorted(times)
    mine = [each.seq for each in recorded if each.run_id == run.run_id]
    assert mine == list(range(1, run.next_seq))


async def test_a_run_from_its_opening_to_its_end_takes_a_statement_each(place: Place) -> None:
    replica = await place.replica()
    with _in_one_statement(replica):
        run = await place.run(replica)
        assert await run.append(event("agent_started"), steps={"s1": b"1"}) == 1
        assert await run.append(steps={"s2": b"2"}) == 1
        other = await place.run(replica, run.user_id)
        appended = (run.append(event(), event()), other.append(event()))
        assert sorted(await asyncio.gather(*appended)) == [3, 4]
        await _opened(run, replica, 1)
        assert await run.append(event("agent_completed"), end=True) == 5
    await _ends_well(replica, run)


async def test_two_replicas_write_a_user_in_turns(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    first = await place.run(replicas[0])
    runs = [first, await place.run(replicas[1], first.user_id)]
    for number in range(40):
        assert await runs[number % 2].append(event()) == number + 1
    # after guesses that were wrong it looks for a while, and then guesses again
    for number in range(40, 60):
        assert await first.append(event()) == number + 1
    with _in_one_statement(replicas[0]):
        assert await first.append(event()) == 61
    await _ends_well(replicas[0], first)
    await _ends_well(replicas[1], runs[1])


async def test_a_head_that_another_owner_fenced_meanwhile_takes_nothing_and_its_neighbours_go_on(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    runs = [await place.run(replicas[0]) for _ in range(3)]
    for run in runs:
        await run.append(event())
    await _opened(runs[1], replicas[1], 2)
    requests = [run.request(event()) for run in runs]
    outcomes = await asyncio.gather(*(replicas[0].submit(request) for request in requests))
    assert [outcome.refused.code if outcome.refused else outcome.last_cursor for outcome in outcomes] == [2, "FENCED", 2]
    # the new owner comes to the replica that knew the earlier one
    requests[1].epoch = 2
    assert (await replicas[0].submit(requests[1])).last_cursor == 2
    for run in runs:
        await _ends_well(replicas[0], run)


async def test_what_was_appended_by_way_of_another_replica_is_known_again(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0])
    await run.append(event())
    steps, more = run.request(steps={"s1": b"1"}), run.request(event())
    for request in (steps, more):
        assert (await replicas[1].submit(request)).refused is None
    assert (await replicas[0].submit(steps)).last_cursor == 2
    assert (await replicas[0].submit(more)).last_cursor == 2
    other = events_pb2.AppendRequest()
    other.CopyFrom(steps)
    other.steps[0].result, other.first_seq = b"2", run.next_seq
    refused = (await replicas[0].submit(other)).refused
    assert refused is not None
    assert refused.code == "ALREADY_EXISTS"
    await _ends_well(replicas[0], run)


async def test_steps_that_were_sent_before_are_acknowledged_again(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    for number in range(3):
        await run.append(steps={f"s{number}": b"1"})
    # nothing else came since, and yet they are not new
    for again in run.sent[1:]:
        outcome = await replica.submit(again)
        assert (outcome.refused, outcome.last_cursor) == (None, 1)
    assert await run.append(event()) == 2
    await _ends_well(replica, run)


@pytest.mark.parametrize("erased", [False, True])
async def test_a_run_that_ended_elsewhere_takes_nothing_more(place: Place, erased: bool) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0])
    await run.append(event())
    last = run.request(event("agent_completed"), end=True)
    await replicas[1].submit(last)
    if erased:
        await replicas[1].erasures.erase(run.user_id, "r1", run.user_id)
    refused = (await replicas[0].submit(run.request(event()))).refused
    assert refused is not None
    assert refused.code == "FAILED_PRECONDITION"
    assert len(await whole(replicas[0], run.user_id)) == (0 if erased else 2)


async def test_a_run_that_an_erasure_of_its_thread_ended_takes_nothing_more(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    async with place.admin() as admin:
        # as for one that has been silent for a day: nothing else of it changes
        await admin.execute("UPDATE events.heads SET ended = true, terminal_type = 'agent_failed' WHERE run_id = $1", run.run_id)
    refused = (await replica.submit(run.request(event()))).refused
    assert refused is not None
    assert refused.code == "FAILED_PRECONDITION"


async def test_a_run_that_was_removed_and_opened_again_elsewhere_is_not_the_one_that_was_seen(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0])
    async with place.admin() as admin:
        await admin.execute("DELETE FROM events.heads WHERE run_id = $1", run.run_id)
    await replicas[1].record.open(heads.new(run.context, ids.RunId(run.run_id), "1" * 32), 1)
    await run.append(event())
    assert orjson.loads((await whole(replicas[0], run.user_id))[-1].frame)["trace_id"] == "1" * 32


async def _waits(admin: postgres.Transaction) -> int:
    """The process of the writer that waits for a lock."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND usename = $1 AND wait_event_type = 'Lock'"
    async with asyncio.timeout(20):
        while True:
            if (pid := await admin.value(query, "netra_events_system")) is not None:
                return int(pid)
            await asyncio.sleep(0.002)


async def test_what_changes_of_a_row_while_it_is_waited_for_and_is_not_the_writers_stays(place: Place) -> None:
    replica = await place.replica()
    run, tenant = await place.run(replica), ids.uuid7()
    await run.append(event(), event())
    with _in_one_statement(replica):
        async with place.admin() as admin, asyncio.TaskGroup() as group:
            await admin.execute("BEGIN")
            await admin.execute("UPDATE events.cursors SET oldest = 2, tenant_id = $2 WHERE user_id = $1", run.user_id, tenant)
            appended = group.create_task(run.append(event()))
            async with place.admin() as other:
                await _waits(other)
            await admin.execute("COMMIT")
    assert appended.result() == 3
    async with place.admin() as admin:
        row = await admin.row("SELECT last, oldest, tenant_id::text AS tenant FROM events.cursors WHERE user_id = $1", run.user_id)
    assert row is not None
    assert tuple(row.values()) == (3, 2, tenant)


async def test_a_backend_that_is_killed_in_the_middle_leaves_nothing_and_the_append_is_written_once(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    async with place.admin() as admin, asyncio.TaskGroup() as group:
        await admin.execute("BEGIN")
        await admin.execute("SELECT run_id FROM events.heads WHERE run_id = $1 FOR UPDATE", run.run_id)
        appended = group.create_task(run.append(event(), steps={"s1": b"1"}))
        async with place.admin() as other:
            await other.execute("SELECT pg_terminate_backend($1)", await _waits(other))
            await admin.execute("ROLLBACK")
    assert appended.result() == 2
    await _ends_well(replica, run)


@pytest.mark.parametrize("answer", ["done twice", "lost"])
async def test_an_append_that_was_committed_and_not_answered_is_written_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    alone, calls = replica.crossing.alone, [0]

    async def unanswered(query: str, *values: object, **more: Any) -> list[postgres.Row]:
        calls[0] += 1
        found = await alone(query, *values, **more)
        if calls[0] > 1:
            return found
        if answer == "lost":
            raise postgres.Undecided
        return await alone(query, *values, **more)

    monkeypatch.setattr(replica.crossing, "alone", unanswered)
    request = run.request(event(), steps={"s1": b"1"})
    outcome = await replica.submit(request)
    if answer == "lost":
        assert outcome.refused is not None
        assert outcome.refused.code == "UNAVAILABLE"
        outcome = await replica.submit(request)
    assert (outcome.refused, outcome.last_cursor) == (None, 2)
    assert await run.append(event()) == 3
    assert calls[0] > 0
    await _ends_well(replica, run)


_EACH = (
    "cursors SET last = last + 1", "cursors SET last_at = last_at + interval '1 microsecond'", "heads SET epoch = epoch + 1",
    "heads SET next_seq = next_seq + 1", "heads SET last_cursor = last_cursor + 1", "heads SET last_digest = '\\x00'",
    "heads SET last_at = last_at + interval '1 microsecond'", "heads SET ended = true",
)  # fmt: skip


@pytest.mark.parametrize("changed", _EACH)
async def test_each_thing_that_is_not_as_it_was_seen_is_noticed_by_itself(place: Place, changed: str) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    async with place.admin() as admin:
        await admin.execute(f"UPDATE events.{changed} WHERE user_id = $1", run.user_id)
    with _in_one_statement(replica), pytest.raises(errors.Internal):
        await run.append(event())
    assert len(await whole(replica, run.user_id)) <= 1


@pytest.mark.parametrize("off", [timedelta(hours=-30), timedelta(seconds=5), timedelta(hours=30)], ids=str)
async def test_who_is_wrong_about_the_time_asks_for_it(place: Place, off: timedelta) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    replica.memory.right(datetime.now(UTC) + off, time.monotonic())
    await run.append(event())
    async with place.admin() as admin:
        query = "SELECT count(*) FROM events.events WHERE user_id = $1 AND recorded_at BETWEEN now() - interval '1 minute' AND now()"
        assert await admin.value(query, run.user_id) == 2
        assert await admin.value("SELECT count(*) FROM events.days WHERE user_id = $1", run.user_id) == 1
    with _in_one_statement(replica):
        assert await run.append(event()) == 3
    await _ends_well(replica, run)


async def test_an_opening_waits_for_what_is_being_written_and_tells_of_it(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event("tool_executing", tool_call_id="c1"))
    head = heads.new(run.context, ids.RunId(run.run_id), "")
    async with place.admin() as admin, asyncio.TaskGroup() as group:
        await admin.execute("BEGIN")
        await admin.execute(
            "INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, event_id, type, tool_call_id, frame)"
            " SELECT retention, last_at, user_id, 2, run_id, 2, gen_random_uuid(), 'tool_executing', 'c2', '{}'"
            " FROM events.heads WHERE run_id = $1",
            run.run_id,
        )
        await admin.execute("UPDATE events.heads SET next_seq = 3 WHERE run_id = $1", run.run_id)
        opened = group.create_task(replica.record.open(head, 2))
        await place.somebody_waits()
        await admin.execute("COMMIT")
    assert (opened.result().next_seq, opened.result().open_tool_calls) == (3, ["c1", "c2"])


async def test_an_opening_that_is_refused_changes_nothing_of_the_run(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await _opened(run, replica, 5)
    stranger = context_of(ids.uuid7(), run_id=run.run_id)
    query = "SELECT h::text FROM events.heads h WHERE run_id = $1"
    async with place.admin() as admin:
        before = await admin.value(query, run.run_id)
        with pytest.raises(errors.Fenced) as fenced:
            await _opened(run, replica, 4)
        with pytest.raises(errors.NotFound):
            await replica.record.open(heads.new(stranger, ids.RunId(run.run_id), ""), 6)
        assert await admin.value(query, run.run_id) == before
    assert fenced.value.details["epoch"] == "5"
    assert await whole(replica, str(stranger.user_id)) == []
