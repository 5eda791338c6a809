"""A message passes nine stages, and what was sent is counted exactly."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

_STAGES = [
    "message_received", "message_validated", "message_persisted", "routing_to_agent", "agent_execution_started",
    "agent_execution_completed", "agent_response_received", "response_persisted", "websocket_notification_sent",
]  # fmt: skip


async def _get(system: System, user: User, path: str) -> dict[str, Any]:
    async with web.client(base_url=gateway_url(system), headers={"Authorization": f"Bearer {user.token}"}) as client:
        return dict((await client.get(path)).raise_for_status().json())


async def test_a_message_leaves_all_nine_stages_behind(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as socket:
        ack = await socket.ask("USER_MESSAGE", {"agent": "text-analyst", "message": "Some text."})
        await socket.ended(ack["data"]["run_id"])
        stages = await _stages(system, user, ack["data"]["run_id"])
    assert [stage["name"] for stage in stages] == _STAGES
    times = [datetime.datetime.fromisoformat(stage["at"]) for stage in stages]
    assert times == sorted(times)


async def _stages(system: System, user: User, run_id: str) -> list[dict[str, Any]]:
    """Those of a run once the last one is there, which is told once a second."""
    async with asyncio.timeout(10):
        while True:
            stages: list[dict[str, Any]] = (await _get(system, user, f"/v1/runs/{run_id}"))["stages"]
            if stages[-1]["name"] == _STAGES[-1]:
                return stages
            await asyncio.sleep(0.2)


async def test_what_a_user_sends_over_several_sockets_at_once_is_counted_exactly(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as one, sockets.opened(system, user) as two:
        async with asyncio.TaskGroup() as group:
            for socket in (one, two):
                group.create_task(_busy(socket))
        found = await _get(system, user, "/v1/me/statistics")
    # what others send is not shown to them
    (mine,) = found.values()
    assert mine.pop("last_processed_time") is not None
    counted = {"messages_processed": 8, "start_agent_requests": 4, "user_messages": 8, "chat_messages": 4, "errors": 12}
    assert mine == {**counted, "deprecated": {"MESSAGE": 4}}


async def _busy(socket: sockets.Socket) -> None:
    for number in range(2):
        await socket.ask("START_AGENT", {"agent": "text-analyst", "user_request": "x"} if number else {})
        await socket.ask("USER_MESSAGE", {"agent": "text-analyst", "message": "x"})
        await socket.ask("message", {"agent": "text-analyst", "message": "x" if number else ""})
        await socket.ask("CHAT", {"agent": "nobody", "message": "x"})
        await socket.connection.send("{")
        await socket.ask("PING")
