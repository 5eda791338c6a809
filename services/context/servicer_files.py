"""The part of ContextService about artifacts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from chassis import identity
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import artifacts, contexts, stamps, uploads

_ACCEPTED = "x-netra-accepted"


class FilesServicer(context_pb2_grpc.ContextServiceServicer):
    """Files, up and down."""

    _contexts: contexts.Contexts
    _artifacts: artifacts.Artifacts
    _uploads: uploads.Uploads

    async def PutArtifact(
        self, request_iterator: AsyncIterator[context_pb2.PutArtifactRequest], context: Any
    ) -> context_pb2.PutArtifactResponse:
        caller, parts = identity.current(), _Parts(request_iterator, self._uploads.limits.stall_s)
        draft = _draft(await parts.header(), caller)
        async with self._uploads.open(self._actor(caller), draft) as upload:
            await context.send_initial_metadata(((_ACCEPTED, "header"),))
            async for data in parts.data(whole=bool(draft.size or draft.sha256)):
                await upload.take(data)
            return context_pb2.PutArtifactResponse(artifact=_artifact(await upload.complete()))

    async def GetArtifact(self, request: context_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[context_pb2.GetArtifactResponse]:
        actor = self._actor(identity.current())
        found = await self._artifacts.get(actor, ids.ArtifactId(request.artifact_id))
        async with contextlib.aclosing(self._artifacts.read(actor, found, request.offset)) as pieces:
            yield context_pb2.GetArtifactResponse(artifact=_artifact(found))
            async for data in pieces:
                yield context_pb2.GetArtifactResponse(data=data)

    async def ListArtifacts(self, request: context_pb2.ListArtifactsRequest, context: Any) -> context_pb2.ListArtifactsResponse:
        actor, thread_id = self._actor(identity.current()), _thread_id(request.thread_id)
        page, following = await self._artifacts.artifacts(actor, thread_id, request.page_size, request.page_token)
        used = await self._artifacts.usage(actor)
        return context_pb2.ListArtifactsResponse(
            artifacts=[_artifact(entry) for entry in page], next_page_token=following, count=used.count, bytes=used.bytes,
            max_count=used.room.count, max_bytes=used.room.bytes,
        )  # fmt: skip

    async def DeleteArtifact(self, request: context_pb2.DeleteArtifactRequest, context: Any) -> context_pb2.DeleteArtifactResponse:
        await self._artifacts.delete(identity.current().user_id, ids.ArtifactId(request.artifact_id))
        return context_pb2.DeleteArtifactResponse()

    def _actor(self, caller: identity.Caller) -> artifacts.Actor:
        if caller.principal is not None:
            return artifacts.Actor(caller.principal.user_id, caller.principal.tier)
        frame = caller.frame
        self._contexts.require_standing(frame)
        return artifacts.Actor(frame.user_id, frame.tier, frame.context_id)


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


def _thread_id(told: str) -> ids.ThreadId | None:
    return ids.ThreadId(told) if told else None


def _draft(header: context_pb2.ArtifactHeader, caller: identity.Caller) -> artifacts.Draft:
    return artifacts.Draft(
        request_id=ids.RequestId(header.request_id),
        name=header.name,
        media_type=artifacts.media_type(header.media_type),
        size=header.size,
        sha256=header.sha256,
        run_id=None if caller.context is None else caller.context.run_id,
        thread_id=_thread_id(header.thread_id) if caller.context is None else caller.context.thread_id,
    )


def _artifact(entry: artifacts.Artifact) -> context_pb2.Artifact:
    return context_pb2.Artifact(
        artifact_id=entry.artifact_id, name=entry.name, media_type=entry.media_type, size=entry.size, sha256=entry.sha256,
        run_id=entry.run_id or "", created_at=stamps.stamp(entry.created_at), thread_id=entry.thread_id or "", user_id=entry.user_id,
    )  # fmt: skip
