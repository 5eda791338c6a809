"""ContextService: open, renew, derive, get, close; threads and messages; artifacts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf import timestamp_pb2

from chassis import identity
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import artifacts, contexts, threads, uploads

_ACCEPTED = "x-netra-accepted"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ContextServicer(context_pb2_grpc.ContextServiceServicer):
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

    async def PutArtifact(
        self, request_iterator: AsyncIterator[context_pb2.PutArtifactRequest], context: Any
    ) -> context_pb2.PutArtifactResponse:
        caller, parts = identity.current(), _Parts(request_iterator, self._uploads.limits.stall_s)
        draft = _draft(await parts.header(), caller)
        async with self._uploads.open(caller.user_id, draft) as upload:
            await context.send_initial_metadata(((_ACCEPTED, "header"),))
            async for data in parts.data(whole=bool(draft.size or draft.sha256)):
                await upload.take(data)
            return context_pb2.PutArtifactResponse(artifact=_artifact(await upload.complete()))

    async def GetArtifact(self, request: context_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[context_pb2.GetArtifactResponse]:
        user_id = identity.current().user_id
        found = await self._artifacts.get(user_id, ids.ArtifactId(request.artifact_id))
        async with contextlib.aclosing(self._artifacts.read(user_id, found, request.offset)) as pieces:
            yield context_pb2.GetArtifactResponse(artifact=_artifact(found))
            async for data in pieces:
                yield context_pb2.GetArtifactResponse(data=data)

    async def ListArtifacts(self, request: context_pb2.ListArtifactsRequest, context: Any) -> context_pb2.ListArtifactsResponse:
        page, following = await self._artifacts.artifacts(identity.current().user_id, request.page_size, request.page_token)
        return context_pb2.ListArtifactsResponse(artifacts=[_artifact(entry) for entry in page], next_page_token=following)

    async def DeleteArtifact(self, request: context_pb2.DeleteArtifactRequest, context: Any) -> context_pb2.DeleteArtifactResponse:
        await self._artifacts.delete(identity.current().user_id, ids.ArtifactId(request.artifact_id))
        return context_pb2.DeleteArtifactResponse()


class _Parts:
    """What comes on one upload: a header, data, and perhaps the end. Raises `DeadlineExceeded` when nothing comes."""

    def __init__(self, requests: AsyncIterator[context_pb2.PutArtifactRequest], stall_s: float) -> None:
        self._requests, self._stall_s = requests, stall_s

    async def _next(self) -> context_pb2.PutArtifactRequest | None:
        try:
            async with asyncio.timeout(self._stall_s):
                part = await anext(self._requests, None)
        except TimeoutError:
            raise errors.DeadlineExceeded(f"Nothing came for {self._stall_s:g} s. Send the artifact again.") from None
        if part is not None and not isinstance(part, context_pb2.PutArtifactRequest):
            raise errors.InvalidPayload("The request is not a valid protobuf message of this method.")
        return part

    async def header(self) -> context_pb2.ArtifactHeader:
        """The first part. Raises `InvalidPayload` when it is another one."""
        part = await self._next()
        if part is None or part.WhichOneof("part") != "header":
            raise errors.InvalidPayload("The first part must be the header.", field="header")
        return part.header

    async def data(self, *, whole: bool) -> AsyncIterator[bytes]:
        """The other parts. Without a size or checksum told (`whole`) they must have an end: a broken stream looks ended, too."""
        came = False
        while (part := await self._next()) is not None:
            if part.WhichOneof("part") == "end":
                return
            if part.WhichOneof("part") != "data" or len(part.data) > artifacts.PIECE:
                raise errors.InvalidPayload(f"After the header comes data, at most {artifacts.PIECE} bytes at once.", field="data")
            came = True
            yield part.data
        if came and not whole:
            raise errors.InvalidPayload("Tell size or sha256 in the header, or send end as the last part.", field="end")


def _draft(header: context_pb2.ArtifactHeader, caller: identity.Caller) -> artifacts.Draft:
    return artifacts.Draft(
        request_id=ids.RequestId(header.request_id),
        name=header.name,
        media_type=artifacts.media_type(header.media_type),
        size=header.size,
        sha256=header.sha256,
        run_id=None if caller.context is None else caller.context.run_id,
    )


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


def _artifact(entry: artifacts.Artifact) -> context_pb2.Artifact:
    return context_pb2.Artifact(
        artifact_id=entry.artifact_id, name=entry.name, media_type=entry.media_type, size=entry.size, sha256=entry.sha256,
        run_id=entry.run_id or "", created_at=_stamp(entry.created_at),
    )  # fmt: skip
