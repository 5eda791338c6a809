"""The signed context: for one service, one run and a while; nothing in it can be changed."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from chassis import channel, identity
from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures import forge
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.users import User

OTHER = ids.uuid7()
# what a token binds, and a value that somebody would like to have there
WISHES: dict[str, Any] = {
    "context_id": OTHER, "user_id": OTHER, "tenant_id": OTHER, "session_id": OTHER, "thread_id": OTHER, "run_id": OTHER,
    "request_id": "another", "roles": ["admin"], "tier": "enterprise", "scope": ["runs:write"], "depth": 3,
    "deadline": int(time.time() + 86_400) * 1_000_000, "correlation_id": "0123456789abcdef" * 2, "agent_context_sha256": "0" * 64,
}  # fmt: skip


def _changed(token: str, change: Callable[[dict[str, Any]], None]) -> str:
    header, _, signature = token.split(".")
    claims = forge.claims_of(token)
    change(claims)
    return ".".join((header, forge.encoded(json.dumps(claims, separators=(",", ":")).encode()), signature))


class Uses:
    """All that a service does with a context, of a run of its own."""

    def __init__(self, contexts: Contexts, user: User, opened: context_pb2.OpenContextResponse) -> None:
        self.contexts, self.user, self.opened = contexts, user, opened
        self._events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(contexts.services.channel("events"))

    async def open_run(self, token: str, run_id: str = "", caller: channel.Metadata = ()) -> events_pb2.OpenRunResponse:
        """Open the record of a run."""
        request = events_pb2.OpenRunRequest(context_token=token, run_id=run_id or self.opened.context.run_id, epoch=1)
        return await self._events.OpenRun(request, metadata=caller or self.contexts.dispatcher, wait_for_ready=True)

    def all(self, token: str) -> dict[str, Awaitable[Any]]:
        """One call each."""
        contexts, within = self.contexts, self.contexts.within(token)
        listing = context_pb2.ListMessagesRequest(thread_id=self.opened.context.thread_id)
        getting = context_pb2.GetContextRequest(context_id=self.opened.context.context_id)
        return {
            "renew": contexts.renew(token), "derive": contexts.derive(token), "append": contexts.append(token, "hello"),
            "get": contexts.stub.GetContext(getting, metadata=within), "list": contexts.stub.ListMessages(listing, metadata=within),
            "close": contexts.close(token), "open_run": self.open_run(token),
        }  # fmt: skip

    async def refused(self, token: str) -> set[str]:
        """The codes with which all of it is refused."""
        return {(await refused(call)).code for call in self.all(token).values()}


@pytest.fixture
async def uses(contexts: Contexts) -> Uses:
    """A context, and events beside."""
    await contexts.services.events()
    user = await contexts.services.user()
    return Uses(contexts, user, await contexts.open(user))


async def test_a_context_token_serves_for_everything_until_it_is_closed(uses: Uses) -> None:
    # what is refused below is refused for the reason of its test, and no other
    for name, call in uses.all(uses.opened.context_token).items():
        assert await call, name
    claims = forge.claims_of(uses.opened.context_token)
    assert claims["azp"] == "dispatcher"
    context = uses.opened.context
    for name in ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "tier", "depth"):
        assert claims["ctx"][name] == getattr(context, name)


async def test_whoever_alters_what_is_signed_is_refused(uses: Uses) -> None:
    token = uses.opened.context_token
    for name, value in WISHES.items():
        assert name in forge.claims_of(token)["ctx"], name

        def change(claims: dict[str, Any], name: str = name, value: Any = value) -> None:
            claims["ctx"][name] = value

        assert (await refused(uses.contexts.renew(_changed(token, change)))).code == "UNAUTHENTICATED", name
    for claim, value in {"sub": OTHER, "azp": "events", "exp": int(time.time()) + 7200, "jti": ids.uuid7()}.items():
        altered = _changed(token, lambda claims, claim=claim, value=value: claims.update({claim: value}))  # type: ignore[misc]
        assert await uses.refused(altered) == {"UNAUTHENTICATED"}, claim
    header, claims, signature = token.split(".")
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    assert await uses.refused(f"{header}.{claims}.{flipped}") == {"UNAUTHENTICATED"}


async def test_a_token_for_another_service_is_refused_everywhere(uses: Uses) -> None:
    signs = await uses.contexts.forge(uses.user)
    frame = forge.claims_of(uses.opened.context_token)["ctx"]
    assert await uses.contexts.renew(signs.token(identity.CONTEXT, ctx=frame))
    for service in ("gateway", "events", "auth", "context", "dispatche", "dispatcher2"):
        assert await uses.refused(signs.token(identity.CONTEXT, ctx=frame, azp=service)) == {"UNAUTHENTICATED"}, service
    # and the one for the dispatcher does not serve another service
    for service in ("gateway", "events"):
        caller = await uses.contexts.services.service_token(service)
        stub: context_pb2_grpc.ContextServiceAsyncStub = uses.contexts.stub
        within = (*caller, ("x-netra-context", uses.opened.context_token))
        assert (await refused(stub.RenewContext(context_pb2.RenewContextRequest(), metadata=within))).code == "PERMISSION_DENIED"
        assert (await refused(uses.open_run(uses.opened.context_token, caller=caller))).code == "PERMISSION_DENIED"
    # nor the user it is of
    within = (*uses.user.bearer, ("x-netra-context", uses.opened.context_token))
    assert (await refused(uses.contexts.stub.RenewContext(context_pb2.RenewContextRequest(), metadata=within))).code == "PERMISSION_DENIED"


async def test_a_token_replayed_for_another_run_is_refused(uses: Uses) -> None:
    beside = await uses.contexts.open(uses.user)
    foreign = await uses.contexts.open(await uses.contexts.services.user())
    for run_id in (beside.context.run_id, foreign.context.run_id, ids.uuid7()):
        error = await refused(uses.open_run(uses.opened.context_token, run_id))
        assert (error.code, error.message) == ("PERMISSION_DENIED", "The execution context belongs to another run.")
    assert (await uses.open_run(beside.context_token, beside.context.run_id)).next_seq == 1


async def test_an_expired_token_is_refused(uses: Uses) -> None:
    signs = await uses.contexts.forge(uses.user)
    frame, now = forge.claims_of(uses.opened.context_token)["ctx"], int(time.time())
    late = signs.token(identity.CONTEXT, ctx=frame, iat=now - 3600, nbf=now - 3600, exp=now - identity.LEEWAY_S - 1)
    assert await uses.refused(late) == {"UNAUTHENTICATED"}
    # nobody signs for longer than an hour
    assert await uses.refused(signs.token(identity.CONTEXT, ctx=frame, exp=now + 3700)) == {"UNAUTHENTICATED"}


async def test_the_token_of_a_closed_context_closes_and_tells_its_end_and_no_more(uses: Uses) -> None:
    token = uses.opened.context_token
    closed_at = await uses.contexts.close(token)
    calls = uses.all(token)
    # the end of its run is still to be recorded
    assert (await calls.pop("open_run")).next_seq == 1
    assert await calls.pop("close") == closed_at
    assert {name: (await refused(call)).code for name, call in calls.items()} == dict.fromkeys(calls, "FAILED_PRECONDITION")


async def test_a_context_of_another_user_under_a_good_signature_finds_nothing(uses: Uses) -> None:
    other = await uses.contexts.services.user()
    signs = await uses.contexts.forge(other)
    frame = forge.claims_of(uses.opened.context_token)["ctx"]
    # the user of the frame must be the one the token is of
    assert await uses.refused(signs.token(identity.CONTEXT, ctx=frame)) == {"UNAUTHENTICATED"}
    within = {**frame, "user_id": other.user_id}
    token = signs.token(identity.CONTEXT, ctx=within)
    for call in (uses.contexts.renew(token), uses.contexts.derive(token), uses.contexts.close(token)):
        assert (await refused(call)).code == "NOT_FOUND"
