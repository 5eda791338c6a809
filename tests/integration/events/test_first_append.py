"""The first append of a run opens it: together with what it appends, or before that; and as OpenRun does, in all that is seen of it."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from chassis import postgres
from netra import ids
from netra.events.v1 import events_pb2
from services.events import heads, log
from tests.integration.events.conftest import Place, Replica, Run, context_of, event, whole

_TRACE = "0123456789abcdef" * 2
_HEAD = (
    "SELECT run_id::text, user_id::text, thread_id::text, request_id, correlation_id, trace_id, retention, deadline, epoch, next_seq,"
    " encode(last_digest, 'hex') AS digest, last_first_seq, last_cursor, ended, terminal_type, erased, created_at <= last_at AS in_order"
    " FROM events.heads WHERE run_id = $1"
)
_OF_USER = "SELECT last, oldest, tenant_id::text AS tenant FROM events.cursors WHERE user_id = $1"


def _head(run: Run) -> heads.NewHead:
    return heads.new(run.context, ids.RunId(run.run_id), _TRACE)


async def _known(place: Place, replica: Replica) -> Run:
    """A run of a user who was written here before; it is not open yet."""
    before = await place.run(replica)
    await before.append(event())
    return Run(replica, context_of(before.user_id))


async def _first(run: Run, *events: events_pb2.NewEvent, replica: Replica | None = None, **more: Any) -> log.Outcome:
    return await (replica or run.replica).submit(run.request(*events, **more), opens=_head(run))


async def _rows(place: Place, run: Run) -> dict[str, Any]:
    async with place.admin() as admin:
        row = await admin.row(_HEAD, run.run_id)
    assert row is not None
    return dict(row)


def _alone(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it opens nothing apart, and writes nothing in more than one statement."""

    def fails(*_: object, **_more: object) -> None:
        raise AssertionError("more than one statement")

    monkeypatch.setattr(replica.crossing, "transaction", fails)
    monkeypatch.setattr(replica.own, "alone", fails)


@pytest.mark.parametrize("deadline", [None, 90.25])
async def test_a_run_of_a_known_user_is_opened_by_the_statement_that_writes_its_first_append(
    place: Place, monkeypatch: pytest.MonkeyPatch, deadline: float | None
) -> None:
    replica = await place.replica()
    run = await _known(place, replica)
    frame: dict[str, Any] = {
        "thread_id": ids.uuid7(), "correlation_id": "0123456789abcdef" * 2,
        "deadline": None if deadline is None else datetime.now(UTC) + timedelta(seconds=deadline),
    }  # fmt: skip
    run, apart = (Run(replica, context_of(run.user_id, **frame)) for _ in range(2))
    with monkeypatch.context() as patched:
        _alone(replica, patched)
        assert (await _first(run, event("agent_started"), event(), steps={"s1": b"1"})).last_cursor == 3
        assert await run.append(event("agent_completed"), end=True) == 4
    await replica.record.open(_head(apart), 1)
    await apart.append(event("agent_started"), event(), steps={"s1": b"1"})
    await apart.append(event("agent_completed"), end=True)
    # nothing tells it from one that was opened first
    one, other = await _rows(place, run), await _rows(place, apart)
    assert (one.pop("run_id"), other.pop("run_id")) == (run.run_id, apart.run_id)
    assert (one.pop("last_cursor"), other.pop("last_cursor")) == (4, 7)
    assert len(one.pop("digest")) == len(other.pop("digest")) == 64
    assert one == other
    assert [orjson.loads(each.frame)["trace_id"] for each in (await whole(replica, run.user_id))[1:]] == [_TRACE] * 6


async def test_a_run_of_a_user_of_whom_nothing_is_known_is_opened_before(place: Place) -> None:
    replica = await place.replica()
    run = Run(replica, context_of(ids.uuid7()))
    assert (await _first(run, event())).last_cursor == 1
    async with place.admin() as admin:
        row = await admin.row(_OF_USER, run.user_id)
    assert row is not None
    assert tuple(row.values()) == (1, 1, run.context.tenant_id)
    assert (await _rows(place, run))["next_seq"] == 2


