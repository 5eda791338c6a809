"""What somebody got for what they asked, over gRPC and HTTP, as bytes to search and in a form that can be compared."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.prove.isolation.listening import Heard, Held, listen

Metadata = tuple[tuple[str, str], ...]
# how long a stream may take until it says something (an unknown run is waited for), how long it may be silent then until what it has
# said counts as all, and how long a control waits for what must come
FIRST_S, PATIENCE_S, PATIENT_S = 4.0, 0.5, 20.0
CALL_S = 20.0
_MOST = 64
_SAID = frozenset("agent_context audit_metadata inputs arguments parameters detail".split())
# shorter ones are words that happen to be base64, too
_SHORTEST = 40
OK = "OK"
# what a fault may answer
AWAY = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "OWNER_LOST", "ABORTED"})


@dataclass(slots=True)
class Answer:
    """One answer: `code` is OK or the reason of the refusal, `told` what is said with it; `messages` are protobuf, `values` are JSON.
    A stream that said nothing for as long as it was listened to is `silent`: it may only be slow."""

    code: str
    told: str = ""
    raw: bytes = b""
    messages: list[Message] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    silent: bool = False

    def fields(self) -> Iterator[tuple[str, str]]:
        """Every name with its text, at any depth, also in JSON that lies in bytes."""
        for message in self.messages:
            yield from _of_message(message)
        for value in self.values:
            yield from _of_json("", value)

    @property
    def shape(self) -> frozenset[str]:
        """Which fields say something."""
        found = {one.name for message in self.messages for one, value in message.ListFields()}
        return frozenset(found | {name for value in self.values[:1] if isinstance(value, dict) for name, inner in value.items() if inner})


def _of_message(message: Message) -> Iterator[tuple[str, str]]:
    for one, value in message.ListFields():
        for item in value if one.is_repeated else (value,):
            if isinstance(item, Message):
                yield from _of_message(item)
            elif isinstance(item, str):
                yield one.name, item
            elif isinstance(item, bytes) and one.name not in _SAID:
                with contextlib.suppress(ValueError):
                    for line in item.splitlines():
                        yield from _of_json(one.name, json.loads(line))


def _of_json(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        # what somebody said themselves says nothing of what a thing is
        said = _SAID | {"data"} if "event_id" in value else _SAID
        for key, inner in value.items():
            if key not in said:
                yield from _of_json(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _of_json(name, inner)
    elif isinstance(value, str):
        yield name, value


Until = Callable[[Sequence[Message]], bool]


async def rpc(
    channel: grpc.aio.Channel, method: MethodDescriptor, requests: Sequence[Message], metadata: Metadata, patience_s: float, until: Until,
    held: Held | None = None,
) -> Answer:  # fmt: skip
    """Ask. A stream is read until it ends, is silent for too long, or has said what is wanted; with `held`, then as long as that lasts."""
    response = message_factory.GetMessageClass(method.output_type)
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    make: Any = getattr(channel, kind)
    path = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = make(path, request_serializer=lambda message: message.SerializeToString(), response_deserializer=None)
    enough = asyncio.Event()
    sent: Any = _sent(requests, enough, hold=method.server_streaming) if method.client_streaming else requests[0]
    parts: list[bytes] = []
    found: list[Message] = []
    call, silent = call(sent, metadata=metadata, timeout=CALL_S), False
    try:
        if method.server_streaming:
            silent = await _read(call, response, parts, found, patience_s, until, held)
        else:
            parts.append(await call)
            found.append(response.FromString(parts[0]))
    except grpc.aio.AioRpcError as error:
        return _refused(error, parts, found)
    finally:
        enough.set()
        call.cancel()
    return Answer(OK, "", b"\n".join(parts), found, silent=silent)


async def _sent(requests: Sequence[Message], enough: asyncio.Event, *, hold: bool) -> AsyncIterator[Message]:
    for request in requests:
        yield request
    if hold:
        await enough.wait()


async def _read(
    call: Any, response: Any, parts: list[bytes], found: list[Message], patience_s: float, until: Until, held: Held | None
) -> bool:
    async def read() -> Heard:
        part = await call.read()
        if part is grpc.aio.EOF:
            return Heard.ENDED
        parts.append(part)
        found.append(response.FromString(part))
        return Heard.ENOUGH if until(found) or len(parts) >= _MOST else Heard.MORE

    # a refusal may take its time, what follows does not
    return await listen(read, max(patience_s, FIRST_S), patience_s, held)


def _refused(error: grpc.aio.AioRpcError, parts: list[bytes], found: list[Message]) -> Answer:
    code, told, info = error.code().name, error.details() or "", error_details_pb2.ErrorInfo()
    trailers = repr((error.initial_metadata(), error.trailing_metadata())).encode()
    rich = rpc_status.from_call(error)  # type: ignore[arg-type]
    details = {}
    for detail in rich.details if rich is not None else ():
        if detail.Unpack(info):
            code, details = info.reason, {name: value for name, value in sorted(info.metadata.items()) if name != "correlation_id"}
    return Answer(code, f"{told} {details}", b"\n".join((*parts, told.encode(), trailers)), found)


async def http(client: httpx.AsyncClient, method: str, path: str, *, held: Held | None = None, **more: Any) -> Answer:
    """Ask the gateway. A stream of events is read until it ends or is silent, and with `held`, then as long as that lasts."""
    request = client.build_request(method, path, **more)
    parts: list[bytes] = []
    response = await client.send(request, stream=True)
    chunks = aiter(response.aiter_bytes())

    async def read() -> Heard:
        try:
            part = await anext(chunks, None)
        except httpx.ReadTimeout:
            return Heard.ENDED
        if part is None:
            return Heard.ENDED
        parts.append(part)
        if stream and len(parts) >= _MOST:
            return Heard.ENOUGH
        # that there is a stream says nothing: it asks for what is in it only then
        return Heard.MORE if not stream or b"data:" in part else Heard.NOTHING

    stream = response.headers.get("content-type", "").startswith("text/event-stream")
    try:
        silent = await (listen(read, FIRST_S, PATIENCE_S * 2, held) if stream else listen(read, CALL_S, CALL_S))
    finally:
        await response.aclose()
    answer = shown(response.status_code, repr(response.headers.multi_items()), b"".join(parts))
    answer.silent = silent
    return answer


def shown(status: int, headers: str, body: bytes) -> Answer:
    """What an HTTP answer says."""
    values = []
    with contextlib.suppress(ValueError):
        values.append(json.loads(body))
    if not values:
        for line in body.splitlines():
            with contextlib.suppress(ValueError):
                values.append(json.loads(line.removeprefix(b"data:")))
    if status < 400:
        return _unpacked(Answer(OK, "", headers.encode() + b"\n" + body, [], values))
    problem = values[0] if values and isinstance(values[0], dict) else {}
    details = dict(sorted(problem.get("details", {}).items())) if problem else {}
    told = f"{status} {problem.get('message', '')} {details}"
    return Answer(str(problem.get("code") or status), told, headers.encode() + b"\n" + body, [], values)


def frame(found: dict[str, Any], more: Sequence[dict[str, Any]] = ()) -> Answer:
    """What the answer to a frame says, with what came after it."""
    raw = json.dumps([found, *more]).encode()
    ended = next((one for one in more if one["type"] == "stream_end" and one["code"] not in (OK, "CANCELLED")), None)
    if found["type"] == "ack" and ended is not None:
        return _unpacked(Answer(ended["code"], ended["message"], raw, [], [found, *more]))
    if found["type"] != "error":
        return _unpacked(Answer(OK, "", raw, [], [found, *more]))
    return Answer(str(found["code"]), f"{found['message']} {sorted(found['details'].items())}", raw, [], [found, *more])


def _unpacked(answer: Answer) -> Answer:
    """The answer, with what lies in it as base64."""
    inside = []
    for _, text in [pair for value in answer.values for pair in _of_json("", value)]:
        if len(text) >= _SHORTEST and len(text) % 4 == 0 and " " not in text:
            with contextlib.suppress(ValueError):
                inside.append(base64.b64decode(text, validate=True))
                answer.values += [json.loads(line) for line in inside[-1].splitlines()]
    answer.raw = b"\n".join((answer.raw, *inside))
    return answer
