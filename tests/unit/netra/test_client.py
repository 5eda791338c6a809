"""No request waits for ever: what the gateway cannot read is refused here, and every wait has an end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
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

    def end(self, code: int, reason: str) -> None:
        self.close_code, self.close_reason = code, reason
        self._said.put_nowait(None)

    async def close(self) -> None:
        self.end(1000, "")


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
    event = {"type": "agent_completed", "event_id": "x", "cursor": 42, "seq": 1, "run_id": "r", "request_id": ""}

    async def pass_over(socket: Socket, frame: dict[str, Any]) -> None:
        await accept(socket, frame)
        socket.say({"type": "position", "cursor": 41})
        socket.say({**event, "request_id": frame["id"]})

    async with gateway(pass_over) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        assert [found["cursor"] async for found in connected.run(user_request="x")] == [42]
        assert (connected.cursor, len(got)) == (42, 1)


async def _until(what: Callable[[], bool]) -> None:
    while True:
        if what():
            return
        await asyncio.sleep(0.001)


def _event(seq: int, last: int = 5, *, ahead: int = 0, of: str = "") -> dict[str, Any]:
    """One of the events of a run, whose first has the cursor after `ahead`."""
    kind = "agent_completed" if seq == last else "agent_thinking"
    return {"type": kind, "event_id": f"x{seq}", "cursor": ahead + seq, "seq": seq, "run_id": "r", "request_id": of}


def _record(connected: client.Client, events: list[dict[str, Any]], *, over: bool = False, oldest: int = 1) -> list[str]:
    """What the gateway has of the run besides: whether it is over, and its events; yields what it is asked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.url.path} {request.url.params.get('after', '')}".rstrip())
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"ended_at": "2026-11-21T00:00:00Z" if over else None})
        after = int(request.url.params["after"])
        if after < oldest - 1:
            return httpx.Response(409, json={"code": "FAILED_PRECONDITION", "message": "gone", "details": {"oldest": str(oldest)}})
        found = [event for event in events if event["cursor"] > after]
        return httpx.Response(200, json={"events": found, "next_after": max([after, *(event["cursor"] for event in found)])})

    connected.api._http = httpx.AsyncClient(base_url=connected.api.url, transport=httpx.MockTransport(answer))
    return asked


@pytest.mark.parametrize(("frames", "size"), [(3, 2**20), (1000, 400)])
async def test_what_a_slow_reader_of_a_run_has_no_room_for_comes_from_the_record(
    frames: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "_FRAMES", frames)
    monkeypatch.setattr(incoming, "_BYTES", size)
    last, sockets, record = 40, list[Socket](), list[dict[str, Any]]()

    async def begin(socket: Socket, frame: dict[str, Any]) -> None:
        sockets.append(socket)
        await accept(socket, frame)
        socket.say(_event(1, last, of=frame["id"]))

    async with gateway(begin) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        record += [_event(seq, last) for seq in range(1, 36)]
        asked = _record(connected, record)
        run = connected.run(user_request="x")
        found = [(await anext(run))["seq"]]
        for seq in range(2, 31):
            sockets[0].say(_event(seq, last))
        await _until(lambda: connected.cursor == 30)
        (follower,) = connected._followers
        # nothing of what came is kept here, but for what is to be asked
        assert (follower._came.qsize(), follower._bytes) == (1, 0)
        while len(found) < 35:
            found.append((await anext(run))["seq"])
        assert asked == ["/v1/runs/r", "/v1/runs/r/events 1"]
        # from here on as it comes; what the record had before it came is not doubled
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(_first(run))
            await _until(lambda: asked[-1] == "/v1/runs/r/events 35")
            for seq in range(31, last + 1):
                sockets[0].say(_event(seq, last))
                # one after the other: there is room for each
                await _until(functools.partial(lambda seq: connected.cursor == seq, seq))
                found += [(await waiting if seq == 36 else await anext(run))["seq"]] if seq > 35 else []
        assert asked[-1] == "/v1/runs/r/events 35"
        assert [event async for event in run] == []
    assert found == list(range(1, last + 1))


