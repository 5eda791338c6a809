"""Runs that wait: for messages, for approvals, for a time; put away when nothing of them can go on, and carried on where they were."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from netra import errors
from netra.agent import AgentSpec, Turn, agent
from netra.tool import Settled, ToolContext, tool
from services.dispatcher import approvals, journal, parking, running, runs
from tests.fixtures import lives

MADE: list[str] = []


async def _found(_: ToolContext, arguments: Mapping[str, Any]) -> Settled:
    return Settled(arguments["word"] in MADE, arguments["word"])


@tool(side_effects=True, reconcile=_found)
async def mark(word: str) -> str:
    """Leaves a mark."""
    MADE.append(word)
    return word


@agent("interview")
async def interview(turn: Turn) -> dict[str, Any]:
    """Asks twice."""
    await turn.tool("mark", word="begun")
    first = await turn.wait_for_message()
    await turn.tool("mark", word=first.text)
    second = await turn.wait_for_message()
    return {"message": f"{first.text}, {second.text}.", "from": [first.user_id, second.user_id]}


@agent("cautious")
async def cautious(turn: Turn) -> dict[str, Any]:
    """Asks whether it may."""
    decision = await turn.approve("May I?", quorum=2, timeout_s=turn.inputs.get("timeout_s"))
    if decision.approved:
        await turn.tool("mark", word="allowed")
    return {"decision": decision.decision, "by": list(decision.by), "comment": decision.comment}


@agent("patient")
async def patient(turn: Turn) -> str:
    """Sleeps for long."""
    await turn.think("Good night.")
    await turn.sleep(100)
    await turn.sleep(0.5)
    return "awake"


Make = Callable[..., Awaitable[lives.World]]


@pytest.fixture
async def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes worlds."""
    monkeypatch.setattr(journal, "_PARTING_S", 0.05)
    monkeypatch.setattr(running, "GRACE_S", 0.2)
    MADE.clear()
    worlds: list[lives.World] = []

    async def make(*agents: AgentSpec, **limits: Any) -> lives.World:
        worlds.append(await lives.world(tmp_path / str(len(worlds)), agents, [mark], **limits))
        return worlds[-1]

    yield make
    for world in worlds:
        world.spaces.close()


async def test_a_run_that_waits_for_a_message_is_put_away_and_goes_on_with_it(made: Make) -> None:
    world = await made(interview)
    assert await world.live("interview") is runs.RunState.SUSPENDED
    away = world.record.away
    assert (away["waits_for"], away["mail_after"], away["asked"]) == ("message", 0, ())
    assert away["wait_s"] == pytest.approx(604_800, abs=60)
    # nobody misses it when leases are renewed
    assert world.mine is not None
    assert world.mine.over
    world.people.say("Ada")
    assert await world.live("interview") is runs.RunState.SUSPENDED
    assert (world.record.away["mail_after"], MADE) == (1, ["begun", "Ada"])
    world.people.say("Bob")
    assert await world.live("interview") is runs.RunState.COMPLETED
    (completed,) = world.record.of("agent_completed")
    assert completed["result"] == {"message": "Ada, Bob.", "from": [mail.user_id for mail in world.people.sent]}
    assert (MADE, world.record.thread) == (["begun", "Ada"], {f"{world.run_id}:answer": "Ada, Bob."})
    assert world.record.kinds == [
        "agent_started", "message_created", "tool_executing", "tool_completed", "agent_suspended", "agent_resumed", "message_created",
        "tool_executing", "tool_completed", "agent_suspended", "agent_resumed", "message_created", "message_created", "agent_completed",
    ]  # fmt: skip
    assert [data["reason"] for data in world.record.of("agent_resumed")] == ["message", "message"]
    assert [data["content"] for data in world.record.of("message_created")] == ["What now?", "Ada", "Bob", "Ada, Bob."]


