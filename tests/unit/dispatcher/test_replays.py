"""Runs whose owners die: what is in the record is not done a second time, and whoever carries on comes to the same end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from netra import errors, ids
from netra.agent import AgentSpec, Turn, agent
from netra.tool import ToolSpec, tool
from services.dispatcher import runs
from tests.fixtures import lives, replayed
from tests.fixtures.replayed import EFFECTS, HELD, TOOLS, Made


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("name", ["sequence", "parallel", "recovery", "loop", "swift"])
async def test_an_owner_that_dies_anywhere_is_followed_to_the_same_end(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, many: bool
) -> None:
    if many:
        lives.at_once(monkeypatch)
    run_id = ids.uuid7()
    calm = await made(run_id=run_id)
    assert await calm.live(name) is runs.RunState.COMPLETED
    effects, appends = len({*EFFECTS}), len(calm.record.requests)
    assert len(EFFECTS) == effects
    for dies_at in range(appends):
        EFFECTS.clear()
        world = await made(run_id=run_id)
        assert await world.killed(name, dies_at), (dies_at, appends)
        assert await world.live(name) is runs.RunState.COMPLETED, (dies_at, world.record.events[-1])
        assert len(EFFECTS) == len({*EFFECTS}), dies_at
        if name != "recovery":
            assert replayed.shape(world) == replayed.shape(calm), dies_at
            assert len(EFFECTS) == effects
        kinds = world.record.kinds
        assert [kinds.count(kind) for kind in ("agent_started", "message_created", "agent_completed")] == [1, 2, 1], dies_at
        assert kinds[-1] == "agent_completed"
        assert world.record.kinds.count("tool_executing") == world.record.kinds.count("tool_completed")


async def test_owners_that_die_one_after_the_other_add_up_to_one_run(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world = await made()
    while await world.killed("loop", 2):
        continue
    assert world.record.state is runs.RunState.COMPLETED
    assert world.epoch > 5
    assert len(EFFECTS) == len({*EFFECTS})
    assert world.record.of("agent_completed")[0]["usage"]["tools"] == len(EFFECTS)


@agent("asker")
async def asker(turn: Turn) -> str:
    """Does what nobody can look for."""
    try:
        return str(await turn.tool("pay", word="p"))
    except errors.OwnerLost as error:
        return error.code


@pytest.mark.parametrize(
    ("decision", "result", "status", "effects"), [("approve", "p", "success", 2), ("reject", "OWNER_LOST", "unknown", 1)]
)
async def test_whether_a_call_of_unknown_outcome_is_made_again_is_for_a_person_to_say(
    made: Made, decision: str, result: str, status: str, effects: int
) -> None:
    world = await made(asker)
    await replayed.left(world, "asker", "tool_executing")
    assert await world.live("asker") is runs.RunState.SUSPENDED
    assert world.record.away["waits_for"] == "approval"
    (asked,) = world.record.of("approval_requested")
    assert (asked["tool_name"], asked["parameters"], asked["approval_id"]) == ("pay", {"word": "p"}, world.record.away["asked"][0])
    world.people.vote(decision)
    assert await world.live("asker") is runs.RunState.COMPLETED
    assert (world.record.of("agent_completed")[0]["result"], world.record.of("tool_completed")[0]["status"]) == (result, status)
    assert (len(EFFECTS), len({*EFFECTS})) == (effects, 1)
    assert world.record.kinds == [
        "agent_started", "message_created", "tool_executing", "approval_requested", "agent_suspended", "agent_resumed",
        "approval_resolved", "tool_completed", "message_created", "agent_completed",
    ]  # fmt: skip


async def test_a_word_on_one_attempt_is_none_on_the_next(made: Made) -> None:
    world = await made(asker)
    await replayed.left(world, "asker", "tool_executing")
    assert await world.live("asker") is runs.RunState.SUSPENDED
    world.people.vote("approve")
    before = len(EFFECTS)
    HELD[0].hold()
    owner = world.owner()
    world.record.state = runs.RunState.RUNNING
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("asker")))
        await lives.until(lambda: len(EFFECTS) > before)
        world.record.dies_at, world.record.came = 0, 0
        run.cancel()
    HELD[0].release()
    world.record.dies_at = None
    world.record.dead.clear()
    assert await world.live("asker") is runs.RunState.SUSPENDED
    assert len(world.people.wanted) == 2
    world.people.vote("reject")
    assert await world.live("asker") is runs.RunState.COMPLETED
    assert world.record.of("tool_completed")[0]["attempts"] == 2


async def test_a_large_result_is_read_from_where_it_is(made: Made) -> None:
    @agent("reader")
    async def reader(turn: Turn) -> int:
        """Uses a large result."""
        found = await turn.tool("heavy", size=300_000)
        await turn.tool("order", word=str(len(found)))
        return len(found)

    world = await made(reader)
    await replayed.left(world, "reader", "tool_executing", 2)
    assert await world.live("reader") is runs.RunState.COMPLETED
    assert world.record.of("agent_completed")[0]["result"] == 300_000
    assert [key for key in world.record.steps_kept if "heavy" in key and "~" not in key] == ["1:tool:heavy"]


class Fickle:
    """An agent that does something else when it is run again."""

    def __init__(self) -> None:
        self.lives = 0

    def spec(self, other: Callable[[Turn], Awaitable[object]]) -> AgentSpec:
        """The agent; `other` is what it does from its second life on."""

        @agent("fickle")
        async def fickle(turn: Turn) -> object:
            """Changes its mind."""
            self.lives += 1
            if self.lives > 1:
                return await other(turn)
            await turn.think("One.")
            await turn.gather(turn.tool("look", word="a"), turn.tool("look", word="b"))
            return await turn.tool("order", word="c")

        return fickle


async def _as_before(turn: Turn) -> None:
    await turn.think("One.")
    await turn.gather(turn.tool("look", word="a"), turn.tool("look", word="b"))


async def _another_name(turn: Turn) -> None:
    await turn.tool("look", word="a")


async def _swallowed(turn: Turn) -> str:
    with contextlib.suppress(errors.NetraError):
        await turn.tool("look", word="a")
    with contextlib.suppress(errors.NetraError):
        await turn.tool("order", word="d")
    return "fine"


async def _no_strands(turn: Turn) -> None:
    await turn.think("One.")
    await turn.tool("look", word="a")


async def _fewer_strands(turn: Turn) -> None:
    await turn.think("One.")
    await turn.gather(turn.tool("look", word="a"))
    await turn.tool("order", word="c")


async def _shorter(turn: Turn) -> str:
    await _as_before(turn)
    return "done"


DIFFERENT = {
    "another step": (_another_name, "1:think", "1:tool:look"),
    "swallowed": (_swallowed, "1:think", "1:tool:look"),
    "no strands": (_no_strands, "2.0:1:tool:look", "2:tool:look"),
    "fewer strands": (_fewer_strands, "2.1:1:tool:look", "its end"),
    "shorter": (_shorter, "3:tool:order", "its end"),
}


@pytest.mark.parametrize("name", DIFFERENT)
async def test_an_agent_that_does_something_else_fails_by_it(made: Made, name: str) -> None:
    other, recorded, asked = DIFFERENT[name]
    world = await made(Fickle().spec(other))
    await replayed.left(world, "fickle", "tool_executing", 3)
    assert await world.live("fickle") is runs.RunState.FAILED
    details = world.record.of("agent_failed")[0]["error"]["details"]
    assert (details["field"], details["recorded"].removesuffix("~1"), details["asked"]) == ("step", recorded, asked)
    assert len(EFFECTS) == 1
    # the call that it did not come back to is settled, and told before the end
    assert world.record.of("tool_completed")[-1]["status"] == "success"
    assert world.record.kinds.count("tool_executing") == world.record.kinds.count("tool_completed")


async def test_a_step_that_was_stopped_before_anything_of_it_was_recorded_is_no_difference(made: Made) -> None:
    @agent("hasty")
    async def hasty(turn: Turn) -> str:
        """Stops what it began."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await turn.sleep(1)
        return str(await turn.tool("order", word="a"))

    world = await made(hasty)
    await replayed.left(world, "hasty", "tool_executing")
    assert await world.live("hasty") is runs.RunState.COMPLETED
    assert len(EFFECTS) == 1


