"""Steps of agents: their keys, side by side and in children, whatever the timing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
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
from services.dispatcher import journal, outbox, turn
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import dispatch, workspace
from services.dispatcher.tools import registry as tools_
from tests.fixtures import workspaces
from tests.fixtures.permits import permitted


class Record:
    """The far end of the append stream: takes what comes, in a moment or later."""

    def __init__(self, chance: random.Random) -> None:
        # what is wrong with an append is raised by the next barrier
        self._chance, self._tasks = chance, lifecycle.Tasks(on_failure=lambda _error: None)
        self.events: list[dict[str, Any]] = []
        self.steps: dict[str, Any] = {}
        self.shown: list[dict[str, Any]] = []

    def append(self, request: events_pb2.AppendRequest, user_id: str, token: object = None) -> asyncio.Future[None]:
        """Take an append."""
        return self._tasks.spawn(self._taken(request), "append")

    def show(self, request: events_pb2.AppendRequest, user_id: str) -> None:
        """Who watches sees it."""
        self.shown += [{"type": one.type, **orjson.loads(one.data)} for one in request.transients]

    async def _taken(self, request: events_pb2.AppendRequest) -> None:
        await moments(self._chance)
        self.events += [{"type": event.type, **orjson.loads(event.data)} for event in request.events]
        for step in request.steps:
            assert step.key not in self.steps
            assert len(step.key) <= 200
            self.steps[step.key] = orjson.loads(step.result)


async def moments(chance: random.Random) -> None:
    """A few turns of the loop."""
    for _ in range(chance.randrange(12)):
        await asyncio.sleep(0)


class World:
    """One run without services: agents and tools in, record out; `seed` decides how long everything takes."""

    def __init__(self, folder: Path, *agents: AgentSpec, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.record = Record(self.chance)
        self._folder, self._agents = folder, agents
        self.hanging = asyncio.Semaphore(0)
        self.stopped: list[str] = []

    @contextlib.asynccontextmanager
    async def turn(self, **inputs: object) -> AsyncIterator[turn.Turn]:
        """The turn of an agent named `first`."""

        @tool()
        async def echo(text: str) -> str:
            """Returns the text, at some time."""
            await moments(self.chance)
            return text

        @tool()
        async def refuse(text: str) -> None:
            """Raises, at some time."""
            await moments(self.chance)
            raise errors.InvalidPayload(text, field=text)

        @tool(timeout_s=60)
        async def hang(text: str) -> None:
            """Waits for its end."""
            self.hanging.release()
            try:
                await asyncio.Event().wait()
            finally:
                self.stopped.append(text)

        run_id = ids.RunId.new()
        context = UserExecutionContext.from_request(
            user_id=ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=run_id,
            request_id="r", roles=("user",), tier="free",
        )  # fmt: skip
        spaces = workspace.Workspaces(self._folder / "work", None, 1)  # type: ignore[arg-type]
        tools, agents = tools_.ToolRegistry([echo, refuse, hang]), agents_.AgentRegistry(self._agents)
        files = spaces.of(run_id, workspaces.no_token)
        owned = outbox.Owned(run_id, context.user_id, 1, str, files.keep)
        bridge = journal.AgentWebSocketBridge(self.record, owned, 1, "first")
        mine = await permitted("tools:execute")
        async with dispatch.UnifiedToolDispatcher.for_context(context, tools, mine, bridge, files) as dispatcher:
            yield turn.Turn("What now?", inputs, context, bridge, dispatcher, agents.get)
        await bridge.barrier()
        spaces.close()

    @property
    def keys(self) -> list[str]:
        """The keys of the steps in the order of the record, but for those that say that a call begins."""
        return [key for key, step in self.record.steps.items() if "tool_call" not in step or step["tool_call"]["state"] != "intent"]

    def results(self) -> dict[str, Any]:
        """What each step that is a tool came to."""
        return {key: step["result"] for key, step in self.record.steps.items() if "result" in step}


Made = Callable[..., World]


@pytest.fixture
def world(tmp_path: Path) -> Made:
    """Makes worlds."""
    return lambda *agents, **more: World(tmp_path, *agents, **more)


@agent("leaf")
async def leaf(turn: Turn) -> list[object]:
    """Does two things after each other."""
    await turn.think("A leaf.")
    return [await turn.tool("echo", text=f"{turn.inputs['name']} {place}") for place in range(2)]


@agent("branch")
async def branch(turn: Turn) -> list[object]:
    """Does two things at once, then another."""
    both = await turn.gather(turn.child("leaf", name=f"{turn.inputs['name']}/left"), turn.tool("echo", text="right"))
    return [*both, await turn.tool("echo", text="after")]


async def test_keys_are_the_same_however_steps_that_run_at_once_interleave(world: Made) -> None:
    seen, orders = set(), set()
    for seed in range(40):
        here = world(leaf, branch, seed=seed)
        async with here.turn() as first:
            await first.think("Before.")
            branches = (first.child("branch", name=name) for name in "ab")
            await first.gather(*branches, first.sleep(0), first.tool("echo", text="c"))
            await first.tool("echo", text="last")
        assert first.steps == len(here.keys) == 14
        seen.add(orjson.dumps(here.results(), option=orjson.OPT_SORT_KEYS))
        orders.add(tuple(here.keys))
    assert len(seen) == 1
    assert len(orders) > 1
    assert orjson.loads(seen.pop()) == {
        "2.0:1:child:branch/1.0:1:child:leaf/2:tool:echo": "a/left 0", "2.0:1:child:branch/1.0:1:child:leaf/3:tool:echo": "a/left 1",
        "2.0:1:child:branch/1.1:1:tool:echo": "right", "2.0:1:child:branch/2:tool:echo": "after",
        "2.1:1:child:branch/1.0:1:child:leaf/2:tool:echo": "b/left 0", "2.1:1:child:branch/1.0:1:child:leaf/3:tool:echo": "b/left 1",
        "2.1:1:child:branch/1.1:1:tool:echo": "right", "2.1:1:child:branch/2:tool:echo": "after",
        "2.3:1:tool:echo": "c", "3:tool:echo": "last",
    }  # fmt: skip


async def test_results_come_in_the_order_given(world: Made) -> None:
    for seed in range(10):
        async with world(seed=seed).turn() as first:
            assert await first.gather(*(first.tool("echo", text=str(place)) for place in range(5))) == ["0", "1", "2", "3", "4"]
            assert await first.gather() == []


async def test_when_one_fails_the_others_are_gone_before_it_is_raised(world: Made) -> None:
    for seed in range(20):
        here = world(seed=seed)
        async with here.turn() as first:
            with pytest.raises(errors.InvalidPayload) as caught:
                await first.gather(*(first.tool("refuse", text=name) for name in "xyz"), first.tool("hang", text="a"))
            await first.think("After.")
        types = [event["type"] for event in here.record.events]
        told = [event for event in here.record.events if event["type"] == "tool_completed"]
        assert types[-1] == "agent_thinking"
        assert types.count("tool_executing") == len(told)
        first_error = next(event["error"]["message"] for event in told if event["status"] == "error")
        assert (first_error, here.stopped) == (caught.value.message, ["a"])


async def test_one_that_was_stopped_before_it_began_leaves_no_warning(world: Made) -> None:
    here = world()
    async with here.turn() as first:
        with pytest.raises(errors.NotFound):
            await first.gather(first.child("missing"), first.tool("echo", text="x"), first.gather(first.tool("echo", text="y")))
        assert await first.tool("echo", text="after") == "after"
        assert not lifecycle.told_to_stop()


async def test_a_failure_of_one_stops_a_tool_of_another(world: Made) -> None:
    here = world()
    async with here.turn() as first:
        with pytest.raises(errors.InvalidPayload, match="x"):
            await first.gather(first.tool("hang", text="a"), first.gather(first.tool("hang", text="b"), first.tool("refuse", text="x")))
        assert sorted(here.stopped) == ["a", "b"]


async def test_a_cancel_stops_all_of_them(world: Made) -> None:
    here = world()
    async with here.turn() as first, asyncio.TaskGroup() as group:
        work = first.gather(first.tool("hang", text="a"), first.gather(first.tool("hang", text="b")))
        running = group.create_task(_awaited(work))
        await asyncio.wait_for(here.hanging.acquire(), 10)
        await asyncio.wait_for(here.hanging.acquire(), 10)
        running.cancel()
        await asyncio.wait({running})
        assert (sorted(here.stopped), running.cancelled()) == (["a", "b"], True)


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


async def test_a_child_speaks_in_its_own_name_and_gets_what_its_parent_has(world: Made) -> None:
    @agent("inner")
    async def inner(turn: Turn) -> object:
        """Shows what it got."""
        await turn.think("Inner.")
        await turn.tool("echo", text="x")
        return [turn.request, dict(turn.inputs)]

    here = world(inner)
    async with here.turn(a=1, b=2) as first:
        await first.think("First.")
        assert await first.child("inner", b=3) == ["What now?", {"a": 1, "b": 3}]
        assert await first.child("inner", request="And now?") == ["And now?", {"a": 1, "b": 2}]
        await first.think("Last.")
    events = here.record.events
    assert [event["agent_name"] for event in events] == ["first", *["inner"] * 6, "first"]
    assert len({event["agent_id"] for event in events}) == 1
    assert [event["step_number"] for event in events if event["type"] == "agent_thinking"] == [1, 2, 3, 4]


async def test_text_that_is_shown_is_no_step_and_not_recorded(world: Made) -> None:
    @agent("inner")
    async def inner(turn: Turn) -> None:
        """Shows something of its own."""
        turn.delta("inner")

    here = world(inner)
    async with here.turn() as first:
        await first.think("First.")
        first.delta("a")
        first.delta("")
        await first.child("inner")
        await first.think("Last.")
        assert first.steps == 2
    assert [(one["type"], one["agent_name"], one["text"]) for one in here.record.shown] == [
        ("agent_delta", "first", "a"), ("agent_delta", "inner", "inner"),
    ]  # fmt: skip
    assert [event["type"] for event in here.record.events] == ["agent_thinking"] * 2
    assert list(here.record.steps) == ["1:think", "3:think"]


async def test_generations_are_counted(world: Made) -> None:
    deepest = []

    @agent("endless")
    async def endless(turn: Turn) -> None:
        """Hands on to itself."""
        deepest.append(await turn.tool("echo", text="down"))
        await turn.child("endless")

    here = world(endless)
    async with here.turn() as first:
        with pytest.raises(errors.DepthExceeded, match="at most 10"):
            await first.child("endless")
    assert len(deepest) == len(here.results()) == 10


async def test_a_child_that_there_is_not_is_named(world: Made) -> None:
    async with world(leaf).turn() as first:
        with pytest.raises(errors.NotFound, match=r"There are: leaf\."):
            await first.child("missing")


async def test_long_names_make_no_key_that_the_record_refuses(world: Made) -> None:
    name = "n" * 64

    @agent(name)
    async def inner(turn: Turn) -> None:
        """Hands on twice."""
        if turn.inputs["left"]:
            await turn.child(name, left=turn.inputs["left"] - 1)
        await turn.tool("echo", text=str(turn.inputs["left"]))

    here = world(inner)
    async with here.turn() as first:
        await first.gather(first.child(name, left=3), first.child(name, left=3))
        with pytest.raises(errors.NotFound):
            await first.tool("t" * 500)
    assert sorted(here.results().values()) == sorted("0123" * 2)
    assert len(here.keys) == 9
