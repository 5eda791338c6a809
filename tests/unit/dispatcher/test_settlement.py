"""Calls that a dead owner left, taken up by an engine: what is done, what is told, what is answered, and how many appends a call takes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from chassis import lifecycle
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.events.v1 import events_pb2
from netra.tool import Settled, ToolContext, ToolSpec, tool
from services.dispatcher import engine, executions, ledger, outbox, runs, settings
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import dispatch, workspace
from services.dispatcher.tools import registry as tools_
from tests.fixtures.permits import permitted


class Record:
    """The record of one run: what is appended to it is found in it."""

    def __init__(self) -> None:
        self.requests: list[events_pb2.AppendRequest] = []
        self.ends: list[tuple[runs.RunState, bytes]] = []
        # the context of the run is closed
        self.closed = asyncio.Event()

    async def open(self, *_: object) -> events_pb2.OpenRunResponse:
        """What there is so far."""
        told = [event for request in self.requests for event in request.events]
        opened = {event.tool_call_id for event in told if event.type == "tool_executing"}
        closed = {event.tool_call_id for event in told if event.type == "tool_completed"}
        ended = any(request.end for request in self.requests)
        return events_pb2.OpenRunResponse(
            next_seq=len(told) + 1, ended=ended, terminal_type=told[-1].type if ended else "", open_tool_calls=sorted(opened - closed)
        )

    async def steps(self, *_: object) -> AsyncIterator[tuple[str, bytes]]:
        """The steps so far."""
        for request in self.requests:
            for step in request.steps:
                yield step.key, step.result

    def append(self, request: events_pb2.AppendRequest, _user_id: str, _token: object = None) -> asyncio.Future[None]:
        """Take an append."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests.append(request)
        asyncio.get_running_loop().call_soon(answer.set_result, None)
        return answer

    def show(self, *_: object) -> None:
        """Nobody watches."""

    async def finishing(self, *_: object) -> bool | None:
        """The run is ours."""
        return False

    async def ended(
        self, _run_id: object, _epoch: int, state: runs.RunState, outcome: bytes, _passed: object, *, context_open: bool
    ) -> None:
        """The end of a run, whose context is closed already, or will be."""
        assert context_open is not self.closed.is_set()
        self.ends.append((state, outcome))

    async def close(self, _token: str) -> None:
        """The context of the run is closed."""
        self.closed.set()

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