async def test_a_first_append_may_be_the_last_or_have_steps_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await place.replica()
    ended, stepping = await _known(place, replica), await _known(place, replica)
    _alone(replica, monkeypatch)
    assert (await _first(ended, event("agent_cancelled"), end=True)).refused is None
    row = await _rows(place, ended)
    assert (row["ended"], row["terminal_type"], row["next_seq"]) == (True, "agent_cancelled", 2)
    assert (await _first(stepping, steps={"s1": b"1"})).refused is None
    assert (await _rows(place, stepping))["next_seq"] == 1
    assert await stepping.append(event()) == 2


async def test_what_was_written_elsewhere_meanwhile_is_noticed(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await _known(place, replicas[0])
    beside = Run(replicas[1], context_of(run.user_id))
    assert (await _first(beside, event())).last_cursor == 2
    # where it is opened, the user's record is thought to end before that
    assert (await _first(run, event())).last_cursor == 3
    assert [each.cursor for each in await whole(replicas[0], run.user_id)] == [1, 2, 3]


@pytest.mark.parametrize("where", ["here", "elsewhere", "at once"])
async def test_what_is_sent_twice_is_recorded_once(place: Place, where: str) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await _known(place, replicas[0])
    request = run.request(event(), event(), steps={"s1": b"1"})
    to = [replicas[0], replicas[where == "elsewhere"]]
    if where == "at once":
        outcomes = await asyncio.gather(*(replica.submit(request, opens=_head(run)) for replica in (*to, replicas[1])))
    else:
        outcomes = [await replica.submit(request, opens=_head(run)) for replica in to]
    # one that another transaction is just writing is sent again
    late = [one.refused.code for one in outcomes if one.refused is not None]
    assert set(late) <= {"UNAVAILABLE"}
    outcomes += [await replica.submit(request, opens=_head(run)) for replica in replicas]
    assert {one.last_cursor for one in outcomes if one.refused is None} == {3}
    assert [each.seq for each in await whole(replicas[0], run.user_id, run_id=run.run_id)] == [1, 2]
    for replica in replicas:
        assert (await replica.submit(run.request(event()), opens=None)).refused is None


@pytest.mark.parametrize("seen", [True, False])
async def test_a_run_that_another_owner_has_taken_over_is_fenced(place: Place, seen: bool) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await _known(place, replicas[0])
    await replicas[0 if seen else 1].record.open(_head(run), 2)
    refused = (await _first(run, event())).refused
    assert refused is not None
    assert refused.code == "FENCED"
    row = await _rows(place, run)
    assert (row["epoch"], row["next_seq"]) == (2, 1)
    assert await whole(replicas[0], run.user_id, run_id=run.run_id) == []


async def test_an_owner_that_comes_after_finds_what_the_first_append_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = await place.replica()
    run = await _known(place, replica)
    # as far as a clock may be behind before the time is asked for
    replica.memory.right(datetime.now(UTC) - timedelta(seconds=0.5), time.monotonic())
    with monkeypatch.context() as patched:
        _alone(replica, patched)
        assert (await _first(run, event("agent_started"), event("tool_executing", tool_call_id="c1"))).refused is None
    opened = await replica.record.open(_head(run), 2)
    assert (opened.next_seq, opened.open_tool_calls, opened.ended) == (3, ["c1"], False)
    refused = (await replica.submit(run.request(event()))).refused
    assert refused is not None
    assert refused.code == "FENCED"
    # and whoever has seen it open is told what came first, as often as it asks
    assert (await replica.submit(run.sent[0], opens=_head(run))).refused is not None


async def test_a_run_of_another_user_takes_nothing(place: Place) -> None:
    replica = await place.replica()
    mine, theirs = await _known(place, replica), await _known(place, replica)
    assert (await _first(theirs, event())).refused is None
    for _ in range(2):
        stolen = Run(replica, context_of(mine.user_id, run_id=theirs.run_id))
        refused = (await _first(stolen, event())).refused
        assert refused is not None
        assert refused.code == "NOT_FOUND"
    assert len(await whole(replica, mine.user_id)) == 1
    assert (await _rows(place, theirs))["next_seq"] == 2


async def test_one_that_cannot_be_opened_does_not_hold_up_its_neighbours(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    runs = [await _known(place, replicas[0]) for _ in range(4)]
    await replicas[1].record.open(_head(runs[1]), 2)
    going = await place.run(replicas[0])
    requests = [(run.request(event()), _head(run)) for run in runs]
    outcomes = await asyncio.gather(
        replicas[0].submit(going.request(event())), *(replicas[0].submit(request, opens=head) for request, head in requests)
    )
    assert [outcome.refused and outcome.refused.code for outcome in outcomes] == [None, None, "FENCED", None, None]
    for run in (runs[0], runs[2], runs[3]):
        assert [each.seq for each in await whole(replicas[0], run.user_id, run_id=run.run_id)] == [1]


async def test_one_whose_user_is_held_elsewhere_is_to_be_sent_again_and_others_go_on(place: Place) -> None:
    replica = await place.replica()
    held, other = await _known(place, replica), await _known(place, replica)
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        await admin.execute("SELECT last FROM events.cursors WHERE user_id = $1 FOR UPDATE", held.user_id)
        outcomes = await asyncio.gather(_first(held, event()), _first(other, event()))
        assert [outcome.refused and outcome.refused.code for outcome in outcomes] == ["UNAVAILABLE", None]
        await admin.execute("ROLLBACK")
    assert (await replica.submit(held.sent[0], opens=_head(held))).last_cursor == 2


@pytest.mark.parametrize("answer", ["done twice", "lost"])
async def test_a_first_append_that_was_committed_and_not_answered_is_written_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    replica = await place.replica()
    run = await _known(place, replica)
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
    outcome = await _first(run, event(), steps={"s1": b"1"})
    if answer == "lost":
        assert outcome.refused is not None
        assert outcome.refused.code == "UNAVAILABLE"
        outcome = await replica.submit(run.sent[0], opens=_head(run))
    assert (outcome.refused, outcome.last_cursor) == (None, 2)
    assert await run.append(event()) == 3
    assert [each.seq for each in await whole(replica, run.user_id, run_id=run.run_id)] == [1, 2]


async def test_many_runs_are_opened_while_they_are_taken_over_and_no_promise_is_lost(place: Place) -> None:
    replicas, chance = [await place.replica() for _ in range(2)], random.Random(7)
    users = [(await _known(place, replicas[number % 2])).user_id for number in range(4)]
    runs = [Run(replicas[0], context_of(users[number % 4])) for number in range(60)]
    acknowledged, fenced = dict[str, int](), set[str]()

    async def owner(run: Run) -> None:
        """The first one: it sends its first append, to any replica, until it is told what became of it."""
        request = run.request(event(), event())
        for _ in range(40):
            outcome = await replicas[chance.randrange(2)].submit(request, opens=_head(run))
            if outcome.refused is None:
                acknowledged[run.run_id] = outcome.last_cursor
                return
            if outcome.refused.code == "FENCED":
                fenced.add(run.run_id)
                return
            assert outcome.refused.code == "UNAVAILABLE"
        raise AssertionError("never told")

    async def successor(run: Run) -> None:
        """Somebody takes it over, whether or not it was opened."""
        await asyncio.sleep(chance.random() / 50)
        await replicas[chance.randrange(2)].record.open(_head(run), 2)

    async with asyncio.TaskGroup() as group:
        for number, run in enumerate(runs):
            group.create_task(owner(run))
            if number % 3 == 0:
                group.create_task(successor(run))
    assert len(acknowledged) + len(fenced) == 60
    for user_id in users:
        recorded = await whole(replicas[0], user_id)
        assert [each.cursor for each in recorded] == list(range(1, len(recorded) + 1))
        times = [orjson.loads(each.frame)["timestamp"] for each in recorded]
        assert times == sorted(times)
    for run in runs:
        mine = [each.seq for each in await whole(replicas[1], run.user_id, run_id=run.run_id)]
        # one that was fenced may have been recorded before, and its answer was lost: here no answer is
        assert mine == ([1, 2] if run.run_id in acknowledged else [])