class Failing:
    """Strands that run beside each other until one of them fails, in each life in another order."""

    def __init__(self) -> None:
        self.lives, self.seen = 0, list[list[str]]()
        self.free, self.hung = asyncio.Event(), asyncio.Event()

    @property
    def tools(self) -> list[ToolSpec]:
        """One that is stopped."""

        @tool(timeout_s=20)
        async def hang(word: str) -> None:
            """Waits for its end."""
            EFFECTS.append(("hang", word))
            self.hung.set()
            await asyncio.Event().wait()

        return [*TOOLS, hang]

    def spec(self) -> AgentSpec:
        """The agent."""

        @agent("failing")
        async def failing(turn: Turn) -> list[str]:
            """Goes on with what it has when one of its strands has failed."""
            self.lives += 1
            found: list[str] = []
            self.seen.append(found)
            try:
                await turn.gather(self._stopped(turn, found), self._free_later(turn, found), self._late(turn), self._fails(turn))
            except errors.NetraError as error:
                found.append(error.message)
            await turn.tool("order", word="after")
            return found

        return failing

    async def _stopped(self, turn: Turn, found: list[str]) -> None:
        found.append(await turn.tool("look", word="before it hangs"))
        await turn.tool("hang", word="h")

    async def _free_later(self, turn: Turn, found: list[str]) -> None:
        await self.free.wait()
        found.append(await turn.tool("order", word="never"))

    async def _late(self, turn: Turn) -> None:
        await self.free.wait()
        raise errors.NotFound("another error")

    async def _fails(self, turn: Turn) -> None:
        await turn.tool("look", word="first")
        await self.hung.wait()
        await turn.tool("refuse", word="the error")


