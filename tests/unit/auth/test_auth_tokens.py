"""Tokens that the verifier of every process accepts, and only those."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import identity, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.auth import keys, opaque, policy, tokens, users

USER = users.User(ids.UserId.new(), ids.TenantId.new(), ("user",), "free", 3)


async def _made() -> tuple[tokens.Tokens, identity.Verifier]:
    private_key = Ed25519PrivateKey.generate()
    known = trust.Trust()
    key = auth_pb2.Key(kid="k", public_key=private_key.public_key().public_bytes_raw(), issuer="auth")
    await known.apply(auth_pb2.WatchTrustResponse(keys=[key], policy=policy.default()))
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


async def test_a_scope_narrows_and_is_told() -> None:
    issue, verifier = await _made()
    issued = issue.for_user(USER, tokens.Session(ids.SessionId.new(), 600), scope=["runs:write", "runs:read", "runs:read"])
    assert issued.scope == ("runs:read", "runs:write")
    assert (await verifier.principal(issued.access_token)).scope == frozenset({"runs:read", "runs:write"})


@pytest.mark.parametrize("kind", [opaque.REFRESH, opaque.RESET])
def test_opaque_tokens_are_random_prefixed_and_stored_as_digests(kind: str) -> None:
    one, other = opaque.new(kind), opaque.new(kind)
    assert one != other
    assert re.fullmatch(kind + r"_[\w\-]{43}", one)
    assert opaque.looks_like(kind, one)
    assert not opaque.looks_like({opaque.REFRESH: opaque.RESET, opaque.RESET: opaque.REFRESH}[kind], one)
    assert len(opaque.digest(one)) == 32


def test_a_refresh_token_has_one_child_which_only_the_key_can_tell() -> None:
    family, parent = opaque.Family(b"k" * 32), opaque.new(opaque.REFRESH)
    child = family.child(parent)
    assert opaque.looks_like(opaque.REFRESH, child)
    assert opaque.Family(b"k" * 32).child(parent) == child
    assert len({child, family.child(child), family.child(opaque.new(opaque.REFRESH)), opaque.Family(b"l" * 32).child(parent)}) == 4


def test_marks_of_devices_differ_by_each_part_and_by_the_key() -> None:
    family, other = opaque.Family(b"k" * 32), opaque.Family(b"l" * 32)
    marks = [family.mark("a", "b"), family.mark("b", "a"), family.mark("ab"), family.mark("a", "b", ""), other.mark("a", "b")]
    assert len(set(marks)) == len(marks)
    assert family.mark("a", "b") == marks[0]


@pytest.mark.parametrize(
    "text", ["", "nrt_", "x" * 47, "nrt_" + "a" * 42, "nrt_" + "a" * 44, "nrt_" + "a" * 42 + "\n", "nrt_" + "\u0000" * 43]
)
def test_what_cannot_be_a_refresh_token_is_seen_without_a_database(text: str) -> None:
    assert not opaque.looks_like(opaque.REFRESH, text)
