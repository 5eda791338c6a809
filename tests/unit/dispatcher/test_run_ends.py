"""How runs end that are given up, late, rolled back, silent or let go of."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import Any

import pytest

from netra.agent import Turn, agent
from services.dispatcher import running, runs
from tests.fixtures import lives, replayed
from tests.fixtures.permits import Counted, permitted
from tests.fixtures.replayed import EFFECTS, Made


async def test_a_poison_run_is_given_up_with_its_calls_untouched(made: Made) -> None:
    world = await made()
    await replayed.left(world, "sequence", "tool_executing", 2)
    assert await world.live("sequence", takeovers=11) is runs.RunState.FAILED
    assert world.record.of("agent_failed")[0]["error"]["code"] == "OWNER_LOST"
    assert "11 processes" in world.record.of("agent_failed")[0]["message"]
    assert world.record.of("tool_completed")[-1]["status"] == "unknown"


ENDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "orphaned": (
        {"orphaned": True, "missing_s": 700.0, "version": "9.9.9"},
        "failed",
        "No dispatcher has had agent loop in version 9.9.9 for 700 s.",
    ),
    "overdue": ({"overdue": True}, "timed_out", "was not begun within"),
    "late": ({"ran_s": 31.0}, "timed_out", "did not finish within 30 s"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_what_is_not_begun_any_more_says_why(made: Made, name: str) -> None:
    claim, state, message = ENDS[name]
    world = await made()
    assert await world.live("loop", **claim) == state
    ((_, data),) = world.record.events
    assert message in data["message"]
    assert EFFECTS == []


async def test_a_deadline_counts_what_the_run_has_run_before(made: Made) -> None:
    @agent("waiter")
    async def waiter(turn: Turn) -> None:
        """Waits for its end."""
        while True:
            await turn.sleep(0.01)

    world = await made(waiter)
    began = time.monotonic()
    assert await world.live("waiter", ran_s=29.9) is runs.RunState.TIMED_OUT
    assert time.monotonic() - began < 20


async def test_a_run_that_was_rolled_back_hides_its_messages_at_its_end(made: Made) -> None:
    world = await made()
    mine = world.claimed("loop")
    mine.rolled_back = True
    mine.ask_to_stop()
    owner = world.owner()
    await asyncio.wait_for(owner.run(mine), 10)
    assert (world.record.state, world.record.hidden) == (runs.RunState.CANCELLED, True)


@pytest.mark.parametrize("heeds", [True, False])
async def test_a_cancel_that_the_agent_does_not_heed_is_not_told_as_confirmed(
    made: Made, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    monkeypatch.setattr(running, "GRACE_S", 0.05)
    began, heard = asyncio.Event(), asyncio.Event()

    @agent("deaf")
    async def deaf(turn: Turn) -> None:
        """Goes on, whatever it is told."""
        began.set()
        while not heard.is_set():
            try:
                await heard.wait()
            except asyncio.CancelledError:
                if heeds:
                    raise

    world = await made(deaf)
    mine, owner = world.claimed("deaf"), world.owner()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(mine))
        await began.wait()
        mine.ask_to_stop()
        await asyncio.wait_for(run, 10)
    heard.set()
    assert world.record.state is runs.RunState.CANCELLED
    assert world.record.of("agent_cancelled")[0].get("confirmed") is (None if heeds else False)


@pytest.mark.parametrize(
    ("name", "claim", "state"), [("loop", {}, "completed"), ("loop", {"orphaned": True}, "failed"), ("loop", {"ran_s": 31.0}, "timed_out")]
)
async def test_a_row_that_says_so_hides_the_messages_of_a_run_however_that_ends(
    made: Made, name: str, claim: dict[str, Any], state: str
) -> None:  # fmt: skip
    world = await made()
    # nobody told its owner, and it was not stopped
    world.record.rolled_back = True
    assert (await world.live(name, **claim), world.record.hidden) == (state, True)


async def test_an_agent_that_falls_silent_is_ended_as_such(made: Made) -> None:
    @agent("mute")
    async def mute(turn: Turn) -> None:
        """Says nothing any more."""
        await turn.think("Last words.")
        await asyncio.Event().wait()

    world = await made(mute, agent_silent_s=0.05)
    owner = world.owner()
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(world.executions.watch())
        await asyncio.wait_for(owner.run(world.claimed("mute")), 10)
        watch.cancel()
    assert world.record.state is runs.RunState.FAILED
    details = world.record.of("agent_failed")[0]["error"]["details"]
    assert details["cause"] == "no_heartbeat"
    assert details["support_code"] in world.record.of("agent_failed")[0]["message"]


async def test_nothing_outside_is_changed_when_the_lease_is_about_to_end(made: Made) -> None:
    world = await made()
    owner = world.owner()
    await asyncio.wait_for(owner.run(world.claimed("sequence", leased_until=time.monotonic() + 0.9)), 10)
    assert (EFFECTS, world.record.over, world.record.kinds[-1]) == ([], False, "tool_executing")
    # the next owner asks, and makes it
    assert await world.live("sequence", leased_until=time.monotonic() + 60) is runs.RunState.COMPLETED
    assert len(EFFECTS) == 1


async def test_a_run_that_is_let_go_of_keeps_what_it_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    @agent("talker")
    async def talker(turn: Turn) -> str:
        """Thinks faster than the record answers, then waits."""
        for number in range(20):
            await turn.think(f"Thought {number}.")
        await turn.sleep(1)
        return "done"

    world = await made(talker)
    owner = world.owner()
    slow, append = asyncio.Event(), world.record.append

    def late(*request: Any) -> asyncio.Future[None]:
        answer = append(*request)
        waits: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: asyncio.get_running_loop().call_later(0.05, waits.set_result, None))
        slow.set()
        return waits

    monkeypatch.setattr(world.record, "append", late)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(world.claimed("talker")))
        await slow.wait()
        await lives.until(lambda: len(world.record.requests) > 0)
        await asyncio.sleep(0)
        run.cancel()
    await owner.close()
    told = world.record.kinds.count("agent_thinking")
    monkeypatch.setattr(world.record, "append", append)
    assert await world.live("talker") is runs.RunState.COMPLETED
    assert (told > 0, world.record.kinds.count("agent_thinking")) == (True, 20)


def _executes(world: lives.World, mine: running.Running) -> bool:
    return world.record.kinds.count("agent_thinking") == 1 and mine.parking is not None


async def test_an_owner_that_tells_something_new_has_brought_its_run_further(made: Made) -> None:
    @agent("stuck")
    async def stuck(turn: Turn) -> None:
        """Thinks once, and comes no further."""
        await turn.think("Once.")
        await asyncio.Event().wait()

    world = await made(stuck)
    for moved in (True, False):
        owner, mine = world.owner(), world.claimed("stuck")
        async with asyncio.TaskGroup() as group:
            run = group.create_task(owner.run(mine))
            await lives.until(functools.partial(_executes, world, mine))
            for _ in range(50):
                await asyncio.sleep(0)
            run.cancel()
        await owner.close()
        assert mine.moved is moved


class Deaf(Counted):
    """Counts the second call after its caller was told to stop, and does not pass that on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = asyncio.Event()

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        await super().take(kind, key, per_minute, burst, cost)
        if len(self.asked) == 2:
            self.counts.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


async def test_nothing_outside_is_changed_for_a_run_that_was_let_go_of(made: Made) -> None:
    world, deaf = await made(), Deaf()
    entitled, world._entitled = world._entitled, lives.Entitled(await permitted("tools:execute", counted=deaf))
    async with asyncio.TaskGroup() as group:
        run = group.create_task(world.owner().run(world.claimed("sequence", leased_until=time.monotonic() + 60)))
        await deaf.counts.wait()
        run.cancel()
    assert (EFFECTS, world.record.over, world.record.kinds[-1]) == ([], False, "tool_completed")
    # nothing says that it began: so the next owner makes it, and is the first
    world._entitled = entitled
    assert await world.live("sequence", leased_until=time.monotonic() + 60) is runs.RunState.COMPLETED
    assert len(EFFECTS) == 1
