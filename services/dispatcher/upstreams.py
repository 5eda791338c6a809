"""Typed stubs of the services this one calls: context, with its artifacts, and events."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import grpc
import stamina
from google.protobuf import timestamp_pb2

from chassis import channel, replicas, status
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from netra.tool import Artifact

_EVENT_WAIT_S = replicas.SILENCE_S
_STEPS_PAGE = 500
_PIECE = 64 * 1024
_BLOCK = 1024 * 1024
# a restart of PostgreSQL or of the context service is waited for
_AWAY = (errors.Unavailable, errors.DeadlineExceeded, errors.RateLimited)
_ATTEMPTS = 12
_CLOSE_S = 3.0
# what the context of one call is derived for
_CALL = "tools/execute"


@dataclass(frozen=True, slots=True)
class Opened:
    """An execution context and its signature. The id of its first message is empty when none was stored with it."""

    context: UserExecutionContext
    stored: bytes
    token: str
    expires_at: timestamp_pb2.Timestamp
    message_id: str = ""


class Contexts:
    """The context service."""

    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to)

    async def open(self, request: context_pb2.OpenContextRequest) -> Opened:
        """Open a context, with its message when it has one. An older service stores none.

        Raises `NotFound` for a foreign thread, `AlreadyExists` for a request id with another payload.
        """
        with status.translated():
            answer = await self._stub.OpenContext(request)
        context = UserExecutionContext.from_proto(answer.context)
        stored = answer.context.SerializeToString(deterministic=True)
        return Opened(context, stored, answer.context_token, answer.expires_at, answer.message_id)

    async def renew(self, token: str) -> str:
        """The same context, signed for another hour."""
        with status.translated():
            answer = await self._stub.RenewContext(context_pb2.RenewContextRequest(), metadata=_in_context(token))
        return answer.context_token

    async def derive(self, token: str, run_id: str) -> str:
        """The token of a context of one call alone, in that of a session's calls; once per run. Raises `FailedPrecondition`, `NotFound`."""
        request = context_pb2.DeriveContextRequest(
            request_id=f"call:{run_id}", operation=_CALL, agent_context=b"{}", run_id=run_id
        )  # fmt: skip
        with status.translated():
            answer = await self._stub.DeriveContext(request, metadata=_in_context(token))
        return answer.context_token

    async def append_message(self, token: str, request_id: str, role: str, content: str) -> ids.MessageId:
        """Add a message to the thread of the context; once per request id."""
        request = context_pb2.AppendMessageRequest(request_id=request_id, role=role, content=content)
        with status.translated():
            answer = await self._stub.AppendMessage(request, metadata=_in_context(token))
        return ids.MessageId(answer.message.message_id)

    async def hide(self, token: str) -> None:
        """Hide all messages of the context's run from its thread; again, it changes nothing. Raises `FailedPrecondition` once closed."""
        with status.translated():
            await self._stub.HideMessages(context_pb2.HideMessagesRequest(), metadata=_in_context(token))

    async def rest(self, opened: Opened) -> None:
        """Say that nothing came of a context: it can be opened again by the same request, and until then nothing waits for it."""
        request = context_pb2.CloseContextRequest(unused=opened.expires_at)
        with status.translated():
            await self._stub.CloseContext(request, metadata=_in_context(opened.token))

    async def close(self, token: str) -> None:
        """Close the context."""
        with status.translated():
            # the end of a run waits for this, and who is not closed now is closed later
            await self._stub.CloseContext(context_pb2.CloseContextRequest(), metadata=_in_context(token), timeout=_CLOSE_S)

    async def close_with(self, token: str, name: str, role: str, content: str, timeout_s: float) -> ids.MessageId | None:
        """Close the context after a last message of its run; what it says under the same name again is the same message.

        None when the service is an older one: then nothing was done. Raises `FailedPrecondition` when it is closed without the message.
        """
        message = context_pb2.RunMessage(name=name, role=role, content=content)
        # an older service, which would close it without the message, finds nothing to do with such a time
        request = context_pb2.CloseContextRequest(unused=timestamp_pb2.Timestamp(), message=message)
        with status.translated():
            answer = await self._stub.CloseContext(request, metadata=_in_context(token), timeout=min(timeout_s, _CLOSE_S))
        return ids.MessageId(answer.message_id) if answer.message_id else None


