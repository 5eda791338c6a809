"""What a socket shows of tools: their beginning, progress and end, whole and in order, to their user alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import json_format

from netra import errors, ids
from netra.agent import Turn, agent
from netra.events.v1 import kinds_pb2
from netra.tool import ToolContext, tool
from services.dispatcher import journal
from tests.fixtures import sockets
from tests.fixtures.dispatchers import house
from tests.fixtures.sockets import Socket
from tests.fixtures.storage import Services
from tests.fixtures.users import User

GATES: dict[str, asyncio.Event] = {}


@tool(name="shown.step", timeout_s=30, idempotent=True, retries=1)
async def step(context: ToolContext, text: str, mark: str = "") -> str:
    """Takes a step, and shows how far it is."""
    context.progress(0.25, f"{text}: begun")
    if mark:
        await GATES[mark].wait()
    return text.upper()


@tool(name="shown.wrong")
async def wrong(kind: str) -> str:
    """Fails in one way or another."""
    raise errors.QuotaExceeded("Nothing is left.") if kind == "known" else ValueError("a secret")


@agent("shower")
async def shower(turn: Turn) -> Any:
    """Calls tools that were asked for."""
    asked = turn.inputs["calls"]
    if turn.inputs.get("at_once"):
        return await turn.gather(*(turn.tool(one["tool"], **one["arguments"]) for one in asked))
    found = []
    for one in asked:
        try:
            found.append(await turn.tool(one["tool"], **one["arguments"]))
        except errors.NetraError as error:
            found.append(error.code)
    return found


@pytest.fixture
async def running(services: Services) -> Services:
    """All services and a gateway."""
    await services.all(agents=[shower], tools=[step, wrong])
    await services.gateway()
    return services


@contextlib.asynccontextmanager
async def socket_of(services: Services, user: User) -> AsyncIterator[Socket]:
    """A socket of a user."""
    system: Any = services
    async with sockets.opened(system, user) as socket:
        yield socket


async def started(socket: Socket, *calls: tuple[str, dict[str, Any]], **inputs: Any) -> str:
    """Start a run that makes these calls."""
    asked = [{"tool": name, "arguments": arguments} for name, arguments in calls]
    payload = {"agent": "shower", "user_request": "Show.", "inputs": {"calls": asked, **inputs}}
    ack = await socket.ask("START_AGENT", payload)
    assert ack["type"] == "ack", ack
    return str(ack["data"]["run_id"])


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The data of the events of a kind."""
    return [event["data"] for event in events if event["type"] == kind]


@pytest.mark.real_services
class TestWebSocketToolExecutionIntegration:
    """Sockets."""

    async def test_websocket_events_during_successful_tool_execution(self, running: Services) -> None:
        user = await running.user()
        mark = ids.uuid7()
        GATES[mark] = asyncio.Event()
        async with socket_of(running, user) as socket:
            run_id = await started(socket, ("shown.step", {"text": "a", "mark": mark}))
            shown = await socket.until(type="tool_progress")
            # while it is under way, and kept nowhere
            assert (shown["data"]["progress_percentage"], shown["data"]["message"]) == (25.0, "a: begun")
            assert "seq" not in shown
            assert of(socket.frames, "tool_completed") == []
            GATES[mark].set()
            events = await socket.ended(run_id)
        durable = [event for event in events if "seq" in event]
        sockets.in_legal_order(durable)
        (over,) = of(durable, "tool_completed")
        assert (over["status"], over["result"], over["attempts"]) == ("success", "A", 1)
        assert shown["data"]["tool_call_id"] == over["tool_call_id"]

    async def test_websocket_events_during_failed_tool_execution(self, running: Services) -> None:
        user = await running.user()
        async with socket_of(running, user) as socket:
            calls: list[tuple[str, dict[str, Any]]] = [
                ("shown.wrong", {"kind": "known"}), ("shown.wrong", {"kind": "other"}), ("no.such", {}), ("shown.step", {"text": 1}),
            ]  # fmt: skip
            events = await socket.ended(await started(socket, *calls))
        durable = [event for event in events if "seq" in event]
        sockets.in_legal_order(durable)
        over = of(durable, "tool_completed")
        codes = ["QUOTA_EXCEEDED", "TOOL_FAILED", "NOT_FOUND", "INVALID_PAYLOAD"]
        assert [one["error"]["code"] for one in over] == codes
        assert {one["status"] for one in over} == {"error"}
        assert [one["attempts"] for one in over] == [1, 1, 0, 0]
        assert "secret" not in str(over)
        assert events[-1]["data"]["result"] == codes

    async def test_websocket_events_during_concurrent_tool_execution(self, running: Services) -> None:
        """Two users, many calls at once: each socket shows its user's, each in a pair."""
        users = [await running.user() for _ in range(2)]
        async with socket_of(running, users[0]) as one, socket_of(running, users[1]) as other:
            calls = [[("shown.step", {"text": f"{name}{number}"}) for number in range(8)] for name in "ab"]
            runs = [await started(socket, *mine, at_once=True) for socket, mine in zip((one, other), calls, strict=True)]
            seen = [[event for event in await socket.ended(run) if "seq" in event] for socket, run in zip((one, other), runs, strict=True)]
        for name, user, events in zip("AB", users, seen, strict=True):
            sockets.in_legal_order(events)
            assert {event["user_id"] for event in events} == {user.user_id}
            assert events[-1]["data"]["result"] == [f"{name}{number}" for number in range(8)]
            assert len(of(events, "tool_executing")) == len(of(events, "tool_completed")) == 8

    async def test_websocket_event_data_completeness_and_structure(self, running: Services) -> None:
        user = await running.user()
        async with socket_of(running, user) as socket:
            run_id = await started(socket, ("shown.step", {"text": "a"}), ("shown.wrong", {"kind": "known"}))
            events = [event for event in await socket.ended(run_id) if "seq" in event]
        for event in events:
            assert {"cursor", "seq", "event_id", "user_id", "thread_id", "run_id", "request_id", "correlation_id", "timestamp"} <= set(
                event
            )
            assert (event["user_id"], event["run_id"]) == (user.user_id, run_id)
            message = getattr(kinds_pb2, "".join(word.title() for word in event["type"].split("_")))()
            json_format.ParseDict(event["data"], message)
        begun, over = of(events, "tool_executing")[0], of(events, "tool_completed")[0]
        assert begun["parameters"] == {"text": "a"}
        assert begun["tool_version"] == "1.0.0"
        assert over["enforcement"] == {"tier": "trusted", "backend": "asyncio"}
        assert over["execution_time_ms"] > 0
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))

    async def test_websocket_events_with_agent_websocket_bridge_adapter(self, tmp_path: Any) -> None:
        """The bridge is what dispatchers of runs tell: each of its methods for calls is one of the `Reporter`'s."""
        async with house(tmp_path, [step]) as made:
            who = made.person()
            async with made.open(who) as tools:
                await tools.execute("shown.step", {"text": "a"})
        assert who.heard.types() == ["tool_executing", "tool_progress", "tool_completed"]
        for name in ("tool_executing", "tool_progress", "tool_completed", "security_violation", "barrier", "require_lease"):
            assert callable(getattr(journal.AgentWebSocketBridge, name))