async def test_a_message_that_is_there_already_is_not_waited_for(made: Make) -> None:
    world = await made(interview)
    world.people.say("Ada")
    world.people.say("Bob")
    assert await world.live("interview") is runs.RunState.COMPLETED
    assert "agent_suspended" not in world.record.kinds


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("dies_at", range(14))
async def test_owners_of_a_run_that_waits_may_die_anywhere(made: Make, dies_at: int, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        lives.at_once(monkeypatch)
    world = await made(interview)
    for word in ("Ada", "Bob", "-", "-"):
        if await world.killed("interview", dies_at):
            await world.live("interview")
        if world.record.over:
            break
        world.people.say(word)
    assert world.record.state is runs.RunState.COMPLETED
    assert MADE == ["begun", "Ada"]
    kinds = world.record.kinds
    assert kinds.count("agent_suspended") == kinds.count("agent_resumed")
    assert [data["content"] for data in world.record.of("message_created")] == ["What now?", "Ada", "Bob", "Ada, Bob."]


async def test_no_message_in_time_is_raised_and_raised_again(made: Make) -> None:
    @agent("brief")
    async def brief(turn: Turn) -> str:
        """Does not wait for long."""
        try:
            await turn.wait_for_message(timeout_s=0.05)
        except errors.DeadlineExceeded as late:
            await turn.tool("mark", word=late.code)
        return (await turn.wait_for_message()).text

    world = await made(brief)
    assert await world.live("brief") is runs.RunState.SUSPENDED
    assert (world.record.away["mail_after"], MADE) == (0, [])
    await asyncio.sleep(max(world.record.away["wait_s"], 0))
    assert await world.live("brief") is runs.RunState.SUSPENDED
    assert world.record.of("agent_resumed")[0]["reason"] == "timeout"
    world.people.say("At last.")
    assert await world.live("brief") is runs.RunState.COMPLETED
    assert (world.record.of("agent_completed")[0]["result"], MADE) == ("At last.", ["DEADLINE_EXCEEDED"])


@pytest.mark.parametrize(
    ("votes", "decision", "made_of_it"),
    [(["approve", "approve"], "approve", ["allowed"]), (["approve", "reject"], "reject", []), (["reject"], "reject", [])],
)
async def test_people_decide_whether_it_goes_on(made: Make, votes: list[str], decision: str, made_of_it: list[str]) -> None:
    world = await made(cautious)
    assert await world.live("cautious") is runs.RunState.SUSPENDED
    (asked,) = world.record.of("approval_requested")
    assert (asked["message"], asked["quorum"], world.record.away["asked"]) == ("May I?", 2, (asked["approval_id"],))
    assert world.record.of("agent_suspended")[0]["approval_id"] == asked["approval_id"]
    for vote in votes:
        world.people.vote(vote, f"I {vote}.")
    assert await world.live("cautious") is runs.RunState.COMPLETED
    (result,) = (data["result"] for data in world.record.of("agent_completed"))
    (found,) = world.people.asked.values()
    by = [vote.user_id for vote in found.votes if vote.decision == decision]
    assert (result, MADE) == ({"decision": decision, "by": by, "comment": f"I {decision}."}, made_of_it)
    (told,) = world.record.of("approval_resolved")
    assert (told["decision"], told["by"], told.get("together", by)) == (decision, by[-1], by)
    assert world.record.of("agent_resumed")[0]["reason"] == "approval"


async def test_what_nobody_decided_in_time_has_expired(made: Make) -> None:
    world = await made(cautious)
    world.inputs = {"timeout_s": 0.05}
    assert await world.live("cautious") is runs.RunState.SUSPENDED
    world.people.vote("approve", "One is not enough.")
    await asyncio.sleep(0.06)
    assert await world.live("cautious") is runs.RunState.COMPLETED
    assert world.record.of("agent_completed")[0]["result"] == {"decision": "expired", "by": [], "comment": ""}
    assert world.record.of("agent_resumed")[0]["reason"] == "timeout"


@pytest.mark.parametrize("many", [True, False])
async def test_an_owner_that_died_while_it_asked_has_asked_once(made: Make, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        lives.at_once(monkeypatch)
    calm = await made(cautious)
    assert await calm.live("cautious") is runs.RunState.SUSPENDED
    appends = len(calm.record.requests)
    assert appends > 1
    for dies_at in range(1, appends + 2):
        world = await made(cautious)
        assert await world.killed("cautious", dies_at) is (dies_at <= appends)
        if world.record.state is not runs.RunState.SUSPENDED:
            assert await world.live("cautious") is runs.RunState.SUSPENDED
        assert (len(world.people.wanted), world.record.kinds.count("approval_requested")) == (1, 1)


async def test_a_long_sleep_is_slept_away_and_what_is_left_of_it_only_once(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await made(patient)
    assert await world.live("patient") is runs.RunState.SUSPENDED
    assert world.record.away["waits_for"] == "timer"
    assert world.record.away["wait_s"] == pytest.approx(100, abs=20)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    assert await world.live("patient") is runs.RunState.COMPLETED
    assert (world.record.of("agent_resumed")[0]["reason"], world.record.kinds.count("agent_thinking")) == ("timeout", 1)


async def test_a_sleep_that_is_over_soon_is_slept_here(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SOON_S", 1000.0)
    world = await made(patient)
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("patient")))
        await lives.until(lambda: "1:think" in world.record.steps_kept and "2:sleep~1" in world.record.steps_kept)
        assert (world.record.state, world.record.kinds[-1]) == (runs.RunState.RUNNING, "agent_thinking")
        assert world.mine is not None
        world.mine.ask_to_stop()
        await run
    assert world.record.state is runs.RunState.CANCELLED


async def test_a_run_of_which_one_strand_goes_on_stays_and_hears_of_what_comes(made: Make) -> None:
    @agent("both")
    async def both(turn: Turn) -> list[Any]:
        """Waits, and works."""

        async def works() -> int:
            count = 0
            while MADE != ["stop"]:
                count += 1
                await turn.sleep(0.01)
            return count

        async def waits() -> str:
            return (await turn.wait_for_message()).text

        return (await turn.gather(waits(), works()))[:1]

    world = await made(both)
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("both")))
        await lives.until(lambda: world.record.steps_kept.get("1.1:1:sleep"))
        world.people.say("Hello.")
        assert world.mine is not None
        world.mine.wake()
        await lives.until(lambda: world.record.kinds.count("message_created") == 2)
        MADE.append("stop")
        await run
    assert (world.record.of("agent_completed")[0]["result"], "agent_suspended" in world.record.kinds) == (["Hello."], False)