async def test_strands_of_which_one_failed_come_as_far_as_they_came_then(made: Made) -> None:
    failing = Failing()
    world = await made(failing.spec(), tools=failing.tools)
    await replayed.left(world, "failing", "tool_executing", 5)
    # what another strand waited for has come meanwhile
    failing.free.set()
    assert await world.live("failing") is runs.RunState.COMPLETED
    assert (failing.lives, failing.seen) == (2, [["before it hangs", "the error"]] * 2)
    assert sorted(word for _, word in EFFECTS) == ["after", "h"]
    assert world.record.of("agent_completed")[0]["result"] == ["before it hangs", "the error"]


async def test_strands_of_which_nobody_says_which_failed_first_end_by_the_one_that_did(made: Made) -> None:
    failing, waits, looked = Failing(), asyncio.Event(), asyncio.Event()

    @agent("hanging")
    async def hanging(turn: Turn) -> str:
        """Ends by the error of a strand; the first time it does not come so far."""
        try:
            await turn.gather(failing._stopped(turn, []), _fails(turn), _looks(turn))
        except errors.NetraError as error:
            await waits.wait()
            return error.message
        return ""

    async def _fails(turn: Turn) -> None:
        await failing.hung.wait()
        await looked.wait()
        for _ in range(4):
            await turn.think("Not yet.")
        await turn.tool("refuse", word="the error")

    async def _looks(turn: Turn) -> None:
        for number in range(6):
            await turn.tool("look", word=str(number))
        looked.set()

    world = await made(hanging, tools=failing.tools)
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("hanging")))
        await lives.until(lambda: "1:gather" in world.record.steps_kept)
        run.cancel()
    # its owner died just before
    del world.record.steps_kept["1:gather"]
    waits.set()
    assert await world.live("hanging") is runs.RunState.COMPLETED
    assert world.record.of("agent_completed")[0]["result"] == "the error"
    assert [word for _, word in EFFECTS] == ["h"]


async def test_a_call_with_a_secret_is_not_asked_about(made: Made) -> None:
    @tool(side_effects=True)
    async def sign(api_key: str) -> None:
        """Has an effect, and needs a secret."""
        EFFECTS.append(("sign", ""))
        await HELD[0].passed()

    @agent("signer")
    async def signer(turn: Turn) -> None:
        """Signs."""
        await turn.tool("sign", api_key="hunter2-hunter2")

    world = await made(signer, tools=[sign])
    await replayed.left(world, "signer", "tool_executing")
    assert await world.live("signer") is runs.RunState.FAILED
    assert (world.people.wanted, world.record.of("tool_completed")[0]["status"]) == ([], "unknown")