class Artifacts:
    """The files of users, in the context service. They go through in blocks: a large one is never in memory as a whole."""

    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to)

    async def fetch(self, token: str, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact to a file; there is none when that fails. Raises `NotFound`."""
        with _Download(to) as download:
            async for attempt in stamina.retry_context(on=_AWAY, attempts=_ATTEMPTS, timeout=None):
                with attempt, status.translated():
                    request = context_pb2.GetArtifactRequest(artifact_id=artifact_id, offset=download.size)
                    await download.go_on(self._stub.GetArtifact(request, metadata=_in_context(token)))
            return download.whole()

    async def keep(self, token: str, request_id: str, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact, once per request id. Raises `TooLarge`, `InvalidPayload`."""
        with _opened(content) as file:
            size = file.seek(0, os.SEEK_END)
            header = context_pb2.ArtifactHeader(request_id=request_id, name=name, media_type=media_type, size=size)
            async for attempt in stamina.retry_context(on=_AWAY, attempts=_ATTEMPTS, timeout=None):
                with attempt, status.translated():
                    file.seek(0)
                    answer = await self._stub.PutArtifact(_parts(header, file), metadata=_in_context(token))
        return _artifact(answer.artifact)


class _Download:
    """An artifact on its way into a file, over as many calls as it takes."""

    def __init__(self, to: Path) -> None:
        self._to, self._file, self._digest = to, open(to, "wb"), hashlib.sha256()
        self._artifact: Artifact | None = None
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, _error: object, _traceback: object) -> None:
        self._file.close()
        if kind is not None:
            self._to.unlink(missing_ok=True)

    async def go_on(self, parts: Any) -> None:
        """Take what comes."""
        block = bytearray()
        async for part in parts:
            if part.WhichOneof("part") == "artifact":
                self._artifact = _artifact(part.artifact)
            block += part.data
            if len(block) >= _BLOCK:
                await asyncio.to_thread(self._write, block)
                block = bytearray()
        await asyncio.to_thread(self._write, block)

    def _write(self, block: bytearray) -> None:
        self._file.write(block)
        self._digest.update(block)
        self.size += len(block)

    def whole(self) -> Artifact:
        """The artifact, when all of it came."""
        found = self._artifact
        if found is None or (found.size, found.sha256) != (self.size, self._digest.hexdigest()):
            raise errors.Internal("An artifact did not come as it was kept.")
        return found


def _opened(content: bytes | Path) -> IO[bytes]:
    return open(content, "rb") if isinstance(content, Path) else io.BytesIO(content)


async def _parts(header: context_pb2.ArtifactHeader, file: IO[bytes]) -> AsyncIterator[context_pb2.PutArtifactRequest]:
    yield context_pb2.PutArtifactRequest(header=header)
    while block := await asyncio.to_thread(file.read, _BLOCK):
        for start in range(0, len(block), _PIECE):
            yield context_pb2.PutArtifactRequest(data=block[start : start + _PIECE])


def _artifact(found: context_pb2.Artifact) -> Artifact:
    return Artifact(found.artifact_id, found.name, found.media_type, found.size, found.sha256)


class Records:
    """The events service. A user's record is written through the replica that is first for the user."""

    def __init__(self, known: replicas.Replicas, connect: Callable[[str], grpc.aio.Channel]) -> None:
        """`connect` makes the channel to one replica."""
        self.replicas = known
        self._stubs: replicas.Each[events_pb2_grpc.EventsServiceAsyncStub] = replicas.Each(
            known, lambda target: events_pb2_grpc.EventsServiceStub(connect(target))
        )

    def of(self, target: str) -> events_pb2_grpc.EventsServiceAsyncStub:
        """The stub of one replica."""
        return self._stubs.of(target)

    async def open(
        self, run_id: str, user_id: str, epoch: int, context_token: str, trace_id: str, call: events_pb2.Call | None = None
    ) -> events_pb2.OpenRunResponse:
        """Own the record of a run at this epoch, and read it; with the context of a session's calls it is the run of a `call`.

        Raises `Fenced` when another owns it at a higher epoch.
        """
        request = events_pb2.OpenRunRequest(run_id=run_id, epoch=epoch, context_token=context_token, trace_id=trace_id, call=call)

        async def opened(stub: events_pb2_grpc.EventsServiceAsyncStub) -> events_pb2.OpenRunResponse:
            with status.translated():
                return await stub.OpenRun(request, timeout=_EVENT_WAIT_S)

        return await self._stubs.ask(user_id, opened)

    async def steps(self, run_id: str, user_id: str, epoch: int, context_token: str) -> AsyncIterator[tuple[str, bytes]]:
        """The steps of a run that this process owns, key and result, page by page. Raises `Fenced` when another owns it by now."""
        request = events_pb2.ListStepsRequest(run_id=run_id, epoch=epoch, context_token=context_token, page_size=_STEPS_PAGE)

        async def page(stub: events_pb2_grpc.EventsServiceAsyncStub) -> events_pb2.ListStepsResponse:
            with status.translated():
                return await stub.ListSteps(request, timeout=_EVENT_WAIT_S)

        while True:
            answer = await self._stubs.ask(user_id, page)
            for step in answer.steps:
                yield step.key, step.result
            if not answer.next_after:
                return
            request.after = answer.next_after


def _in_context(token: str) -> channel.Metadata:
    return (("x-netra-context", token),)


def timestamp(seconds_from_now: float) -> datetime.datetime:
    """The time so many seconds from now, UTC."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds_from_now)