async def test_strands_that_wait_for_different_things_wait_together(made: Make) -> None:
    @agent("three")
    async def three(turn: Turn) -> list[Any]:
        """Waits for three things."""
        return await turn.gather(_said(turn), _allowed(turn), turn.tool("mark", word="beside"))

    world = await made(three)
    assert await world.live("three") is runs.RunState.SUSPENDED
    assert (world.record.away["waits_for"], len(world.record.away["asked"]), MADE) == ("message", 1, ["beside"])
    world.people.vote("approve")
    assert await world.live("three") is runs.RunState.SUSPENDED
    assert (world.record.away["asked"], world.record.of("agent_resumed")[0]["reason"]) == ((), "approval")
    world.people.say("Now.")
    assert await world.live("three") is runs.RunState.COMPLETED
    assert (world.record.of("agent_completed")[0]["result"], MADE) == (["Now.", True, "beside"], ["beside"])


async def _said(turn: Turn) -> str:
    return (await turn.wait_for_message()).text


async def _allowed(turn: Turn) -> bool:
    return (await turn.approve("May I?")).approved


async def test_an_agent_that_is_stopped_by_its_own_limit_does_not_go_on_while_its_run_is_put_away(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    @agent("limited")
    async def limited(turn: Turn) -> str:
        """Has a limit of its own."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                return (await turn.wait_for_message()).text
        await turn.tool("mark", word="too late")
        return "alone"

    world = await made(limited)
    suspended = world.record.suspended

    async def slow(*told: Any, **more: Any) -> bool:
        await asyncio.sleep(0.1)
        return await suspended(*told, **more)

    monkeypatch.setattr(world.record, "suspended", slow)
    append = world.record.append

    def late(*request: Any) -> asyncio.Future[None]:
        answer = append(*request)
        waits: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: asyncio.get_running_loop().call_later(0.05, waits.set_result, None))
        return waits

    monkeypatch.setattr(world.record, "append", late)
    assert await world.live("limited") is runs.RunState.SUSPENDED
    assert (MADE, world.record.kinds[-1], world.record.over) == ([], "agent_suspended", False)


async def test_one_that_another_owns_by_now_is_let_go_of(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await made(interview)

    async def not_mine(*_: Any, **_more: Any) -> bool:
        return False

    monkeypatch.setattr(world.record, "suspended", not_mine)
    assert await world.live("interview") is runs.RunState.RUNNING
    assert (world.record.over, world.record.kinds[-1]) == (False, "agent_suspended")


async def test_a_run_at_its_end_is_not_put_away(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world = await made(patient)
    assert await world.killed("patient", 2)
    world.record.state = runs.RunState.FINISHING
    assert await world.live("patient", deadline_s=0.5) is runs.RunState.TIMED_OUT
    assert "agent_suspended" not in world.record.kinds


async def test_an_agent_that_waits_is_not_silent(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SOON_S", 1000.0)
    world = await made(patient, agent_silent_s=0.05)
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(world.executions.watch())
        run = group.create_task(owner.run(world.claimed("patient")))
        await lives.until(lambda: "2:sleep~1" in world.record.steps_kept)
        await asyncio.sleep(0.2)
        assert not run.done()
        assert world.mine is not None
        world.mine.ask_to_stop()
        await run
        watch.cancel()
    assert world.record.state is runs.RunState.CANCELLED


async def test_what_may_not_be_asked_is_refused_at_the_step(made: Make) -> None:
    @agent("wrong")
    async def wrong(turn: Turn) -> list[str]:
        """Asks for what cannot be."""
        asked: list[Awaitable[object]] = [
            turn.approve(" "), turn.approve("May I?", quorum=0), turn.approve("May I?", quorum=approvals.MAX_QUORUM + 1),
            turn.approve("May I?", timeout_s=0), turn.wait_for_message(timeout_s=-1), turn.sleep(-1), turn.emit("agent_started"),
            turn.emit("No."), turn.emit("fine", value=object()),
        ]  # fmt: skip
        found = []
        for one in asked:
            try:
                await one
            except errors.InvalidPayload as refused:
                found.append(refused.details["field"])
        return found

    world = await made(wrong)
    assert await world.live("wrong") is runs.RunState.COMPLETED
    assert world.record.of("agent_completed")[0]["result"] == [
        "message", "quorum", "quorum", "timeout_s", "timeout_s", "seconds", "kind", "kind", "data",
    ]  # fmt: skip