@pytest.mark.parametrize("over", [True, False])
async def test_a_run_whose_history_is_cut_goes_on_or_says_that_its_end_is_gone(over: bool) -> None:
    sockets = list[Socket]()

    async def cut(socket: Socket, frame: dict[str, Any]) -> None:
        sockets.append(socket)
        await accept(socket, frame)
        for told in (*(_event(seq, of=frame["id"]) for seq in (1, 2)), {"type": "history_truncated", "oldest": 9}):
            socket.say(told)

    async with gateway(cut) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        # what is gone between was of other runs, unless this one is over
        rest = [] if over else [_event(seq, ahead=6) for seq in (3, 4)]
        _record(connected, rest, over=over, oldest=9)
        run, found = connected.run(user_request="x"), list[int]()
        if over:
            with pytest.raises(errors.FailedPrecondition, match="no longer"):
                await _read(run, found)
            assert found == [1, 2]
        else:
            while len(found) < 4:
                found.append((await anext(run))["seq"])
            for seq in (3, 4, 5):
                sockets[0].say(_event(seq, ahead=6))
            await _read(run, found)
            assert found == [1, 2, 3, 4, 5]


async def test_a_run_of_which_some_events_are_gone_says_so() -> None:
    async def cut(socket: Socket, frame: dict[str, Any]) -> None:
        await accept(socket, frame)
        for told in (_event(1, of=frame["id"]), {"type": "history_truncated", "oldest": 4}, _event(4), _event(5)):
            socket.say(told)

    async with gateway(cut) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        _record(connected, [_event(4), _event(5)], over=True, oldest=4)
        found = list[int]()
        with pytest.raises(errors.FailedPrecondition, match="no longer"):
            await _read(connected.run(user_request="x"), found)
        assert found == [1]


async def test_a_slow_reader_is_told_of_a_restored_record_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "_FRAMES", 2)
    sockets = list[Socket]()

    async def begin(socket: Socket, frame: dict[str, Any]) -> None:
        sockets.append(socket)
        await accept(socket, frame)
        socket.say(_event(1, of=frame["id"]))

    async with gateway(begin) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        asked, run = _record(connected, []), connected.run(user_request="x")
        found = [(await anext(run))["seq"]]
        for told in (*(_event(seq) for seq in (2, 3, 4)), {"type": "resync", "epoch": "f", "cursor": 1}):
            sockets[0].say(told)
        await _until(lambda: connected.epoch == "f")
        with pytest.raises(errors.FailedPrecondition, match="restored"):
            await _read(run, found)
        assert (found, asked) == ([1], [])


async def _read(run: AsyncIterator[dict[str, Any]], found: list[int]) -> None:
    async for event in run:
        found.append(event["seq"])  # noqa: PERF401 - what comes before it fails counts


async def test_a_hole_is_asked_for_once_however_many_events_come_from_behind_it() -> None:
    started, rest = list[str](), [[5, 6, 7], [2, 3, 7, 8, 9], list(range(4, 10))]

    async def holed(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["type"] == "RESUME":
            after = frame["payload"]["after"]
            socket.say({"type": "ack", "id": frame["id"], "data": {"from": after, "to": 9}})
            # the same hole once more, then another one, then none
            for seq in rest.pop(0):
                socket.say(_event(seq, 9, of=started[0]))
        else:
            started.append(frame["id"])
            await accept(socket, frame)
            for seq in (1, 4, 5, 6, 7, 8):
                socket.say(_event(seq, 9, of=frame["id"]))

    async with gateway(holed) as (url, got), client.connect(url, "t") as connected, asyncio.timeout(5):
        assert [event["seq"] async for event in connected.run(user_request="x")] == list(range(1, 10))
        asked = [frame["payload"]["after"] for frame in map(json.loads, got) if frame["type"] == "RESUME"]
        assert asked == [1, 1, 3]


async def test_a_hole_that_cannot_be_filled_on_this_socket_is_filled_on_the_next() -> None:
    first = list[object]()

    async def holed(socket: Socket, frame: dict[str, Any]) -> None:
        if frame["type"] == "RESUME":
            socket.say({"type": "error", "id": frame["id"], "code": "UNAVAILABLE", "message": "not now", "details": {}})
        elif frame["type"] == "START_AGENT":
            first.append(socket)
            await accept(socket, frame)
            for seq in (1, 4):
                socket.say(_event(seq, 4, of=frame["id"]))
        else:
            # what resumes is given from there
            for seq in (2, 3, 4):
                socket.say(_event(seq, 4))
            socket.say({"type": "ack", "id": frame["id"], "data": {"state": "running"}})

    async with gateway(holed) as (url, _), client.connect(url, "t") as connected, asyncio.timeout(5):
        run = connected.run(user_request="x")
        found = [(await anext(run))["seq"]]
        await _until(lambda: connected._socket not in (None, *first))
        await connected.cancel("r")
        await _read(run, found)
        assert found == [1, 2, 3, 4]


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
            socket.end(code, "no")
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
