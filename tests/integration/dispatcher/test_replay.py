"""Runs of agents whose dispatcher is killed: another carries them on, and what was done is not done again."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis import postgres
from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2, dispatcher_pb2_grpc
from services.events import store_retention, store_system
from services.events.settings import EventsSettings
from standalone import prepare
from tests.fixtures import effects
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types


class World:
    """A user, what their runs did outside, and dispatchers that come and go."""

    def __init__(self, services: Services, user: User, admin_dsn: str, outside: effects.Outside) -> None:
        self.services, self.user, self.outside, self._admin_dsn = services, user, outside, admin_dsn

    async def start(self, port: int, agent: str, mark: str) -> dispatcher_pb2.StartRunResponse:
        """Start a run at one dispatcher."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(channel)
            inputs = json.dumps({"folder": str(self.outside.folder), "mark": mark}).encode()
            request = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent=agent, user_request="Go.", inputs=inputs)
            return await stub.StartRun(request, metadata=self.user.bearer, wait_for_ready=True, timeout=30)

    async def killed_while(self, agent: str, mark: str, held: str, *made: str) -> dispatcher_pb2.StartRunResponse:
        """A dispatcher begins a run, and is killed while the effect of this mark stands still, and others are `made`."""
        async with effects.dispatcher(self.services.settings("dispatcher")) as (process, port):
            run = await self.start(port, agent, mark)
            await self.outside.until(dict.fromkeys((held, *made), 1))
            process.kill()
            process.wait()
        self.outside.release()
        return run

    async def value(self, query: str, *arguments: object) -> Any:
        """What the database says."""
        async with postgres.connection(self._admin_dsn) as admin:
            return await admin.value(query, *arguments)

    async def carried_on(self) -> Runs:
        """Another dispatcher, when the lease of the dead one is over."""
        await self.value("UPDATE dispatcher.runs SET lease_until = now() WHERE lease_until IS NOT NULL RETURNING 1")
        await self.services.dispatcher(agents=effects.AGENTS, tools=effects.TOOLS)
        return Runs(self.services)


@pytest.fixture
async def world(services: Services, stores: Standalone, database: str, tmp_path: Path) -> World:
    """A world without a dispatcher."""
    await services.auth()
    await services.context()
    await services.events()
    folder = tmp_path / "outside"
    folder.mkdir()
    return World(services, await services.user(), prepare.on_database(stores.postgres_admin_url, database), effects.Outside(folder))


# where the dispatcher is killed; the calls that are settled then
PLACES = {"e beside": {"order": "reconcile"}, "e of helper": {"order": "reconcile"}, "e last": {"order": "reconcile"}}


@pytest.mark.parametrize("held", PLACES)
async def test_a_run_whose_dispatcher_is_killed_is_carried_on_and_nothing_is_done_twice(world: World, held: str) -> None:
    world.outside.hold(held)
    # of what goes on beside it the tool says that it was made, once its call is in the record: so it is
    run = await world.killed_while("errand", "e", held, *(["e of helper"] if held == "e beside" else []))
    runs = await world.carried_on()
    events = await runs.ended(world.user, run.run_id)
    assert events[-1]["data"]["result"]["counts"] == [1, 1, 1, 1]
    assert {mark: len(world.outside.of(mark)) for mark in ("e first", "e beside", "e of helper", "e last")} == dict.fromkeys(
        ("e first", "e beside", "e of helper", "e last"), 1
    )
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    told = types(events)
    assert [told.count(kind) for kind in ("agent_started", "agent_thinking", "tool_executing", "tool_completed")] == [1, 2, 4, 4]
    settled = {event["data"]["tool_name"]: event["data"]["settled"] for event in events if "settled" in event["data"]}
    assert settled == PLACES[held]
    assert await _said(world, run.thread_id) == ["Go.", events[-1]["data"]["result"]["message"]]
    assert await world.value("SELECT takeovers FROM dispatcher.runs WHERE run_id = $1", run.run_id) == 1


async def _said(world: World, thread_id: str) -> list[str]:
    stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(world.services.channel("context"))
    page = await stub.ListMessages(context_pb2.ListMessagesRequest(thread_id=thread_id), metadata=world.user.bearer)
    return [message.content for message in page.messages]


@pytest.mark.parametrize(
    ("decision", "message", "effects_made"),
    [(approvals_pb2.DECISION_APPROVE, "Paid 2 times.", 2), (approvals_pb2.DECISION_REJECT, "OWNER_LOST", 1)],
    ids=["approved", "rejected"],
)
async def test_a_person_says_whether_a_call_of_unknown_outcome_is_made_again(
    world: World, decision: approvals_pb2.Decision.ValueType, message: str, effects_made: int
) -> None:
    world.outside.hold("c")
    run = await world.killed_while("caller", "c", "c")
    runs = await world.carried_on()
    seen = await runs.until(world.user, run.run_id, "agent_suspended")
    (asked,) = (event["data"] for event in seen if event["type"] == "approval_requested")
    request = approvals_pb2.ResolveApprovalRequest(approval_id=asked["approval_id"], decision=decision, comment="As I say.")
    await runs.dispatcher.ResolveApproval(request, metadata=world.user.bearer, wait_for_ready=True, timeout=30)
    events = await runs.ended(world.user, run.run_id)
    assert events[-1]["data"]["result"]["message"] == message
    # under one key, however often
    assert (len(world.outside.of("c")), len({*world.outside.of("c")})) == (effects_made, 1)
    (resolved,) = (event["data"] for event in events if event["type"] == "approval_resolved")
    assert (resolved["by"], resolved["comment"]) == (world.user.user_id, "As I say.")


