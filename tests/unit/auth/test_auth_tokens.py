"""Tokens that the verifier of every process accepts, and only those."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import identity, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.auth import keys, policy, tokens, users

USER = users.User(ids.UserId.new(), ids.TenantId.new(), ("user",), "free", 3)


async def _made() -> tuple[tokens.Tokens, identity.Verifier]:
    private_key = Ed25519PrivateKey.generate()
    known = trust.Trust()
    key = auth_pb2.Key(kid="k", public_key=private_key.public_key().public_bytes_raw(), issuer="auth")
    await known.apply(auth_pb2.WatchTrustResponse(keys=[key], policy=policy.current()))
    signing = cast(Any, SimpleNamespace(signer=keys.Signer("k", private_key)))
    verifier = identity.Verifier(known)
    return tokens.Tokens(signing, verifier, 600, 3600), verifier


async def test_access_tokens_name_user_session_roles_and_tier() -> None:
    issue, verifier = await _made()
    session = tokens.Session(ids.SessionId.new(), 10_000)
    issued = issue.for_user(USER, session, "nrt_x")
    principal = await verifier.principal(issued.access_token)
    assert (principal.user_id, principal.session_id, principal.roles, principal.tier) == (
        USER.user_id,
        session.session_id,
        ("user",),
        "free",
    )
    assert (issued.expires_in_s, issued.refresh_token, issued.user_id) == (600, "nrt_x", USER.user_id)
    assert await issue.inspect(issued.access_token) == principal


async def test_an_access_token_does_not_outlive_its_session() -> None:
    issue, _ = await _made()
    assert issue.for_user(USER, tokens.Session(ids.SessionId.new(), 7), "").expires_in_s == 7
    with pytest.raises(errors.Unauthenticated):
        issue.for_user(USER, tokens.Session(ids.SessionId.new(), 0), "")


async def test_service_tokens_are_not_access_tokens() -> None:
    issue, verifier = await _made()
    issued = issue.for_service("gateway")
    assert await verifier.service(issued.access_token) == "gateway"
    assert await issue.inspect(issued.access_token) is None
    assert not issued.refresh_token


async def test_junk_is_nobody() -> None:
    issue, _ = await _made()
    assert await issue.inspect("junk") is None


def test_refresh_tokens_are_random_prefixed_and_stored_as_digests() -> None:
    one, other = tokens.new_refresh(), tokens.new_refresh()
    assert one != other
    assert re.fullmatch(r"nrt_[\w\-]{43}", one)
    assert tokens.looks_like_refresh(one)
    assert len(tokens.digest(one)) == 32


@pytest.mark.parametrize(
    "text", ["", "nrt_", "x" * 47, "nrt_" + "a" * 42, "nrt_" + "a" * 44, "nrt_" + "a" * 42 + "\n", "nrt_" + "\u0000" * 43]
)
def test_what_cannot_be_a_refresh_token_is_seen_without_a_database(text: str) -> None:
    assert not tokens.looks_like_refresh(text)
