"""The end of a run that answers: its context is closed with the answer, unless something else still needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from netra import errors, ids
from netra.agent import Turn, agent
from netra.tool import tool
from services.dispatcher import journal, outbox, runs
from tests.fixtures import lives

Made = Callable[[], Awaitable[lives.World]]
_AT_ONCE, _AFTERWARDS = ["close with", "end"], ["append", "end", "close"]


@tool()
async def look(word: str) -> str:
    """Has no effect."""
    return word


@agent("answers")
async def answers(turn: Turn) -> dict[str, Any]:
    """Looks, thinks and answers."""
    await turn.think("A word.")
    return {"message": f"It is {await turn.tool('look', word='red')}.", "more": [1, 2]}


@agent("long")
async def long(turn: Turn) -> str:
    """Has an answer that is told by reference."""
    return "x" * 300_000


@agent("secretive")
async def secretive(turn: Turn) -> dict[str, Any]:
    """Has an answer that is told whole, but for the names of what is not told of it: these are too many."""
    return {"message": "Done.", "x" * 4_000: [{"password": "x"}] * 100}


@agent("wide")
async def wide(turn: Turn) -> str:
    """Tells more than one event may have before its answer."""
    await turn.emit("sample", text="x" * 300_000)
    return "Done."


@pytest.fixture
async def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Made]:
    """Makes worlds."""
    # whoever dies here hears nothing from the record any more
    monkeypatch.setattr(journal, "_PARTING_S", 0.05)
    worlds: list[lives.World] = []

    async def make() -> lives.World:
        worlds.append(await lives.world(tmp_path / f"{len(worlds)}", [answers, long, secretive, wide], [look]))
        return worlds[-1]

    yield make
    for world in worlds:
        world.spaces.close()


async def _run(world: lives.World, mine: Any) -> runs.RunState:
    owner = world.owner()
    await asyncio.wait_for(owner.run(mine), 20)
    await owner.close()
    return world.record.state


async def test_a_context_is_closed_with_the_answer_before_the_end_is_told(made: Made) -> None:
    world = await made()
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert world.record.asked == _AT_ONCE
    assert world.record.thread == {f"{world.run_id}:answer": "It is red."}
    assert [kind for kind, _ in world.record.events][-2:] == ["message_created", "agent_completed"]


@pytest.mark.parametrize("name", ["long", "secretive", "wide"])
async def test_what_is_kept_as_a_file_is_kept_before_the_context_is_closed(made: Made, name: str) -> None:
    world = await made()
    assert await world.live(name) is runs.RunState.COMPLETED
    assert world.record.asked == _AFTERWARDS
    assert world.files.kept


async def test_what_still_waits_to_be_kept_is_kept_before_the_answer_goes_out(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await made()
    append, append_message, kept = world.record.append, world.record.append_message, list[int]()
    waiting = list[asyncio.Future[None]]()

    def slowly(*arguments: Any) -> asyncio.Future[None]:
        append(*arguments)
        waiting.append(asyncio.get_running_loop().create_future())
        return waiting[-1]

    async def said(*arguments: Any) -> ids.MessageId:
        kept.append(len(world.files.kept))
        return await append_message(*arguments)

    monkeypatch.setattr(world.record, "append", slowly)
    monkeypatch.setattr(world.record, "append_message", said)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(world.live("wide"))
        # what tells that it begins is not answered before the agent has said all that it had to
        await lives.until(lambda: waiting)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (world.record.thread, world.files.kept) == ({}, {})
        monkeypatch.setattr(world.record, "append", append)
        waiting[0].set_result(None)
        assert await run is runs.RunState.COMPLETED
    assert world.record.asked == _AFTERWARDS
    assert kept == [1]


async def test_a_run_without_effects_is_two_appends(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    # however slow the machine is
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world = await made()
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert [[event.type for event in request.events] for request in world.record.requests] == [
        ["agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed"],
        ["message_created", "agent_completed"],
    ]


@pytest.mark.parametrize("many", [True, False])
async def test_whoever_takes_over_comes_to_the_same_end_wherever_the_first_one_died(
    made: Made, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        lives.at_once(monkeypatch)
    closed = 0
    for dies_at in range(1, 20):
        world = await made()
        if not await world.killed("answers", dies_at):
            break
        closed += world.record.closed
        said = dict(world.record._said)
        assert await world.live("answers") is runs.RunState.COMPLETED
        assert world.record.thread == {f"{world.run_id}:answer": "It is red."}
        told = [data["message_id"] for data in world.record.of("message_created") if data["role"] == "assistant"]
        assert told == list(world.record._said.values())
        assert not said or said == world.record._said
    # some died between the close and the end
    assert closed
    assert dies_at < 19


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("name", ["long", "secretive", "wide"])
async def test_files_are_there_for_whoever_takes_over_wherever_the_first_one_died(
    made: Made, name: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        lives.at_once(monkeypatch)
    for dies_at in range(1, 20):
        world = await made()
        if not await world.killed(name, dies_at):
            break
        assert await world.live(name) is runs.RunState.COMPLETED
    assert dies_at < 19


async def test_messages_are_hidden_before_the_context_is_closed(made: Made) -> None:
    world = await made()
    mine = world.claimed("answers")
    mine.rolled_back = True
    assert await _run(world, mine) is runs.RunState.COMPLETED
    assert world.record.asked == ["append", "end", "hide", "close"]


async def test_messages_are_hidden_also_when_that_is_asked_for_in_the_last_moment(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await made()
    mine, close_with = world.claimed("answers"), world.record.close_with

    async def meanwhile(*arguments: Any) -> ids.MessageId | None:
        said = await close_with(*arguments)
        mine.rolled_back = True
        return said

    monkeypatch.setattr(world.record, "close_with", meanwhile)
    assert await _run(world, mine) is runs.RunState.COMPLETED
    assert world.record.asked == ["close with", "end", "hide"]


@pytest.mark.parametrize("why", ["token", "record", "lease"])
async def test_a_context_stays_open_until_the_end_when_that_may_take_long(made: Made, why: str) -> None:
    world = await made()
    mine = world.claimed("answers")
    mine.token_old, world.record.reachable = why == "token", why != "record"
    mine.leased_until = time.monotonic() + 0.9 if why == "lease" else 0.0
    assert await _run(world, mine) is runs.RunState.COMPLETED
    assert world.record.asked == _AFTERWARDS


async def test_an_older_context_service_is_given_the_answer_as_before(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await made()

    async def older(*_: object) -> None:
        return None

    monkeypatch.setattr(world.record, "close_with", older)
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert world.record.asked == _AFTERWARDS
    assert world.record.thread == {f"{world.run_id}:answer": "It is red."}


async def test_a_run_whose_answer_is_refused_fails_and_its_context_is_closed(made: Made) -> None:
    world = await made()
    world.record.thread[f"{world.run_id}:answer"] = "Something else."
    assert await world.live("answers") is runs.RunState.FAILED
    assert world.record.asked == ["close with", "end", "close"]
    assert world.record.of("agent_failed")[0]["error"]["code"] == errors.AlreadyExists.code


async def test_the_first_owner_of_a_run_opens_it_with_its_first_append_and_the_next_one_before(made: Made) -> None:
    world = await made()
    assert await world.killed("answers", 1)
    assert world.record.openings == ["with it"]
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert world.record.openings == ["with it", "apart"]


async def test_a_run_is_opened_before_it_begins_while_the_record_is_not_known_to_be_there(made: Made) -> None:
    world = await made()
    world.record.reachable = False
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert world.record.openings == ["apart"]


async def test_a_run_that_was_never_in_the_record_is_begun_by_its_next_owner(made: Made) -> None:
    world = await made()
    assert await world.killed("answers", 0)
    assert (world.record.openings, world.record.thread) == ([], {})
    assert await world.live("answers") is runs.RunState.COMPLETED
    assert world.record.kinds.count("agent_started") == 1
