"""ContextService: open, renew, derive, get, close; threads and messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf import timestamp_pb2

from chassis import identity
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import contexts, threads

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ContextServicer(context_pb2_grpc.ContextServiceServicer):
    """Turns requests into typed values and results into responses."""

    def __init__(self, verifier: identity.Verifier, opened: contexts.Contexts, conversations: threads.Threads) -> None:
        self._verifier = verifier
        self._contexts = opened
        self._threads = conversations

    async def OpenContext(self, request: context_pb2.OpenContextRequest, context: Any) -> context_pb2.OpenContextResponse:
        principal = await self._verifier.user(request.access_token)
        signed = await self._contexts.open(principal, _opening(request), identity.current().service)
        return context_pb2.OpenContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=_stamp(signed.expires_at)
        )

    async def RenewContext(self, request: context_pb2.RenewContextRequest, context: Any) -> context_pb2.RenewContextResponse:
        signed = await self._contexts.renew(identity.current().frame)
        return context_pb2.RenewContextResponse(context_token=signed.token, expires_at=_stamp(signed.expires_at))

    async def DeriveContext(self, request: context_pb2.DeriveContextRequest, context: Any) -> context_pb2.DeriveContextResponse:
        caller = identity.current()
        request_id = ids.RequestId(request.request_id)
        signed = await self._contexts.derive(caller.frame, request_id, request.operation, request.agent_context, caller.service)
        return context_pb2.DeriveContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=_stamp(signed.expires_at)
        )

    async def GetContext(self, request: context_pb2.GetContextRequest, context: Any) -> context_pb2.GetContextResponse:
        found = await self._contexts.get(identity.current().user_id, ids.ContextId(request.context_id))
        closed_at = None if found.closed_at is None else _stamp(found.closed_at)
        return context_pb2.GetContextResponse(context=found.context.to_proto(), closed_at=closed_at)

    async def CloseContext(self, request: context_pb2.CloseContextRequest, context: Any) -> context_pb2.CloseContextResponse:
        caller = identity.current()
        return context_pb2.CloseContextResponse(closed_at=_stamp(await self._contexts.close(caller.frame, caller.service)))

    async def AppendMessage(self, request: context_pb2.AppendMessageRequest, context: Any) -> context_pb2.AppendMessageResponse:
        draft = threads.Draft(ids.RequestId(request.request_id), request.role, request.content)
        return context_pb2.AppendMessageResponse(message=_message(await self._threads.append(identity.current().frame, draft)))

    async def ListMessages(self, request: context_pb2.ListMessagesRequest, context: Any) -> context_pb2.ListMessagesResponse:
        user_id, thread_id = identity.current().user_id, ids.ThreadId(request.thread_id)
        page, following = await self._threads.messages(user_id, thread_id, request.page_size, request.page_token)
        return context_pb2.ListMessagesResponse(messages=[_message(entry) for entry in page], next_page_token=following)

    async def ListThreads(self, request: context_pb2.ListThreadsRequest, context: Any) -> context_pb2.ListThreadsResponse:
        page, following = await self._threads.threads(identity.current().user_id, request.page_size, request.page_token)
        return context_pb2.ListThreadsResponse(threads=[_thread(entry) for entry in page], next_page_token=following)


def _opening(request: context_pb2.OpenContextRequest) -> contexts.Opening:
    return contexts.Opening(
        request_id=ids.RequestId(request.request_id),
        run_id=ids.RunId(request.run_id),
        thread_id=ids.ThreadId(request.thread_id) if request.thread_id else None,
        connection_id=ids.ConnectionId(request.connection_id) if request.connection_id else None,
        deadline=_moment("deadline", request.deadline) if request.HasField("deadline") else None,
        correlation_id=ids.CorrelationId(request.correlation_id) if request.correlation_id else None,
        agent_context=request.agent_context,
        audit_metadata=request.audit_metadata,
    )


def _moment(name: str, stamp: timestamp_pb2.Timestamp) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise errors.InvalidPayload(f"{name} is out of range", field=name) from None


def _stamp(moment: datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _message(entry: threads.Message) -> context_pb2.Message:
    return context_pb2.Message(
        message_id=entry.message_id, thread_id=entry.thread_id, position=entry.position, role=entry.role, content=entry.content,
        run_id=entry.run_id, created_at=_stamp(entry.created_at),
    )  # fmt: skip


def _thread(entry: threads.Thread) -> context_pb2.Thread:
    return context_pb2.Thread(
        thread_id=entry.thread_id, created_at=_stamp(entry.created_at), updated_at=_stamp(entry.updated_at), messages=entry.messages
    )
