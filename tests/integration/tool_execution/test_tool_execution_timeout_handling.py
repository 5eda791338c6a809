"""Deadlines, attempts, substitutes and refusals: what a call comes to when its tool does not do as it should."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from netra import errors
from netra.tool import ToolContext, tool
from services.dispatcher.tools import means
from tests.fixtures.dispatchers import House, Person, house


class Weather:
    """What tools outside are like just now: errors to raise, one after the other, and how often they were asked."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.asked = 0
        self.keys: set[str] = set()
        self.gate = asyncio.Event()


NOW: dict[str, Weather] = {}


async def outside(mark: str, context: ToolContext | None = None) -> str:
    """Asks something that may fail."""
    weather = NOW[mark]
    weather.asked += 1
    if context is not None:
        weather.keys.add(context.effect_key)
    if weather.errors:
        raise weather.errors.pop(0)
    return "fine"


@tool(name="ask.again", idempotent=True, retries=3, timeout_s=30)
async def ask_again(context: ToolContext, mark: str) -> str:
    """Asks something that may fail, and asks again."""
    return await outside(mark, context)


@tool(name="ask.once", timeout_s=30)
async def ask_once(mark: str) -> str:
    """Asks something that may fail."""
    return await outside(mark)


@tool(name="ask.else", fallback="ask.backup", timeout_s=0.2)
async def ask_else(mark: str) -> str:
    """Asks something that may fail; another tool stands in."""
    if NOW[mark].errors:
        return await outside(mark)
    await NOW[mark].gate.wait()
    return "late"


@tool(name="ask.backup", timeout_s=30)
async def ask_backup(mark: str) -> str:
    """Knows an old answer."""
    return f"old answer for {mark}"


@tool(name="change", side_effects=True, fallback="ask.backup", timeout_s=30)
async def change(mark: str) -> str:
    """Changes something, perhaps."""
    return await outside(mark)


@tool(name="hang", timeout_s=60)
async def hang(mark: str) -> str:
    """Waits for ever."""
    await NOW[mark].gate.wait()
    return "late"


@tool(name="one.by.one", concurrency=1, timeout_s=60)
async def one_by_one(context: ToolContext, mark: str) -> str:
    """Bears one call at a time."""
    NOW[mark].asked += 1
    context.progress(0.5, "half")
    await NOW[mark].gate.wait()
    return "done"


TOOLS = [ask_again, ask_once, ask_else, ask_backup, change, hang, one_by_one]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[House]:
    """A process with the tools above."""
    rules = means.Rules(failures=3, open_s=60, waiting=2, calls=20, calls_per_user=12)
    async with house(tmp_path, TOOLS, rules=rules) as made:
        yield made


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> str:
    """The weather of one test."""
    NOW[request.node.name] = Weather()
    return str(request.node.name)


def told(who: Person) -> list[Any]:
    """The outcomes that were told, in their order."""
    return [event["outcome"] for event in who.heard.events if event["type"] == "tool_completed"]


