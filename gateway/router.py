"""START_AGENT, USER_MESSAGE, CHAT, CANCEL -> the RPC each becomes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import orjson

from chassis import channel, identity, status
from gateway import frames, views
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc

MAX_DEADLINE_S = 24 * 3600
_MAX_REQUEST_BYTES = 64 * 1024
_MAX_INPUT_BYTES = 64 * 1024
_ON_BUSY = {"enqueue": dispatcher_pb2.ON_BUSY_ENQUEUE, "reject": dispatcher_pb2.ON_BUSY_REJECT}
_MESSAGE_FIELDS = ("message", "content", "text")


def start_run(payload: Mapping[str, Any], thread_id: str, request_id: str, connection_id: str = "") -> dispatcher_pb2.StartRunRequest:
    """What START_AGENT and POST /v1/runs ask for. Raises `InvalidPayload` naming the field."""
    return dispatcher_pb2.StartRunRequest(
        request_id=request_id,
        agent=frames.optional_text(payload, "agent"),
        user_request=frames.text_of(payload, ("user_request",), _MAX_REQUEST_BYTES),
        inputs=_inputs(payload),
        thread_id=thread_of(payload, thread_id),
        connection_id=connection_id,
        **_options(payload),
    )


def message(payload: Mapping[str, Any], thread_id: str, request_id: str, connection_id: str = "") -> dispatcher_pb2.StartRunRequest:
    """What USER_MESSAGE and CHAT ask for. Raises `InvalidPayload` naming the field."""
    return dispatcher_pb2.StartRunRequest(
        request_id=request_id,
        agent=frames.optional_text(payload, "agent"),
        user_request=frames.text_of(payload, _MESSAGE_FIELDS, frames.MAX_MESSAGE_BYTES),
        thread_id=thread_of(payload, thread_id),
        connection_id=connection_id,
        **_options(payload),
    )


def accepted(request: dispatcher_pb2.StartRunRequest, received_at: float) -> dispatcher_pb2.StartRunRequest:
    """The request, which was found in order just now, with the first two stages of its way."""
    request.received_at.FromNanoseconds(int(received_at * 1e9))
    request.validated_at.GetCurrentTime()
    return request


def _inputs(payload: Mapping[str, Any]) -> bytes:
    inputs = payload.get("inputs")
    if inputs is None:
        return b""
    if not isinstance(inputs, dict):
        raise frames.wrong("payload.inputs", "must be an object")
    written = orjson.dumps(inputs)
    if len(written) > _MAX_INPUT_BYTES:
        raise errors.TooLarge("payload.inputs has at most 65536 bytes", field="payload.inputs", limit=_MAX_INPUT_BYTES)
    return written


def thread_of(payload: Mapping[str, Any], thread_id: str) -> str:
    """The thread a frame names, in its payload or beside it. Raises `InvalidPayload`."""
    inner = frames.optional_id(payload.get("thread_id"), "payload.thread_id")
    if inner and thread_id and inner != thread_id:
        raise frames.wrong("payload.thread_id", "names another thread than thread_id")
    return thread_id or inner


def _options(payload: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    on_busy = payload.get("on_busy")
    if on_busy is not None:
        if not isinstance(on_busy, str) or on_busy not in _ON_BUSY:
            raise frames.wrong("payload.on_busy", f"must be one of {', '.join(_ON_BUSY)}")
        options["on_busy"] = _ON_BUSY[on_busy]
    deadline = payload.get("deadline_s")
    if deadline is not None:
        if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline <= MAX_DEADLINE_S:
            raise frames.wrong("payload.deadline_s", f"must be a number above 0 and at most {MAX_DEADLINE_S}")
        options["deadline"] = timedelta(seconds=deadline)
    return options


class Router:
    """Makes the call a frame stands for, in its sender's name."""

    def __init__(self, dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub) -> None:
        self._dispatcher = dispatcher

    async def call(self, who: identity.Principal, frame: frames.Frame, request_id: str, connection_id: str) -> dict[str, Any]:
        """The `data` of the ack. Raises `NetraError`."""
        if frame.type == "CANCEL":
            return await self._cancel(who, frame.fields)
        make = start_run if frame.type == "START_AGENT" else message
        request = accepted(make(frame.fields, frame.thread_id, request_id, connection_id), frame.received_at)
        with status.translated():
            answer = await self._dispatcher.StartRun(request, metadata=channel.bearer(who.token))
        data = {"run_id": answer.run_id, "thread_id": answer.thread_id}
        return data if frame.type == "START_AGENT" else {**data, "message_id": answer.message_id}

    async def _cancel(self, who: identity.Principal, payload: Mapping[str, Any]) -> dict[str, Any]:
        run_id = frames.optional_id(payload.get("run_id"), "payload.run_id")
        if not run_id:
            raise frames.wrong("payload.run_id", "is required")
        request = dispatcher_pb2.CancelRunRequest(run_id=ids.RunId(run_id))
        with status.translated():
            answer = await self._dispatcher.CancelRun(request, metadata=channel.bearer(who.token))
        return {"run_id": run_id, "state": views.state(answer.state)}
