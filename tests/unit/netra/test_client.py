"""No request waits for ever: what the gateway cannot read is refused here, and every wait has an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import typer
from rich.console import Console
from websockets.asyncio import client as socket_

from netra import api, client, console, errors, incoming

CONNECTED = {"type": "connected", "user_id": "u", "cursor": 0, "epoch": "e", "limits": {"max_frame_bytes": 1024}}


class Socket:
    """A connection of a gateway that greets, and behaves as told to every frame."""

    def __init__(self, behave: Behave, first: str, got: list[str]) -> None:
        self._behave, self._got = behave, got
        self._said: asyncio.Queue[str | None] = asyncio.Queue()
        self._said.put_nowait(first)
        self.close_code: int | None = None
        self.close_reason = ""

    async def __aenter__(self) -> Socket:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __aiter__(self) -> AsyncIterator[str]:
        while (text := await self._said.get()) is not None:
            yield text

    async def send(self, text: str) -> None:
        self._got.append(text)
        await self._behave(self, json.loads(text))

    def say(self, frame: dict[str, Any]) -> None:
        self._said.put_nowait(json.dumps(frame))

    def close(self, code: int, reason: str) -> None:
        self.close_code, self.close_reason = code, reason
        self._said.put_nowait(None)


Behave = Callable[[Socket, dict[str, Any]], Awaitable[None]]


@contextlib.asynccontextmanager
async def gateway(behave: Behave, first: str = json.dumps(CONNECTED)) -> AsyncIterator[tuple[str, list[str]]]:
    """Every connection is to this gateway; yields its address and the frames it got."""
    got: list[str] = []

    async def opened(*_: object, **__: object) -> Socket:
        return Socket(behave, first, got)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket_, "connect", opened)
        yield "http://a.example", got


async def accept(socket: Socket, frame: dict[str, Any]) -> None:
    socket.say({"type": "ack", "id": frame["id"], "data": {"run_id": "r", "thread_id": "t"}})


async def say_nothing(socket: Socket, frame: dict[str, Any]) -> None:
    pass


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"inputs": {"x": float("nan")}}, "payload.inputs.x"),
        ({"inputs": {"x": [1, float("-inf")]}}, "payload.inputs.x.1"),
        ({"inputs": {"x": 2**64}}, "payload.inputs.x"),
        ({"inputs": {"x": 10**400}}, "payload.inputs.x"),
        ({"inputs": {"x": {1}}}, "payload.inputs.x"),
        ({"inputs": {"\ud800": 1}}, "payload.inputs"),
        ({"inputs": {(1, 2): 1}}, "payload.inputs"),
        ({"inputs": {"x": [{"__proto__": 1}]}}, "payload.inputs.x.0.__proto__"),
        ({"user_request": "\ud800"}, "payload.user_request"),
        ({"thread_id": "\udfff"}, "thread_id"),
    ],
)
async def test_what_the_gateway_cannot_read_is_refused_by_name(given: dict[str, Any], field: str) -> None:
    async with gateway(accept) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        with pytest.raises(errors.InvalidPayload) as refused:
            await connected.start(**{"user_request": "x", **given})
        assert refused.value.details["field"] == field
        assert got == []


async def test_what_was_passed_over_is_not_asked_for_again() -> None:
    event = {"type": "agent_completed", "event_id": "x", "cursor": 42, "run_id": "r", "request_id": ""}

    async def pass_over(socket: Socket, frame: dict[str, Any]) -> None:
        await accept(socket, frame)
        socket.say({"type": "position", "cursor": 41})
        socket.say({**event, "request_id": frame["id"]})

    async with gateway(pass_over) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        assert [found["cursor"] async for found in connected.run(user_request="x")] == [42]
        assert (connected.cursor, len(got)) == (42, 1)


async def test_a_stream_gives_its_data_and_then_says_how_it_ended() -> None:
    async def streaming(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["type"] != "STREAM":
            return
        asked = frame["payload"]["request"]["of"]
        # at once, before whoever asked can look
        socket.say({"type": "ack", "id": frame["id"], "data": {"stream_id": asked}})
        for number in range(3):
            socket.say({"type": "stream_data", "stream_id": asked, "seq": number + 1, "data": {"n": number}})
            socket.say({"type": "stream_data", "stream_id": "nobody's", "seq": number + 1, "data": {}})
        end = {"good": {"code": "OK"}, "bad": {"code": "NOT_FOUND", "message": "There is none."}}
        if asked in end:
            socket.say({"type": "stream_end", "stream_id": asked, "message": "", **end[asked]})

    async with gateway(streaming) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        assert [told["n"] async for told in connected.stream("a/B", {"of": "good"})] == [0, 1, 2]
        failing = connected.stream("a/B", {"of": "bad"})
        assert [(await anext(failing))["n"] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(errors.NotFound):
            await anext(failing)
        left = connected.stream("a/B", {"of": "endless"})
        await anext(left)
        await left.aclose()
        assert json.loads(got[-1])["payload"] == {"stream_id": "endless"}
        assert json.loads(got[-1])["type"] == "STREAM_CANCEL"
        assert connected._streams == {}


@pytest.mark.parametrize(("frames", "size"), [(3, 2**20), (1000, 330)])
async def test_what_nobody_reads_of_a_stream_is_bounded_and_holds_up_nothing_else(
    frames: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "_FRAMES", frames)
    monkeypatch.setattr(incoming, "_BYTES", size)
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def pouring(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["type"] == "STREAM":
            socket.say({"type": "ack", "id": frame["id"], "data": {"stream_id": "s"}})
            for number in range(1, 9):
                data = {"n": f"{number:030}"}
                socket.say({"type": "stream_data", "stream_id": "s", "seq": number, "data": data})
        elif frame["type"] == "STREAM_CANCEL":
            cancelled.put_nowait(frame["payload"]["stream_id"])
        else:
            await accept(socket, frame)

    async with gateway(pouring) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        stream = connected.stream("a/B", {})
        found = [int((await anext(stream))["n"])]
        assert await cancelled.get() == "s"
        assert (await connected.start(user_request="x"))["run_id"] == "r"
        with pytest.raises(errors.Unavailable, match="as fast as it came"):
            await _rest(stream, found)
        # what was kept comes first; whoever reads took none, or one, before the rest came
        assert found in ([1, 2, 3], [1, 2, 3, 4])
        assert (connected._streams, cancelled.empty()) == ({}, True)


async def _rest(stream: AsyncIterator[dict[str, Any]], found: list[int]) -> None:
    async for data in stream:
        found.append(int(data["n"]))  # noqa: PERF401 - what comes before it fails counts


async def test_the_end_of_a_stream_always_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "_FRAMES", 2)
    stream = incoming.Stream()
    for frame in ({"type": "stream_data", "data": 1}, {"type": "stream_data", "data": 2}, {"type": "stream_end", "code": "OK"}):
        stream.put(frame, 10)
    assert [(await stream.take())["type"] for _ in range(3)] == ["stream_data", "stream_data", "stream_end"]
    assert not stream.overrun
    for size in (2**30, 1):
        stream.put({"type": "stream_data", "data": 3}, size)
    assert (await stream.take())["data"] == 3
    with pytest.raises(errors.Unavailable):
        await stream.take()


@pytest.mark.parametrize("passes", range(8))
async def test_a_stream_that_is_given_up_while_it_opens_leaves_nothing_behind(passes: int) -> None:
    asked: asyncio.Queue[tuple[Socket, str]] = asyncio.Queue()
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def slow(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["type"] == "STREAM":
            asked.put_nowait((socket, frame["id"]))
        elif frame["type"] == "STREAM_CANCEL":
            cancelled.put_nowait(frame["payload"]["stream_id"])

    async with gateway(slow) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(_first(connected.stream("a/B", {})))
            socket, frame_id = await asked.get()
            socket.say({"type": "ack", "id": frame_id, "data": {"stream_id": "s"}})
            # before, while and after the answer is taken
            for _ in range(passes):
                await asyncio.sleep(0)
            opening.cancel()
        assert await cancelled.get() == "s"
        assert (connected._streams, connected._pending, cancelled.empty()) == ({}, {}, True)


async def _first(stream: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(stream)


async def test_nesting_is_refused_where_the_gateway_refuses_it() -> None:
    async with gateway(accept) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        await connected.start(user_request="x", inputs={"x": nested(29)})
        with pytest.raises(errors.InvalidPayload, match="nested"):
            await connected.start(user_request="x", inputs={"x": nested(30)})
        assert len(got) == 1


async def test_a_frame_over_the_limit_of_the_gateway_is_not_sent() -> None:
    async with gateway(accept) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        await connected.start(user_request="é" * 400)
        with pytest.raises(errors.TooLarge) as refused:
            await connected.start(user_request="é" * 512)
        assert refused.value.details["limit"] == "1024"
        assert len(got) == 1


async def test_a_request_that_nobody_answers_ends() -> None:
    async with gateway(say_nothing) as (url, _), client.connect(url, "t", patience_s=0.2) as connected, asyncio.timeout(5):
        with pytest.raises(errors.DeadlineExceeded, match="not known"):
            await connected.start(user_request="x")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1002, errors.InvalidPayload), (1003, errors.InvalidPayload), (1007, errors.InvalidPayload), (1009, errors.TooLarge)],
)
async def test_a_request_that_closes_the_socket_is_not_sent_again(code: int, kind: type[errors.NetraError]) -> None:
    async def close(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["payload"]["user_request"] == "x":
            socket.close(code, "no")
        else:
            await accept(socket, frame)

    async with gateway(close) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        with pytest.raises(kind, match="no"):
            await connected.start(user_request="x")
        assert (await connected.start(user_request="y"))["run_id"] == "r"
        assert len(got) == 2


async def test_a_token_function_that_fails_is_told_and_nobody_waits() -> None:
    async def token() -> str:
        raise RuntimeError("boom")

    async with gateway(accept) as (url, _), asyncio.timeout(5):
        with pytest.raises(errors.Internal, match="boom"):
            async with client.connect(url, token):
                pass


@pytest.mark.parametrize("first", ["<html>", "[]", "{}"])
async def test_a_frame_that_cannot_be_read_is_told(first: str) -> None:
    async with gateway(accept, first) as (url, _), asyncio.timeout(5):
        with pytest.raises(errors.Internal, match="cannot be read"):
            async with client.connect(url, "t"):
                pass


@pytest.mark.parametrize(
    "url", ["", "localhost:8080", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://[", "http://a\n", "http://a/?b=c"]
)
async def test_an_address_that_cannot_be_is_refused_at_once(url: str) -> None:
    with pytest.raises(errors.InvalidPayload, match="NETRA_URL"):
        api.Api(url)


def test_the_command_line_ends_with_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        raise KeyError("runs")

    monkeypatch.setattr(console, "err", Console(stderr=True))
    with pytest.raises(typer.Exit):
        console.complete(work)
    assert "INTERNAL netra cannot go on: KeyError('runs')" in capsys.readouterr().err
