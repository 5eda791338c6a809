"""Runs while the record is away: they wait, bounded by their deadline, and nothing they did is missing afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import lifecycle, replicas
from netra import ids
from netra.agent import Turn, agent
from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import tool
from services.dispatcher import kinds
from services.events import wiring as events_wiring
from services.events.settings import EventsSettings
from tests.fixtures import proxy
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs, types


@dataclass(slots=True)
class Pace:
    """Of one run: it goes on when it is told to, and counts."""

    steps: int = 0
    effects: int = 0
    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    moved: asyncio.Condition = field(default_factory=asyncio.Condition)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def allow(self, steps: int) -> None:
        """So many steps more."""
        for _ in range(steps):
            self.go.release()

    async def until(self, steps: int) -> None:
        """Returns when so many steps were taken."""
        async with asyncio.timeout(10), self.moved:
            await self.moved.wait_for(lambda: self.steps >= steps)

    async def stands(self) -> int:
        """How many steps were taken when a second has passed without another."""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(1), self.moved:
                    await self.moved.wait()
        return self.steps


PACES: dict[str, Pace] = {}


@agent("walker", deadline_s=60)
async def walker(turn: Turn) -> dict[str, int]:
    """Takes a step whenever it may."""
    pace = PACES[turn.inputs["mark"]]
    try:
        for number in range(turn.inputs["steps"]):
            await pace.go.acquire()
            await turn.think(f"Step {number}.")
            async with pace.moved:
                pace.steps += 1
                pace.moved.notify_all()
    finally:
        pace.over.set()
    return {"steps": pace.steps}


@tool(side_effects=True, timeout_s=0.5)
async def effect(mark: str) -> int:
    """Changes something."""
    PACES[mark].effects += 1
    return PACES[mark].effects


@agent("doer", deadline_s=60)
async def doer(turn: Turn) -> dict[str, str]:
    """Waits, then calls a tool with an effect."""
    await PACES[turn.inputs["mark"]].go.acquire()
    try:
        await turn.tool("effect", mark=turn.inputs["mark"])
    except Exception as error:
        return {"message": getattr(error, "code", "?")}
    finally:
        PACES[turn.inputs["mark"]].over.set()
    return {"message": "done"}


@pytest.fixture
async def wire(services: Services) -> AsyncIterator[proxy.Proxy]:
    """All services, the dispatcher on the far side of a wire from the record."""
    await services.auth()
    await services.context()
    await services.events()
    async with proxy.listening() as wire:
        wire.to = services.ports["events"]
        await services.dispatcher(events_target=f"127.0.0.1:{wire.port}", agents=[walker, doer], tools=[effect])
        yield wire


async def _walking(running: Runs, steps: int, deadline_s: float = 60) -> tuple[Any, str, Pace]:
    user, mark = await running.services.user(), ids.uuid7()
    PACES[mark] = pace = Pace()
    deadline = duration_pb2.Duration()
    deadline.FromMilliseconds(round(deadline_s * 1000))
    started = await running.start(user, "walker", inputs={"mark": mark, "steps": steps}, deadline=deadline)
    return user, started.run_id, pace


async def test_an_agent_stops_soon_and_goes_on_when_the_record_is_back(wire: proxy.Proxy, services: Services) -> None:
    running = Runs(services)
    user, run_id, pace = await _walking(running, 200)
    pace.allow(3)
    await pace.until(3)
    await running.until(user, run_id, "agent_thinking")
    async with wire.stalled():
        pace.allow(197)
        # 64 may wait to be recorded, and one is being taken
        # 64 entries may wait to be recorded, and one step is just being taken
        assert await pace.stands() <= 3 + 64 + 1
    events = await running.ended(user, run_id)
    assert pace.steps == 200
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["data"]["step_number"] for event in events if event["type"] == "agent_thinking"] == list(range(1, 201))
    assert types(events)[-1] == "agent_completed"


async def test_the_deadline_ends_a_run_that_waits_and_the_record_is_told_when_it_is_back(wire: proxy.Proxy, services: Services) -> None:
    running = Runs(services)
    user, run_id, pace = await _walking(running, 200, deadline_s=2)
    pace.allow(2)
    await pace.until(2)
    async with wire.stalled():
        pace.allow(198)
        await asyncio.wait_for(pace.over.wait(), 10)
        walked = pace.steps
        assert walked < 70
    events = await running.ended(user, run_id)
    assert (types(events)[-1], pace.steps) == ("agent_timed_out", walked)
    assert types(events).count("agent_thinking") == walked
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


async def test_a_tool_with_effects_is_not_called_before_the_record_has_its_call(wire: proxy.Proxy, services: Services) -> None:
    running, user, mark = Runs(services), await services.user(), ids.uuid7()
    PACES[mark] = pace = Pace()
    run_id = (await running.start(user, "doer", inputs={"mark": mark})).run_id
    await running.until(user, run_id, "message_created")
    async with wire.stalled():
        pace.allow(1)
        await asyncio.wait_for(pace.over.wait(), 10)
        assert pace.effects == 0
    events = await running.ended(user, run_id)
    assert pace.effects == 0
    done = next(event["data"] for event in events if event["type"] == "tool_completed")
    assert (done["status"], done["error"]["code"]) == ("timeout", "DEADLINE_EXCEEDED")
    assert events[-1]["data"]["result"] == {"message": "DEADLINE_EXCEEDED"}
    for event in events:
        kinds.check(event["type"], event["data"])


async def test_one_replica_that_ends_takes_no_run_with_it(services: Services) -> None:
    await services.auth()
    await services.context()
    await services.events()
    async with contextlib.AsyncExitStack() as other:
        second = await other.enter_async_context(events_wiring.build(EventsSettings(**services.settings("events"))))
        targets = f"127.0.0.1:{services.ports['events']},127.0.0.1:{second.port}"
        await services.dispatcher(events_target=targets, agents=[walker, doer], tools=[effect])
        running = Runs(services)
        walks = [await _walking(running, 6) for _ in range(6)]
        for _, _, pace in walks:
            pace.allow(3)
        for _, _, pace in walks:
            await pace.until(3)
        await other.aclose()
        for user, run_id, pace in walks:
            pace.allow(3)
            events = await running.ended(user, run_id)
            assert [event["data"]["step_number"] for event in events if event["type"] == "agent_thinking"] == [1, 2, 3, 4, 5, 6]
            assert types(events)[-1] == "agent_completed"


async def test_the_health_of_the_dispatcher_says_when_the_record_is_gone(services: Services) -> None:
    await services.auth()
    await services.context()
    async with contextlib.AsyncExitStack() as only:
        record = await only.enter_async_context(events_wiring.build(EventsSettings(**services.settings("events"))))
        services.ports["events"] = record.port
        await services.dispatcher(agents=[walker])
        running = Runs(services)
        user, run_id, pace = await _walking(running, 4)
        pace.allow(1)
        await pace.until(1)
        await running.until(user, run_id, "agent_thinking")
        health: Any = health_pb2_grpc.HealthStub(services.channel("dispatcher"))

        async def until(wanted: int) -> None:
            async with asyncio.timeout(20):
                watched = health.Watch(health_pb2.HealthCheckRequest(service="netra.record"))
                async for answer in watched:
                    if answer.status == wanted:
                        watched.cancel()
                        return

        await until(health_pb2.HealthCheckResponse.SERVING)
        await only.aclose()
        pace.allow(3)
        await until(health_pb2.HealthCheckResponse.NOT_SERVING)
        whole = await health.Check(health_pb2.HealthCheckRequest())
        assert whole.status == health_pb2.HealthCheckResponse.SERVING
        async with events_wiring.build(EventsSettings(**services.settings("events", port=record.port))):
            await until(health_pb2.HealthCheckResponse.SERVING)
            assert types(await running.ended(user, run_id))[-1] == "agent_completed"


async def test_a_call_that_cannot_be_recorded_in_time_is_not_made(
    wire: proxy.Proxy, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.dispatcher.supervisor._TOOL_GRACE_S", 60)
    running, user, mark = Runs(services), await services.user(), ids.uuid7()
    PACES[mark] = pace = Pace()
    request = dispatcher_pb2.ExecuteToolRequest(
        request_id=ids.uuid7(), tool_name="effect", arguments=json.dumps({"mark": mark}).encode()
    )  # fmt: skip

    async def called() -> dispatcher_pb2.ExecuteToolResponse:
        return await running.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True)

    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    call = tasks.spawn(called(), "call")
    async with wire.stalled():
        # the first append of the call is given up meanwhile, and sent again; the call has its time, and its outcome is told afterwards
        assert not (await asyncio.wait({call}, timeout=replicas.SILENCE_S + 0.5))[0]
    answer = await call
    assert (answer.status, answer.error.code, pace.effects) == ("timeout", "DEADLINE_EXCEEDED", 0)
    events = await running.ended(user, answer.run_id)
    assert (types(events), events[-1]["data"]["status"]) == (["tool_executing", "tool_completed"], "timeout")
