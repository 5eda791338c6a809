"""Files over HTTP: streamed both ways, at the pace of the slower side, never whole in memory."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import grpc
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis import channel, identity, log, status
from gateway import frames, problems, requests, session, upstreams, wire
from netra import errors, ids
from netra.context.v1 import context_pb2

if TYPE_CHECKING:
    _Upload = grpc.aio.StreamUnaryCall[context_pb2.PutArtifactRequest, context_pb2.PutArtifactResponse]
    _Download = grpc.aio.UnaryStreamCall[context_pb2.GetArtifactRequest, context_pb2.GetArtifactResponse]

_log = log.get(__name__)
_ACCEPTED = "x-netra-accepted"
_PIECE = 64 * 1024
# on average, of the time in which the client is waited for; less is no upload but an occupation
_SLOWEST = 1024
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{0,19})|bytes=-(\d{1,19})")
_NOT_IN_QUOTES = re.compile(r"[^ !#-\[\]-~]|%")


class Artifacts:
    """Moves bytes in the caller's name."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge = edge
        self._services = services

    async def put(self, who: identity.Principal, request: Request) -> context_pb2.Artifact:
        """Keep the body. Raises what the context service refuses, as soon as it does."""
        body = _Body(request, self._edge.settings.artifact_stall_s, lambda: self._revoked(who))
        call = self._services.context.PutArtifact(body.parts(_header(request)), metadata=channel.bearer(who.token))
        body.call = call
        try:
            with status.translated():
                return (await call).artifact
        except errors.Unavailable as error:
            # also what the body itself has cut off
            raise body.failure or error from None
        finally:
            call.cancel()

    async def get(self, who: identity.Principal, artifact_id: ids.ArtifactId, request: Request) -> Response:
        """The bytes, or the part of them that `Range` asks for. Raises `NotFound`."""
        call, found = await self._opened(who, artifact_id, 0)
        try:
            span = _span(request.headers, found)
            if span is None:
                call.cancel()
                return _unsatisfiable(found)
            if span.first > 0:
                call.cancel()
                call, found = await self._opened(who, artifact_id, span.first)
        except BaseException:
            call.cancel()
            raise
        return _Sent(call, found, span, lambda: self._revoked(who), self._edge.settings.stall_s)

    async def _opened(self, who: identity.Principal, artifact_id: ids.ArtifactId, offset: int) -> tuple[_Download, context_pb2.Artifact]:
        wanted = context_pb2.GetArtifactRequest(artifact_id=artifact_id, offset=offset)
        call = self._services.context.GetArtifact(wanted, metadata=channel.bearer(who.token))
        with status.translated():
            return call, (await anext(aiter(call))).artifact

    def _revoked(self, who: identity.Principal) -> bool:
        return self._edge.verifier.trust.revoked(who)


def _header(request: Request) -> context_pb2.ArtifactHeader:
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise errors.InvalidPayload("Send the bytes as they are, without Content-Encoding.", field="Content-Encoding")
    name = request.query_params.get("name", "")
    if not name:
        raise frames.wrong("query.name", "is required: what the artifact is called")
    return context_pb2.ArtifactHeader(
        request_id=requests.key(request),
        name=name,
        media_type=headers.get("content-type", ""),
        size=problems.number({"Content-Length": headers.get("content-length", "")}, "Content-Length", 0, 2**62, 0),
        sha256=headers.get("x-content-sha256", "").lower(),
        thread_id=requests.in_query(request.query_params, "thread_id"),
    )


