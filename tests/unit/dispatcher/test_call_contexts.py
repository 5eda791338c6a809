"""Which calls execute in the same context: those of one session, with the same rights, for a while."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from google.protobuf import timestamp_pb2

from chassis import identity, telemetry
from netra import errors, ids
from netra.context import CALLS, UserExecutionContext
from netra.context.v1 import context_pb2
from services.dispatcher import call_contexts, upstreams


class Opened:
    """Contexts that were asked for, as the context service would answer."""

    def __init__(self) -> None:
        self.asked: list[context_pb2.OpenContextRequest] = []
        self.rested: list[str] = []
        self.refusal: errors.NetraError | None = None
        self.user = _user()

    async def open(self, request: context_pb2.OpenContextRequest) -> upstreams.Opened:
        """One more, for the user of whom it is asked last."""
        self.asked.append(request)
        await asyncio.sleep(0)
        user = self.user
        context = UserExecutionContext.from_request(
            user_id=user.user_id, tenant_id=user.tenant_id, session_id=user.session_id, thread_id=ids.ThreadId.new(), run_id=request.run_id,
            request_id=request.request_id, roles=user.roles, tier=user.tier, agent_context=request.agent_context,
        )  # fmt: skip
        return upstreams.Opened(context, b"", f"token {len(self.asked)}", timestamp_pb2.Timestamp())

    async def rest(self, opened: upstreams.Opened) -> None:
        """Nothing waits for it, if that can be said."""
        if self.refusal is not None:
            raise self.refusal
        self.rested.append(opened.token)


def _user(**other: Any) -> identity.Principal:
    made = identity.Principal(
        ids.UserId.new(), ids.TenantId.new(), ids.SessionId(ids.uuid7()), ("user",), "free", expires_at=0.0, token="access"
    )  # fmt: skip
    return dataclasses.replace(made, **other)


class Clock:
    """Stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def opened() -> Opened:
    """None yet."""
    return Opened()


async def _of(kept: call_contexts.CallContexts, opened: Opened, user: identity.Principal, request_id: str = "r") -> upstreams.Opened:
    opened.user = user
    return await kept.of(user, request_id)


async def test_the_calls_of_a_session_share_a_context_and_have_frames_of_their_own(opened: Opened) -> None:
    kept, user = call_contexts.CallContexts(opened), opened.user
    correlations, found = [ids.CorrelationId.new(), ids.CorrelationId.new()], []
    for correlation, request_id in zip(correlations, ("one", "two"), strict=True):
        with telemetry.span("call", {telemetry.CORRELATION_HEADER: correlation}):
            found.append(await _of(kept, opened, user, request_id))
    first, second = found
    (asked,) = opened.asked
    assert (asked.access_token, asked.thread_id, opened.rested) == ("access", "", ["token 1"])
    assert first.token == second.token == "token 1"
    assert first.context.context_id == second.context.context_id
    assert first.context.thread_id == second.context.thread_id
    assert (first.context.request_id, second.context.request_id) == ("one", "two")
    assert [first.context.correlation_id, second.context.correlation_id] == correlations
    assert len({asked.run_id, first.context.run_id, second.context.run_id}) == 3
    assert first.context.agent_context == CALLS
    read = UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(second.stored))
    assert read == second.context
    assert read.serves_calls


@pytest.mark.parametrize(
    "other",
    [
        {"session_id": ids.SessionId(ids.uuid7())}, {"user_id": ids.UserId.new()}, {"tenant_id": ids.TenantId.new()}, {"tier": "early"},
        {"roles": ("admin",)}, {"scope": frozenset({"tools:execute"})}, {"actor": "gateway"},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
async def test_whoever_is_another_or_may_do_something_else_by_now_has_another_one(opened: Opened, other: dict[str, Any]) -> None:
    kept, user = call_contexts.CallContexts(opened), opened.user
    await _of(kept, opened, user)
    found = await _of(kept, opened, dataclasses.replace(user, **other))
    assert found.token == "token 2"
    for name, value in other.items():
        assert name in ("scope", "actor") or getattr(found.context, name) == value
    # and theirs is still the first
    assert (await _of(kept, opened, user)).token == "token 1"


async def test_one_serves_for_five_minutes(opened: Opened) -> None:
    clock = Clock()
    kept, user = call_contexts.CallContexts(opened, clock), opened.user
    for clock.now, token in ((0.0, "token 1"), (299.0, "token 1"), (300.0, "token 2"), (599.0, "token 2"), (600.0, "token 3")):
        assert (await _of(kept, opened, user)).token == token


async def test_what_is_erased_of_a_user_has_no_calls_added(opened: Opened) -> None:
    kept, user, other = call_contexts.CallContexts(opened), opened.user, _user()
    await _of(kept, opened, user)
    await _of(kept, opened, other)
    kept.forget(user.user_id)
    assert (await _of(kept, opened, user)).token == "token 3"
    assert (await _of(kept, opened, other)).token == "token 2"


async def test_one_that_cannot_rest_serves_all_the_same(opened: Opened) -> None:
    kept, user = call_contexts.CallContexts(opened), opened.user
    opened.refusal = errors.Unavailable()
    assert (await _of(kept, opened, user)).token == "token 1"
    assert (await _of(kept, opened, user)).token == "token 1"


async def test_those_that_come_at_once_are_all_served(opened: Opened) -> None:
    kept, user = call_contexts.CallContexts(opened), opened.user
    found = await asyncio.gather(*(kept.of(user, f"r{number}") for number in range(5)))
    assert all(one.context.serves_calls and one.context.user_id == user.user_id for one in found)
    before = len(opened.asked)
    await kept.of(user, "later")
    assert len(opened.asked) == before
