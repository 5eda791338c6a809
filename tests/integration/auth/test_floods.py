"""However much is sent, the record stays small, and whoever has the real secret is let in."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from chassis import status
from netra.auth.v1 import auth_pb2
from services.auth import throttle
from tests.fixtures.accounts import Accounts, new_email, refused
from tests.fixtures.users import User

ELSEWHERE = "198.51.100.7"
_REFUSED = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome IN ('refused', 'throttled')"
Call = Callable[[Accounts, User], Awaitable[Callable[[str], Awaitable[Any]]]]


async def _refresh(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    return lambda junk: accounts.refresh(junk or user.refresh_token)


async def _api_key(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    key = await accounts.api_key(user, "runs:read")

    async def sign_in(junk: str) -> Any:
        grant = auth_pb2.ApiKeyGrant(api_key=junk or key)
        return await accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(api_key=grant))

    return sign_in


async def _client(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    secret = (accounts.services.secrets / "events" / "service").read_text().strip()

    async def sign_in(junk: str) -> Any:
        grant = auth_pb2.ClientCredentialsGrant(client_id="events", client_secret=junk or secret)
        return await accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(client_credentials=grant))

    return sign_in


async def _exchange(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    secret = (accounts.services.secrets / "events" / "service").read_text().strip()

    async def exchange(junk: str) -> Any:
        actor = auth_pb2.ClientCredentialsGrant(client_id="events", client_secret=junk or secret)
        grant = auth_pb2.ExchangeGrant(subject_token=user.token, actor=actor, scope=["runs:read"])
        return await accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(exchange=grant))

    return exchange


async def _reset(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    admin, wanted = await accounts.admin(), auth_pb2.CreateResetTokenRequest(user_id=user.user_id)

    async def reset(junk: str) -> Any:
        token = junk or (await accounts.stub.CreateResetToken(wanted, metadata=admin)).reset_token
        return await accounts.stub.ResetPassword(auth_pb2.ResetPasswordRequest(reset_token=token, new_password="another good password"))

    return reset


async def _login(accounts: Accounts, user: User) -> Callable[[str], Awaitable[Any]]:
    return lambda junk: accounts.login(user.email, junk or user.password)


@pytest.mark.parametrize("call", [_refresh, _api_key, _client, _exchange, _reset])
async def test_noise_from_a_place_does_not_keep_those_out_who_have_the_real_secret(accounts: Accounts, call: Call) -> None:
    use = await call(accounts, await accounts.services.user())
    codes = Counter([(await refused(use("junk"))).code for _ in range(70)])
    assert codes["UNAUTHENTICATED"] >= 60
    assert codes["RATE_LIMITED"] >= 5
    await use("")
    assert (await refused(use("junk"))).code == "RATE_LIMITED"


async def test_random_names_from_one_place_fill_no_record(accounts: Accounts) -> None:
    codes = Counter([(await refused(accounts.login_from(ELSEWHERE, new_email(), "a wrong password"))).code for _ in range(160)])
    assert codes["RATE_LIMITED"] >= 30
    # what was looked at, and that there was more, once in a minute
    assert await accounts.value(_REFUSED) <= codes["UNAUTHENTICATED"] + 2


async def test_one_name_from_many_places_fills_no_record(accounts: Accounts) -> None:
    email = new_email()
    codes = Counter([(await refused(accounts.login_from(f"198.51.100.{n}", email, "a wrong password"))).code for n in range(100)])
    assert codes["RATE_LIMITED"] >= 30
    assert await accounts.value(_REFUSED) <= codes["UNAUTHENTICATED"] + 2


async def test_wrong_keys_fill_no_record(accounts: Accounts) -> None:
    use = await _api_key(accounts, await accounts.services.user())
    codes = Counter([(await refused(use("junk"))).code for _ in range(100)])
    assert codes["RATE_LIMITED"] >= 30
    assert await accounts.value("SELECT count(*) FROM auth.audit WHERE action = 'api_key'") <= codes["UNAUTHENTICATED"]


async def test_a_refresh_token_that_is_brought_again_and_again_fills_no_record(accounts: Accounts) -> None:
    user = await accounts.services.user()
    await accounts.refresh((await accounts.refresh(user.refresh_token)).refresh_token)
    for _ in range(20):
        await refused(accounts.refresh(user.refresh_token))
    assert [action for _, action, _ in await accounts.audited(user.user_id)].count("end_session") == 1


@contextlib.asynccontextmanager
async def _strict(accounts: Accounts, monkeypatch: pytest.MonkeyPatch, **rates: int) -> AsyncIterator[Accounts]:
    """A replica that allows less."""
    make = throttle.Throttle
    monkeypatch.setattr(throttle, "Throttle", lambda counted, *_: make(counted, throttle.Rates(**rates)))
    async with accounts.replica() as replica:
        yield replica


async def _codes(use: Callable[[str], Awaitable[Any]], times: int) -> list[str]:
    found = []
    for _ in range(times):
        try:
            await use("")
            found.append("OK")
        except grpc.aio.AioRpcError as error:
            found.append(status.from_rpc(error).code)
    return found


@pytest.mark.parametrize("call", [_login, _refresh, _api_key, _client, _exchange, _reset])
async def test_each_place_has_so_many_calls_a_minute(accounts: Accounts, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    user = await accounts.services.user()
    async with _strict(accounts, monkeypatch, per_address=8) as replica:
        use = await call(replica, user)
        assert {(await refused(use("junk"))).code for _ in range(5)} == {"UNAUTHENTICATED"}
        codes = await _codes(use, 5)
        assert codes[-1] == "RATE_LIMITED"
        assert 0 < ((await refused(use(""))).retry_after_ms or 0) <= 60_000


@pytest.mark.parametrize("call", [_login, _refresh, _api_key, _client, _exchange, _reset])
async def test_each_account_session_or_service_has_so_many_successes_a_minute(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    user, other = await accounts.services.user(), await accounts.services.user()
    async with _strict(accounts, monkeypatch, per_account=4) as replica:
        use, others = await call(replica, user), await call(replica, other)
        codes = await _codes(use, 12)
        assert codes[:2] == ["OK"] * 2
        assert codes[-4:] == ["RATE_LIMITED"] * 4
        if call is not _client:
            await others("")


async def test_a_refresh_that_comes_too_early_loses_nothing(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    user = await accounts.services.user()
    async with _strict(accounts, monkeypatch, per_account=1) as replica:
        child = await replica.refresh(user.refresh_token)
        assert (await refused(replica.refresh(child.refresh_token))).code == "RATE_LIMITED"
    # asked for again in time, where it is not too early
    session_id = (await accounts.verified(user.token)).principal.session_id
    async with accounts.counting() as counted:
        await counted.give_back(*throttle.successes("refresh", session_id, 1).counted)
    assert (await accounts.refresh(child.refresh_token)).access_token


async def test_the_operator_sets_how_many_that_are(accounts: Accounts) -> None:
    user, other = await accounts.services.user(), await accounts.services.user()
    async with accounts.replica(calls_per_address=20, successes_per_account=12, sessions_per_user=2) as replica:
        tokens = [await replica.login(user.email, user.password) for _ in range(2)]
        assert [(await replica.verified(token)).valid for token in (user.token, tokens[0].access_token)] == [False, True]
        # more than enough: some come back while a slow machine works
        codes = await _codes(lambda _: replica.login(user.email, user.password), 30)
        assert codes[0] == "OK"
        assert "RATE_LIMITED" in codes
        assert "RATE_LIMITED" in await _codes(lambda _: replica.login(other.email, other.password), 40)
