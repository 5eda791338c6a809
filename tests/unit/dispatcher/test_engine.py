"""Runs without services: what is begun and what is not, how each ends, which stages it passes, what it tells after its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from chassis import lifecycle
from netra import errors, ids
from netra.agent import AgentSpec, Turn, agent
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from netra.tool import tool
from services.dispatcher import engine, executions, journal, running, runs, settings, stages
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import dispatch, workspace
from services.dispatcher.tools import registry as tools_
from tests.fixtures.permits import permitted

BEGUN: list[str] = []


@agent("swift", deadline_s=30)
async def swift(turn: Turn) -> dict[str, str]:
    """Is done at once."""
    BEGUN.append(turn.request)
    return {"message": "done"}


@agent("raiser", deadline_s=30)
async def raiser(turn: Turn) -> None:
    """Raises."""
    raise errors.NotFound("nothing here")


@agent("sleeper", deadline_s=30)
async def sleeper(turn: Turn) -> None:
    """Waits for its end."""
    await asyncio.Event().wait()


@agent("survivor", deadline_s=30)
async def survivor(turn: Turn) -> None:
    """Goes on after it was stopped, for as long as it can tell of it."""
    number = 0
    while True:
        number += 1
        with contextlib.suppress(asyncio.CancelledError):
            await turn.think(f"Thought {number}.")
            await asyncio.sleep(0.01)


@agent("blind", deadline_s=30)
async def blind(turn: Turn) -> None:
    """Only thinks."""
    for number in range(100_000):
        await turn.think(f"Thought {number}.")


@agent("heavy", deadline_s=30)
async def heavy(turn: Turn) -> str:
    """Hands a tool more than it may take."""
    try:
        await turn.tool("echo", text="x" * 300_000)
    except errors.TooLarge as error:
        return error.code
    return "taken"


@tool()
async def echo(text: str) -> str:
    """Returns the text."""
    return text


class Record:
    """The record, the rows and the threads: all that the engine writes to, and what it finds."""

    def __init__(self) -> None:
        self.found = events_pb2.OpenRunResponse(next_seq=1)
        self.requests: list[events_pb2.AppendRequest] = []
        self.ends: list[tuple[runs.RunState, list[str]]] = []
        self.fenced = False
        self.reachable = True
        self.steps_found: list[tuple[str, bytes]] = []

    async def steps(self, *_: object) -> AsyncIterator[tuple[str, bytes]]:
        """The steps so far."""
        for step in self.steps_found:
            yield step

    async def open(self, *_: object) -> events_pb2.OpenRunResponse:
        """What there is so far."""
        return self.found

    def append(self, request: events_pb2.AppendRequest, _user_id: str, _token: object = None) -> asyncio.Future[None]:
        """Take an append."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests.append(request)
        if self.fenced:
            answer.set_exception(errors.Fenced("newer"))
        else:
            asyncio.get_running_loop().call_soon(answer.set_result, None)
        return answer

    def show(self, *_: object) -> None:
        """Nobody watches."""

    async def finishing(self, *_: object) -> bool | None:
        """The run is ours."""
        return None if self.fenced else False

    async def ended(
        self, _run_id: ids.RunId, _epoch: int, state: runs.RunState, _outcome: bytes, passed: Mapping[str, datetime], *, context_open: bool
    ) -> None:
        """The end of a run."""
        assert not context_open
        self.ends.append((state, [stage for stage, _ in stages.in_order(passed)]))

    async def append_message(self, *_: object) -> ids.MessageId:
        """A message of the thread."""
        return ids.MessageId(ids.uuid7())

    async def close_with(self, *_: object) -> ids.MessageId:
        """The context of the run is closed, after a last message."""
        return ids.MessageId.new()

    async def close(self, _token: str) -> None:
        """The context of the run is closed."""

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and data of what was told."""
        return [(event.type, orjson.loads(event.data)) for request in self.requests for event in request.events]


class Entitled:
    """Everything is allowed."""

    def __init__(self, mine: object) -> None:
        self._mine = mine

    def of_context(self, *_: object) -> Any:
        """What may be called."""
        return self._mine

    def require_begin(self, *_: object) -> None:
        """May begin."""


class World:
    """An engine and what is around it."""

    def __init__(self, folder: Path, mine: object) -> None:
        self.record = Record()
        there: Any = self.record
        entitled: Any = Entitled(mine)
        self.spaces = workspace.Workspaces(folder / "work", None, 1)  # type: ignore[arg-type]
        agents = agents_.AgentRegistry([swift, raiser, sleeper, survivor, blind, heavy])
        tools = dispatch.Dispatchers(tools_.ToolRegistry([echo]))
        limits, seen = settings.DispatcherSettings(), executions.Executions(agents)
        self.engine = engine.ExecutionEngine(there, there, there, there, agents, tools, entitled, self.spaces, there, limits, seen)

    def running(self, spec: AgentSpec, *, deadline_s: float = 30, epoch: int = 1, **claimed: Any) -> engine.Running:
        """A run of an agent, claimed."""
        run_id = ids.RunId.new()
        context = UserExecutionContext.from_request(
            user_id=ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=run_id,
            request_id="r", roles=("user",), tier="free",
        )  # fmt: skip
        stored = context.to_proto().SerializeToString(deterministic=True)
        order = runs.Order(run_id, "agent", spec.name, "What now?", b"{}", deadline_s, ids.uuid7(), stored, "token", "")
        return engine.Running(runs.Claim(order, epoch, cancelled="", expired=False, **claimed), "token")

    async def ended(self, running: engine.Running) -> tuple[runs.RunState, list[str]]:
        """How a run ends: its state, and the stages that were passed here."""
        await asyncio.wait_for(self.engine.run(running), 20)
        (end,) = self.record.ends
        return end


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A fresh one."""
    monkeypatch.setattr(running, "GRACE_S", 0.05)
    BEGUN.clear()
    world = World(tmp_path, await permitted("tools:execute"))
    yield world
    await world.engine.close()
    world.spaces.close()


