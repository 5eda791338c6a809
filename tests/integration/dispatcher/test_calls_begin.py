"""A call is accepted and begins in one statement, once for each request; whoever asked is answered before its row says how it ended."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from chassis import postgres
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from services.dispatcher import calling, runs, store_system, wiring
from services.dispatcher.settings import DispatcherSettings
from tests.fixtures import queued
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs, types


async def _begin(queue: queued.Queue, user_id: ids.UserId, **more: Any) -> runs.Run | None:
    call = runs.Order(more.pop("run_id", None) or ids.RunId.new(), "tool", "look", "", b"{}", 60.0, "", b"", "token", "")
    wanted = {
        "session_id": ids.uuid7(), "tier": "free", "thread_id": ids.ThreadId.new(), "request_id": "r", "digest": b"d",
        "correlation_id": "c", "most_queued": 10, "passed": {}, "owner": "one", "lease_s": 60.0, **more,
    }  # fmt: skip
    return await queue.mine.begin(user_id, call, **wanted)


def _user() -> ids.UserId:
    return ids.UserId.new()


async def test_it_runs_at_once_at_epoch_1_under_the_lease_of_its_owner_in_one_round_trip(
    queue: queued.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    alone, transaction = postgres.DatabaseManager.alone, postgres.DatabaseManager.transaction

    async def counted(database: postgres.DatabaseManager, query: str, *arguments: Any, **more: Any) -> Any:
        asked.append("alone")
        return await alone(database, query, *arguments, **more)

    def noted(database: postgres.DatabaseManager, *arguments: Any, **more: Any) -> Any:
        asked.append("transaction")
        return transaction(database, *arguments, **more)

    monkeypatch.setattr(postgres.DatabaseManager, "alone", counted)
    monkeypatch.setattr(postgres.DatabaseManager, "transaction", noted)
    user, run_id = _user(), ids.RunId.new()
    assert await _begin(queue, user, run_id=run_id) is None
    assert asked == ["alone"]
    (row,) = await queue.admin.fetch(
        "SELECT user_id, kind, state, epoch, lease_owner, extract(epoch FROM lease_until - created_at)::float8 AS lease_s,"
        " started_at >= created_at AS began, stages ? 'routing_to_agent' AS routed FROM dispatcher.runs"
    )
    found = dict(row)
    assert 59 < found.pop("lease_s") < 70
    assert found == {
        "user_id": user, "kind": "tool", "state": "running", "epoch": 1, "lease_owner": "one", "began": True, "routed": True
    }  # fmt: skip


async def test_of_the_same_request_at_several_dispatchers_at_once_one_begins(queue: queued.Queue) -> None:
    user = _user()
    # the context service gave both the context of the first, and so its run
    for run_id in (None, ids.RunId.new()):
        request = ids.uuid7()
        found = await asyncio.gather(*(_begin(queue, user, run_id=run_id, request_id=request, owner=f"{n}") for n in range(8)))
        known = [run for run in found if run is not None]
        assert len(known) == 7
        assert {(run.state, run.digest, run.kind) for run in known} == {(runs.RunState.RUNNING, b"d", "tool")}
        assert len({run.run_id for run in known}) == 1
    # another user may use the same request id
    assert await _begin(queue, _user(), request_id=request) is None


async def test_what_is_over_is_returned_with_its_answer(queue: queued.Queue) -> None:
    user, run_id = _user(), ids.RunId.new()
    assert await _begin(queue, user, run_id=run_id) is None
    await queue.everyone.ended(run_id, 1, runs.RunState.COMPLETED, b"42", {}, context_open=False)
    known = await _begin(queue, user)
    assert known is not None
    assert (known.run_id, known.state, known.outcome) == (run_id, runs.RunState.COMPLETED, b"42")


async def test_nothing_begins_while_too_many_of_the_users_wait_and_others_do_not_count(queue: queued.Queue) -> None:
    user, other = _user(), _user()
    await queue.many(user, 3)
    with pytest.raises(errors.RateLimited):
        await _begin(queue, user, most_queued=3)
    assert await queue.admin.value("SELECT count(*) FROM dispatcher.runs WHERE kind = 'tool'") == 0
    assert await _begin(queue, user, most_queued=4) is None
    assert await _begin(queue, other, most_queued=3) is None


async def test_whom_a_statement_was_for_is_forgotten_with_it(queue: queued.Queue) -> None:
    """What comes next on the connection sees no row, whoever's; and no row is made but of the user it is for."""
    user = _user()
    await asyncio.gather(*(_begin(queue, user, request_id=f"r{n}") for n in range(20)))
    query = "SELECT run_id FROM dispatcher.runs WHERE current_setting('netra.user_id', true) IS DISTINCT FROM $1"
    for _ in range(20):
        assert await queue.mine._database.alone(query, "") == []
    assert await queue.admin.value("SELECT count(DISTINCT user_id) FROM dispatcher.runs") == 1


