"""ContextService: contexts here; threads and files in the parts it is put together from."""

from __future__ import annotations

from typing import Any

from google.protobuf import timestamp_pb2

from chassis import identity, telemetry
from netra import ids
from netra.context.v1 import context_pb2
from services.context import artifacts, contexts, drafts, oversight, privacy, sharing, stamps, threads, uploads
from services.context.servicer_files import FilesServicer
from services.context.servicer_threads import ThreadsServicer


class ContextServicer(ThreadsServicer, FilesServicer):
    """Turns requests into typed values and results into responses."""

    def __init__(
        self,
        verifier: identity.Verifier,
        opened: contexts.Contexts,
        looks: oversight.Oversight,
        conversations: threads.Threads,
        shared: sharing.Sharing,
        kept: privacy.Privacy,
        files: artifacts.Artifacts,
        coming: uploads.Uploads,
    ) -> None:
        self._verifier = verifier
        self._contexts = opened
        self._oversight = looks
        self._threads = conversations
        self._sharing = shared
        self._privacy = kept
        self._artifacts = files
        self._uploads = coming

    async def OpenContext(self, request: context_pb2.OpenContextRequest, context: Any) -> context_pb2.OpenContextResponse:
        principal = await self._verifier.user(request.access_token)
        opening = _opening(request)
        signed = await self._contexts.open(principal, opening, identity.current().service)
        message_id = signed.message_id
        if opening.said is not None and message_id is None:
            # of a context that was opened before it is there, or that was opened without it
            message_id = (await self._threads.append(signed.context, opening.said.draft(signed.context.run_id))).message_id
        return context_pb2.OpenContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=stamps.stamp(signed.expires_at),
            message_id=message_id or "",
        )  # fmt: skip

    async def RenewContext(self, request: context_pb2.RenewContextRequest, context: Any) -> context_pb2.RenewContextResponse:
        caller = identity.current()
        signed = await self._contexts.renew(caller.frame, caller.service)
        return context_pb2.RenewContextResponse(context_token=signed.token, expires_at=stamps.stamp(signed.expires_at))

    async def DeriveContext(self, request: context_pb2.DeriveContextRequest, context: Any) -> context_pb2.DeriveContextResponse:
        caller = identity.current()
        request_id = ids.RequestId(request.request_id)
        signed = await self._contexts.derive(
            caller.frame, request_id, request.operation, request.agent_context, request.scope, caller.service, _call(request)
        )  # fmt: skip
        return context_pb2.DeriveContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=stamps.stamp(signed.expires_at)
        )

    async def GetContext(self, request: context_pb2.GetContextRequest, context: Any) -> context_pb2.GetContextResponse:
        caller = identity.current()
        if caller.context is not None:
            self._contexts.require_standing(caller.context)
        found = await self._oversight.get(request.user_id, ids.ContextId(request.context_id))
        return context_pb2.GetContextResponse(context=found.context.to_proto(), closed_at=_closed_at(found))

    async def ListContexts(self, request: context_pb2.ListContextsRequest, context: Any) -> context_pb2.ListContextsResponse:
        wanted = contexts.Filter(_thread_id(request.thread_id), ids.RunId(request.run_id) if request.run_id else None, request.open)
        page, following = await self._oversight.contexts(request.user_id, wanted, request.page_size, request.page_token)
        found = [context_pb2.StoredContext(context=each.context.to_proto(), closed_at=_closed_at(each)) for each in page]
        return context_pb2.ListContextsResponse(contexts=found, next_page_token=following)

    async def ListContextAudit(
        self, request: context_pb2.ListContextAuditRequest, context: Any
    ) -> context_pb2.ListContextAuditResponse:  # fmt: skip
        about = contexts.About(ids.ContextId(request.context_id) if request.context_id else None, _thread_id(request.thread_id))
        page, following = await self._oversight.trail(request.user_id, about, request.page_size, request.page_token)
        return context_pb2.ListContextAuditResponse(entries=[_entry(each) for each in page], next_page_token=following)

    async def CloseContext(self, request: context_pb2.CloseContextRequest, context: Any) -> context_pb2.CloseContextResponse:
        caller = identity.current()
        if request.HasField("message"):
            draft = _said(request.message).draft(caller.frame.run_id)
            self._contexts.require_standing(caller.frame)
            last = await self._threads.close(caller.frame, draft, caller.service)
            return context_pb2.CloseContextResponse(closed_at=stamps.stamp(last.closed_at), message_id=last.message_id)
        if request.HasField("unused"):
            await self._contexts.rest(caller.frame, stamps.moment("unused", request.unused))
            return context_pb2.CloseContextResponse()
        return context_pb2.CloseContextResponse(closed_at=stamps.stamp(await self._contexts.close(caller.frame, caller.service)))


def _call(request: context_pb2.DeriveContextRequest) -> contexts.Call | None:
    if not request.run_id:
        return None
    return contexts.Call(ids.RunId(request.run_id), ids.CorrelationId(telemetry.correlation_id() or ids.CorrelationId.new()))


def _opening(request: context_pb2.OpenContextRequest) -> contexts.Opening:
    return contexts.Opening(
        request_id=ids.RequestId(request.request_id),
        run_id=ids.RunId(request.run_id),
        thread_id=_thread_id(request.thread_id),
        connection_id=ids.ConnectionId(request.connection_id) if request.connection_id else None,
        deadline=stamps.moment("deadline", request.deadline) if request.HasField("deadline") else None,
        correlation_id=ids.CorrelationId(request.correlation_id) if request.correlation_id else None,
        agent_context=request.agent_context,
        audit_metadata=request.audit_metadata,
        said=_said(request.message) if request.HasField("message") else None,
    )


def _said(message: context_pb2.RunMessage) -> drafts.Said:
    return drafts.Said(message.name, message.role, message.content)


def _thread_id(value: str) -> ids.ThreadId | None:
    return ids.ThreadId(value) if value else None


def _closed_at(found: contexts.Stored) -> timestamp_pb2.Timestamp | None:
    return None if found.closed_at is None else stamps.stamp(found.closed_at)


def _entry(each: contexts.Entry) -> context_pb2.AuditEntry:
    return context_pb2.AuditEntry(
        entry_id=each.entry_id, at=stamps.stamp(each.at), context_id=each.context_id, thread_id=each.thread_id, actor=each.actor,
        action=each.action, correlation_id=each.correlation_id, detail=each.detail,
    )  # fmt: skip