class _Body:
    """The body of a request as the parts of an upload. `failure` is why it ended early on this side."""

    call: _Upload

    def __init__(self, request: Request, stall_s: float, revoked: Callable[[], bool]) -> None:
        self._request, self._stall_s, self._revoked = request, stall_s, revoked
        self.failure: errors.NetraError | None = None
        self._patience_s = stall_s

    async def parts(self, header: context_pb2.ArtifactHeader) -> AsyncIterator[context_pb2.PutArtifactRequest]:
        """Header, data, end; read no faster than they are taken."""
        yield context_pb2.PutArtifactRequest(header=header)
        # a peer that waits for `100 Continue` is spared sending what would be refused
        if _ACCEPTED not in (await self.call.initial_metadata() or ()):
            return
        async for chunk in self._chunks():
            for at in range(0, len(chunk), _PIECE):
                yield context_pb2.PutArtifactRequest(data=chunk[at : at + _PIECE])
        yield context_pb2.PutArtifactRequest(end=True)

    async def _chunks(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._request.stream())
        while True:
            try:
                chunk = await self._next(chunks)
                if self._revoked():
                    raise errors.Unauthenticated("The session has ended. Sign in again.")
            except TimeoutError:
                message = f"Nothing came for {self._stall_s:g} s, or less than {_SLOWEST} bytes a second. Send the artifact again."
                self.failure = errors.DeadlineExceeded(message)
            except ClientDisconnect:
                self.failure = errors.Cancelled("The client went away.")
            except errors.NetraError as error:
                self.failure = error
            if self.failure is not None:
                raise self.failure
            if chunk is None:
                return
            yield chunk

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        began = time.monotonic()
        async with asyncio.timeout(self._patience_s):
            chunk = await anext(chunks, None)
        # what was saved up by a fast beginning is no leave to trickle
        waited_s = time.monotonic() - began
        self._patience_s = min(self._stall_s, self._patience_s - waited_s + len(chunk or b"") / _SLOWEST)
        return chunk


@dataclass(frozen=True, slots=True)
class _Span:
    """Which bytes are sent: from `first` to before `end`."""

    first: int
    end: int
    partial: bool


def _span(headers: Mapping[str, str], found: context_pb2.Artifact) -> _Span | None:
    """What is asked for; None when there is no such part. More than one range, or none of ours, means all (RFC 9110)."""
    asked = _RANGE.fullmatch(headers.get("range", ""))
    if asked is None or headers.get("if-range", _etag(found)) != _etag(found):
        return _Span(0, found.size, partial=False)
    first, last, length = asked.groups()
    if length is not None:
        span = _Span(max(found.size - int(length), 0), found.size, partial=True)
    else:
        span = _Span(int(first), min(int(last) + 1, found.size) if last else found.size, partial=True)
    return span if span.first < span.end else None


def _etag(found: context_pb2.Artifact) -> str:
    return f'"{found.sha256}"'


def _unsatisfiable(found: context_pb2.Artifact) -> Response:
    error = errors.InvalidPayload(f"The artifact has {found.size} bytes; there is no such range in it.", field="Range")
    return problems.response(error, 416, {"Content-Range": f"bytes */{found.size}"})


def _headers(found: context_pb2.Artifact, span: _Span) -> dict[str, str]:
    plain = _NOT_IN_QUOTES.sub("_", found.name)
    headers = {
        "Content-Type": found.media_type,
        "Content-Length": str(span.end - span.first),
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(found.name, safe='')}",
        # what a user uploaded must never act as a page of ours
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "ETag": _etag(found),
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-store",
    }
    return headers | ({"Content-Range": f"bytes {span.first}-{span.end - 1}/{found.size}"} if span.partial else {})


class _Sent(Response):
    """An artifact on its way out; a connection on which it cannot be sent to its end is cut, so that nobody takes a part for it."""

    def __init__(self, call: _Download, found: context_pb2.Artifact, span: _Span, revoked: Callable[[], bool], stall_s: float) -> None:
        super().__init__(status_code=206 if span.partial else 200, headers=_headers(found, span))
        self._call, self._left, self._revoked, self._stall_s = call, span.end - span.first, revoked, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with asyncio.TaskGroup() as group:
                work = [group.create_task(one) for one in (self._feed(send, scope["method"] == "HEAD"), wire.gone(receive))]
                await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
                for task in work:
                    task.cancel()
        except* (TimeoutError, errors.NetraError) as failed:
            _log.info("a download ends early", reason=[type(error).__name__ for error in failed.exceptions])
            scope["state"]["cut"]()
            await wire.gone(receive)
        finally:
            self._call.cancel()

    async def _feed(self, send: Send, bare: bool) -> None:
        parts = aiter(self._call)
        while self._left > 0 and not bare:
            with status.translated():
                part = await anext(parts, None)
            if part is None or self._revoked():
                raise errors.Unavailable
            data = part.data[: self._left]
            self._left -= len(data)
            await wire.put(send, data, self._stall_s, more=True)
        await wire.put(send, b"", self._stall_s, more=False)
