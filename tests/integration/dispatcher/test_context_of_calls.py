"""Calls that name no thread execute in one context of their session; each is a run of its own, with ids and files of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from chassis import postgres, telemetry
from netra import ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from netra.tool import ToolContext, tool
from services.dispatcher import running as running_
from standalone import prepare
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs


@tool(idempotent=True)
async def echo(text: str) -> str:
    """Says the same."""
    return text


@tool()
async def much() -> list[str]:
    """Returns what is kept as a file."""
    return ["é" * 1000] * 300


@tool()
async def twice(context: ToolContext) -> list[str]:
    """Keeps two files at once."""
    kept = await asyncio.gather(*(context.keep(name, "text/plain", name.encode()) for name in ("a.txt", "b.txt")))
    return [one.artifact_id for one in kept]


@tool(timeout_s=60)
async def hang() -> None:
    """Waits until it is stopped."""
    await asyncio.Event().wait()


@pytest.fixture
async def running(contexts: Contexts, services: Services, tmp_path: Path) -> Runs:
    """All services, with the tools above."""
    await services.events()
    await services.dispatcher(tools=[echo, much, twice, hang], work_dir=tmp_path / "work")
    return Runs(services)


async def _call(
    running: Runs, user: User, name: str, thread_id: str = "", correlation: str = "", **arguments: Any
) -> dispatcher_pb2.ExecuteToolResponse:  # fmt: skip
    request = dispatcher_pb2.ExecuteToolRequest(
        request_id=ids.uuid7(), tool_name=name, arguments=json.dumps(arguments).encode(), thread_id=thread_id
    )  # fmt: skip
    metadata = (*user.bearer, *([(telemetry.CORRELATION_HEADER, correlation)] if correlation else []))
    answer = await running.dispatcher.ExecuteTool(request, metadata=metadata, wait_for_ready=True, timeout=30)
    assert answer.status == "success", str(answer.error)
    return answer


async def _frames(running: Runs, user: User, run_id: str) -> list[dict[str, Any]]:
    page = await running.events.ListEvents(events_pb2.ListEventsRequest(run_id=run_id), metadata=user.bearer)
    return [json.loads(event.frame) for event in page.events]


async def _run(running: Runs, user: User, run_id: str) -> dispatcher_pb2.Run:
    return (await running.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer)).run


async def test_each_call_has_a_run_and_ids_of_its_own_in_the_context_of_its_session(running: Runs, contexts: Contexts) -> None:
    user = await running.services.user()
    correlations = [ids.CorrelationId.new() for _ in range(3)]
    seen = [(await _call(running, user, "echo", correlation=correlation, text="x")).run_id for correlation in correlations]
    (context,) = (await contexts.page(user)).contexts
    assert json.loads(context.context.agent_context) == {"kind": "calls"}
    runs = [await _run(running, user, run_id) for run_id in seen]
    assert {run.thread_id for run in runs} == {context.context.thread_id}
    assert len({run.request_id for run in runs}) == len(set(seen)) == 3
    for run, correlation in zip(runs, correlations, strict=True):
        frames = await _frames(running, user, run.run_id)
        assert [frame["type"] for frame in frames] == ["tool_executing", "tool_completed"]
        told = {(frame["run_id"], frame["thread_id"], frame["request_id"], frame["correlation_id"]) for frame in frames}
        assert told == {(run.run_id, run.thread_id, run.request_id, correlation)}
        assert run.correlation_id == correlation


async def test_another_session_and_a_call_in_a_thread_have_contexts_of_their_own(running: Runs, contexts: Contexts) -> None:
    user = await running.services.user()
    again = await contexts.login(user)
    first, second = [(await _run(running, user, (await _call(running, who, "echo", text="x")).run_id)) for who in (user, again)]
    assert first.thread_id != second.thread_id
    within = await _run(running, user, (await _call(running, user, "echo", first.thread_id, text="x")).run_id)
    assert within.thread_id == first.thread_id
    kinds = [json.loads(one.context.agent_context)["kind"] for one in (await contexts.page(user)).contexts]
    assert sorted(kinds) == ["calls", "calls", "tool"]


@pytest.mark.parametrize(("name", "fresh_s"), [("much", 1200.0), ("twice", 1200.0), ("twice", 0.0)])
async def test_files_of_a_call_are_of_its_run_by_a_context_of_its_own_that_ends_with_it(
    running: Runs, contexts: Contexts, monkeypatch: pytest.MonkeyPatch, name: str, fresh_s: float
) -> None:
    # the token of a call that lasts is renewed: the context stays the same
    monkeypatch.setattr(running_, "_FRESH_S", fresh_s)
    user = await running.services.user()
    await _call(running, user, "echo", text="x")
    answer = await _call(running, user, name)
    made = [answer.result_ref.artifact_id] if name == "much" else json.loads(answer.result)
    listed = (await contexts.stub.ListArtifacts(context_pb2.ListArtifactsRequest(), metadata=user.bearer)).artifacts
    assert sorted(one.artifact_id for one in listed) == sorted(made)
    assert {one.run_id for one in listed} == {answer.run_id}
    # its row says so when its context is closed
    run = await _run(running, user, answer.run_id)
    assert run.HasField("ended_at")
    own, calls = (await contexts.page(user)).contexts
    assert (own.context.run_id, own.context.depth, own.context.thread_id) == (answer.run_id, 1, calls.context.thread_id)
    assert own.context.correlation_id == run.correlation_id
    assert own.HasField("closed_at")
    assert not calls.HasField("closed_at")


async def test_the_thread_of_calls_may_be_erased_at_once(running: Runs, contexts: Contexts) -> None:
    user = await running.services.user()
    run = await _run(running, user, (await _call(running, user, "much")).run_id)
    request = context_pb2.EraseThreadRequest(request_id=ids.uuid7(), thread_id=run.thread_id)
    await contexts.stub.EraseThread(request, metadata=user.bearer)
    await running.dispatcher.EraseRuns(
        dispatcher_pb2.EraseRunsRequest(request_id=ids.uuid7(), thread_id=run.thread_id), metadata=user.bearer
    )
    # what comes later is elsewhere, and has its files
    later = await _call(running, user, "much")
    assert (await _run(running, user, later.run_id)).thread_id != run.thread_id


async def test_a_call_whose_process_died_is_ended_by_what_it_left(running: Runs, stores: Standalone, database: str) -> None:
    user = await running.services.user()
    answer = await _call(running, user, "echo", text="x")
    before = await _frames(running, user, answer.run_id)
    # as if its owner had died with its outcome in the record and not in its row
    await _run(running, user, answer.run_id)
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        await admin.execute(
            "UPDATE dispatcher.runs SET state = 'running', ended_at = NULL, outcome = NULL, lease_owner = 'gone', lease_until = now()"
            " WHERE run_id = $1", answer.run_id,
        )  # fmt: skip
    async with asyncio.timeout(20):
        while not (run := await _run(running, user, answer.run_id)).HasField("ended_at"):  # noqa: ASYNC110 - another process ends it
            await asyncio.sleep(0.02)
    assert run.state == dispatcher_pb2.RUN_STATE_COMPLETED
    assert await _frames(running, user, answer.run_id) == before


async def test_while_a_call_is_under_way_its_thread_is_not_erased_and_the_same_request_goes_on_with_it(running: Runs) -> None:
    user = await running.services.user()
    request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="hang")
    async with asyncio.TaskGroup() as group:
        call = running.dispatcher.ExecuteTool(request, metadata=user.bearer, timeout=40)
        group.create_task(_stopped(call))
        begun = await running.until(user, "", "tool_executing")
        run_id, thread_id = begun[0]["run_id"], begun[0]["thread_id"]
        recorded = events_pb2.EraseEventsRequest(request_id="e", thread_id=thread_id)
        kept = dispatcher_pb2.EraseRunsRequest(request_id="e", thread_id=thread_id)
        for erase in (
            lambda: running.events.EraseEvents(recorded, metadata=user.bearer),
            lambda: running.dispatcher.EraseRuns(kept, metadata=user.bearer),
        ):
            assert (await refused(erase())).code == "FAILED_PRECONDITION"
        await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=run_id), metadata=user.bearer)
    assert (await running.events.EraseEvents(recorded, metadata=user.bearer)).runs == 1
    assert (await running.dispatcher.EraseRuns(kept, metadata=user.bearer)).runs == 1


async def _stopped(call: Any) -> None:
    assert (await call).status == "cancelled"
