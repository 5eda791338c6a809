"""Keys for programs and tokens on behalf of users: narrowed, shown once, ended at once."""

from __future__ import annotations

from datetime import timedelta

import jwt
import pytest
from google.protobuf.duration_pb2 import Duration

from chassis import channel
from netra import errors
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts, accounts, refused
from tests.fixtures.users import User

__all__ = ["accounts"]
SCOPES = ["runs:read", "runs:write"]


async def _create(
    accounts: Accounts, user: User, scopes: list[str] | None = None, lifetime: timedelta | None = None, name: str = "nightly job"
) -> auth_pb2.CreateApiKeyResponse:
    request = auth_pb2.CreateApiKeyRequest(name=name, scopes=SCOPES if scopes is None else scopes)
    if lifetime is not None:
        request.lifetime.CopyFrom(_duration(lifetime))
    return await accounts.stub.CreateApiKey(request, metadata=user.bearer)


def _duration(lifetime: timedelta) -> Duration:
    found = Duration()
    found.FromTimedelta(lifetime)
    return found


async def _sign_in(accounts: Accounts, api_key: str) -> auth_pb2.Tokens:
    grant = auth_pb2.ApiKeyGrant(api_key=api_key)
    return (await accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(api_key=grant))).tokens


async def _exchange(
    accounts: Accounts, subject: str, scope: list[str], *, service: str = "dispatcher", secret: str = ""
) -> auth_pb2.Tokens:
    found = secret or (accounts.services.secrets / service / "service").read_text().strip()
    actor = auth_pb2.ClientCredentialsGrant(client_id=service, client_secret=found)
    grant = auth_pb2.ExchangeGrant(subject_token=subject, actor=actor, scope=scope)
    return (await accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(exchange=grant))).tokens


async def _permissions(accounts: Accounts, token: str) -> list[str]:
    answer = await accounts.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=channel.bearer(token))
    return list(answer.permissions)


async def test_a_key_signs_in_with_its_scopes_and_no_more(accounts: Accounts) -> None:
    user = await accounts.services.user()
    made = await _create(accounts, user, [*SCOPES, "session:read"])
    tokens = await _sign_in(accounts, made.api_key)
    assert (tokens.user_id, tokens.refresh_token, list(tokens.scope)) == (user.user_id, "", [*SCOPES, "session:read"])
    assert await _permissions(accounts, tokens.access_token) == [*SCOPES, "session:read"]
    denied = await refused(accounts.stub.ListApiKeys(auth_pb2.ListApiKeysRequest(), metadata=channel.bearer(tokens.access_token)))
    assert denied.details["permission"] == "api_keys:read"


async def test_the_secret_is_shown_once_and_stored_nowhere(accounts: Accounts) -> None:
    user = await accounts.services.user()
    made = await _create(accounts, user)
    await _sign_in(accounts, made.api_key)
    listed = (await accounts.stub.ListApiKeys(auth_pb2.ListApiKeysRequest(), metadata=user.bearer)).keys
    assert [(key.key_id, key.name, key.prefix, list(key.scopes)) for key in listed] == [
        (made.key.key_id, "nightly job", made.api_key[:12], SCOPES)
    ]
    assert listed[0].HasField("last_used_at")
    assert listed[0].expires_at.ToDatetime() - listed[0].created_at.ToDatetime() == timedelta(days=90)
    # all that is not shown again: it may have an underscore anywhere, and what is behind its last one be next to nothing
    secret = made.api_key[12:]
    assert len(secret) > 20
    stored = "SELECT count(*) FROM auth.api_keys AS k WHERE strpos(k::text, $1) > 0"
    assert await accounts.value(stored, secret) == 0
    assert await accounts.value("SELECT count(*) FROM auth.audit AS a WHERE strpos(a::text, $1) > 0", secret) == 0
    assert await accounts.value(stored, made.api_key[:12]) == 1


async def test_a_revoked_key_and_its_tokens_end_at_once(accounts: Accounts) -> None:
    user = await accounts.services.user()
    made, kept = await _create(accounts, user), await _create(accounts, user)
    tokens = await _sign_in(accounts, made.api_key)
    assert (await accounts.verified(tokens.access_token)).valid
    await accounts.stub.RevokeApiKey(auth_pb2.RevokeApiKeyRequest(key_id=made.key.key_id), metadata=user.bearer)
    assert not (await accounts.verified(tokens.access_token)).valid
    assert isinstance(await refused(_sign_in(accounts, made.api_key)), errors.Unauthenticated)
    assert (await _sign_in(accounts, kept.api_key)).user_id == user.user_id
    listed = (await accounts.stub.ListApiKeys(auth_pb2.ListApiKeysRequest(), metadata=user.bearer)).keys
    assert [key.key_id for key in listed] == [kept.key.key_id]


async def test_a_key_is_its_users_alone(accounts: Accounts) -> None:
    user, other = await accounts.services.user(), await accounts.services.user()
    made = await _create(accounts, user)
    assert not (await accounts.stub.ListApiKeys(auth_pb2.ListApiKeysRequest(), metadata=other.bearer)).keys
    foreign = accounts.stub.RevokeApiKey(auth_pb2.RevokeApiKeyRequest(key_id=made.key.key_id), metadata=other.bearer)
    assert isinstance(await refused(foreign), errors.NotFound)
    assert (await _sign_in(accounts, made.api_key)).user_id == user.user_id