async def test_a_child_that_was_in_time_is_not_late_when_it_is_taken_again(made: Made) -> None:
    goes_on = asyncio.Event()

    @tool()
    async def stand() -> None:
        """Stands still."""
        await goes_on.wait()

    @agent("boss")
    async def boss(turn: Turn) -> str:
        """Has a part done, in time."""
        found = await turn.child("leaf", name="x", deadline_s=10)
        await turn.tool("stand")
        return str(found)

    world = await made(replayed.leaf, boss, tools=[*TOOLS, stand])
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("boss")))
        await lives.until(lambda: "2:tool:stand~1" in world.record.steps_kept)
        run.cancel()
    goes_on.set()
    assert "1:child:leaf~1" in world.record.steps_kept
    assert await world.live("boss", ran_s=20.0) is runs.RunState.COMPLETED
    assert len(EFFECTS) == 1


@pytest.mark.parametrize(("name", "state"), [("swift", runs.RunState.COMPLETED), ("fails", runs.RunState.FAILED)])
async def test_the_thread_of_a_run_is_not_free_before_its_begin_is_recorded(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, state: runs.RunState
) -> None:
    @agent("fails")
    async def fails(turn: Turn) -> None:
        """Has nothing to answer."""
        raise errors.NotFound("Nothing is here.")

    world = await made(fails, replayed.AGENTS["swift"])
    owner, answers, append = world.owner(), list[tuple[asyncio.Future[None], asyncio.Future[None]]](), world.record.append

    def held(*request: Any) -> asyncio.Future[None]:
        answers.append((asyncio.get_running_loop().create_future(), append(*request)))
        return answers[-1][0]

    monkeypatch.setattr(world.record, "append", held)
    async with asyncio.TaskGroup() as group:
        group.create_task(owner.run(world.claimed(name)))
        await lives.until(lambda: answers)
        for _ in range(100):
            await asyncio.sleep(0)
        states, thread = [world.record.state], dict(world.record.thread)
        monkeypatch.setattr(world.record, "append", append)
        answers[0][0].set_result(None)
    assert [*states, world.record.state] == [runs.RunState.RUNNING, state]
    # nor does the answer go out before that which it rests on is there for whoever has to give it again
    assert thread == {}


async def test_a_child_that_was_late_is_late_again_and_not_run(made: Made) -> None:
    begun: list[str] = []

    @agent("slow")
    async def slow(turn: Turn) -> None:
        """Never ends."""
        begun.append("slow")
        await turn.think("Slow.")
        await turn.sleep(1)
        await asyncio.Event().wait()

    @agent("parent")
    async def parent(turn: Turn) -> str:
        """Does not wait for it."""
        try:
            await turn.child("slow", deadline_s=0.05)
        except errors.DeadlineExceeded:
            return str(await turn.tool("order", word="instead"))
        return "in time"

    world = await made(slow, parent)
    await replayed.left(world, "parent", "tool_executing")
    assert await world.live("parent") is runs.RunState.COMPLETED
    assert (world.record.of("agent_completed")[0]["result"], begun, len(EFFECTS)) == ("instead", ["slow"], 1)


async def test_a_child_calls_no_more_than_it_was_given(made: Made) -> None:
    @agent("helper", tools=("look", "order"))
    async def helper(turn: Turn) -> list[str]:
        """Tries all it knows."""
        found = []
        for name in ("look", "order", "pay"):
            try:
                found.append(str(await turn.tool(name, word="w")))
            except errors.PermissionDenied as error:
                found.append(error.code)
        return found

    @agent("boss")
    async def boss(turn: Turn) -> list[Any]:
        """Gives less and less."""
        return [await turn.child("helper"), await turn.child("helper", tools=["order", "pay"])]

    world = await made(helper, boss)
    assert await world.live("boss") is runs.RunState.COMPLETED
    denied = "PERMISSION_DENIED"
    assert world.record.of("agent_completed")[0]["result"] == [["w", "w", denied], [denied, "w", denied]]
