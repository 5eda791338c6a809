"""START_AGENT, USER_MESSAGE, CHAT, CANCEL, SEND, APPROVE -> the RPC each becomes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import orjson

from chassis import channel, identity, status
from gateway import frames, views
from netra import errors
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2, dispatcher_pb2_grpc

MAX_DEADLINE_S = 24 * 3600
_MAX_REQUEST_BYTES = 64 * 1024
_MAX_INPUT_BYTES = 64 * 1024
_ON_BUSY = {
    "enqueue": dispatcher_pb2.ON_BUSY_ENQUEUE,
    "reject": dispatcher_pb2.ON_BUSY_REJECT,
    "interrupt": dispatcher_pb2.ON_BUSY_INTERRUPT,
    "rollback": dispatcher_pb2.ON_BUSY_ROLLBACK,
}
_DECISIONS = {"approve": approvals_pb2.DECISION_APPROVE, "reject": approvals_pb2.DECISION_REJECT}
_MAX_COMMENT = 2000
# a grant token is no longer than that
_MAX_GRANT = 2048
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
    """What USER_MESSAGE and CHAT ask for: a run, unless one waits for the message. Raises `InvalidPayload` naming the field."""
    return dispatcher_pb2.StartRunRequest(
        request_id=request_id,
        deliver=True,
        agent=frames.optional_text(payload, "agent"),
        user_request=frames.text_of(payload, _MESSAGE_FIELDS, frames.MAX_MESSAGE_BYTES),
        thread_id=thread_of(payload, thread_id),
        connection_id=connection_id,
        **_options(payload),
    )


def sent(payload: Mapping[str, Any], run_id: str, request_id: str, grant_token: str) -> dispatcher_pb2.SendMessageRequest:
    """What SEND and POST /v1/runs/{id}:send ask for. Raises `InvalidPayload` naming the field."""
    text = frames.text_of(payload, _MESSAGE_FIELDS, frames.MAX_MESSAGE_BYTES)
    return dispatcher_pb2.SendMessageRequest(request_id=request_id, run_id=run_id, message=text, grant_token=grant_token)


def resolved(payload: Mapping[str, Any], approval_id: str, grant_token: str) -> approvals_pb2.ResolveApprovalRequest:
    """What APPROVE and POST /v1/approvals/{id}:resolve ask for. Raises `InvalidPayload` naming the field."""
    decision = payload.get("decision")
    if not isinstance(decision, str) or decision not in _DECISIONS:
        raise frames.wrong("payload.decision", f"must be one of {', '.join(_DECISIONS)}")
    comment = frames.optional_text(payload, "comment", _MAX_COMMENT)
    if "\x00" in comment:
        raise frames.wrong("payload.comment", "must not hold the character U+0000")
    return approvals_pb2.ResolveApprovalRequest(
        approval_id=approval_id, decision=_DECISIONS[decision], comment=comment, grant_token=grant_token
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
        if frame.type == "SEND":
            return await self.send(who, sent(frame.fields, _id(frame.fields, "run_id"), request_id, _grant(frame.fields)))
        if frame.type == "APPROVE":
            wanted = resolved(frame.fields, _id(frame.fields, "approval_id"), _grant(frame.fields))
            found = await self.resolve(who, wanted)
            return {"approval_id": found.approval_id, "state": views.approval_state(found.state)}
        make = start_run if frame.type == "START_AGENT" else message
        request = accepted(make(frame.fields, frame.thread_id, request_id, connection_id), frame.received_at)
        with status.translated():
            answer = await self._dispatcher.StartRun(request, metadata=channel.bearer(who.token))
        data = {"run_id": answer.run_id, "thread_id": answer.thread_id}
        if frame.type == "START_AGENT":
            return data
        return {**data, "message_id": answer.message_id, "delivered": answer.delivered}

    async def send(self, who: identity.Principal, request: dispatcher_pb2.SendMessageRequest) -> dict[str, Any]:
        """Say something to a run; what is told of it. Raises `NetraError`."""
        with status.translated():
            answer = await self._dispatcher.SendMessage(request, metadata=channel.bearer(who.token))
        state = views.state(answer.state)
        return {"run_id": request.run_id, "message_id": answer.message_id, "delivered": True, "state": state}

    async def resolve(self, who: identity.Principal, request: approvals_pb2.ResolveApprovalRequest) -> approvals_pb2.Approval:
        """Say a user's word on an approval; what became of it. Raises `NetraError`."""
        with status.translated():
            answer = await self._dispatcher.ResolveApproval(request, metadata=channel.bearer(who.token))
        return answer.approval

    async def _cancel(self, who: identity.Principal, payload: Mapping[str, Any]) -> dict[str, Any]:
        run_id = _id(payload, "run_id")
        request = dispatcher_pb2.CancelRunRequest(run_id=run_id)
        with status.translated():
            answer = await self._dispatcher.CancelRun(request, metadata=channel.bearer(who.token))
        return {"run_id": run_id, "state": views.state(answer.state)}


def _id(payload: Mapping[str, Any], name: str) -> str:
    found = frames.optional_id(payload.get(name), f"payload.{name}")
    if not found:
        raise frames.wrong(f"payload.{name}", "is required")
    return found


def _grant(payload: Mapping[str, Any]) -> str:
    return frames.optional_text(payload, "grant_token", _MAX_GRANT)