async def test_nobody_gives_a_key_more_than_they_have(accounts: Accounts) -> None:
    reader = await accounts.services.user(role="readonly")
    denied = await refused(_create(accounts, reader, ["runs:write"]))
    assert isinstance(denied, errors.PermissionDenied)
    user = await accounts.services.user()
    narrow = await _sign_in(accounts, (await _create(accounts, user, ["api_keys:write", "runs:read"])).api_key)
    holder = User(user.user_id, user.email, user.password, narrow.access_token, "")
    assert isinstance(await refused(_create(accounts, holder, ["runs:write"])), errors.PermissionDenied)
    assert (await _create(accounts, holder, ["runs:read"])).api_key.startswith("nak_")


@pytest.mark.parametrize(
    ("name", "scopes", "lifetime", "field"),
    [
        ("", SCOPES, None, "name"),
        ("x" * 101, SCOPES, None, "name"),
        ("a\nb", SCOPES, None, "name"),
        ("job", [], None, "scopes"),
        ("job", ["runs:nothing"], None, "scopes"),
        ("job", SCOPES, timedelta(seconds=59), "lifetime"),
        ("job", SCOPES, timedelta(days=366), "lifetime"),
        ("job", SCOPES, timedelta(seconds=-1), "lifetime"),
    ],
)
async def test_a_key_that_cannot_be(accounts: Accounts, name: str, scopes: list[str], lifetime: timedelta | None, field: str) -> None:
    user = await accounts.services.user()
    assert (await refused(_create(accounts, user, scopes, lifetime, name))).details["field"] == field


async def test_a_key_ends_in_time_and_with_its_user(accounts: Accounts) -> None:
    user = await accounts.services.user()
    short, long = await _create(accounts, user, lifetime=timedelta(minutes=1)), await _create(accounts, user)
    async with accounts.database() as owner:
        await owner.execute("UPDATE auth.api_keys SET expires_at = now() WHERE key_id = $1", short.key.key_id)
    assert isinstance(await refused(_sign_in(accounts, short.api_key)), errors.Unauthenticated)
    await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user.user_id), metadata=await accounts.admin())
    assert isinstance(await refused(_sign_in(accounts, long.api_key)), errors.Unauthenticated)


@pytest.mark.parametrize(
    "change", [lambda key: key[:-1], lambda key: key[:-1] + "~", lambda key: key.swapcase(), lambda _: "", lambda _: "nak_"]
)
async def test_only_the_key_itself_works(accounts: Accounts, change: object) -> None:
    user = await accounts.services.user()
    made = await _create(accounts, user)
    assert callable(change)
    assert isinstance(await refused(_sign_in(accounts, change(made.api_key))), errors.Unauthenticated)


async def test_a_service_acts_for_a_user_with_less_and_for_a_minute(accounts: Accounts) -> None:
    user = await accounts.services.user()
    tokens = await _exchange(accounts, user.token, ["session:read", "runs:read"])
    claims = jwt.decode(tokens.access_token, options={"verify_signature": False})
    assert (claims["sub"], claims["act"], claims["scope"]) == (user.user_id, {"sub": "dispatcher"}, ["runs:read", "session:read"])
    assert claims["exp"] - claims["iat"] <= 60
    assert jwt.get_unverified_header(tokens.access_token)["typ"] == "obo+jwt"
    assert await _permissions(accounts, tokens.access_token) == ["runs:read", "session:read"]
    assert (f"service:dispatcher for user:{user.user_id}", "exchange", "ok") in await accounts.audited(user.user_id)


async def test_what_acts_for_a_user_is_not_passed_on_and_makes_no_keys(accounts: Accounts) -> None:
    user = await accounts.services.user()
    token = (await _exchange(accounts, user.token, ["api_keys:write", "runs:read"])).access_token
    assert isinstance(await refused(_exchange(accounts, token, ["runs:read"])), errors.Unauthenticated)
    holder = User(user.user_id, user.email, user.password, token, "")
    assert isinstance(await refused(_create(accounts, holder, ["runs:read"])), errors.PermissionDenied)


async def test_an_exchange_needs_a_service_a_user_and_a_scope_of_theirs(accounts: Accounts) -> None:
    user, reader = await accounts.services.user(), await accounts.services.user(role="readonly")
    assert isinstance(await refused(_exchange(accounts, user.token, SCOPES, secret="wrong")), errors.Unauthenticated)
    assert isinstance(await refused(_exchange(accounts, user.token[:-8] + "AAAAAAAA", SCOPES)), errors.Unauthenticated)
    (_, service_token), *_ = await accounts.services.service_token("dispatcher")
    assert isinstance(await refused(_exchange(accounts, service_token.removeprefix("Bearer "), SCOPES)), errors.Unauthenticated)
    assert isinstance(await refused(_exchange(accounts, reader.token, ["runs:write"])), errors.PermissionDenied)
    assert (await refused(_exchange(accounts, user.token, []))).details["field"] == "scope"
