"""Threads over HTTP: what was said on them, whom they are granted to, and how they end."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, identity, status
from gateway import frames, problems, requests, session, upstreams, views
from netra import errors, ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_PATH = "/v1/threads/{thread_id}"
# an erasure asks the record twice, under two keys that are the same ones when it is asked for again
_LATE = uuid.UUID("5b0f1c6e-6a1d-4f0e-9d5b-3c1e3a7f2b60")


class Threads:
    """One method per resource: read, call in the caller's name, show."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [
            ("GET", "/v1/threads", self.list_threads),
            ("POST", f"{_PATH}:restore", self.restore_thread),
            ("POST", f"{_PATH}:erase", self.erase_thread),
            ("GET", f"{_PATH}/messages", self.list_messages),
            ("GET", f"{_PATH}/grants", self.list_grants),
            ("POST", f"{_PATH}/grants", self.grant_thread),
            ("DELETE", f"{_PATH}/grants/{{grantee_id}}", self.withdraw_grant),
            ("POST", f"{_PATH}/token", self.grant_token),
            ("GET", _PATH, self.get_thread),
            ("DELETE", _PATH, self.delete_thread),
        ]

    async def list_threads(self, request: Request) -> Response:
        """The caller's threads, or those granted to them, or those they deleted; newest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        selection = views.selection_named(query.get("selection", ""))
        if selection is None:
            raise frames.wrong("query.selection", "must be own, shared or deleted")
        wanted = context_pb2.ListThreadsRequest(**requests.page(query), selection=selection)
        with status.translated():
            found = await self._services.context.ListThreads(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"threads": [views.thread(one) for one in found.threads], "next_page_token": found.next_page_token})

    async def get_thread(self, request: Request) -> Response:
        """A thread of the caller, or one granted to them."""
        who = await self._edge.callers.of(request)
        wanted = context_pb2.GetThreadRequest(thread_id=_thread_id(request))
        with status.translated():
            found = await self._services.context.GetThread(wanted, metadata=channel.bearer(who.token))
        return problems.answer(views.thread(found.thread))

    async def list_messages(self, request: Request) -> Response:
        """What was said on a thread, oldest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        wanted = context_pb2.ListMessagesRequest(thread_id=_thread_id(request), **requests.page(query))
        with status.translated():
            found = await self._services.context.ListMessages(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"messages": [views.message(one) for one in found.messages], "next_page_token": found.next_page_token})

    async def delete_thread(self, request: Request) -> Response:
        """Hide a thread of the caller, until it is restored or its time has passed."""
        who = await self._edge.callers.of(request)
        wanted = context_pb2.DeleteThreadRequest(request_id=requests.key(request), thread_id=_thread_id(request))
        with status.translated():
            found = await self._services.context.DeleteThread(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"thread": views.thread(found.thread), "erased_at": views.time(found, "erased_at")})

    async def restore_thread(self, request: Request) -> Response:
        """Show a deleted thread of the caller again."""
        who = await self._edge.callers.of(request)
        wanted = context_pb2.RestoreThreadRequest(request_id=requests.key(request), thread_id=_thread_id(request))
        with status.translated():
            found = await self._services.context.RestoreThread(wanted, metadata=channel.bearer(who.token))
        return problems.answer(views.thread(found.thread))

    async def erase_thread(self, request: Request) -> Response:
        """Remove the content of a thread of the caller for good, in the record as well. Ask again when it fails, with whichever key."""
        who = await self._edge.callers.of(request)
        # nothing is erased for who may not erase the rest
        requests.require(self._edge, who, "data:erase", "events:erase", "threads:read")
        key, thread_id = requests.key(request), _thread_id(request)
        # the record first: as long as that is not emptied, the thread is there to be asked for again
        granted = await self._granted(who, thread_id)
        recorded = events_pb2.EraseEventsResponse() if granted else await self._erase_events(who, key, thread_id)
        found = await self._erase_content(who, key, thread_id, recorded)
        # what was recorded between the two; to a thread that is erased nothing is added
        late = await self._erase_events(who, str(uuid.uuid5(_LATE, key)), thread_id)
        wanted = dispatcher_pb2.EraseRunsRequest(request_id=key, thread_id=thread_id)
        with status.translated():
            await self._services.dispatcher.EraseRuns(wanted, metadata=channel.bearer(who.token))
        erased = {"messages": found.messages, "artifacts": found.artifacts, "events": recorded.events + late.events}
        return problems.answer({"thread_id": thread_id, **erased, "runs": max(recorded.runs, late.runs)})

    async def _granted(self, who: identity.Principal, thread_id: str) -> bool:
        """Whether it is somebody else's: that is refused before anything of the caller's is erased, such as what they did there."""
        wanted = context_pb2.GetThreadRequest(thread_id=thread_id)
        try:
            with status.translated():
                found = await self._services.context.GetThread(wanted, metadata=channel.bearer(who.token))
        except errors.NotFound:
            # a deleted one, or one that was erased and has left something in the record; or none
            return False
        return found.thread.access != context_pb2.ACCESS_OWN

    async def _erase_content(
        self, who: identity.Principal, key: str, thread_id: str, recorded: events_pb2.EraseEventsResponse
    ) -> context_pb2.EraseThreadResponse:
        """Raises `NotFound` for a thread of which nothing is known, in the record neither."""
        wanted = context_pb2.EraseThreadRequest(request_id=key, thread_id=thread_id)
        try:
            with status.translated():
                return await self._services.context.EraseThread(wanted, metadata=channel.bearer(who.token))
        except errors.NotFound:
            if not recorded.runs:
                raise
            # an earlier request erased it, or its time had passed
            return context_pb2.EraseThreadResponse()

    async def _erase_events(self, who: identity.Principal, key: str, thread_id: str) -> events_pb2.EraseEventsResponse:
        wanted = events_pb2.EraseEventsRequest(request_id=key, thread_id=thread_id)
        with status.translated():
            return await self._services.events.EraseEvents(wanted, metadata=channel.bearer(who.token))

    async def list_grants(self, request: Request) -> Response:
        """Whom a thread of the caller is granted to, oldest first."""
        who, query = await self._edge.callers.of(request), request.query_params
        wanted = context_pb2.ListGrantsRequest(
            thread_id=_thread_id(request), **requests.page(query), withdrawn=requests.flag(query, "withdrawn")
        )
        with status.translated():
            found = await self._services.context.ListGrants(wanted, metadata=channel.bearer(who.token))
        return problems.answer({"grants": [views.grant(one) for one in found.grants], "next_page_token": found.next_page_token})

    async def grant_thread(self, request: Request) -> Response:
        """Let another user of the tenant read a thread of the caller, or write to it; again changes which."""
        who = await self._edge.callers.of(request)
        body = await problems.body_of(request, self._edge.settings.max_body_bytes)
        frames.refuse_identity(body, "")
        access = views.access_named(body.get("access"))
        if access is None:
            raise frames.wrong("access", "must be read or write")
        if ("grantee_id" in body) == ("email" in body):
            raise frames.wrong("grantee_id", "or email is required: whom the thread is granted to, and not both")
        wanted = context_pb2.GrantThreadRequest(request_id=requests.key(request), thread_id=_thread_id(request), access=access)
        if "email" in body:
            wanted.email = problems.required(body, "email", 320)
        else:
            wanted.user_id = frames.optional_id(problems.required(body, "grantee_id"), "grantee_id")
        with status.translated():
            found = await self._services.context.GrantThread(wanted, metadata=channel.bearer(who.token))
        place = f"/v1/threads/{found.grant.thread_id}/grants/{found.grant.grantee_id}"
        return problems.answer(views.grant(found.grant), 201, {"Location": place})

    async def withdraw_grant(self, request: Request) -> Response:
        """End a grant of the caller."""
        who = await self._edge.callers.of(request)
        wanted = context_pb2.WithdrawGrantRequest(
            request_id=requests.key(request), thread_id=_thread_id(request), grantee_id=requests.in_path(request, "grantee_id", ids.UserId)
        )
        with status.translated():
            found = await self._services.context.WithdrawGrant(wanted, metadata=channel.bearer(who.token))
        return problems.answer(views.grant(found.grant))

    async def grant_token(self, request: Request) -> Response:
        """What shows the runs and events of a thread to the caller, for a few minutes."""
        who = await self._edge.callers.of(request)
        wanted = context_pb2.CreateGrantTokenRequest(thread_id=_thread_id(request))
        with status.translated():
            found = await self._services.context.CreateGrantToken(wanted, metadata=channel.bearer(who.token))
        shown = {"grant_token": found.grant_token, "expires_at": views.time(found, "expires_at"), "access": views.access(found.access)}
        return problems.answer(shown)


def _thread_id(request: Request) -> ids.ThreadId:
    return requests.in_path(request, "thread_id", ids.ThreadId)
