"""Sign-in, refresh, reuse, revocation and new users, over a real database."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from chassis import channel, status
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import wiring as context_wiring
from services.context.settings import ContextSettings
from tests.fixtures.storage import ADMIN, Services
from tests.fixtures.users import User


class Auth:
    """Calls auth as users and as the context service."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))

    async def login(self, email: str, password: str) -> auth_pb2.Tokens:
        """Sign in."""
        grant = auth_pb2.PasswordGrant(email=email, password=password)
        return (await self.stub.IssueToken(auth_pb2.IssueTokenRequest(password=grant))).tokens

    async def admin(self) -> channel.Metadata:
        """Metadata of the first administrator's calls."""
        password = (self.services.secrets / "auth" / "bootstrap_admin").read_text().strip()
        return channel.bearer((await self.login(ADMIN, password)).access_token)

    async def refresh(self, refresh_token: str) -> auth_pb2.Tokens:
        """Exchange a refresh token."""
        return (await self.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=refresh_token))).tokens

    async def verified(self, access_token: str) -> auth_pb2.VerifyTokenResponse:
        """What a service is told about a token."""
        caller = await self.services.service_token("context")
        return await self.stub.VerifyToken(auth_pb2.VerifyTokenRequest(access_token=access_token), metadata=caller)


@pytest.fixture
async def auth(services: Services) -> Auth:
    """Auth alone."""
    await services.auth()
    return Auth(services)


async def _refused(call: Awaitable[Any]) -> errors.NetraError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return status.from_rpc(caught.value)


async def test_the_right_password_opens_a_session_of_the_user(auth: Auth) -> None:
    user = await auth.services.user(tier="early")
    tokens = await auth.login(user.email.upper(), user.password)
    assert tokens.user_id == user.user_id
    first, second = await auth.verified(user.token), await auth.verified(tokens.access_token)
    assert (second.valid, second.principal.user_id, list(second.principal.roles), second.principal.tier) == (
        True, user.user_id, ["user"], "early",
    )  # fmt: skip
    assert first.principal.session_id != second.principal.session_id


async def test_whatever_is_wrong_the_error_is_the_same(auth: Auth) -> None:
    user = await auth.services.user()
    wrong = [
        (user.email, user.password + "x"), (user.email, ""), (user.email, "x" * 5000), ("nobody@netra.example", user.password),
        ("no address", user.password), ("", ""),
    ]  # fmt: skip
    refused = [await _refused(auth.login(email, password)) for email, password in wrong]
    assert {(error.code, error.message, tuple(error.details)) for error in refused} == {
        ("UNAUTHENTICATED", "E-mail or password is wrong.", ())
    }
    # the positive control
    assert (await auth.login(user.email, user.password)).access_token


async def test_a_refresh_rotates_the_pair_within_the_session(auth: Auth) -> None:
    user = await auth.services.user()
    second = await auth.refresh(user.refresh_token)
    third = await auth.refresh(second.refresh_token)
    assert len({user.refresh_token, second.refresh_token, third.refresh_token}) == 3
    answers = [await auth.verified(token) for token in (user.token, second.access_token, third.access_token)]
    assert [answer.valid for answer in answers] == [True] * 3
    assert len({answer.principal.session_id for answer in answers}) == 1


@pytest.mark.parametrize("token", ["", "junk", "nrt_" + "a" * 43])
async def test_what_is_no_refresh_token_is_refused(auth: Auth, token: str) -> None:
    assert (await _refused(auth.refresh(token))).code == "UNAUTHENTICATED"


async def test_reuse_ends_the_session(auth: Auth) -> None:
    user = await auth.services.user()
    elsewhere = await auth.login(user.email, user.password)
    child = await auth.refresh(user.refresh_token)
    assert (await _refused(auth.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    assert not (await auth.verified(user.token)).valid
    assert not (await auth.verified(child.access_token)).valid
    assert (await _refused(auth.refresh(child.refresh_token))).code == "UNAUTHENTICATED"
    # other sessions of the user go on
    assert (await auth.verified(elsewhere.access_token)).valid
    await auth.refresh(elsewhere.refresh_token)


async def test_an_ended_session_is_refused_by_other_services(auth: Auth) -> None:
    services, ended = auth.services, asyncio.Event()
    context = await services.stack.enter_async_context(context_wiring.build(ContextSettings(**services.settings("context"))))
    await asyncio.wait_for(context.trust.awaited(), 10)
    services.ports["context"] = context.port
    threads: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    user = await services.user()
    context.trust.on_revocation(lambda _: ended.set())
    await threads.ListThreads(context_pb2.ListThreadsRequest(), metadata=user.bearer)
    await auth.refresh(user.refresh_token)
    await _refused(auth.refresh(user.refresh_token))
    await asyncio.wait_for(ended.wait(), 10)
    refused = await _refused(threads.ListThreads(context_pb2.ListThreadsRequest(), metadata=user.bearer))
    assert refused.code == "UNAUTHENTICATED"


async def test_of_twenty_who_bring_one_refresh_token_one_wins(auth: Auth) -> None:
    user = await auth.services.user()
    answers = await asyncio.gather(*(auth.refresh(user.refresh_token) for _ in range(20)), return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, auth_pb2.Tokens)]
    lost = [status.from_rpc(answer).code for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(won) == 1
    assert lost == ["UNAUTHENTICATED"] * 19
    # the others reused it, so the session is over for the winner too
    assert (await _refused(auth.refresh(won[0].refresh_token))).code == "UNAUTHENTICATED"


async def test_a_revoked_session_is_told_to_followers(auth: Auth) -> None:
    user = await auth.services.user()
    caller = await auth.services.service_token("events")
    following = auth.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=caller)
    snapshot = await anext(aiter(following))
    assert snapshot.keys
    assert snapshot.policy.grants
    session_id = (await auth.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)).session_id
    assert session_id not in {each.session_id for each in snapshot.revocations}
    async with asyncio.timeout(10):
        async for update in following:
            if session_id in {each.session_id for each in update.revocations}:
                break
    following.cancel()
    # those who come later find it in their snapshot
    later = auth.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=caller)
    assert session_id in {each.session_id for each in (await anext(aiter(later))).revocations}
    later.cancel()


