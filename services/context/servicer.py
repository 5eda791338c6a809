"""ContextService: contexts here; threads and files in the parts it is put together from."""

from __future__ import annotations

from typing import Any

from chassis import identity
from netra import ids
from netra.context.v1 import context_pb2
from services.context import artifacts, contexts, stamps, threads, uploads
from services.context.servicer_files import FilesServicer
from services.context.servicer_threads import ThreadsServicer


class ContextServicer(ThreadsServicer, FilesServicer):
    """Turns requests into typed values and results into responses."""

    def __init__(
        self,
        verifier: identity.Verifier,
        opened: contexts.Contexts,
        conversations: threads.Threads,
        files: artifacts.Artifacts,
        coming: uploads.Uploads,
    ) -> None:
        self._verifier = verifier
        self._contexts = opened
        self._threads = conversations
        self._artifacts = files
        self._uploads = coming

    async def OpenContext(self, request: context_pb2.OpenContextRequest, context: Any) -> context_pb2.OpenContextResponse:
        principal = await self._verifier.user(request.access_token)
        signed = await self._contexts.open(principal, _opening(request), identity.current().service)
        return context_pb2.OpenContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=stamps.stamp(signed.expires_at)
        )

    async def RenewContext(self, request: context_pb2.RenewContextRequest, context: Any) -> context_pb2.RenewContextResponse:
        caller = identity.current()
        signed = await self._contexts.renew(caller.frame, caller.service)
        return context_pb2.RenewContextResponse(context_token=signed.token, expires_at=stamps.stamp(signed.expires_at))

    async def DeriveContext(self, request: context_pb2.DeriveContextRequest, context: Any) -> context_pb2.DeriveContextResponse:
        caller = identity.current()
        request_id = ids.RequestId(request.request_id)
        signed = await self._contexts.derive(
            caller.frame, request_id, request.operation, request.agent_context, request.scope, caller.service
        )  # fmt: skip
        return context_pb2.DeriveContextResponse(
            context=signed.context.to_proto(), context_token=signed.token, expires_at=stamps.stamp(signed.expires_at)
        )

    async def GetContext(self, request: context_pb2.GetContextRequest, context: Any) -> context_pb2.GetContextResponse:
        found = await self._contexts.get(identity.current().user_id, ids.ContextId(request.context_id))
        closed_at = None if found.closed_at is None else stamps.stamp(found.closed_at)
        return context_pb2.GetContextResponse(context=found.context.to_proto(), closed_at=closed_at)

    async def CloseContext(self, request: context_pb2.CloseContextRequest, context: Any) -> context_pb2.CloseContextResponse:
        caller = identity.current()
        return context_pb2.CloseContextResponse(closed_at=stamps.stamp(await self._contexts.close(caller.frame, caller.service)))


def _opening(request: context_pb2.OpenContextRequest) -> contexts.Opening:
    return contexts.Opening(
        request_id=ids.RequestId(request.request_id),
        run_id=ids.RunId(request.run_id),
        thread_id=ids.ThreadId(request.thread_id) if request.thread_id else None,
        connection_id=ids.ConnectionId(request.connection_id) if request.connection_id else None,
        deadline=stamps.moment("deadline", request.deadline) if request.HasField("deadline") else None,
        correlation_id=ids.CorrelationId(request.correlation_id) if request.correlation_id else None,
        agent_context=request.agent_context,
        audit_metadata=request.audit_metadata,
    )
