"""The policy over a real database: versions, who may change it, and that a change is in force everywhere within a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from typing import Any

import grpc
import pytest

from chassis import status
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.auth import permissions
from services.auth import wiring as auth_wiring
from services.auth.settings import AuthSettings
from tests.fixtures.policies import Administrator, limited, without
from tests.fixtures.storage import ADMIN, Services
from tests.fixtures.users import User


@pytest.fixture
async def admin(services: Services) -> Administrator:
    """Auth alone, and its administrator."""
    await services.auth()
    return await Administrator(services).signed_in()


async def _refused(call: Awaitable[Any]) -> errors.NetraError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return status.from_rpc(caught.value)


def _update(policy: auth_pb2.Policy, expected: int, comment: str = "") -> auth_pb2.UpdatePolicyRequest:
    return auth_pb2.UpdatePolicyRequest(policy=policy, expected_version=expected, comment=comment)


async def test_the_first_version_is_the_one_of_the_code(admin: Administrator) -> None:
    policy = await admin.policy()
    assert policy.version == 1
    assert {(grant.role, grant.tier): set(grant.permissions) for grant in policy.grants} == {
        (role, tier): permissions.granted(role, tier) for role in permissions.ROLES for tier in permissions.TIERS
    }
    free = next(limits for limits in policy.limits if limits.tier == "free")
    assert (free.runs_per_minute, free.concurrent_runs, free.monthly_cost_micro_usd) == (10, 2, 5_000_000)


async def test_a_change_is_a_new_version_that_can_be_taken_back(admin: Administrator) -> None:
    before = await admin.policy()
    assert await admin.change(without("user", "free", "runs:write"), "no more free runs") == 2
    changed = await admin.policy()
    assert changed.version == 2
    assert await admin.policy(1) == before
    request = auth_pb2.RevertPolicyRequest(version=1, comment="they complained")
    assert (await admin.stub.RevertPolicy(request, metadata=admin.bearer)).version == 3
    after = await admin.policy()
    assert after.version == 3
    after.version = 1
    assert after == before
    listed = await admin.stub.ListPolicyVersions(auth_pb2.ListPolicyVersionsRequest(page_size=2), metadata=admin.bearer)
    rest = auth_pb2.ListPolicyVersionsRequest(page_size=2, page_token=listed.next_page_token)
    listed.MergeFrom(await admin.stub.ListPolicyVersions(rest, metadata=admin.bearer))
    assert [(each.version, each.comment) for each in listed.versions] == [
        (3, "back to version 1: they complained"), (2, "no more free runs"), (1, "the defaults"),
    ]  # fmt: skip
    assert [each.actor.partition(":")[0] for each in listed.versions] == ["user", "user", "netra"]


async def test_of_many_who_change_the_same_version_one_wins(admin: Administrator) -> None:
    policy = await admin.policy()
    answers = await asyncio.gather(
        *(admin.stub.UpdatePolicy(_update(policy, 1, f"number {number}"), metadata=admin.bearer) for number in range(10)),
        return_exceptions=True,
    )
    won = [answer for answer in answers if isinstance(answer, auth_pb2.UpdatePolicyResponse)]
    lost = [status.from_rpc(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [answer.version for answer in won] == [2]
    assert {(error.code, error.details["field"], error.details["version"]) for error in lost} == {
        ("FAILED_PRECONDITION", "expected_version", "2")
    }
    for expected in (0, 1, 3, 7):
        error = await _refused(admin.stub.UpdatePolicy(_update(policy, expected), metadata=admin.bearer))
        assert (error.code, error.details["version"]) == ("FAILED_PRECONDITION", "2")


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda p: p.grants.add(role="root", tier="free"), "policy.grants[15].role"),
        (lambda p: p.grants.add(role="user", tier="gold"), "policy.grants[15].tier"),
        (lambda p: p.grants.add(role="user", tier="mid"), "policy.grants"),
        (lambda p: p.grants[0].permissions.append("everything"), "policy.grants[0].permissions"),
        (lambda p: p.limits.pop(), "policy.limits"),
        (lambda p: p.limits.add(tier="free"), "policy.limits"),
        (lambda p: setattr(p.limits[0], "sockets", -1), "policy.limits[0].sockets"),
        (lambda p: p.tools.add(tool="a*b"), "policy.tools[0].tool"),
        (lambda p: p.tools.add(tool=""), "policy.tools[0].tool"),
        (lambda p: p.tools.add(tool="a", tiers=["gold"]), "policy.tools[0].tiers"),
        (lambda p: p.tools.add(tool="a", roles=["root"]), "policy.tools[0].roles"),
        (lambda p: p.tools.add(tool="a", permission="x"), "policy.tools[0].permission"),
        (lambda p: p.tools.extend([auth_pb2.ToolRule(tool="a"), auth_pb2.ToolRule(tool="a")]), "policy.tools"),
        (lambda p: p.features.add(feature="Sso"), "policy.features[7].feature"),
        (lambda p: p.features.add(feature="sso"), "policy.features"),
        (lambda p: p.tools.extend(auth_pb2.ToolRule(tool=f"t{n}", tiers=["free"]) for n in range(30_000)), "policy"),
        # nobody saws off the branch they sit on
        (without("admin", "internal", "policy:write"), "policy.grants"),
        (without("admin", "internal", "policy:read"), "policy.grants"),
        (limited("internal", requests_per_minute=0), "policy.limits"),
    ],
)
async def test_a_policy_that_cannot_be_is_refused_with_the_place(admin: Administrator, edit: Any, field: str) -> None:
    policy = await admin.policy()
    edit(policy)
    error = await _refused(admin.stub.UpdatePolicy(_update(policy, 1), metadata=admin.bearer))
    assert (error.code in ("INVALID_PAYLOAD", "FRAME_TOO_LARGE"), error.details.get("field")) == (True, field)
    assert (await admin.policy()).version == 1


async def test_others_may_be_left_without_requests(admin: Administrator) -> None:
    assert await admin.change(limited("free", requests_per_minute=0)) == 2
    # nor can one be gone back to that would lock its author out
    assert await admin.change(limited("internal", requests_per_minute=1)) == 3


async def test_unknown_versions_and_tokens_are_told_as_such(admin: Administrator) -> None:
    assert (await _refused(admin.policy(7))).code == "NOT_FOUND"
    assert (await _refused(admin.policy(-1))).code == "INVALID_PAYLOAD"
    revert = admin.stub.RevertPolicy(auth_pb2.RevertPolicyRequest(version=7), metadata=admin.bearer)
    assert (await _refused(revert)).code == "NOT_FOUND"
    for token in ("x", "-", "LTE=", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk="):
        listed = admin.stub.ListPolicyVersions(auth_pb2.ListPolicyVersionsRequest(page_token=token), metadata=admin.bearer)
        assert (await _refused(listed)).details["field"] == "page_token"


async def test_only_those_who_run_the_installation_change_it_and_are_told_who_they_are(admin: Administrator, services: Services) -> None:
    policy = await admin.policy()
    users = [await services.user("admin", "enterprise"), await services.user("user", "internal"), await services.user("admin", "internal")]
    enterprise = await _refused(admin.stub.UpdatePolicy(_update(policy, 1), metadata=users[0].bearer))
    assert (enterprise.code, enterprise.details) == ("PERMISSION_DENIED", {"permission": "policy:write", "tiers": "internal"})
    role = await _refused(admin.stub.UpdatePolicy(_update(policy, 1), metadata=users[1].bearer))
    assert (role.code, role.details) == ("PERMISSION_DENIED", {"permission": "policy:write"})
    # administrators of every tier may look, and those of the installation may write
    await admin.stub.GetPolicy(auth_pb2.GetPolicyRequest(), metadata=users[0].bearer)
    await admin.stub.UpdatePolicy(_update(policy, 1), metadata=users[2].bearer)


async def test_newer_tables_of_the_code_replace_older_ones_but_nothing_that_a_person_made(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    await services.auth()
    admin = await Administrator(services).signed_in()
    monkeypatch.setattr(permissions, "VERSION", permissions.VERSION + 1)
    monkeypatch.setitem(permissions.LIMITS["free"], "sockets", 5)
    await services.auth()
    newer = await admin.policy()
    assert (newer.version, newer.limits[0].sockets) == (2, 5)
    await admin.change(limited("free", sockets=1))
    monkeypatch.setattr(permissions, "VERSION", permissions.VERSION + 1)
    monkeypatch.setitem(permissions.LIMITS["free"], "sockets", 7)
    await services.auth()
    kept = await admin.policy()
    assert (kept.version, kept.limits[0].sockets) == (3, 1)


class Everywhere:
    """One call of a user to each service."""

    def __init__(self, services: Services, user: User) -> None:
        self._user = user
        self._auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))
        self._context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
        self._events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))
        self._runs: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(
            services.channel("dispatcher")
        )

    def calls(self) -> dict[str, Awaitable[Any]]:
        """The calls; each needs another permission."""
        bearer = self._user.bearer
        return {
            "session:read": self._auth.ListSessions(auth_pb2.ListSessionsRequest(), metadata=bearer, wait_for_ready=True),
            "threads:read": self._context.ListThreads(context_pb2.ListThreadsRequest(), metadata=bearer, wait_for_ready=True),
            "events:read": self._events.ListEvents(events_pb2.ListEventsRequest(), metadata=bearer, wait_for_ready=True),
            "runs:read": self._runs.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=bearer, wait_for_ready=True),
        }

    async def allowed(self) -> set[str]:
        """What is allowed just now."""
        calls = self.calls()
        answers = await asyncio.gather(*calls.values(), return_exceptions=True)
        refused = {name for name, answer in zip(calls, answers, strict=True) if isinstance(answer, grpc.aio.AioRpcError)}
        codes = {answer.code().name for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
        assert codes <= {"PERMISSION_DENIED"}
        return calls.keys() - refused

    async def until(self, wanted: Iterable[str], began: float) -> float:
        """How long after `began` exactly this was allowed."""
        async with asyncio.timeout(20):
            while True:
                if await self.allowed() == set(wanted):
                    return time.monotonic() - began
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("elsewhere", ["", "told", "not told"], ids=["same replica", "other replica", "other replica, no Valkey between"])
async def test_a_change_is_in_force_in_every_process_within_a_second(services: Services, elsewhere: str) -> None:
    await services.all()
    if elsewhere:
        # the services follow the first replica, and the change is made at another one
        apart = {"valkey_namespace": f"{services.common['valkey_namespace']}x"} if elsewhere == "not told" else {}
        settings = AuthSettings(**services.settings("auth", bootstrap_admin=ADMIN, **apart))
        services.ports["auth"] = (await services.stack.enter_async_context(auth_wiring.build(settings))).port
    admin = await Administrator(services).signed_in()
    every = Everywhere(services, await services.user("user", "early"))
    names = set(every.calls())
    assert await every.allowed() == names
    took = []
    for _ in range(3):
        version = await admin.change(without("user", "early", *names))
        took.append(await every.until(set(), time.monotonic()))
        request = auth_pb2.RevertPolicyRequest(version=version - 1)
        await admin.stub.RevertPolicy(request, metadata=admin.bearer)
        took.append(await every.until(names, time.monotonic()))
    print("in force after, s:", [round(each, 3) for each in took])
    assert max(took) < 1.0