async def test_a_run_that_waits_outlives_all_dispatchers(world: World) -> None:
    async with effects.dispatcher(world.services.settings("dispatcher")) as (process, port):
        run = await world.start(port, "waiter", "w")
        await _in_state(world, run.run_id, "suspended")
        process.kill()
        process.wait()
    runs = await world.carried_on()
    said = dispatcher_pb2.SendMessageRequest(request_id=ids.uuid7(), run_id=run.run_id, message="Hello.")
    await runs.dispatcher.SendMessage(said, metadata=world.user.bearer, wait_for_ready=True, timeout=30)
    events = await runs.until(world.user, run.run_id, "agent_resumed")
    assert events[-1]["data"]["reason"] == "message"
    await _in_state(world, run.run_id, "suspended")
    assert await world.value("SELECT waits_for FROM dispatcher.runs WHERE run_id = $1", run.run_id) == "timer"
    # an hour later: the time it sleeps until is in the record, which is told that it was earlier
    query = "UPDATE events.steps SET result = $2 WHERE run_id = $1 AND key = '3:sleep~1' RETURNING 1"
    assert await world.value(query, run.run_id, b'{"until": 1}') == 1
    await world.value("UPDATE dispatcher.runs SET wakes_at = now() WHERE run_id = $1 RETURNING 1", run.run_id)
    events = await runs.ended(world.user, run.run_id)
    assert [event["data"]["waits_for"] for event in events if event["type"] == "agent_suspended"] == ["message", "timer"]
    assert [event["data"]["reason"] for event in events if event["type"] == "agent_resumed"] == ["message", "timeout"]
    assert [len(world.outside.of(mark)) for mark in ("w before", "w after")] == [1, 1]
    assert events[-1]["data"]["result"]["message"] == "Hello."
    assert await world.value("SELECT takeovers FROM dispatcher.runs WHERE run_id = $1", run.run_id) == 0


async def _in_state(world: World, run_id: str, state: str) -> None:
    async with asyncio.timeout(30):
        while True:
            if await world.value("SELECT state FROM dispatcher.runs WHERE run_id = $1", run_id) == state:
                return
            await asyncio.sleep(0.02)


async def _swept(world: World) -> None:
    """The sweep of events, two days after all that is in the record."""
    await world.value("UPDATE events.heads SET last_at = last_at - interval '2 days' RETURNING 1")
    settings = EventsSettings(**world.services.settings("events"))
    dsn = settings.postgres_dsn("netra_events_system", "postgres_system")
    system = await postgres.open_pool(dsn, "test", size=1, options=store_system.OPTIONS)
    try:
        while await store_retention.Retention(system).drop_steps(datetime.now(UTC), 200):
            pass
    finally:
        await system.close()


async def test_a_run_that_has_waited_for_days_does_nothing_twice(world: World) -> None:
    await world.services.dispatcher(agents=effects.AGENTS, tools=effects.TOOLS)
    runs = Runs(world.services)
    run = await world.start(world.services.ports["dispatcher"], "waiter", "w")
    await _in_state(world, run.run_id, "suspended")
    await _swept(world)
    said = dispatcher_pb2.SendMessageRequest(request_id=ids.uuid7(), run_id=run.run_id, message="At last.")
    await runs.dispatcher.SendMessage(said, metadata=world.user.bearer, wait_for_ready=True, timeout=30)
    events = await runs.until(world.user, run.run_id, "agent_resumed")
    assert events[-1]["data"]["reason"] == "message"
    await _in_state(world, run.run_id, "suspended")
    assert len(world.outside.of("w before")) == 1


async def test_a_run_whose_steps_are_gone_ends_and_is_not_begun_again(world: World) -> None:
    await world.services.dispatcher(agents=effects.AGENTS, tools=effects.TOOLS)
    runs = Runs(world.services)
    run = await world.start(world.services.ports["dispatcher"], "waiter", "w")
    await _in_state(world, run.run_id, "suspended")
    await world.value("DELETE FROM events.steps WHERE run_id = $1 RETURNING 1", run.run_id)
    said = dispatcher_pb2.SendMessageRequest(request_id=ids.uuid7(), run_id=run.run_id, message="At last.")
    await runs.dispatcher.SendMessage(said, metadata=world.user.bearer, wait_for_ready=True, timeout=30)
    events = await runs.ended(world.user, run.run_id)
    assert types(events)[-2:] == ["agent_suspended", "agent_failed"]
    assert events[-1]["data"]["error"]["code"] == "OWNER_LOST"
    assert "steps" in events[-1]["data"]["message"]
    assert len(world.outside.of("w before")) == 1


async def test_a_run_that_waits_ends_when_it_is_cancelled(world: World) -> None:
    await world.services.dispatcher(agents=effects.AGENTS, tools=effects.TOOLS)
    runs = Runs(world.services)
    run = await world.start(world.services.ports["dispatcher"], "waiter", "w")
    await _in_state(world, run.run_id, "suspended")
    await runs.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=run.run_id), metadata=world.user.bearer, timeout=20)
    events = await runs.ended(world.user, run.run_id)
    assert types(events)[-2:] == ["agent_suspended", "agent_cancelled"]
    assert world.outside.of("w after") == []
