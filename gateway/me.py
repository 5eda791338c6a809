"""GET /v1/me: who the token says I am, what I may, what I use; and what I have sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, identity, status
from gateway import problems, session, upstreams, views
from netra import errors
from netra.auth.v1 import auth_pb2
from netra.dispatcher.v1 import dispatcher_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_MOST = 200
# the permission to see what all users do together
_OF_ALL = "audit:read"


class Me:
    """Asks auth who somebody is, the policy what they are entitled to, the dispatcher what runs."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [("GET", "/v1/me", self.me), ("GET", "/v1/me/statistics", self.statistics)]

    async def me(self, request: Request) -> Response:
        """Who the token says I am, my limits, and what I use of them."""
        who = await self._edge.callers.of(request)
        with status.translated():
            found = await self._services.auth.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=channel.bearer(who.token))
        limits = views.limits(self._edge.verifier.trust.limits(who.tier))
        scope = None if who.scope is None else sorted(who.scope)
        frame_bytes = self._edge.entitled.max_frame_bytes(who, self._edge.settings.max_frame_bytes)
        more = {"limits": {**limits, "max_frame_bytes": frame_bytes}, "usage": await self._usage(who)}
        return problems.answer({**views.caller(found), "scope": scope, **more})

    async def statistics(self, request: Request) -> Response:
        """What came over the sockets of this gateway: mine, and all for who may read the record of access."""
        who = await self._edge.callers.of(request)
        counted = self._edge.statistics
        shown = {"user": counted.of(who.user_id).shown()}
        with contextlib.suppress(errors.PermissionDenied):
            identity.require(self._edge.verifier.trust, who, _OF_ALL)
            shown["process"] = counted.process.shown()
        return problems.answer(shown)

    async def _usage(self, who: identity.Principal) -> dict[str, int | None]:
        running, queued = await asyncio.gather(
            self._runs(who, dispatcher_pb2.RUN_STATE_RUNNING), self._runs(who, dispatcher_pb2.RUN_STATE_QUEUED)
        )
        return {"sockets": self._edge.open.open_for(who.user_id), "concurrent_runs": running, "queued_runs": queued}

    async def _runs(self, who: identity.Principal, state: dispatcher_pb2.RunState.ValueType) -> int | None:
        """How many, up to 200; None when that cannot be told."""
        wanted = dispatcher_pb2.ListRunsRequest(page_size=_MOST, state=state)
        try:
            with status.translated():
                return len((await self._services.dispatcher.ListRuns(wanted, metadata=channel.bearer(who.token))).runs)
        except (errors.PermissionDenied, errors.Unavailable, errors.DeadlineExceeded):
            return None