async def settled(holds: Any) -> None:
    """Returns when something holds that comes with the next turns of the loop."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.real_services
class TestToolExecutionTimeoutHandling:
    """Tools that are late, fail, or are too many."""

    async def test_tool_execution_with_reasonable_timeout(self, place: House, mark: str) -> None:
        who = place.person()
        async with place.open(who, deadline_s=60) as tools:
            # the least of the deadlines of tool, call and run
            began = time.monotonic()
            late = await tools.execute("hang", {"mark": mark}, timeout_s=0.05)
            assert (late.status, late.attempts) == ("timeout", 1)
            assert time.monotonic() - began < 5
            assert late.error is not None
            assert "hang did not finish within 0.0" in late.error.message
        async with place.open(who, deadline_s=0.0) as tools:
            assert ((over := await tools.execute("ask.once", {"mark": mark})).status, over.attempts) == ("timeout", 0)
        who.heard.pairs()
        assert NOW[mark].asked == 0

    async def test_tool_execution_error_handling_and_recovery(self, place: House, mark: str) -> None:
        who, weather = place.person(), NOW[mark]
        async with place.open(who) as tools:
            weather.errors = [errors.Unavailable("away"), ConnectionResetError("gone")]
            outcome = await tools.execute("ask.again", {"mark": mark}, step_key="1:tool")
            # tried again where that may help, under one key, told once
            assert (outcome.status, outcome.attempts, weather.asked, len(weather.keys)) == ("success", 3, 3, 1)
            # what a repetition cannot mend is not repeated
            for wrong, code in ((ValueError("a secret word"), "TOOL_FAILED"), (errors.InvalidPayload("line 3"), "INVALID_PAYLOAD")):
                weather.errors = [wrong]
                outcome = await tools.execute("ask.again", {"mark": mark})
                assert (outcome.attempts, outcome.error and outcome.error.code) == (1, code)
                assert "secret" not in str(outcome.error)
            # nor is what is not declared to bear it
            weather.errors = [errors.Unavailable("away")]
            assert (await tools.execute("ask.once", {"mark": mark})).attempts == 1
            # the tool itself says when to come back: after the end of the call, so that there is no other attempt
            weather.errors = [errors.RateLimited(retry_after_ms=40_000)]
            assert (await tools.execute("ask.again", {"mark": mark})).attempts == 1
        who.heard.pairs()

    async def test_concurrent_tool_execution_timeout_isolation(self, place: House, mark: str) -> None:
        """Calls that hang hold up no other one."""
        people = [place.person() for _ in range(2)]
        async with place.open(people[0]) as hung, place.open(people[1]) as quick, asyncio.TaskGroup() as group:
            waiting = [group.create_task(hung.execute("hang", {"mark": mark}, timeout_s=30)) for _ in range(10)]
            await settled(lambda: place.dispatchers.running == 10)
            took = []
            for _ in range(20):
                began = time.process_time()
                assert (await quick.execute("ask.once", {"mark": mark})).status == "success"
                took.append(time.process_time() - began)
            assert sorted(took)[10] < 0.05
            # none of them has ended meanwhile, and each ends as it should
            assert not any(call.done() for call in waiting)
            NOW[mark].gate.set()
        assert {call.result().status for call in waiting} == {"success"}

    async def test_tool_execution_metrics_tracking_during_errors(self, place: House, mark: str) -> None:
        who, weather = place.person(), NOW[mark]
        weather.errors = [errors.ToolFailed("no")] * 2
        async with place.open(who) as tools:
            calls = [tools.execute("ask.once", {"mark": mark}) for _ in range(2)]
            calls += [tools.execute("nothing", {}), tools.execute("ask.once", {"wrong": 1})]
            calls += [tools.execute("hang", {"mark": mark}, timeout_s=0.01)]
            calls += [tools.execute("ask.backup", {"mark": mark}) for _ in range(5)]
            await asyncio.gather(*calls)
            counted = tools.metrics()
        outcomes = told(who)
        assert (counted.tools_executed, counted.successful_executions, counted.failed_executions) == (10, 5, 5)
        assert counted.websocket_events_sent == len(who.heard.events) == 20
        assert counted.total_execution_time_ms == pytest.approx(sum(one.execution_time_ms for one in outcomes), abs=0.01)
        assert (counted.permission_checks, counted.permission_denials, counted.security_violations) == (9, 0, 0)
        assert counted.last_execution_time is not None
        assert counted.created_at <= counted.last_execution_time
        assert sorted(one.status for one in outcomes) == ["error"] * 4 + ["success"] * 5 + ["timeout"]

    async def test_tool_execution_graceful_degradation(self, place: House, mark: str) -> None:
        who, weather = place.person(), NOW[mark]
        async with place.open(who) as tools:
            # late, then failing: another tool answers, and that is said
            for reason, wrong in (("DEADLINE_EXCEEDED", []), ("TOOL_FAILED", [RuntimeError("x")])):
                weather.errors = list(wrong)
                outcome = await tools.execute("ask.else", {"mark": mark})
                assert outcome.unwrap() == f"old answer for {mark}"
                assert outcome.degraded is not None
                assert outcome.degraded.told() == {"from": "ask.else", "to": "ask.backup", "reason": reason}
            assert outcome.attempts == 2
            # after three failures in a row it is left alone: nothing is asked, the other tool answers at once
            weather.errors = [RuntimeError("x")] * 2
            await tools.execute("ask.else", {"mark": mark})
            asked = weather.asked
            outcome = await tools.execute("ask.else", {"mark": mark})
            assert (outcome.degraded and outcome.degraded.reason, outcome.attempts, weather.asked) == ("UNAVAILABLE", 1, asked)
            # what may have changed something is not done once more in another way
            weather.errors = [RuntimeError("x")]
            outcome = await tools.execute("change", {"mark": mark})
            assert (outcome.status, outcome.degraded) == ("error", None)
        who.heard.pairs()
        # another user's calls are none the worse for it
        other = place.person()
        weather.errors = []
        weather.gate.set()
        async with place.open(other) as theirs:
            assert (await theirs.execute("ask.else", {"mark": mark})).unwrap() == "late"

    async def test_too_many_calls_are_refused_with_the_time_to_come_back_and_the_rest_goes_on(self, place: House, mark: str) -> None:
        first, second, third = (place.person() for _ in range(3))
        async with place.open(first) as one, place.open(second) as two, place.open(third) as three, asyncio.TaskGroup() as group:
            running = [group.create_task(one.execute("hang", {"mark": mark}, timeout_s=30)) for _ in range(12)]
            await settled(lambda: place.dispatchers.running == 12)
            refused = await one.execute("ask.once", {"mark": mark})
            # a tool that bears one call at a time: two wait, the next is refused
            waiting = [group.create_task(two.execute("one.by.one", {"mark": mark}, timeout_s=30)) for _ in range(3)]
            await settled(lambda: place.dispatchers.running == 15 and NOW[mark].asked == 1)
            full = await three.execute("one.by.one", {"mark": mark})
            for outcome, limit in ((refused, "tool_calls"), (full, "waiting")):
                assert (outcome.error and outcome.error.code, outcome.attempts) == ("RESOURCE_EXHAUSTED", 0)
                assert outcome.error is not None
                assert (outcome.error.details["limit"], outcome.error.details["retry_after_ms"]) == (limit, "1000")
            group.create_task(three.execute("hang", {"mark": mark}, timeout_s=30))
            more = [group.create_task(three.execute("hang", {"mark": mark}, timeout_s=30)) for _ in range(5)]
            last = await asyncio.gather(*more[4:])
            assert last[0].error is not None
            assert "This process has 20" in last[0].error.message
            NOW[mark].gate.set()
        assert {call.result().status for call in [*running, *waiting]} == {"success"}
        assert [event["progress"] for event in second.heard.events if event["type"] == "tool_progress"] == [50.0] * 3
        for who in (first, second, third):
            who.heard.pairs()

    async def test_what_changes_something_begins_only_when_the_record_knows(self, place: House, mark: str) -> None:
        who = place.person()
        who.heard.recorded.clear()
        async with place.open(who) as tools, asyncio.TaskGroup() as group:
            changing = group.create_task(tools.execute("change", {"mark": mark}))
            await asyncio.wait_for(who.heard.waits.wait(), 10)
            # it was told, and nothing was done; what changes nothing waits for nothing
            assert (who.heard.types(), NOW[mark].asked) == (["tool_executing"], 0)
            assert (await tools.execute("ask.once", {"mark": mark})).status == "success"
            assert NOW[mark].asked == 1
            # a record that stays away takes the time of the call, and the call was not made
            late = await tools.execute("change", {"mark": mark}, timeout_s=0.05)
            assert (late.status, late.attempts, NOW[mark].asked) == ("timeout", 0, 1)
            assert "the record could not be written" in str(late.error)
            who.heard.recorded.set()
            assert (await changing).status == "success"
        assert NOW[mark].asked == 2
        who.heard.pairs()
