"""Filters of a socket and streaming RPCs over it, against the running system."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from netra import ids
from tests.fixtures import sockets
from tests.fixtures.stack import System
from tests.fixtures.users import NewUser

_EVENTS = "netra.events.v1.EventsService/"


async def test_a_filtered_socket_has_what_it_wants_and_always_knows_how_far_it_is(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as whole, sockets.opened(system, user) as part:
        wanted = (await part.ask("SUBSCRIBE", {"types": ["agent_completed"]}))["data"]["subscription_id"]
        run = await whole.run()
        events = await whole.ended(run["run_id"])
        (end,) = await part.ended(run["run_id"])
        assert end == events[-1]
        before = part.frames[part.frames.index(end) - 1]
        assert before == {"type": "position", "cursor": end["cursor"] - 1}
        # the last one gone, everything comes again; RESUME brings what was passed over
        assert (await part.ask("UNSUBSCRIBE", {"subscription_id": wanted}))["type"] == "ack"
        seen = len(part.frames)
        resumed = await part.ask("RESUME", {"after": events[0]["cursor"] - 1})
        assert resumed["data"]["to"] == end["cursor"]
        while end not in part.frames[seen:]:
            await part.next()
    assert [frame for frame in part.frames[seen:] if "seq" in frame] == events


async def test_positions_alone_lead_a_client_to_the_end_of_the_record(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as whole, sockets.opened(system, user) as part:
        await part.ask("SUBSCRIBE", {"run_id": ids.uuid7()})
        run = await whole.run()
        last = (await whole.ended(run["run_id"]))[-1]["cursor"]
        while (await part.until(type="position"))["cursor"] < last:
            pass
    assert part.events == []
    async with sockets.opened(system, user, f"resume.{last}") as again:
        pong = await again.ask("PING")
    assert again.frames[1:] == [pong]


async def _stream(socket: sockets.Socket, method: str, **request: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The data of a stream, and its end."""
    ack = await socket.ask("STREAM", {"method": method, "request": request})
    assert ack["type"] == "ack", ack
    stream_id = ack["data"]["stream_id"]
    end = await socket.until(type="stream_end", stream_id=stream_id)
    data = [frame for frame in socket.frames if frame["type"] == "stream_data" and frame["stream_id"] == stream_id]
    assert [frame["seq"] for frame in data] == list(range(1, len(data) + 1))
    return [frame["data"] for frame in data], end


def _frames(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(base64.b64decode(event["frame"])) for message in data for event in message["events"]]


async def test_the_events_of_a_run_can_be_streamed_over_the_socket(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        run = await socket.run()
        data, end = await _stream(socket, _EVENTS + "Subscribe", run_id=run["run_id"])
        assert end["code"] == "OK"
        events = await socket.ended(run["run_id"])
        assert _frames(data) == events
        data, end = await _stream(socket, _EVENTS + "ExportEvents")
        assert (end["code"], _frames(data)) == ("OK", events)


async def test_a_stream_shows_nothing_of_others(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket, sockets.opened(system, new_user()) as other:
        run = await socket.run()
        await socket.ended(run["run_id"])
        data, end = await _stream(other, _EVENTS + "Subscribe", run_id=run["run_id"])
        assert (data, end["code"]) == ([], "NOT_FOUND")
        refused = await other.ask("STREAM", {"method": "netra.auth.v1.AuthService/ExportAudit"})
        assert (refused["type"], refused["code"]) == ("error", "PERMISSION_DENIED")


async def test_a_stream_without_end_goes_on_beside_everything_else_until_it_is_cancelled(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        stream_id = (await socket.ask("STREAM", {"method": _EVENTS + "Subscribe"}))["data"]["stream_id"]
        run = await socket.run()
        events = await socket.ended(run["run_id"])
        async with asyncio.timeout(20):
            while len(_frames([frame["data"] for frame in socket.frames if frame["type"] == "stream_data"])) < len(events):
                await socket.next()
        assert (await socket.ask("STREAM_CANCEL", {"stream_id": stream_id}))["type"] == "ack"
        assert (await socket.until(type="stream_end"))["code"] == "CANCELLED"
        assert _frames([frame["data"] for frame in socket.frames if frame["type"] == "stream_data"]) == events
