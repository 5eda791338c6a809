"""Flows of several tools, as agents make them: one after the other, at once, on a condition, with a substitute, in a bounded loop."""

from __future__ import annotations

import asyncio
import itertools
from datetime import datetime
from typing import Any

import pytest

from netra import errors
from netra.agent import Turn, agent
from netra.tool import ToolContext, tool
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs, types

THRESHOLD = 2000
_MOST_ROUNDS = 2
DOMAINS = ("cost", "speed", "risk", "quality")
# where the calls of one run wait for each other
_MEET: dict[str, asyncio.Barrier] = {}


@tool(name="flow.domain")
async def domain(context: ToolContext, name: str) -> dict[str, Any]:
    """Analyses one domain; none is done with before all of them have begun."""
    await _MEET.setdefault(context.context.run_id, asyncio.Barrier(len(DOMAINS))).wait()
    return {"domain": name, "savings": 100 * len(name)}


@tool(name="flow.primary")
async def primary() -> dict[str, Any]:
    """Is out of order."""
    raise errors.Unavailable("The source of the figures is away.")


@tool(name="flow.declared", fallback="flow.backup")
async def declared() -> dict[str, Any]:
    """Is out of order, and says who stands in."""
    raise errors.Unavailable("The source of the figures is away.")


@tool(name="flow.backup")
async def backup() -> dict[str, Any]:
    """Has older figures."""
    return {"figures": "older"}


@tool(name="flow.review")
async def review(draft: int) -> dict[str, Any]:
    """Approves the second draft."""
    return {"approved": draft >= _MOST_ROUNDS, "score": 0.5 + draft / 10}


@agent("sequential")
async def sequential(turn: Turn) -> dict[str, Any]:
    """Analysis, then what to do about it, then doing it."""
    found = await turn.tool("demo_analysis", period="month")
    advised = await turn.tool("demo_optimization", analysis=found)
    done = await turn.tool("demo_action", recommendations=advised["recommendations"])
    return {"total_cost": found["total_cost"], "total_savings": advised["total_savings"], "actions": done["actions"]}


@agent("parallel")
async def parallel(turn: Turn) -> list[Any]:
    """Four domains at once."""
    return await turn.gather(*(turn.tool("flow.domain", name=name) for name in DOMAINS))


@agent("conditional")
async def conditional(turn: Turn) -> dict[str, Any]:
    """Acts when there is enough to be saved, and only advises when there is not."""
    found = await turn.tool("demo_analysis")
    potential = sum(one["potential_savings"] for one in found["optimization_opportunities"])
    if potential > float(turn.inputs.get("threshold", THRESHOLD)):
        return {"branch": "act", "outcome": (await turn.tool("demo_action"))["status"]}
    return {"branch": "advise", "outcome": (await turn.tool("demo_optimization"))["recommendations"][0]["action"]}


@agent("recovering")
async def recovering(turn: Turn) -> list[Any]:
    """Asks another tool when the first one fails: by itself, and as the tool declares."""
    try:
        first = await turn.tool("flow.primary")
    except errors.Unavailable:
        first = await turn.tool("flow.backup")
    return [first, await turn.tool("flow.declared")]


@agent("feedback")
async def feedback(turn: Turn) -> dict[str, Any]:
    """Improves a draft until it is approved, twice at most."""
    scores = []
    for draft in range(1, _MOST_ROUNDS + 1):
        await turn.tool("demo_optimization", draft=draft)
        said = await turn.tool("flow.review", draft=draft)
        scores.append(said["score"])
        if said["approved"]:
            break
    return {"rounds": len(scores), "scores": scores, "approved": said["approved"]}


AGENTS = [sequential, parallel, conditional, recovering, feedback]
TOOLS = [domain, primary, declared, backup, review]


@pytest.fixture
async def running(services: Services) -> Runs:
    """All services, with the agents and tools above."""
    await services.all(agents=AGENTS, tools=TOOLS)
    return Runs(services)


def called(events: list[dict[str, Any]]) -> list[str]:
    """The tools that were called, in their order."""
    return [event["data"]["tool_name"] for event in events if event["type"] == "tool_executing"]


def result(events: list[dict[str, Any]]) -> Any:
    """What the run came to."""
    assert events[-1]["type"] == "agent_completed", events[-1]
    return events[-1]["data"]["result"]


def at(event: dict[str, Any]) -> datetime:
    """When it was told."""
    return datetime.fromisoformat(event["timestamp"])


@pytest.mark.real_services
class TestMultiToolOrchestrationFlows:
    """Flows."""

    async def _run(self, running: Runs, name: str, **inputs: Any) -> list[dict[str, Any]]:
        user = await running.services.user()
        return await running.ended(user, (await running.start(user, name, inputs=inputs)).run_id)

    async def test_sequential_analysis_optimization_flow(self, running: Runs) -> None:
        events = await self._run(running, "sequential")
        assert called(events) == ["demo_analysis", "demo_optimization", "demo_action"]
        assert result(events) == {
            "total_cost": 15420.50,
            "total_savings": 3350.75,
            "actions": [
                {"action": "resize_instances", "state": "planned", "automated": True},
                {"action": "move_cold_storage", "state": "planned", "automated": True},
            ],
        }
        # one is over before the next begins
        pairs = [event["type"] for event in events if event["type"].startswith("tool_")]
        assert pairs == ["tool_executing", "tool_completed"] * 3

    async def test_parallel_multi_domain_analysis_flow(self, running: Runs) -> None:
        events = await self._run(running, "parallel")
        assert [one["domain"] for one in result(events)] == [*DOMAINS]
        begun = [event for event in events if event["type"] == "tool_executing"]
        # all of them begin before any is over
        first_end = types(events).index("tool_completed")
        assert all(event["seq"] <= events[first_end]["seq"] for event in begun)
        assert (at(begun[-1]) - at(begun[0])).total_seconds() < 2

    async def test_conditional_orchestration_flow_with_branching(self, running: Runs) -> None:
        events = await self._run(running, "conditional")
        assert (result(events)["branch"], called(events)) == ("act", ["demo_analysis", "demo_action"])
        events = await self._run(running, "conditional", threshold=5000)
        assert (result(events)["branch"], called(events)) == ("advise", ["demo_analysis", "demo_optimization"])

    async def test_error_recovery_in_multi_tool_flow(self, running: Runs) -> None:
        events = await self._run(running, "recovering")
        assert result(events) == [{"figures": "older"}] * 2
        over = [event["data"] for event in events if event["type"] == "tool_completed"]
        assert [(one["tool_name"], one["status"]) for one in over] == [
            ("flow.primary", "error"), ("flow.backup", "success"), ("flow.declared", "success"),
        ]  # fmt: skip
        assert over[0]["error"]["code"] == "UNAVAILABLE"
        assert over[2]["degraded"] == {"from": "flow.declared", "to": "flow.backup", "reason": "UNAVAILABLE"}
        assert "degraded" not in over[1]

    async def test_complex_orchestration_with_feedback_loops(self, running: Runs) -> None:
        events = await self._run(running, "feedback")
        found = result(events)
        assert (found["rounds"], found["approved"]) == (2, True)
        assert all(later >= earlier for earlier, later in itertools.pairwise(found["scores"]))
        assert called(events) == ["demo_optimization", "flow.review"] * 2
