"""Approvals over HTTP: what runs ask people for, and what these say to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, status
from gateway import frames, problems, requests, router, session, upstreams, views
from netra import ids
from netra.dispatcher.v1 import approvals_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_PATH = "/v1/approvals"


class Approvals:
    """One method per resource: read, call in the caller's name, show."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [
            ("GET", _PATH, self.list_approvals),
            ("POST", f"{_PATH}/{{approval_id}}:resolve", self.resolve_approval),
            ("GET", f"{_PATH}/{{approval_id}}", self.get_approval),
        ]

    async def list_approvals(self, request: Request) -> Response:
        """What the caller's runs asked for, or all of the thread of a grant token; newest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        state = views.approval_state_named(query.get("state", ""))
        if query.get("state") and not state:
            raise frames.wrong("query.state", "must be pending, approved, rejected or expired")
        wanted = approvals_pb2.ListApprovalsRequest(
            **requests.page(query),
            run_id=requests.in_query(query, "run_id"),
            state=state or approvals_pb2.APPROVAL_STATE_UNSPECIFIED,
            grant_token=requests.grant(request),
        )
        with status.translated():
            found = await self._services.dispatcher.ListApprovals(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"approvals": [views.approval(one) for one in found.approvals], "next_page_token": found.next_page_token})

    async def get_approval(self, request: Request) -> Response:
        """One approval of a run of the caller, or of the thread of a grant token."""
        who = await self._edge.callers.of(request)
        wanted = approvals_pb2.GetApprovalRequest(approval_id=_approval_id(request), grant_token=requests.grant(request))
        with status.translated():
            found = await self._services.dispatcher.GetApproval(wanted, metadata=channel.bearer(who.token))
        return problems.answer(views.approval(found.approval))

    async def resolve_approval(self, request: Request) -> Response:
        """APPROVE over HTTP: the caller's word on an approval."""
        who = await self._edge.callers.of(request)
        payload = await problems.body_of(request, self._edge.settings.max_body_bytes)
        frames.refuse_identity(payload, "payload.")
        wanted = router.resolved(payload, _approval_id(request), requests.grant(request))
        return problems.answer(views.approval(await self._edge.calls.resolve(who, wanted)))


def _approval_id(request: Request) -> ids.ApprovalId:
    return requests.in_path(request, "approval_id", ids.ApprovalId)