async def test_a_revoked_session_is_over(auth: Auth) -> None:
    user = await auth.services.user()
    await auth.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    assert not (await auth.verified(user.token)).valid
    assert (await _refused(auth.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    again = auth.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    assert (await _refused(again)).code == "UNAUTHENTICATED"


class TestCreateUser:
    """Administrators make users, in their own tenant."""

    def _wanted(self, **more: Any) -> auth_pb2.CreateUserRequest:
        return auth_pb2.CreateUserRequest(**{"email": f"{secrets.token_hex(6)}@netra.example", "password": "a good password"} | more)

    async def test_a_new_user_signs_in_with_the_least_unless_told_otherwise(self, auth: Auth) -> None:
        admin = await auth.admin()
        least, more = self._wanted(), self._wanted(roles=["readonly", "admin"], tier="mid")
        made = [(await auth.stub.CreateUser(wanted, metadata=admin)).user_id for wanted in (least, more)]
        told = [await auth.verified((await auth.login(wanted.email, wanted.password)).access_token) for wanted in (least, more)]
        assert [answer.principal.user_id for answer in told] == made
        assert [(list(answer.principal.roles), answer.principal.tier) for answer in told] == [
            (["user"], "free"), (["admin", "readonly"], "business"),
        ]  # fmt: skip
        own = await auth.verified(admin[0][1].removeprefix("Bearer "))
        assert {answer.principal.tenant_id for answer in told} == {own.principal.tenant_id}

    @pytest.mark.parametrize("role", ["user", "readonly"])
    async def test_only_administrators_may(self, auth: Auth, role: str) -> None:
        user, wanted = await auth.services.user(role=role), self._wanted()
        assert (await _refused(auth.stub.CreateUser(wanted, metadata=user.bearer))).code == "PERMISSION_DENIED"
        assert (await _refused(auth.stub.CreateUser(wanted))).code == "UNAUTHENTICATED"
        assert (await _refused(auth.login(wanted.email, wanted.password))).code == "UNAUTHENTICATED"

    async def test_an_address_belongs_to_one_user_in_any_case(self, auth: Auth) -> None:
        admin, wanted = await auth.admin(), self._wanted()
        await auth.stub.CreateUser(wanted, metadata=admin)
        taken = self._wanted(email=wanted.email.upper(), password="another password")
        refused = await _refused(auth.stub.CreateUser(taken, metadata=admin))
        assert (refused.code, refused.details["field"]) == ("ALREADY_EXISTS", "email")
        await auth.login(wanted.email, wanted.password)

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"email": "no address"}, "email"),
            ({"password": "x" * 11}, "password"),
            ({"password": "x" * 1025}, "password"),
            ({"roles": ["god"]}, "roles"),
            ({"tier": "gold"}, "tier"),
        ],
    )
    async def test_a_wrong_field_is_named(self, auth: Auth, more: dict[str, Any], field: str) -> None:
        refused = await _refused(auth.stub.CreateUser(self._wanted(**more), metadata=await auth.admin()))
        assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", field)


@pytest.mark.parametrize("method", ["IssueToken", "RefreshToken", "CreateUser"])
async def test_malformed_protobuf_is_an_invalid_argument(auth: Auth, method: str) -> None:
    user = await auth.services.user(role="admin")
    call: Any = auth.services.channel("auth").unary_unary(f"/netra.auth.v1.AuthService/{method}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\x0a\xff", metadata=user.bearer)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert status.from_rpc(caught.value).code == "INVALID_PAYLOAD"


async def test_a_user_is_told_who_they_are(auth: Auth) -> None:
    user: User = await auth.services.user(role="readonly")
    answer = await auth.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=user.bearer)
    assert (answer.principal.user_id, answer.email) == (user.user_id, user.email)
    assert "runs:read" in answer.permissions
    assert "runs:write" not in answer.permissions