class Held:
    """Ends of calls are not stored until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.released = asyncio.Event(), asyncio.Event()
        # how many came to where they wait for them
        self.readers = 0
        ended, stored = store_system.SystemStore.ended, calling.Calls.stored

        async def late(store: store_system.SystemStore, *arguments: Any, **more: Any) -> None:
            self.came.set()
            await self.released.wait()
            await ended(store, *arguments, **more)

        async def noted(calls: calling.Calls, user_id: ids.UserId) -> None:
            self.readers += 1
            await stored(calls, user_id)

        monkeypatch.setattr(store_system.SystemStore, "ended", late)
        monkeypatch.setattr(calling.Calls, "stored", noted)


async def test_who_is_answered_finds_the_call_ended_though_its_row_comes_later(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    await services.all()
    running, held = Runs(services), Held(monkeypatch)
    user, other = await services.user(), await services.user()
    request = dispatcher_pb2.ExecuteToolRequest(
        request_id=ids.uuid7(), tool_name="text_statistics", arguments=json.dumps({"text": "One two."}).encode()
    )
    asked: dict[str, Any] = {"metadata": user.bearer, "wait_for_ready": True, "timeout": 20}
    answer = await running.dispatcher.ExecuteTool(request, **asked)
    assert (answer.status, types(await running.ended(user, answer.run_id))) == ("success", ["tool_executing", "tool_completed"])
    await asyncio.wait_for(held.came.wait(), 10)
    # the same request needs no row, and another user's list does not wait for it
    assert await running.dispatcher.ExecuteTool(request, **asked) == answer
    assert not (await running.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=other.bearer)).runs
    reads = asyncio.gather(
        running.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=answer.run_id), metadata=user.bearer),
        running.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=user.bearer),
    )
    async with asyncio.timeout(10):
        while held.readers < 3:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
    held.released.set()
    found, page = await reads
    assert [found.run.state, *(run.state for run in page.runs)] == [dispatcher_pb2.RUN_STATE_COMPLETED] * 2
    # now by its row
    assert await running.dispatcher.ExecuteTool(request, **asked) == answer


async def test_a_process_that_stops_stores_how_the_calls_ended_that_it_answered(
    services: Services, queue: queued.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await services.auth()
    await services.context()
    await services.events()
    held, user = Held(monkeypatch), await services.user()
    request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="text_statistics", arguments=b'{"text": "One two."}')
    async with wiring.build(DispatcherSettings(**services.settings("dispatcher"))) as stopping:
        await stopping.trust.awaited()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stopping.port}") as channel:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(channel)
            answer = await stub.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=20)
        await asyncio.wait_for(held.came.wait(), 10)
        # while it stops already
        asyncio.get_running_loop().call_later(0.2, held.released.set)
    assert held.released.is_set()
    assert await queue.value(answer.run_id, "state") == "completed"
    assert await queue.value(answer.run_id, "context_open") is False
