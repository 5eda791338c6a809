"""The part of ContextService about threads and their messages."""

from __future__ import annotations

from typing import Any

from chassis import identity
from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import stamps, threads


class ThreadsServicer(context_pb2_grpc.ContextServiceServicer):
    """Conversations."""

    _threads: threads.Threads

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


def _message(entry: threads.Message) -> context_pb2.Message:
    return context_pb2.Message(
        message_id=entry.message_id, thread_id=entry.thread_id, position=entry.position, role=entry.role, content=entry.content,
        run_id=entry.run_id, created_at=stamps.stamp(entry.created_at),
    )  # fmt: skip


def _thread(entry: threads.Thread) -> context_pb2.Thread:
    return context_pb2.Thread(
        thread_id=entry.thread_id, created_at=stamps.stamp(entry.created_at), updated_at=stamps.stamp(entry.updated_at),
        messages=entry.messages,
    )  # fmt: skip
