"""kill -9 of each process during a run: it is restarted, the client resumes, the record is complete."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import netra
from tests.fixtures import sockets
from tests.fixtures.stack import SERVICES, System, gateway_url
from tests.fixtures.users import NewUser


@pytest.mark.parametrize("name", SERVICES)
async def test_a_killed_process_costs_no_event(system: System, new_user: NewUser, name: str) -> None:
    user = new_user()
    events: list[dict[str, Any]] = []
    async with netra.connect(gateway_url(system), user.token) as client:
        async for event in client.run("text-analyst", user_request="Some text.", inputs={"pace_s": 1.0}):
            events.append(event)
            if event["type"] == "agent_thinking" and event["data"]["step_number"] == 1:
                await asyncio.to_thread(system.kill, name)
    await asyncio.to_thread(system.restarted, name)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["cursor"] for event in events] == list(range(1, len(events) + 1))
    last = events[-1]
    # also when it was the run's owner: another one goes on with it
    assert last["type"] == "agent_completed"
    async with sockets.opened(system, user, "resume.0") as socket:
        assert await socket.ended(last["run_id"]) == events


@pytest.mark.parametrize("name", ["postgres", "valkey"])
async def test_a_killed_store_costs_no_event(system: System, new_user: NewUser, name: str) -> None:
    user = new_user()
    async with netra.connect(gateway_url(system), user.token) as client:
        events = []
        async for event in client.run("text-analyst", user_request="Some text.", inputs={"pace_s": 1.0}):
            events.append(event)
            if event["type"] == "agent_thinking" and event["data"]["step_number"] == 1:
                await asyncio.to_thread(system.kill, name)
    await asyncio.to_thread(system.restarted, name)
    assert [event["cursor"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "agent_completed", events[-1]["data"]
