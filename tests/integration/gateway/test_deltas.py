"""Text as it is produced: shown between the events of its run to those who watch, kept nowhere, and never in the way of a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from netra.agent import Turn, agent
from services.events import announce
from tests.fixtures import web
from tests.fixtures.sockets import Socket
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types
from tests.integration.gateway.conftest import bearer, until


class Script:
    """What the agent of a test waits for, and its turn."""

    def __init__(self) -> None:
        self.go = asyncio.Semaphore(0)
        self.turn: Turn


SCRIPTS: dict[str, Script] = {}


@agent("narrator", deadline_s=60)
async def narrator(turn: Turn) -> str:
    """Says what it says word by word, when it is let."""
    script = SCRIPTS[turn.request]
    script.turn = turn
    await turn.think("What to say?")
    await script.go.acquire()
    for word in ("one ", "two "):
        turn.delta(word)
    await script.go.acquire()
    await turn.think("one two ")
    # before the record can have what it follows
    turn.delta("three")
    await script.go.acquire()
    return "one two three"


@contextlib.asynccontextmanager
async def _socket(services: Services, user: User) -> AsyncIterator[Socket]:
    url = f"ws://127.0.0.1:{services.ports['gateway']}/ws"
    async with websockets.connect(url, additional_headers=bearer(user), proxy=None) as connection:
        socket = Socket(connection)
        await socket.until(type="connected")
        yield socket


async def _begun(socket: Socket, name: str) -> tuple[Script, str]:
    SCRIPTS[name] = script = Script()
    ack = await socket.ask("START_AGENT", {"agent": "narrator", "user_request": name})
    assert ack["type"] == "ack", ack
    return script, str(ack["data"]["run_id"])


def _told(frames: list[dict[str, Any]], run_id: str) -> list[str]:
    """The events of a run by their kinds, and what was shown by its text."""
    return [frame["data"]["text"] if frame["type"] == "agent_delta" else frame["type"] for frame in frames if frame.get("run_id") == run_id]


_RECORDED = ["agent_started", "message_created", "agent_thinking", "agent_thinking", "message_created", "agent_completed"]
_WATCHED = [*_RECORDED[:3], "one ", "two ", "agent_thinking", "three", *_RECORDED[4:]]


async def _narrated(socket: Socket, script: Script, run_id: str) -> None:
    """The run goes on when what was said is seen."""
    await socket.until(type="agent_thinking", run_id=run_id)
    for seen in ("two ", "three"):
        script.go.release()
        while (await socket.until(type="agent_delta", run_id=run_id))["data"]["text"] != seen:
            pass
    script.go.release()
    await socket.ended(run_id)


async def test_text_is_shown_between_the_events_of_its_run_and_not_kept(services: Services) -> None:
    await services.all(agents=[narrator])
    await services.gateway()
    user, other = await services.user(), await services.user()
    async with contextlib.AsyncExitStack() as stack:
        mine, stranger = [await stack.enter_async_context(_socket(services, one)) for one in (user, other)]
        script, run_id = await _begun(mine, "shown")
        await _narrated(mine, script, run_id)
        assert _told(mine.frames, run_id) == _WATCHED
        shown = [frame for frame in mine.frames if frame["type"] == "agent_delta"]
        for frame, after_seq in zip(shown, (3, 3, 4), strict=True):
            # what has no place in the record cannot be mistaken for what has
            assert not {"cursor", "seq", "event_id"} & frame.keys()
            assert (frame.get("cursor"), frame["after_seq"], frame["user_id"]) == (None, after_seq, user.user_id)
            assert (frame["data"]["agent_name"], frame["request_id"]) == ("narrator", mine.events[0]["request_id"])
        assert [event["cursor"] for event in mine.events] == list(range(1, 7))
        # the end was the last word, whatever the agent does
        script.turn.delta("too late")
        again, second = await _begun(mine, "again")
        await _narrated(mine, again, second)
        assert _told(mine.frames, run_id) == _WATCHED
        # the past is what was recorded
        before = len(mine.frames)
        resumed = await mine.ask("RESUME", {"after": 0})
        assert resumed["type"] == "ack", resumed
        while (await mine.next()).get("cursor") != 12:
            pass
        assert _told(mine.frames[before:], run_id) == _told(mine.frames[before:], second) == _RECORDED
        async with web.client(base_url=f"http://127.0.0.1:{services.ports['gateway']}", trust_env=False) as http:
            page = (await http.get(f"/v1/runs/{run_id}/events", headers=bearer(user))).json()
        assert types(page["events"]) == _RECORDED
        # and it was nobody else's
        await stranger.ask("PING")
        assert [frame["type"] for frame in stranger.frames] == ["connected", "pong"]


async def test_who_watches_a_kind_or_one_run_is_shown_what_belongs_to_it(services: Services) -> None:
    await services.all(agents=[narrator])
    await services.gateway()
    user = await services.user()
    url, streamed = f"http://127.0.0.1:{services.ports['gateway']}", asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        whole, words, ends = [await stack.enter_async_context(_socket(services, user)) for _ in range(3)]
        for socket, kind in ((words, "agent_delta"), (ends, "agent_completed")):
            assert (await socket.ask("SUBSCRIBE", {"types": [kind]}))["type"] == "ack"
        script, run_id = await _begun(whole, "filtered")
        http = await stack.enter_async_context(web.client(base_url=url, trust_env=False, timeout=20))
        lines: list[str] = []

        async def stream() -> None:
            headers = {"Accept": "text/event-stream"} | bearer(user)
            async with http.stream("GET", f"/v1/runs/{run_id}/events", headers=headers) as found:
                async for line in found.aiter_lines():
                    lines.append(line)
                    if line == "event: agent_thinking":
                        streamed.set()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(stream())
            await streamed.wait()
            await _narrated(whole, script, run_id)
        assert _told(whole.frames, run_id) == _WATCHED
        for socket, wanted in ((words, ["one ", "two ", "three"]), (ends, ["agent_completed"])):
            await socket.until(type="position", cursor=6) if socket is words else await socket.ended(run_id)
            assert _told(socket.frames, run_id) == wanted
        frames = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert _told(frames, run_id) == _WATCHED
        assert [line for line in lines if line.startswith("id: ")] == [f"id: {cursor}" for cursor in range(1, 7)]


async def test_without_valkey_nothing_is_shown_and_the_run_is_none_the_worse(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    monkeypatch.setattr(announce, "_missed", meter.create_counter("missed"))
    services.own = {"events": {"valkey_url": "redis://127.0.0.1:1/0", "events_poll_s": 0.05}}
    await services.all(agents=[narrator])
    await services.gateway()
    user = await services.user()
    async with _socket(services, user) as socket:
        script, run_id = await _begun(socket, "dropped")
        for gates in (2, 1):
            await socket.until(type="agent_thinking", run_id=run_id)
            for _ in range(gates):
                script.go.release()
        assert _told(await socket.ended(run_id), run_id) == _RECORDED
    assert types(await Runs(services).ended(user, run_id)) == _RECORDED
    missed = dict[str, float]()

    def counted() -> float:
        data: Any = reader.get_metrics_data()
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data is not None else ():
            missed.update({point.attributes["reason"]: point.value for point in metric.data.data_points})
        return sum(missed.values())

    await until(lambda: counted() == 3)
    assert set(missed) <= {"away", "late"}