async def test_an_agent_that_returned_has_passed_all_its_stages(world: World) -> None:
    state, passed = await world.ended(world.running(swift))
    assert state == runs.RunState.COMPLETED
    assert passed == [stages.STARTED, stages.COMPLETED, stages.RESPONDED, stages.RESPONSE_PERSISTED]


async def test_the_execution_of_an_agent_that_raised_is_over_without_an_answer(world: World) -> None:
    assert await world.ended(world.running(raiser)) == (runs.RunState.FAILED, [stages.STARTED, stages.COMPLETED])


async def test_one_that_was_stopped_has_not_completed_its_execution(world: World) -> None:
    running, tasks = world.running(sleeper), lifecycle.Tasks()
    ended = tasks.spawn(world.ended(running), "run")
    while not running.passed.times:  # noqa: ASYNC110 - nobody tells when a stage is passed
        await asyncio.sleep(0.01)
    running.ask_to_stop()
    assert await ended == (runs.RunState.CANCELLED, [stages.STARTED])


async def test_one_whose_time_ran_out_has_not_completed_its_execution(world: World) -> None:
    assert await world.ended(world.running(sleeper, deadline_s=0.05)) == (runs.RunState.TIMED_OUT, [stages.STARTED])


async def test_a_run_at_its_end_is_brought_there_and_not_begun(world: World) -> None:
    state, passed = await world.ended(world.running(swift, epoch=2, finishing=True))
    assert (state, passed, BEGUN) == (runs.RunState.FAILED, [], [])
    ((kind, data),) = world.record.events
    assert (kind, data["error"]["code"], world.record.requests[0].end) == ("agent_failed", "OWNER_LOST", True)


async def test_a_run_at_its_end_that_was_cancelled_ends_as_that(world: World) -> None:
    running = world.running(swift, epoch=2, finishing=True)
    running.ask_to_stop()
    assert (await world.ended(running))[0] == runs.RunState.CANCELLED
    assert ([kind for kind, _ in world.record.events], BEGUN) == (["agent_cancelled"], [])


async def test_a_run_at_its_end_whose_record_has_ended_is_only_closed(world: World) -> None:
    world.record.found = events_pb2.OpenRunResponse(next_seq=1, ended=True, terminal_type="agent_completed")
    assert (await world.ended(world.running(swift, epoch=2, finishing=True)))[0] == runs.RunState.COMPLETED
    assert (world.record.requests, BEGUN) == ([], [])


async def test_a_run_that_nobody_brought_to_its_end_is_begun_by_the_next_owner(world: World) -> None:
    assert (await world.ended(world.running(swift, epoch=2)))[0] == runs.RunState.COMPLETED
    assert BEGUN == ["What now?"]


async def test_an_agent_that_outlives_its_end_puts_nothing_after_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told = journal.AgentWebSocketBridge.timed_out

    def and_more(bridge: journal.AgentWebSocketBridge, error: errors.NetraError) -> None:
        told(bridge, error)
        bridge.thinking("I am still here.", 9, None, "9:think")

    monkeypatch.setattr(journal.AgentWebSocketBridge, "timed_out", and_more)
    assert (await world.ended(world.running(survivor, deadline_s=0.1)))[0] == runs.RunState.TIMED_OUT
    last = world.record.requests[-1]
    assert (world.record.events[-1][0], last.end, last.events[-1].type) == ("agent_timed_out", True, "agent_timed_out")
    told_then = len(world.record.requests)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(world.record.requests) == told_then


async def test_an_agent_whose_record_is_somebody_elses_stops_and_holds_up_nobody(world: World) -> None:
    world.record.fenced = True
    await asyncio.wait_for(world.engine.run(world.running(blind)), 5)
    assert (len(world.record.requests), world.record.ends) == (1, [])


async def test_arguments_that_were_refused_for_their_size_are_not_told(world: World) -> None:
    assert (await world.ended(world.running(heavy)))[0] == runs.RunState.COMPLETED
    told = dict(world.record.events)
    assert told["tool_executing"]["parameters"] == {}
    assert told["tool_completed"]["error"]["code"] == told["agent_completed"]["result"] == "FRAME_TOO_LARGE"
