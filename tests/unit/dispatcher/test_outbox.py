"""When a run's record is told what: in order, what may wait together, the first append as an opening, no run further than its record."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest

from chassis import lifecycle
from netra import errors, ids
from services.dispatcher import journal, outbox
from tests.fixtures import lives
from tests.fixtures.told import CALL, HOW, PLAIN, World, outcome


@pytest.fixture
def world() -> World:
    """A fresh one."""
    return World()


async def test_an_agent_goes_no_further_than_its_record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    monkeypatch.setattr(outbox, "_LATE_S", 3600)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    steps = 0

    async def agent() -> None:
        nonlocal steps
        while True:
            await world.bridge.room()
            world.bridge.step(f"{steps}:sleep", None)
            steps += 1
            await asyncio.sleep(0)

    tasks = lifecycle.Tasks()
    tasks.spawn(agent(), "agent")
    for _ in range(500):
        await asyncio.sleep(0)
    # the first one is on its way
    assert (steps, world.bridge.health().waiting) == (63, 63)
    world.far.answer()
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    for _ in range(100):
        await asyncio.sleep(0)
    assert steps > 63
    await tasks.close()


async def test_an_agent_waits_when_the_record_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_LATE_S", 0.02)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    await asyncio.wait_for(world.bridge.room(), 1)
    await world.late()
    tasks = lifecycle.Tasks()
    waiting = tasks.spawn(world.bridge.room(), "room")
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    # what runs already is told all the same: only steps that begin wait
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    world.far.answer()
    await asyncio.wait_for(waiting, 1)
    assert len(await world.told()) == 2


async def test_an_agent_whose_record_is_somebody_elses_goes_no_further(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.thinking("r", 1, None, "1:think")
    world.far.waiting[0].set_exception(errors.Fenced("newer"))
    with pytest.raises(errors.Fenced, match="newer"):
        await world.told()
    with pytest.raises(errors.Fenced, match="newer"):
        await asyncio.wait_for(world.bridge.room(), 1)
    waiting = world.bridge.health().waiting
    tell_everything(world.bridge)
    assert (world.bridge.health().waiting, len(world.far.requests), world.far.shown) == (waiting, 1, [])


def tell_everything(bridge: journal.AgentWebSocketBridge) -> None:
    """An event, a step, an event beside and one that is shown."""
    bridge.message_created("m", "user", "c")
    bridge.step("9:sleep", None)
    bridge.quality_alert("warning", "score", 0.2, 0.5, "m")
    bridge.delta("some")


async def test_who_waits_for_a_record_that_breaks_hears_of_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    monkeypatch.setattr(outbox, "_LATE_S", 0.0)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    waiting = tasks.spawn(world.bridge.room(), "room")
    assert not (await asyncio.wait({waiting}, timeout=0.05))[0]
    world.far.waiting[0].set_exception(errors.TooLarge("too much"))
    with pytest.raises(errors.TooLarge, match="too much"):
        await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("is_broken", [False, True])
async def test_an_agent_that_only_takes_steps_lets_others_go_on(world: World, is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    if is_broken:
        world.far.waiting[0].set_exception(errors.NotFound("gone"))
        await asyncio.sleep(0)
    turns = 0

    async def agent() -> None:
        nonlocal turns
        # nothing in here waits for anything: without a turn of the loop in each it would never end
        while turns < 50:
            with contextlib.suppress(errors.NotFound):
                await world.bridge.room()
            turns += 1

    tasks, seen = lifecycle.Tasks(), []
    tasks.spawn(agent(), "agent")
    for _ in range(30):
        await asyncio.sleep(0)
        seen.append(turns)
    assert max(seen) < 50
    await tasks.close()


async def test_after_its_end_a_run_tells_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.cancelled("user", [], 1.0)
    # the agent outlived its cancel
    world.bridge.thinking("r", 1, None, "1:think")
    world.bridge.step("2:sleep", None)
    world.bridge.delta("some")
    world.far.answer()
    assert [kind for kind, _ in await world.told()] == ["agent_started", "agent_cancelled"]
    assert ([request.end for request in world.far.requests], world.far.steps, world.far.shown) == ([False, True], {}, [])
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        await world.bridge.room()


async def test_what_is_told_before_the_end_goes_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.step("1:sleep", None)
    world.bridge.failed(errors.AgentFailed("m"))
    world.far.answer()
    await world.told()
    assert [(len(request.events), len(request.steps), request.end) for request in world.far.requests] == [(1, 0, False), (1, 1, True)]


async def test_a_closed_bridge_tells_nothing_and_lets_nobody_wait(world: World) -> None:
    await world.bridge.close()
    tell_everything(world.bridge)
    assert (world.far.requests, world.far.shown, world.bridge.health().waiting) == ([], [], 0)
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        await asyncio.wait_for(world.bridge.room(), 1)


async def test_a_refusal_of_what_belongs_to_no_run_leaves_the_run_alone(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.quality_alert("warning", "score", 0.2, 0.5, "m")
    world.bridge.tool_executing(CALL, "2:tool", False)
    world.far.waiting.pop(1).set_exception(errors.Unauthenticated("ran out"))
    await asyncio.sleep(0)
    await asyncio.wait_for(world.bridge.room(), 1)
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    world.far.answer()
    assert [kind for kind, _ in await world.told()] == ["agent_started", "tool_executing", "tool_completed"]
    assert "ran out" in capsys.readouterr().out


def appends(world: World) -> list[tuple[list[str], list[str]]]:
    """Of each append the kinds of its events, and the keys of its steps."""
    return [([event.type for event in request.events], [step.key for step in request.steps]) for request in world.far.requests]


async def test_a_quick_call_without_effects_is_one_append(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.sleep(0)
    assert world.far.requests == []
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    await world.told()
    # that it began need not be kept beside how it ended
    assert appends(world) == [(["tool_executing", "tool_completed"], ["1:tool"])]


async def test_a_call_with_effects_is_two_and_its_intent_is_there_first(world: World) -> None:
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    await world.told()
    assert appends(world)[1:] == [(["tool_completed"], ["1:tool"])]


async def test_a_barrier_waits_for_what_is_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.wait_for(world.bridge.barrier(), 5)
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]


async def test_what_is_held_is_told_soon_by_itself(world: World) -> None:
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]


def opens(world: World) -> list[str]:
    """Of each append the trace that it opens the run with; empty when it does not."""
    return [request.open.trace_id if request.HasField("open") else "" for request in world.far.requests]


async def test_the_first_append_of_a_run_opens_it_and_no_other_does(world: World) -> None:
    apart = world.unopened()
    world.bridge.started(0, "begins")
    await world.told()
    world.bridge.thinking("r", 1, None, "1:think")
    await world.told()
    assert (opens(world), apart) == (["0" * 32, ""], [])
    first, second = world.far.tokens
    assert (first and first(), second) == ("context token", None)


async def test_an_older_service_is_asked_to_open_a_run_and_sent_the_append_again(world: World) -> None:
    apart = world.unopened()
    world.far.refuses = [errors.NotFound("There is no such run in the record. Open it first.")]
    world.bridge.started(0, "begins")
    world.bridge.thinking("r", 1, None, "1:think")
    await world.told()
    world.bridge.failed(errors.AgentFailed("m"))
    await world.told()
    assert apart == [1]
    assert [[event.type for event in request.events] for request in world.far.requests] == [
        ["agent_started", "agent_thinking"], ["agent_started", "agent_thinking"], ["agent_failed"],
    ]  # fmt: skip
    assert [request.first_seq for request in world.far.requests] == [1, 1, 3]
    assert opens(world)[1:] == ["", ""]


async def test_a_run_that_another_owner_has_opened_meanwhile_is_not_gone_on_with(world: World) -> None:
    world.unopened(errors.Fenced("newer"))
    world.far.refuses = [errors.NotFound("no")]
    world.bridge.started(0, "begins")
    with pytest.raises(errors.Fenced, match="newer"):
        await world.told()
    assert len(world.far.requests) == 1


async def test_a_first_append_that_is_refused_and_mended_opens_the_run_after_all(world: World) -> None:
    apart = world.unopened()
    world.far.refuses = [errors.InvalidPayload("odd")]
    world.bridge.started(0, "begins")
    with pytest.raises(errors.InvalidPayload, match="odd"):
        await world.told()
    world.bridge.mend()
    world.bridge.failed(errors.AgentFailed("mended"))
    await asyncio.wait_for(world.bridge.barrier(), 5)
    assert (opens(world), apart) == (["0" * 32] * 2, [])


def tell_quietly(bridge: journal.AgentWebSocketBridge) -> None:
    """All that a run without effects tells before its end."""
    bridge.started(0, "begins", ("~started", {"at": 1}))
    bridge.message_created("m", "user", "What now?", ("~request", {"at": 1}))
    bridge.thinking("r", 1, None, "1:think")
    bridge.tool_executing(PLAIN, "2:tool", False)
    bridge.tool_completed(outcome(1), HOW, "2:tool")


QUIET = ["agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed"]


async def test_what_a_run_without_effects_tells_goes_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    tell_quietly(world.bridge)
    await asyncio.sleep(0)
    assert world.far.requests == []
    await world.told()
    assert appends(world) == [(QUIET, ["~started", "~request", "1:think", "2:tool"])]


async def test_an_answer_of_the_record_does_not_hurry_what_is_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.resumed("message", 1.0)
    tell_quietly(world.bridge)
    world.far.answer()
    for _ in range(10):
        await asyncio.sleep(0)
    assert [kinds_ for kinds_, _ in appends(world)] == [["agent_resumed"]]
    # what is not held takes along what is
    world.bridge.custom("my_kind", {})
    assert [kinds_ for kinds_, _ in appends(world)] == [["agent_resumed"], [*QUIET, "my_kind"]]


async def test_what_came_first_is_held_no_longer_for_what_comes_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 0.05)
    world.bridge.started(0, "begins")
    # more comes all the time, and each time the timer could be set anew
    async with asyncio.timeout(5):
        while not world.far.requests:
            world.bridge.thinking("r", 1, None, "1:think")
            await asyncio.sleep(0.01)
    assert appends(world)[0][0][0] == "agent_started"
    # and it was not for their number
    assert len(world.far.requests[0].events) < outbox._ENOUGH


async def test_much_is_not_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    for number in range(32):
        assert world.far.requests == []
        world.bridge.thinking("r", 1, None, f"{number}:think")
    assert len(world.far.requests[0].events) == 32
    world.bridge.thinking("x" * 200 * 1024, 1, None, "33:think")
    await world.told()
    assert len(world.far.requests) == 2


async def test_an_outcome_goes_with_the_intent_of_the_step_that_follows_it_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_BRIEF_S", 3600)
    other = dataclasses.replace(PLAIN, tool_call_id=ids.ToolCallId.new())
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    world.bridge.tool_completed(dataclasses.replace(outcome(1), call=PLAIN), HOW, "1:tool")
    await asyncio.sleep(0)
    world.bridge.tool_executing(other, "2:tool", True)
    await world.bridge.barrier()
    assert appends(world) == [(["tool_executing"], ["1:tool~1"]), (["tool_completed", "tool_executing"], ["1:tool", "2:tool~1"])]


async def test_an_outcome_does_not_wait_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    world.bridge.thinking("r", 1, None, "2:think")
    world.bridge.tool_completed(dataclasses.replace(outcome(1), call=PLAIN), HOW, "1:tool")
    for _ in range(2):
        await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert [kinds_ for kinds_, _ in appends(world)] == [["tool_executing"], ["agent_thinking", "tool_completed"]]


async def test_what_became_of_an_earlier_owners_call_waits_for_nothing(world: World) -> None:
    world.bridge.tool_completed(outcome(1), HOW, "1:tool", settled="reconcile")
    assert [kinds_ for kinds_, _ in appends(world)] == [["tool_completed"]]


async def test_a_barrier_does_not_wait_for_what_is_told_after_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    async with asyncio.TaskGroup() as group:
        barrier = group.create_task(world.bridge.barrier())
        await asyncio.wait_for(world.far.arrived.acquire(), 5)
        world.bridge.thinking("r", 1, None, "1:think")
        assert not barrier.done()
        world.far.waiting[0].set_result(None)
        await asyncio.wait_for(barrier, 5)
    assert world.bridge.health().waiting == 1


async def test_a_barrier_waits_for_all_that_was_told_before_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.resumed("message", 1.0)
    world.bridge.thinking("r", 1, None, "1:think")
    async with asyncio.TaskGroup() as group:
        barrier = group.create_task(world.bridge.barrier())
        await asyncio.sleep(0)
        world.far.waiting.pop(0).set_result(None)
        await lives.until(lambda: len(world.far.requests) == 2)
        assert not barrier.done()
        world.far.answer()
    assert world.bridge.health().waiting == 0


async def test_what_is_shown_comes_after_what_was_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    world.bridge.tool_progress(PLAIN, 10.0, None)
    assert (len(world.far.requests), world.far.shown[0].transients[0].after_seq) == (1, 1)


async def test_what_is_shown_waits_until_its_run_is_open(world: World) -> None:
    world.unopened()
    world.far.at_once = False
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    world.bridge.tool_progress(PLAIN, 10.0, None)
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert (world.far.requests[0].HasField("open"), world.far.shown) == (True, [])
    world.far.answer()
    await world.told()
    assert [request.transients[0].after_seq for request in world.far.shown] == [1]
