"""Calls of every tier through the dispatcher: each is contained as it says, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher.tools.sandbox import groups, guardian, sandboxes, workers
from tests.fixtures import contained
from tests.fixtures.dispatchers import House, house
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

TIERS = ("script", "python", "command")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[House]:
    """A process with warm workers."""
    guard = guardian.Guardian(60.0)
    warm = workers.Workers(4, guard, preload=["tests.fixtures.contained"])
    kept = sandboxes.Sandboxes({}, guard=guard, warm=warm)
    await kept.start()
    try:
        async with house(tmp_path, [contained.worker, contained.mortal], contained=kept) as made:
            yield made
    finally:
        await kept.close()


async def execute(runs: Runs, user: User, name: str, **arguments: object) -> pb.ExecuteToolResponse:
    """An interactive call."""
    asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name=name, arguments=json.dumps(arguments).encode())
    return await runs.dispatcher.ExecuteTool(asked, metadata=user.bearer, wait_for_ready=True, timeout=60)


async def available(services: Services) -> dict[str, bool]:
    """Which tiers the dispatcher says that it has, once they are probed."""
    health: Any = health_pb2_grpc.HealthStub(services.channel("dispatcher"))
    found: dict[str, bool] = {}
    async with asyncio.timeout(60):
        for tier in (*TIERS, "remote"):
            async for state in health.Watch(health_pb2.HealthCheckRequest(service=f"netra.sandbox.{tier}"), wait_for_ready=True):
                if state.status != health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
                    found[tier] = state.status == health_pb2.HealthCheckResponse.SERVING
                    break
    return found


async def test_calls_of_all_tiers_are_contained_or_refused(services: Services) -> None:
    await services.all(tools=[contained.contained], sandbox_tiers=",".join(TIERS))
    runs, user = Runs(services), await services.user()
    there = await available(services)
    assert not there["remote"]
    asked: dict[str, tuple[str, dict[str, Any], Any]] = {
        "script": ("run_script", {"code": "print('said')\na + 1", "arguments": {"a": 1}}, 2),
        "python": ("run_python", {"code": "print('said')\nresult = open('given').read()", "files": {"given": "x"}}, "x"),
        "command": ("run_command", {"argv": ["sh", "-c", "echo said >&2; cat given"], "files": {"given": '{"a":1}'}}, {"a": 1}),
    }
    for tier, (name, arguments, result) in asked.items():
        answer = await execute(runs, user, name, **arguments)
        enforcement = json.loads(answer.enforcement)
        assert enforcement["tier"] == tier
        if there[tier]:
            assert answer.status == "success", answer
            assert json.loads(answer.result) == {"result": result, "output": "said\n", "cut": False}
            assert isinstance(enforcement["disk_quota"], bool)
        else:
            assert (answer.error.code, answer.attempts) == ("SANDBOX_UNAVAILABLE", 0)
    # a plain function of the tier, as a whole: with its arguments, and nothing else
    answer = await execute(runs, user, "plain.contained", numbers=[1, 2, 3])
    if there["python"]:
        assert json.loads(answer.result) == {"sum": 6, "environment": [], "there": []}, answer
    events = await runs.ended(user, answer.run_id)
    assert events[-1]["data"]["enforcement"] == json.loads(answer.enforcement)


async def test_plain_functions_run_in_processes_of_their_user(place: House) -> None:
    one, other, apart = (place.person() for _ in range(3))
    async with place.open(one) as mine, place.open(other) as theirs, place.open(apart, strategy="isolated") as alone:
        found = [(await tools.execute("plain.worker", {"value": 1})).unwrap() for tools in (mine, mine, theirs, alone, alone)]
        pids = [one["pid"] for one in found]
        # warm for its user, another for another one; a fresh one for each isolated call
        assert pids[0] == pids[1]
        assert len(set(pids)) == 4
        outcome = await mine.execute("plain.worker", {"value": 2})
        assert dict(outcome.enforcement) == {"tier": "trusted", "backend": "worker"}
    # of an isolated dispatcher no process is left
    assert not any(groups.kill(pid) for pid in pids[3:])


async def test_a_process_that_is_killed_ends_the_attempt_alone(place: House, tmp_path: Path) -> None:
    who = place.person()
    async with place.open(who) as tools:
        outcome = await tools.execute("plain.mortal", {"flag": str(tmp_path / "flag")})
    assert (outcome.status, outcome.attempts, outcome.unwrap()) == ("success", 2, "alive")
    who.heard.pairs()
