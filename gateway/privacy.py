"""Everything that is kept of a user: taken along, and removed for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis import channel, identity, log, status
from gateway import problems, requests, session, upstreams, wire
from netra import errors, ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_log = log.get(__name__)
# how the last line of each service begins; of what users wrote no line begins so
_END = b'{"kind":"end"'
# Many readers take these for ends of lines. They stand inside of strings alone, where the escape means the same.
_LINE_ENDS = (("\x85".encode(), rb"\u0085"), ("\u2028".encode(), rb"\u2028"), ("\u2029".encode(), rb"\u2029"))


class Privacy:
    """Puts together what the services keep, each of its own."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services
        self._exporting: set[ids.UserId] = set()

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [("GET", "/v1/export", self.export), ("DELETE", "/v1/me/data", self.erase)]

    async def export(self, request: Request) -> Response:
        """All that is kept of the caller, one JSON object a line, each with its `kind`; the last one is `end`."""
        who = await self._edge.callers.of(request)
        # refused before the first line, or whole
        requests.require(self._edge, who, "data:export", "events:read")
        return _Export(self._lines(who), lambda: self._edge.verifier.trust.revoked(who), self._edge.settings.stall_s)

    async def _lines(self, who: identity.Principal) -> AsyncGenerator[bytes]:
        """Whole lines, of one message at a time: nothing is read ahead of its reader. Raises `RateLimited` at first."""
        if who.user_id in self._exporting:
            raise errors.RateLimited("An export of yours is going on. Wait for its end.", retry_after_ms=1000)
        self._exporting.add(who.user_id)
        try:
            count = 0
            for part in (self._of_context(who), self._of_runs(who), self._of_events(who)):
                async with contextlib.aclosing(part):
                    async for some in part:
                        count += some.count(b"\n")
                        yield _one_line_each(some)
            yield b'%b,"lines":%d}\n' % (_END, count)
        finally:
            self._exporting.discard(who.user_id)

    async def _of_context(self, who: identity.Principal) -> AsyncGenerator[bytes]:
        """Without its end, as more comes. Raises `Unavailable` when that does not come."""
        call = self._services.context.ExportData(context_pb2.ExportDataRequest(), metadata=channel.bearer(who.token))
        last = b""
        try:
            with status.translated():
                async for part in call:
                    *_, last = part.lines.splitlines(keepends=True) or [b""]
                    yield part.lines.removesuffix(last) if last.startswith(_END) else part.lines
        finally:
            call.cancel()
        if not last.startswith(_END):
            raise errors.Unavailable

    async def _of_runs(self, who: identity.Principal) -> AsyncGenerator[bytes]:
        call = self._services.dispatcher.ExportRuns(dispatcher_pb2.ExportRunsRequest(), metadata=channel.bearer(who.token))
        try:
            with status.translated():
                async for part in call:
                    yield part.lines
        finally:
            call.cancel()

    async def _of_events(self, who: identity.Principal) -> AsyncGenerator[bytes]:
        call = self._services.events.ExportEvents(events_pb2.ExportEventsRequest(), metadata=channel.bearer(who.token))
        try:
            with status.translated():
                async for batch in call:
                    yield b"".join(map(_line, batch.events))
        finally:
            call.cancel()

    async def erase(self, request: Request) -> Response:
        """Remove all that is kept of the caller for good. Ask again with the same key when it fails."""
        who = await self._edge.callers.of(request)
        # nothing is erased for who may not erase the rest
        requests.require(self._edge, who, "data:erase", "events:erase")
        key = requests.key(request)
        with status.translated():
            found = await self._services.context.EraseData(context_pb2.EraseDataRequest(request_id=key), metadata=channel.bearer(who.token))
            recorded = await self._services.events.EraseEvents(
                events_pb2.EraseEventsRequest(request_id=key), metadata=channel.bearer(who.token)
            )
            # last: what was asked for until then is among it
            erased = await self._services.dispatcher.EraseRuns(
                dispatcher_pb2.EraseRunsRequest(request_id=key), metadata=channel.bearer(who.token)
            )
        removed = {
            "threads": found.threads, "messages": found.messages, "artifacts": found.artifacts, "contexts": found.contexts,
            "events": recorded.events, "runs": max(recorded.runs, erased.runs),
        }  # fmt: skip
        return problems.answer(removed)


def _one_line_each(lines: bytes) -> bytes:
    for plain, escaped in _LINE_ENDS:
        lines = lines.replace(plain, escaped)
    return lines


def _line(event: events_pb2.Event) -> bytes:
    """The event as its user got it, in an object that says what it is."""
    return orjson.dumps({"kind": "event", "event": orjson.Fragment(event.frame)}, option=orjson.OPT_APPEND_NEWLINE)


class _Export(Response):
    """NDJSON at the pace of its reader; a connection on which it cannot be sent to its end is cut, so that nobody takes a part for all."""

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncGenerator[bytes], revoked: Callable[[], bool], stall_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "Content-Disposition": 'attachment; filename="netra-export.ndjson"'})
        del self.headers["content-length"]
        self._lines, self._revoked, self._stall_s = lines, revoked, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Raises what the services refuse before the first line."""
        async with contextlib.aclosing(self._lines):
            first = await anext(self._lines)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                return await wire.put(send, b"", self._stall_s, more=False)
            try:
                async with asyncio.TaskGroup() as group:
                    work = [group.create_task(one) for one in (self._feed(first, send), wire.gone(receive))]
                    await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
                    for task in work:
                        task.cancel()
            except* (TimeoutError, errors.NetraError) as failed:
                _log.info("an export ends early", reason=[type(error).__name__ for error in failed.exceptions])
                scope["state"]["cut"]()
                await wire.gone(receive)

    async def _feed(self, first: bytes, send: Send) -> None:
        await wire.put(send, first, self._stall_s, more=True)
        async for some in self._lines:
            if self._revoked():
                raise errors.Unauthenticated("The session has ended. Sign in again.")
            await wire.put(send, some, self._stall_s, more=True)
        await wire.put(send, b"", self._stall_s, more=False)
