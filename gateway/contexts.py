"""Execution contexts over HTTP, and what was done to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, status
from gateway import problems, requests, session, upstreams, views
from netra import ids
from netra.context.v1 import context_pb2

Endpoint = Callable[[Request], Awaitable[Response]]


class Contexts:
    """The caller's; those of another user for who may look at them, which is recorded."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [
            ("GET", "/v1/contexts", self.list_contexts),
            ("GET", "/v1/contexts/audit", self.list_context_audit),
            ("GET", "/v1/contexts/{context_id}", self.get_context),
        ]

    async def list_contexts(self, request: Request) -> Response:
        """The caller's execution contexts, newest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        wanted = context_pb2.ListContextsRequest(
            **requests.page(query), thread_id=requests.in_query(query, "thread_id"), run_id=requests.in_query(query, "run_id"),
            open=requests.flag(query, "open"), user_id=requests.in_query(query, "user_id"),
        )  # fmt: skip
        with status.translated():
            found = await self._services.context.ListContexts(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"contexts": [views.context(one) for one in found.contexts], "next_page_token": found.next_page_token})

    async def get_context(self, request: Request) -> Response:
        """One execution context."""
        who, query = await self._edge.callers.of(request), request.query_params
        wanted = context_pb2.GetContextRequest(
            context_id=requests.in_path(request, "context_id", ids.ContextId), user_id=requests.in_query(query, "user_id")
        )
        with status.translated():
            found = await self._services.context.GetContext(wanted, metadata=channel.bearer(who.token))
        return problems.answer(views.context(found))

    async def list_context_audit(self, request: Request) -> Response:
        """What was done to the caller's contexts and threads, and who looked at them, oldest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        wanted = context_pb2.ListContextAuditRequest(
            **requests.page(query), context_id=requests.in_query(query, "context_id"), thread_id=requests.in_query(query, "thread_id"),
            user_id=requests.in_query(query, "user_id"),
        )  # fmt: skip
        with status.translated():
            found = await self._services.context.ListContextAudit(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"entries": [views.entry(one) for one in found.entries], "next_page_token": found.next_page_token})
