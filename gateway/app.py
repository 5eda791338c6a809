"""Routes: /ws, /auth, /v1, /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from chassis import lifecycle, log, status, telemetry
from gateway import close_codes, http, problems, session, sockets
from gateway.settings import GatewaySettings
from netra import errors

_log = log.get(__name__)
_PROTOCOL = "netra.v1"
_seconds = telemetry.meter.create_histogram("netra.http.server.duration", unit="s", description="Requests by route and status.")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a handshake asks for."""

    token: str
    subprotocol: str | None
    resume: int | None
    client_id: str


def hello(headers: Mapping[str, str], offered: list[str], query: str) -> Hello:
    """Read a handshake. Raises `InvalidPayload` or `Unauthenticated`."""
    if query:
        raise errors.InvalidPayload("The address of the socket takes no query string. Send the token as a subprotocol.", field="query")
    if offered and _PROTOCOL not in offered:
        raise errors.InvalidPayload(f"Offer the subprotocol {_PROTOCOL}.", field="Sec-WebSocket-Protocol")
    token = _option(offered, "bearer.") or problems.bearer(headers)
    if not token:
        raise errors.Unauthenticated("Send an access token: as the subprotocol bearer.<token>, or as Authorization: Bearer <token>.")
    resume = _option(offered, "resume.")
    if resume and not (resume.isascii() and resume.isdigit() and len(resume) <= 18):
        raise errors.InvalidPayload("resume.<cursor> takes a cursor: an integer, 0 or more", field="Sec-WebSocket-Protocol")
    client_id = _option(offered, "client.")
    if len(client_id) > 64:
        raise errors.InvalidPayload("client.<id> has at most 64 characters", field="Sec-WebSocket-Protocol")
    return Hello(token, _PROTOCOL if offered else None, int(resume) if resume else None, client_id)


def _option(offered: list[str], prefix: str) -> str:
    found = [entry.removeprefix(prefix) for entry in offered if entry.startswith(prefix)]
    if len(found) > 1:
        raise errors.InvalidPayload(f"{prefix}... is there more than once", field="Sec-WebSocket-Protocol")
    return found[0] if found else ""


class _Refusal(Exception):
    """A handshake that is refused with an HTTP status."""

    def __init__(self, error: errors.NetraError, code: int) -> None:
        super().__init__(error.message)
        self.error, self.code = error, code


class _Socket:
    """GET /ws."""

    def __init__(self, edge: session.Edge) -> None:
        self._edge = edge

    async def serve(self, websocket: WebSocket) -> None:
        """One socket from its handshake to its end."""
        one: session.Session | None = None
        with telemetry.span("ws open", websocket.headers, "SERVER") as span:
            try:
                greeting = self._greeting(websocket)
                one = await self._opened(websocket, greeting)
                await websocket.accept(greeting.subprotocol)
            except sockets.TooMany:
                await websocket.accept(greeting.subprotocol)
                await websocket.close(*close_codes.TOO_MANY)
                return
            except WebSocketDisconnect:
                if one is not None:
                    one.leave()
                return
            except Exception as error:
                if one is not None:
                    one.leave()
                known = status.as_netra(error.error if isinstance(error, _Refusal) else error)
                telemetry.failed(span, known.code)
                code = error.code if isinstance(error, _Refusal) else None
                await websocket.send_denial_response(problems.response(known, code))
                return
        await one.run(websocket)

    def _greeting(self, websocket: WebSocket) -> Hello:
        origin = websocket.headers.get("origin")
        if origin is not None and not self._edge.settings.allows(origin):
            error = errors.PermissionDenied("Pages of this origin may not open a socket here.")
            self._edge.entitled.refused("socket of another origin", error)
            raise _Refusal(error, 403)
        return hello(websocket.headers, websocket.scope["subprotocols"], websocket.url.query)

    async def _opened(self, websocket: WebSocket, greeting: Hello) -> session.Session:
        principal = await self._edge.callers.of(websocket, greeting.token)
        one = session.Session(self._edge, principal, greeting.client_id, self._edge.callers.address(websocket))
        await self._edge.open.admit(one)
        try:
            # revocations from now on close it; one that came after the token was looked at did not know of it
            if self._edge.verifier.trust.revoked(principal):
                raise errors.Unauthenticated("The session has ended. Sign in again.")
            await one.join(greeting.resume)
        except BaseException:
            one.leave()
            raise
        return one


class _Around:
    """Around every HTTP request: trace and correlation id, tokens kept out of addresses, errors as problem+json, metrics."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        began, answered = time.perf_counter(), [0]
        with telemetry.span(f"HTTP {request.method}", request.headers, "SERVER") as span:
            try:
                problems.refuse_tokens_in(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
                await self._app(scope, receive, _noting(send, answered, telemetry.correlation_id()))
            except (Exception, asyncio.CancelledError) as error:
                if answered[0] or (isinstance(error, asyncio.CancelledError) and lifecycle.told_to_stop()):
                    raise
                known = status.as_netra(error)
                telemetry.failed(span, known.code)
                await problems.response(known)(scope, receive, _noting(send, answered, telemetry.correlation_id()))
            finally:
                route = getattr(scope.get("endpoint"), "__name__", "none")
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", answered[0])
                _seconds.record(time.perf_counter() - began, {"route": route, "status": answered[0]})


def _noting(send: Send, answered: list[int], correlation_id: str) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            answered[0] = message["status"]
            extra = ((b"x-correlation-id", correlation_id.encode()), (b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return noting


async def _unknown(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: routes and methods that do not exist."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else
    if error.status_code == 405:
        known: errors.NetraError = errors.InvalidPayload(f"{request.method} is not a method of {request.url.path}.", field="method")
    elif error.status_code == 404:
        known = errors.NotFound(f"There is nothing at {request.url.path[:200]}. GET / names what there is.")
    else:
        known = errors.InvalidPayload(str(error.detail))
    return problems.response(known, error.status_code, error.headers)


async def _refused(_request: Request, error: Exception) -> Response:
    return problems.response(status.as_netra(error))


def build(edge: session.Edge, api: http.Api, settings: GatewaySettings) -> Starlette:
    """The ASGI application."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=sorted(settings.origins),
        allow_origin_regex=settings.origin_pattern,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=[
            "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Range", "If-Range", "X-Content-SHA256",
            "X-Correlation-Id", "X-Netra-Grant", "traceparent", "baggage",
        ],
        expose_headers=["X-Correlation-Id", "Retry-After", "Location", "Content-Disposition", "Content-Range", "ETag"],
    )  # fmt: skip
    routes = [WebSocketRoute("/ws", _Socket(edge).serve), *(Route(path, end, methods=[method]) for method, path, end in api.routes())]
    handlers = {HTTPException: _unknown, errors.NetraError: _refused}
    return Starlette(routes=routes, middleware=[cors, Middleware(_Around)], exception_handlers=handlers)
