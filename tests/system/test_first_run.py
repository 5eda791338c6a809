"""One user's run from a frame to its last event, and back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from tests.fixtures import sockets
from tests.fixtures.stack import System, gateway_url, spans_of
from tests.fixtures.users import NewUser

TEXT = "Rivers carry water. Water carries boats, and boats carry people."


async def test_a_run_over_the_socket_shows_the_five_critical_events(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as socket:
        frame_id = await socket.send("START_AGENT", {"agent": "text-analyst", "user_request": TEXT})
        ack = await socket.answer(frame_id)
        events = await socket.ended(ack["data"]["run_id"])
    sockets.in_legal_order(events)
    sockets.contiguous(events)
    assert [kind for kind in sockets.CRITICAL if kind in {event["type"] for event in events}] == sockets.CRITICAL
    for event in events:
        assert event["user_id"] == user.user_id
        assert event["request_id"] == frame_id
        assert event["thread_id"] == ack["data"]["thread_id"]
        assert event["data"]["agent_id"] == ack["data"]["run_id"]
        assert event["data"]["agent_name"] == "text-analyst"
        assert event["timestamp"].endswith("Z")
    assert events[-1]["data"]["result"]["statistics"]["words"] == 10


def test_the_command_line_prints_one_frame_per_line(system: System, new_user: NewUser) -> None:
    user = new_user()
    command = [sys.executable, "-m", "netra.cli", "run", "text-analyst", "--request", TEXT, "--json"]
    variables = {"NETRA_URL": gateway_url(system), "NETRA_TOKEN": user.token, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    sockets.in_legal_order(events)
    sockets.contiguous(events)
    assert [kind for kind in sockets.CRITICAL if kind in {event["type"] for event in events}] == sockets.CRITICAL


def test_the_command_line_fails_when_the_run_does(system: System, new_user: NewUser) -> None:
    user = new_user()
    command = [sys.executable, "-m", "netra.cli", "run", "text-analyst", "--request", TEXT, "--input", "pace_s=soon", "--json"]
    variables = {"NETRA_URL": gateway_url(system), "NETRA_TOKEN": user.token, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["type"], last["data"]["error"]["details"]["field"]) == ("agent_failed", "inputs.pace_s")


async def test_a_run_does_not_depend_on_its_socket(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as socket:
        run = await socket.run(TEXT, inputs={"pace_s": 0.3})
        await socket.until(type="agent_started")
        seen = socket.events[-1]["cursor"]
    async with sockets.opened(system, user, f"resume.{seen}") as again:
        events = await again.ended(run["run_id"])
    assert [event["cursor"] for event in events] == list(range(seen + 1, seen + 1 + len(events)))
    assert events[-1]["type"] == "agent_completed"


async def test_resume_rewinds_the_socket_without_a_hole_or_a_double(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as socket:
        first = await socket.ended((await socket.run(TEXT))["run_id"])
        socket.frames.clear()
        # the second run appends while the record is read
        second = await socket.send("START_AGENT", {"agent": "text-analyst", "user_request": TEXT})
        ack = await socket.ask("RESUME", {"after": 0})
        while len([event for event in socket.events if event["type"] in sockets.ENDS]) < 2 or socket.events[-1]["request_id"] != second:
            await socket.next()
    assert ack["data"]["from"] == 0
    after = socket.frames.index(ack)
    cursors = [frame["cursor"] for frame in socket.frames[after:] if "seq" in frame]
    assert cursors[: len(first)] == [event["cursor"] for event in first]
    assert cursors == list(range(1, len(cursors) + 1))


async def test_two_sockets_of_one_user_see_the_same(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user) as one, sockets.opened(system, user) as two:
        run = await one.run(TEXT)
        assert await one.ended(run["run_id"]) == await two.ended(run["run_id"])


async def test_messages_continue_a_thread(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        first = await socket.ask("USER_MESSAGE", {"content": TEXT})
        await socket.ended(first["data"]["run_id"])
        second = await socket.ask("CHAT", {"text": "And more."}, thread_id=first["data"]["thread_id"])
        events = await socket.ended(second["data"]["run_id"])
    assert second["data"]["thread_id"] == first["data"]["thread_id"]
    assert first["data"]["message_id"] != second["data"]["message_id"]
    created = [event["data"]["role"] for event in events if event["type"] == "message_created"]
    assert created == ["user", "assistant"]


async def test_cancel_ends_a_run_and_says_so(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        run = await socket.run(TEXT, inputs={"pace_s": 30})
        await socket.until(type="agent_thinking")
        assert (await socket.ask("CANCEL", {"run_id": run["run_id"]}))["type"] == "ack"
        events = await socket.ended(run["run_id"])
    assert events[-1]["type"] == "agent_cancelled"
    assert events[-1]["data"]["by"] == "user"


async def test_one_request_is_one_trace_through_every_part(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        run = await socket.run(TEXT)
        events = await socket.ended(run["run_id"])
    trace_id, correlation_id = events[0]["trace_id"], events[0]["correlation_id"]
    wanted = {"gateway", "dispatcher", "context", "events"}
    tools = {"tool text_statistics", "tool text_keywords"}
    async with asyncio.timeout(20):
        while True:
            spans = [span for span in await asyncio.to_thread(spans_of, system) if span["traceId"] == trace_id]
            names = {span["name"] for span in spans}
            if {span["service"] for span in spans} >= wanted and names >= tools and any(name.startswith("run ") for name in names):
                break
            await asyncio.sleep(0.1)
    marks = {
        attribute["value"]["stringValue"]
        for span in spans
        for attribute in span["attributes"]
        if attribute["key"] == "netra.correlation_id"
    }
    assert marks == {correlation_id}
    known = {span["spanId"] for span in spans}
    roots = [span for span in spans if span.get("parentSpanId", "") not in known]
    assert len(roots) == 1
    assert roots[0]["service"] == "gateway"
