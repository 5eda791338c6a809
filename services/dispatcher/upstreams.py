"""Typed stubs of the services this one calls: context, events."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import grpc

from chassis import channel, status
from netra import ids
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc

_EVENT_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Opened:
    """An execution context and its signature."""

    context: UserExecutionContext
    stored: bytes
    token: str


class Contexts:
    """The context service."""

    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to)

    async def open(self, request: context_pb2.OpenContextRequest) -> Opened:
        """Open a context. Raises `NotFound` for a foreign thread, `AlreadyExists` for a request id with another payload."""
        with status.translated():
            answer = await self._stub.OpenContext(request)
        context = UserExecutionContext.from_proto(answer.context)
        return Opened(context, answer.context.SerializeToString(deterministic=True), answer.context_token)

    async def renew(self, token: str) -> str:
        """The same context, signed for another hour."""
        with status.translated():
            answer = await self._stub.RenewContext(context_pb2.RenewContextRequest(), metadata=_in_context(token))
        return answer.context_token

    async def append_message(self, token: str, request_id: str, role: str, content: str) -> ids.MessageId:
        """Add a message to the thread of the context; once per request id."""
        request = context_pb2.AppendMessageRequest(request_id=request_id, role=role, content=content)
        with status.translated():
            answer = await self._stub.AppendMessage(request, metadata=_in_context(token))
        return ids.MessageId(answer.message.message_id)

    async def close(self, token: str) -> None:
        """Close the context."""
        with status.translated():
            await self._stub.CloseContext(context_pb2.CloseContextRequest(), metadata=_in_context(token))


class Records:
    """The events service."""

    def __init__(self, to: grpc.aio.Channel) -> None:
        self.stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(to)

    async def open(self, run_id: str, epoch: int, context_token: str, trace_id: str) -> events_pb2.OpenRunResponse:
        """Own the record of a run at this epoch, and read it. Raises `Fenced` when another owns it at a higher one."""
        request = events_pb2.OpenRunRequest(run_id=run_id, epoch=epoch, context_token=context_token, trace_id=trace_id)
        with status.translated():
            return await self.stub.OpenRun(request, timeout=_EVENT_WAIT_S)


def _in_context(token: str) -> channel.Metadata:
    return (("x-netra-context", token),)


def timestamp(seconds_from_now: float) -> datetime.datetime:
    """The time so many seconds from now, UTC."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds_from_now)
