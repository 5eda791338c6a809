"""The RPCs of DispatcherService that show, register and take away tools."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from chassis import audit, identity
from netra import declarations, errors
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from services.dispatcher import entitlements
from services.dispatcher.tools import registrations, registry

_MOST = 200


class ToolsServicer(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """What tools there are."""

    def __init__(
        self, tools: registry.ToolRegistry, registered: registrations.Registrations, entitled: entitlements.Entitlements,
        refusals: audit.Refusals,
    ) -> None:  # fmt: skip
        self._tools, self._registered, self._entitled, self._record = tools, registered, entitled, refusals

    async def ListTools(self, request: pb.ListToolsRequest, context: Any) -> pb.ListToolsResponse:
        """One page of the tools the caller may call."""
        _one_of("tier", request.tier, declarations.TIERS)
        _one_of("enforcement", request.enforcement, declarations.ENFORCEMENTS)
        if not 0 <= request.page_size <= _MOST:
            raise errors.InvalidPayload(f"page_size must be from 1 to {_MOST}, or 0 for as many as fit", field="page_size")
        wanted = registry.Wanted(
            text=request.text, tag=request.tag, category=request.category, permission=request.permission, tier=request.tier,
            enforcement=request.enforcement, parameter=request.parameter,
        )  # fmt: skip
        mine = self._entitled.of_user(identity.current().user)
        page = self._tools.discover(mine, wanted, after=_name(request.page_token), most=request.page_size)
        token = _token(page.tools[-1].spec.name) if page.more else ""
        return pb.ListToolsResponse(tools=[found.shown for found in page.tools], next_page_token=token)

    async def GetTool(self, request: pb.GetToolRequest, context: Any) -> pb.GetToolResponse:
        """One tool the caller may call."""
        found = self._tools.get(request.name)
        if not self._entitled.of_user(identity.current().user).may_call(found.spec):
            # whether there is one is told only to those who may call it
            raise errors.NotFound(f"There is no tool {request.name!r}.", field="tool_name")
        return pb.GetToolResponse(tool=found.shown)

    async def RegisterTool(self, request: pb.RegisterToolRequest, context: Any) -> pb.RegisterToolResponse:
        """Make a tool known to all dispatchers."""
        caller = identity.current()
        found, changed = await self._registered.register(request.tool, _by(caller), replace=request.replace)
        if changed:
            self._record.done("register_tool", f"{found.spec.name} {found.spec.version}, {found.digest}", caller)
        return pb.RegisterToolResponse(tool=found.shown, changed=changed)

    async def DeregisterTool(self, request: pb.DeregisterToolRequest, context: Any) -> pb.DeregisterToolResponse:
        """Take a tool away."""
        caller = identity.current()
        changed = await self._registered.deregister(request.name, _by(caller))
        if changed:
            self._record.done("deregister_tool", request.name, caller)
        return pb.DeregisterToolResponse(changed=changed)


def _by(caller: identity.Caller) -> registrations.By:
    # the access rule let in users by their permission, and the services that it names
    return registrations.By(audit.actor(caller), operator=caller.principal is not None)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value and value not in known:
        raise errors.InvalidPayload(f"{field} must be one of {', '.join(known)}, or empty", field=field)


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _name(token: str) -> str:
    """Where a page begins. Raises `InvalidPayload`."""
    try:
        name = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        name = "?"
    if token and not declarations.NAME.fullmatch(name):
        raise errors.InvalidPayload("page_token must be a next_page_token of this method", field="page_token")
    return name