class World:
    """A run of one call, whose owners come and go, and the tools that they have."""

    def __init__(self, folder: Path, mine: object) -> None:
        self.record, self.made, self.asked = Record(), list[str](), list[Mapping[str, Any]]()
        self.holds, self.began = asyncio.Event(), asyncio.Event()
        self._folder, self._entitled = folder, Entitled(mine)
        self.spaces = workspace.Workspaces(folder / "work", None, 1)  # type: ignore[arg-type]
        self.says: Any = None
        self._tools = [self._pay(), self._order(), self._put(), self._look()]
        self._run_id = ids.RunId.new()

    async def _make(self, context: ToolContext, word: str) -> str:
        self.made.append(context.effect_key)
        self.began.set()
        if self.holds.is_set():
            await asyncio.Event().wait()
        return f"{word} {len(self.made)}"

    def _pay(self) -> ToolSpec:
        @tool(side_effects=True)
        async def pay(context: ToolContext, word: str) -> str:
            """Has an effect."""
            return await self._make(context, word)

        return pay

    def _put(self) -> ToolSpec:
        @tool(side_effects=True, idempotent=True)
        async def put(context: ToolContext, word: str, api_key: str = "") -> str:
            """Has an effect that may come twice."""
            return await self._make(context, word)

        return put

    def _look(self) -> ToolSpec:
        @tool()
        async def look(context: ToolContext, word: str) -> str:
            """Has no effect."""
            return await self._make(context, word)

        return look

    def _order(self) -> ToolSpec:
        async def found(context: ToolContext, arguments: Mapping[str, Any]) -> Settled | None:
            self.asked.append({"effect_key": context.effect_key, **arguments})
            if isinstance(self.says, BaseException):
                raise self.says
            if self.says == "never":
                await asyncio.Event().wait()
            return self.says if self.says is None or isinstance(self.says, Settled) else None

        @tool(side_effects=True, reconcile=found)
        async def order(context: ToolContext, word: str) -> str:
            """Has an effect that can be asked about."""
            return await self._make(context, word)

        return order

    def without(self, name: str) -> None:
        """The next owner does not have this tool."""
        self._tools = [spec for spec in self._tools if spec.name != name]

    def _engine(self) -> engine.ExecutionEngine:
        there: Any = self.record
        entitled: Any = self._entitled
        agents = agents_.AgentRegistry([])
        return engine.ExecutionEngine(
            there, there, there, there, agents, dispatch.Dispatchers(tools_.ToolRegistry(self._tools)), entitled, self.spaces, there,
            settings.DispatcherSettings(), executions.Executions(agents),
        )  # fmt: skip

    def _running(self, name: str, epoch: int, **claimed: Any) -> engine.Running:
        context = UserExecutionContext.from_request(
            user_id=ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=self._run_id,
            request_id="r", roles=("user",), tier="free",
        )  # fmt: skip
        stored = context.to_proto().SerializeToString(deterministic=True)
        order = runs.Order(self._run_id, "tool", name, "", b"{}", 30, "", stored, "token", "")
        return engine.Running(runs.Claim(order, epoch, cancelled="", expired=False, **claimed), "token")

    async def call(self, name: str, **arguments: str) -> pb.ExecuteToolResponse:
        """The first owner makes the call, to its end; its context is closed, after whoever asked was told."""
        made = self._engine()
        kept: list[bytes] = []

        def told(answer: bytes) -> None:
            # in the record it is over by now; whoever waits need not wait for more
            assert self.record.requests[-1].end
            assert not self.record.ends
            assert not self.record.closed.is_set()
            kept.append(answer)

        await asyncio.wait_for(made.call(self._running(name, 1), {"word": "w", **arguments}, told), 10)
        assert self.record.ends
        assert self.record.closed.is_set()
        await made.close()
        return pb.ExecuteToolResponse.FromString(kept[0])

    async def begin(self, name: str, **arguments: str) -> None:
        """The first owner begins the call, and is let go of in the middle of it."""
        made, tasks = self._engine(), lifecycle.Tasks(on_failure=lambda _error: None)
        self.holds.set()
        task = tasks.spawn(made.call(self._running(name, 1), {"word": "w", **arguments}, lambda _answer: None), "call")
        await asyncio.wait_for(self.began.wait(), 10)
        # without effects nothing is waited for; the record has it a moment later
        while not self.record.requests:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait({task})
        await made.close()
        self.holds.clear()

    async def take_up(
        self, name: str, epoch: int = 2, *, stop: bool = False, **claimed: Any
    ) -> tuple[runs.RunState, pb.ExecuteToolResponse]:
        """Another owner takes the call up: how the run ends, and what is answered."""
        if self.says == "never":
            self._tools = [dataclasses.replace(spec, timeout_s=0.1) for spec in self._tools]
        made, running = self._engine(), self._running(name, epoch, **claimed)
        if stop:
            running.ask_to_stop()
        await asyncio.wait_for(made.run(running), 10)
        await made.close()
        ((state, kept),) = self.record.ends
        return state, pb.ExecuteToolResponse.FromString(kept)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A fresh one."""
    world = World(tmp_path, await permitted("tools:execute"))
    yield world
    world.spaces.close()


def told(answer: pb.ExecuteToolResponse) -> tuple[str, str]:
    """Status, and the result or the code of the error."""
    return answer.status, json.loads(answer.result) if answer.result else answer.error.code


@pytest.mark.parametrize(("name", "appends"), [("look", 1), ("pay", 2)])
async def test_a_call_takes_one_append_and_one_more_when_it_has_effects(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, appends: int
) -> None:  # fmt: skip
    # however long it takes here
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    assert told(await world.call(name)) == ("success", "w 1")
    assert len(world.record.requests) == appends
    assert [kind for kind, _ in world.record.events] == ["tool_executing", "tool_completed"]


LEFT = [
    # tool, what it says when it is asked; status, what it comes to, how it was settled, how often it was made
    ("pay", None, "unknown", "OWNER_LOST", "unknown", 1),
    ("put", None, "success", "w 2", "repeat", 2),
    ("look", None, "success", "w 2", "repeat", 2),
    ("order", Settled(True, "found"), "success", "found", "reconcile", 1),
    ("order", Settled(False), "success", "w 2", "repeat", 2),
    ("order", None, "unknown", "OWNER_LOST", "unknown", 1),
    ("order", ValueError("x"), "unknown", "OWNER_LOST", "unknown", 1),
    ("order", errors.Unavailable(), "unknown", "OWNER_LOST", "unknown", 1),
    ("order", "never", "unknown", "OWNER_LOST", "unknown", 1),
    # it was made, and that is not what it returns
    ("order", Settled(True, 7), "error", "TOOL_FAILED", "reconcile", 1),
]


@pytest.mark.parametrize(("name", "says", "status", "outcome", "how", "made"), LEFT)
async def test_an_open_call_is_settled_as_its_tool_declares(
    world: World, name: str, says: Any, status: str, outcome: str, how: str, made: int
) -> None:
    await world.begin(name)
    world.says = says
    state, answer = await world.take_up(name)
    assert (told(answer), state) == ((status, outcome), runs.RunState.COMPLETED if status == "success" else runs.RunState.FAILED)
    (began, first), (ended, last) = world.record.events
    assert (began, ended, last["status"], last["settled"]) == ("tool_executing", "tool_completed", status, how)
    assert first["tool_call_id"] == last["tool_call_id"] == answer.tool_call_id
    assert last["attempts"] == answer.attempts == made
    assert world.made == [ledger.effect_key(world._run_id, "call")] * made
    assert [asked["effect_key"] for asked in world.asked] == ([world.made[0]] if name == "order" else [])


async def test_what_an_owner_that_was_let_go_of_stops_is_not_how_it_ended(world: World) -> None:
    await world.begin("pay")
    assert [kind for kind, _ in world.record.events] == ["tool_executing"]


async def test_an_outcome_in_the_record_is_the_answer_and_nothing_is_made_again(world: World) -> None:
    first = await world.call("put")
    world.record.ends.clear()
    state, again = await world.take_up("put")
    assert (again, state, len(world.made)) == (first, runs.RunState.COMPLETED, 1)


async def test_a_settled_call_stays_as_it_was_settled(world: World) -> None:
    await world.begin("pay")
    _, first = await world.take_up("pay")
    world.record.ends.clear()
    state, again = await world.take_up("pay", 3)
    assert (again, state, len(world.made)) == (first, runs.RunState.FAILED, 1)


async def test_one_that_was_never_told_never_began(world: World) -> None:
    state, answer = await world.take_up("pay")
    assert (told(answer), state, world.made) == (("error", "OWNER_LOST"), runs.RunState.FAILED, [])
    assert [kind for kind, _ in world.record.events] == ["agent_failed"]


async def test_one_with_a_secret_is_not_made_again(world: World) -> None:
    await world.begin("put", api_key="hunter2")
    assert not any(b"hunter2" in result for _, result in [step async for step in world.record.steps()])
    _, answer = await world.take_up("put")
    assert (told(answer), len(world.made)) == (("unknown", "OWNER_LOST"), 1)


@pytest.mark.parametrize("name", ["put", "look"])
async def test_a_tool_that_is_gone_leaves_its_calls_unknown(world: World, name: str) -> None:
    await world.begin(name)
    world.without(name)
    _, answer = await world.take_up(name)
    assert (told(answer), len(world.made)) == (("unknown", "OWNER_LOST"), 1)


@pytest.mark.parametrize(("stop", "finishing"), [(True, False), (False, True)])
async def test_what_is_to_end_is_asked_about_and_not_made_again(world: World, stop: bool, finishing: bool) -> None:
    await world.begin("order")
    world.says = Settled(False)
    _, answer = await world.take_up("order", stop=stop, finishing=finishing)
    assert (told(answer), len(world.made), len(world.asked)) == (("error", "OWNER_LOST"), 1, 1)
    assert world.record.events[-1][1]["settled"] == "dropped"


@pytest.mark.parametrize("name", ["order", "put", "look"])
async def test_what_too_many_owners_did_not_survive_is_left_alone(world: World, name: str) -> None:
    await world.begin(name)
    world.says = Settled(True, "found")
    _, answer = await world.take_up(name, 12, takeovers=11)
    assert (told(answer), len(world.made), world.asked) == (("unknown", "OWNER_LOST"), 1, [])


async def test_a_repetition_that_is_refused_says_nothing_of_the_first_time(world: World) -> None:
    await world.begin("put")
    world._entitled = Entitled(await permitted("data:read"))
    _, answer = await world.take_up("put")
    assert (told(answer), len(world.made)) == (("unknown", "OWNER_LOST"), 1)
    assert "not made again" in answer.error.message


async def test_a_repetition_that_its_owner_does_not_survive_is_counted(world: World) -> None:
    await world.begin("put")
    world.began.clear()
    world.holds.set()
    made, tasks = world._engine(), lifecycle.Tasks(on_failure=lambda _error: None)
    task = tasks.spawn(made.run(world._running("put", 2)), "run")
    await asyncio.wait_for(world.began.wait(), 10)
    task.cancel()
    await asyncio.wait({task})
    await made.close()
    world.holds.clear()
    _, answer = await world.take_up("put", 3)
    assert (told(answer), answer.attempts, len({*world.made})) == (("success", "w 3"), 3, 1)
    assert [key async for key, _ in world.record.steps()] == ["call~1", "call~2", "call~3", "call"]
