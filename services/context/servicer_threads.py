"""The part of ContextService about threads and their messages, who may see them, and what is kept of a user."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from chassis import identity
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import changes, contexts, drafts, privacy, sharing, stamps, threads

_ACCESS = {"read": context_pb2.ACCESS_READ, "write": context_pb2.ACCESS_WRITE, "own": context_pb2.ACCESS_OWN}
_NAMED = {value: name for name, value in _ACCESS.items()}
_SELECTIONS = {
    context_pb2.THREAD_SELECTION_UNSPECIFIED: threads.OWN,
    context_pb2.THREAD_SELECTION_OWN: threads.OWN,
    context_pb2.THREAD_SELECTION_SHARED: threads.SHARED,
    context_pb2.THREAD_SELECTION_DELETED: threads.DELETED,
}


class ThreadsServicer(context_pb2_grpc.ContextServiceServicer):
    """Conversations."""

    _contexts: contexts.Contexts
    _threads: threads.Threads
    _sharing: sharing.Sharing
    _privacy: privacy.Privacy

    async def AppendMessage(self, request: context_pb2.AppendMessageRequest, context: Any) -> context_pb2.AppendMessageResponse:
        draft = drafts.Draft(ids.RequestId(request.request_id), request.role, request.content)
        frame = identity.current().frame
        self._contexts.require_standing(frame)
        return context_pb2.AppendMessageResponse(message=_message(await self._threads.append(frame, draft)))

    async def HideMessages(self, request: context_pb2.HideMessagesRequest, context: Any) -> context_pb2.HideMessagesResponse:
        frame = identity.current().frame
        self._contexts.require_standing(frame)
        return context_pb2.HideMessagesResponse(hidden=await self._threads.hide(frame))

    async def ListMessages(self, request: context_pb2.ListMessagesRequest, context: Any) -> context_pb2.ListMessagesResponse:
        caller, thread_id = identity.current(), ids.ThreadId(request.thread_id)
        if caller.context is not None:
            self._contexts.require_standing(caller.context)
        reader = threads.Reader(caller.user_id, None if caller.context is None else caller.context.context_id)
        page, following = await self._threads.messages(reader, thread_id, request.page_size, request.page_token)
        return context_pb2.ListMessagesResponse(messages=[_message(entry) for entry in page], next_page_token=following)

    async def ListThreads(self, request: context_pb2.ListThreadsRequest, context: Any) -> context_pb2.ListThreadsResponse:
        selection = _SELECTIONS.get(request.selection)
        if selection is None:
            raise errors.InvalidPayload("selection must be one of ThreadSelection", field="selection")
        page, following = await self._threads.threads(identity.current().user_id, selection, request.page_size, request.page_token)
        return context_pb2.ListThreadsResponse(threads=[_thread(entry) for entry in page], next_page_token=following)

    async def GetThread(self, request: context_pb2.GetThreadRequest, context: Any) -> context_pb2.GetThreadResponse:
        found = await self._threads.get(identity.current().user_id, ids.ThreadId(request.thread_id))
        return context_pb2.GetThreadResponse(thread=_thread(found))

    async def DeleteThread(self, request: context_pb2.DeleteThreadRequest, context: Any) -> context_pb2.DeleteThreadResponse:
        thread, erased_at = await self._threads.delete(changes.of(request.request_id, "delete", request.thread_id))
        until = None if erased_at is None else stamps.stamp(erased_at)
        return context_pb2.DeleteThreadResponse(thread=_thread(thread), erased_at=until)

    async def RestoreThread(self, request: context_pb2.RestoreThreadRequest, context: Any) -> context_pb2.RestoreThreadResponse:
        thread = await self._threads.restore(changes.of(request.request_id, "restore", request.thread_id))
        return context_pb2.RestoreThreadResponse(thread=_thread(thread))

    async def EraseThread(self, request: context_pb2.EraseThreadRequest, context: Any) -> context_pb2.EraseThreadResponse:
        removed = await self._privacy.erase_thread(changes.of(request.request_id, "erase", request.thread_id))
        return context_pb2.EraseThreadResponse(messages=removed.messages, artifacts=removed.artifacts)

    async def GrantThread(self, request: context_pb2.GrantThreadRequest, context: Any) -> context_pb2.GrantThreadResponse:
        change = changes.of(request.request_id, "grant", request.thread_id)
        grantee = sharing.Grantee(request.user_id, request.email)
        granted = await self._sharing.grant(change, identity.current().user.tenant_id, grantee, _NAMED.get(request.access, ""))
        return context_pb2.GrantThreadResponse(grant=_grant(granted))

    async def WithdrawGrant(self, request: context_pb2.WithdrawGrantRequest, context: Any) -> context_pb2.WithdrawGrantResponse:
        change = changes.of(request.request_id, "withdraw", request.thread_id)
        return context_pb2.WithdrawGrantResponse(grant=_grant(await self._sharing.withdraw(change, _grantee_id(request.grantee_id))))

    async def ListGrants(self, request: context_pb2.ListGrantsRequest, context: Any) -> context_pb2.ListGrantsResponse:
        page, following = await self._sharing.grants(
            identity.current().user_id, ids.ThreadId(request.thread_id), request.page_size, request.page_token, withdrawn=request.withdrawn
        )
        return context_pb2.ListGrantsResponse(grants=[_grant(entry) for entry in page], next_page_token=following)

    async def CreateGrantToken(self, request: context_pb2.CreateGrantTokenRequest, context: Any) -> context_pb2.CreateGrantTokenResponse:
        signed = await self._sharing.token(identity.current().user, ids.ThreadId(request.thread_id))
        return context_pb2.CreateGrantTokenResponse(
            grant_token=signed.token, expires_at=stamps.stamp(signed.expires_at), access=_ACCESS[signed.access]
        )

    async def ExportData(self, request: context_pb2.ExportDataRequest, context: Any) -> AsyncIterator[context_pb2.ExportDataResponse]:
        async for lines in self._privacy.export(changes.of(ids.uuid7(), "export")):
            yield context_pb2.ExportDataResponse(lines=lines)

    async def EraseData(self, request: context_pb2.EraseDataRequest, context: Any) -> context_pb2.EraseDataResponse:
        removed = await self._privacy.erase_everything(changes.of(request.request_id, "erase"))
        return context_pb2.EraseDataResponse(
            threads=removed.threads, messages=removed.messages, artifacts=removed.artifacts, contexts=removed.contexts
        )


def _grantee_id(value: str) -> ids.UserId:
    try:
        return ids.UserId(value)
    except errors.InvalidPayload as error:
        raise errors.InvalidPayload(error.message.replace("user_id", "grantee_id"), field="grantee_id") from None


def _message(entry: threads.Message) -> context_pb2.Message:
    return context_pb2.Message(
        message_id=entry.message_id, thread_id=entry.thread_id, position=entry.position, role=entry.role, content=entry.content,
        run_id=entry.run_id, created_at=stamps.stamp(entry.created_at), user_id=entry.user_id,
    )  # fmt: skip


def _thread(entry: threads.Thread) -> context_pb2.Thread:
    return context_pb2.Thread(
        thread_id=entry.thread_id, created_at=stamps.stamp(entry.created_at), updated_at=stamps.stamp(entry.updated_at),
        messages=entry.messages, owner_id=entry.owner_id, access=_ACCESS[entry.access],
        deleted_at=None if entry.deleted_at is None else stamps.stamp(entry.deleted_at),
    )  # fmt: skip


def _grant(entry: sharing.Grant) -> context_pb2.Grant:
    return context_pb2.Grant(
        thread_id=entry.thread_id, grantee_id=entry.grantee_id, access=_ACCESS[entry.access], created_at=stamps.stamp(entry.created_at),
        withdrawn_at=None if entry.withdrawn_at is None else stamps.stamp(entry.withdrawn_at),
    )  # fmt: skip
