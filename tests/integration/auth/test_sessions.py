"""Sign-in, the list of devices, the end of sessions, over a real database."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from chassis import channel, status
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import wiring as context_wiring
from services.context.settings import ContextSettings
from tests.fixtures.accounts import Accounts, refused
from tests.fixtures.policies import Administrator
from tests.fixtures.users import User


async def test_the_right_password_opens_a_session_of_the_user(accounts: Accounts) -> None:
    user = await accounts.services.user(tier="early")
    tokens = await accounts.login(user.email.upper(), user.password)
    assert tokens.user_id == user.user_id
    first, second = await accounts.verified(user.token), await accounts.verified(tokens.access_token)
    assert (second.valid, second.principal.user_id, list(second.principal.roles), second.principal.tier) == (
        True, user.user_id, ["user"], "early",
    )  # fmt: skip
    assert first.principal.session_id != second.principal.session_id


async def test_whatever_is_wrong_the_error_is_the_same(accounts: Accounts) -> None:
    user, stopped = await accounts.services.user(), await accounts.services.user()
    await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=stopped.user_id), metadata=await accounts.admin())
    wrong = [
        (user.email, user.password + "x"), (user.email, ""), (user.email, "x" * 5000), ("nobody@netra.example", user.password),
        ("no address", user.password), ("", ""), (stopped.email, stopped.password),
    ]  # fmt: skip
    found = [await refused(accounts.login(email, password)) for email, password in wrong]
    assert {(error.code, error.message, tuple(error.details)) for error in found} == {
        ("UNAUTHENTICATED", "E-mail or password is wrong.", ())
    }
    # the positive control
    assert (await accounts.login(user.email, user.password)).access_token


async def test_a_sign_in_and_its_refusals_are_recorded(accounts: Accounts) -> None:
    user = await accounts.services.user()
    await refused(accounts.login(user.email, "not the password"))
    assert (await accounts.audited(user.user_id))[1:] == [(f"user:{user.user_id}", "login", "ok"), ("anonymous", "login", "refused")]


@pytest.mark.parametrize("method", ["IssueToken", "RefreshToken", "CreateUser"])
async def test_malformed_protobuf_is_an_invalid_argument(accounts: Accounts, method: str) -> None:
    user = await accounts.services.user(role="admin")
    call: Any = accounts.services.channel("auth").unary_unary(f"/netra.auth.v1.AuthService/{method}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\x0a\xff", metadata=user.bearer)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert status.from_rpc(caught.value).code == "INVALID_PAYLOAD"


async def test_what_a_token_is_narrowed_to_and_who_brings_it_is_told(accounts: Accounts) -> None:
    user = await accounts.services.user()
    key = (await accounts.program(user, "session:read", "runs:read")).access_token
    assert list((await accounts.verified(key)).principal.scope) == ["runs:read", "session:read"]
    acting = channel.bearer((await accounts.on_behalf(user, "session:read")).access_token)
    principal = (await accounts.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=acting)).principal
    assert (list(principal.scope), principal.actor) == (["session:read"], "dispatcher")
    own = (await accounts.verified(user.token)).principal
    assert (list(own.scope), own.actor) == ([], "")


async def test_a_user_is_told_who_they_are(accounts: Accounts) -> None:
    user: User = await accounts.services.user(role="readonly")
    answer = await accounts.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=user.bearer)
    assert (answer.principal.user_id, answer.email) == (user.user_id, user.email)
    assert "runs:read" in answer.permissions
    assert "runs:write" not in answer.permissions


class TestDevices:
    """A user sees their sessions and ends them."""

    async def _listed(self, accounts: Accounts, metadata: channel.Metadata) -> list[auth_pb2.Session]:
        return list((await accounts.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=metadata)).sessions)

    async def _end(self, accounts: Accounts, metadata: channel.Metadata, **which: Any) -> int:
        return (await accounts.stub.EndSessions(auth_pb2.EndSessionsRequest(**which), metadata=metadata)).ended

    async def test_sessions_are_listed_by_their_last_use_with_where_they_come_from(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        phone = await accounts.login_from("203.0.113.9", user.email, user.password, "a phone")
        desk = await accounts.login_from("2001:db8::7", user.email, user.password, "a desk")
        await accounts.refresh(phone.refresh_token)
        listed = await self._listed(accounts, channel.bearer(desk.access_token))
        assert [(each.device, each.method, each.current) for each in listed] == [
            ("a phone", "password", False), ("a desk", "password", True), ("tests", "password", False),
        ]  # fmt: skip
        # the phone came back without the gateway's word on where it is
        assert [each.address for each in listed] == ["127.0.0.1", "2001:db8::7", "127.0.0.1"]
        lifetime = listed[1].expires_at.ToDatetime() - listed[1].created_at.ToDatetime()
        assert lifetime.total_seconds() == 8 * 3600

    async def test_nobody_is_believed_who_says_where_others_are(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        grant = auth_pb2.PasswordGrant(email=user.email, password=user.password)
        request = auth_pb2.IssueTokenRequest(password=grant, device="liar", client_address="203.0.113.9")
        await accounts.stub.IssueToken(request)
        await accounts.stub.IssueToken(request, metadata=await accounts.services.service_token("context"))
        listed = await self._listed(accounts, user.bearer)
        assert {each.address for each in listed if each.device == "liar"} == {"127.0.0.1"}

    async def test_one_session_ends_and_the_others_go_on(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        other = await accounts.login(user.email, user.password)
        session_id = (await accounts.verified(other.access_token)).principal.session_id
        assert await self._end(accounts, user.bearer, session_id=session_id) == 1
        assert await self._end(accounts, user.bearer, session_id=session_id) == 0
        assert not (await accounts.verified(other.access_token)).valid
        assert (await refused(accounts.refresh(other.refresh_token))).code == "UNAUTHENTICATED"
        assert (await accounts.verified(user.token)).valid

    async def test_all_others_or_all(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        others = [await accounts.login(user.email, user.password) for _ in range(3)]
        assert await self._end(accounts, user.bearer, others=True) == 3
        assert [(await accounts.verified(each.access_token)).valid for each in others] == [False] * 3
        last = await accounts.login(user.email, user.password)
        assert await self._end(accounts, user.bearer, all=True) == 2
        assert [(await accounts.verified(each)).valid for each in (user.token, last.access_token)] == [False, False]

    async def test_nobody_ends_the_session_of_somebody_else(self, accounts: Accounts) -> None:
        user, other = await accounts.services.user(), await accounts.services.user()
        session_id = (await accounts.verified(other.token)).principal.session_id
        found = await refused(accounts.stub.EndSessions(auth_pb2.EndSessionsRequest(session_id=session_id), metadata=user.bearer))
        assert (found.code, found.details["field"]) == ("NOT_FOUND", "session_id")
        assert (await accounts.verified(other.token)).valid

    @pytest.mark.parametrize("which", [{}, {"all": False}, {"others": False}, {"session_id": "x"}])
    async def test_which_must_be_said(self, accounts: Accounts, which: dict[str, Any]) -> None:
        user = await accounts.services.user()
        found = await refused(accounts.stub.EndSessions(auth_pb2.EndSessionsRequest(**which), metadata=user.bearer))
        assert found.code == "INVALID_PAYLOAD"
        assert (await accounts.verified(user.token)).valid

    async def test_where_the_policy_says_so_a_new_session_ends_the_older_ones(self, accounts: Accounts) -> None:
        admin = await Administrator(accounts.services).signed_in()
        user = await accounts.services.user(tier="free")
        free = await accounts.services.user(tier="early")

        def edit(policy: auth_pb2.Policy) -> None:
            for limits in policy.limits:
                limits.single_session = limits.tier == "free"

        await accounts.services.in_force(await admin.change(edit))
        second = await accounts.login(user.email, user.password)
        assert not (await accounts.verified(user.token)).valid
        assert (await accounts.verified(second.access_token)).valid
        await accounts.login(free.email, free.password)
        assert (await accounts.verified(free.token)).valid

    async def test_beyond_the_most_that_may_be_the_oldest_ends(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        key = await accounts.program(user, "session:read")
        async with accounts.database() as admin:
            query = (
                "INSERT INTO auth.sessions (session_id, user_id, device, expires_at, idle_until, created_at)"
                " SELECT gen_random_uuid(), $1, 'device ' || n, now() + interval '1 hour', now() + interval '1 hour',"
                " now() - make_interval(mins => 100 - n) FROM generate_series(2, 99) AS n"
            )
            await admin.execute(query, user.user_id)
            await admin.execute("UPDATE auth.sessions SET created_at = now() - interval '1 day' WHERE device = 'tests'")
        second = await accounts.login(user.email, user.password)
        assert (await accounts.verified(user.token)).valid
        third = await accounts.login(user.email, user.password)
        assert not (await accounts.verified(user.token)).valid
        assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
        # keys have a limit of their own
        assert [(await accounts.verified(each.access_token)).valid for each in (key, second, third)] == [True] * 3
        assert len(await self._listed(accounts, channel.bearer(third.access_token))) == 100 + 1
        assert await accounts.value("SELECT array_agg(security) FROM auth.revocations") == [False]
        detail = await accounts.value("SELECT detail FROM auth.audit WHERE action = 'end_sessions'")
        session_id = await accounts.value("SELECT session_id FROM auth.sessions WHERE end_reason IS NOT NULL")
        assert str(session_id) in detail


class TestRevocation:
    """What ended here is over everywhere."""

    async def test_a_revoked_session_is_over(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
        assert not (await accounts.verified(user.token)).valid
        assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
        again = accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
        assert (await refused(again)).code == "UNAUTHENTICATED"

    async def test_an_ended_session_is_refused_by_other_services(self, accounts: Accounts) -> None:
        services, ended = accounts.services, asyncio.Event()
        context = await services.stack.enter_async_context(context_wiring.build(ContextSettings(**services.settings("context"))))
        await asyncio.wait_for(context.trust.awaited(), 10)
        services.ports["context"] = context.port
        threads: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
        user = await services.user()
        context.trust.on_revocation(lambda _: ended.set())
        await threads.ListThreads(context_pb2.ListThreadsRequest(), metadata=user.bearer)
        await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
        await asyncio.wait_for(ended.wait(), 10)
        found = await refused(threads.ListThreads(context_pb2.ListThreadsRequest(), metadata=user.bearer))
        assert found.code == "UNAUTHENTICATED"

    async def test_it_is_told_to_followers_and_to_those_who_come_later(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        caller = await accounts.services.service_token("events")
        following = accounts.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=caller)
        snapshot = await anext(aiter(following))
        assert snapshot.keys
        assert snapshot.policy.grants
        session_id = (await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)).session_id
        assert session_id not in {each.session_id for each in snapshot.revocations}
        async with asyncio.timeout(10):
            async for update in following:
                if session_id in {each.session_id for each in update.revocations}:
                    break
        following.cancel()
        later = accounts.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=caller)
        assert session_id in {each.session_id for each in (await anext(aiter(later))).revocations}
        later.cancel()

    async def test_another_replica_of_auth_tells_it_too(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        caller = await accounts.services.service_token("events")
        async with accounts.replica() as other:
            following = other.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=caller)
            await anext(aiter(following))
            session_id = (await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)).session_id
            async with asyncio.timeout(10):
                async for update in following:
                    if session_id in {each.session_id for each in update.revocations}:
                        break
            following.cancel()
            assert (await refused(other.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=user.bearer))).code == "UNAUTHENTICATED"
