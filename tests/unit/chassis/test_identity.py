"""Tokens are believed only when every part of them is what it must be."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import identity, trust
from netra import errors, ids
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2

KEY = Ed25519PrivateKey.generate()
STRANGER = Ed25519PrivateKey.generate()
CONTEXT_KEY = Ed25519PrivateKey.generate()


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


async def _trust() -> trust.Trust:
    known = trust.Trust()
    keys = [
        auth_pb2.Key(kid="k1", public_key=_raw(KEY), issuer="auth"),
        auth_pb2.Key(kid="c1", public_key=_raw(CONTEXT_KEY), issuer="context"),
    ]
    grants = [
        auth_pb2.Grant(role="user", tier="free", permissions=["runs:read", "runs:write"]),
        auth_pb2.Grant(role="readonly", tier="free", permissions=["runs:read"]),
    ]
    await known.apply(auth_pb2.WatchTrustResponse(keys=keys, policy=auth_pb2.Policy(version=1, grants=grants)))
    return known


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": "netra", "aud": "netra", "sub": ids.uuid7(), "sid": ids.uuid7(), "tid": ids.uuid7(), "jti": ids.uuid7(),
        "roles": ["user"], "tier": "free", "ver": 1, "iat": now, "nbf": now, "exp": now + 600,
    }  # fmt: skip
    claims.update(changes)
    return {name: value for name, value in claims.items() if value is not None}


def _token(claims: dict[str, Any] | None = None, *, key: Ed25519PrivateKey = KEY, **header: Any) -> str:
    headers = {"kid": "k1", "typ": "at+jwt", **header}
    return jwt.encode(_claims() if claims is None else claims, key, algorithm="EdDSA", headers=headers)


def _unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    return ".".join([*parts, ""])


def _hmac_with_public_key() -> str:
    signed = jwt.encode(_claims(), b"0" * 32, algorithm="HS256", headers={"kid": "k1", "typ": "at+jwt"})
    return signed


NOW = int(time.time())
HOSTILE: dict[str, Callable[[], str]] = {
    "not a token": lambda: "nonsense",
    "empty parts": lambda: "..",
    "no signature, alg none": lambda: _unsigned({"alg": "none", "kid": "k1", "typ": "at+jwt"}, _claims()),
    "alg EdDSA, no signature": lambda: _unsigned({"alg": "EdDSA", "kid": "k1", "typ": "at+jwt"}, _claims()),
    "symmetric algorithm": _hmac_with_public_key,
    "signed by a stranger": lambda: _token(key=STRANGER),
    "signed by the context service": lambda: _token(key=CONTEXT_KEY, kid="c1"),
    "unknown key id": lambda: _token(kid="k2"),
    "path as key id": lambda: _token(kid="../../etc/passwd"),
    "no key id": lambda: jwt.encode(_claims(), KEY, algorithm="EdDSA", headers={"typ": "at+jwt"}),
    "plain typ": lambda: _token(typ="JWT"),
    "typ of a service": lambda: _token(typ="svc+jwt"),
    "typ of a context": lambda: _token(typ="ctx+jwt"),
    "crit": lambda: _token(crit=["b64"]),
    "jku": lambda: _token(jku="https://attacker.example/keys"),
    "jwk": lambda: _token(jwk={"kty": "OKP"}),
    "x5u": lambda: _token(x5u="https://attacker.example/cert"),
    "other issuer": lambda: _token(_claims(iss="netra.attacker")),
    "issuer prefix": lambda: _token(_claims(iss="netra ")),
    "other audience": lambda: _token(_claims(aud="other")),
    "list of audiences": lambda: _token(_claims(aud=["netra", "other"])),
    "no audience": lambda: _token(_claims(aud=None)),
    "no subject": lambda: _token(_claims(sub=None)),
    "no session": lambda: _token(_claims(sid=None)),
    "no id": lambda: _token(_claims(jti=None)),
    "no expiry": lambda: _token(_claims(exp=None)),
    "extra claim": lambda: _token(_claims(admin=True)),
    "expired": lambda: _token(_claims(iat=NOW - 700, nbf=NOW - 700, exp=NOW - 100)),
    "not yet valid": lambda: _token(_claims(nbf=NOW + 300)),
    "issued in the future": lambda: _token(_claims(iat=NOW + 300)),
    "fractional expiry": lambda: _token(_claims(exp=NOW + 600.5)),
    "expiry as text": lambda: _token(_claims(exp=str(NOW + 600))),
    "lives too long": lambda: _token(_claims(exp=NOW + 100_000)),
    "ends before it begins": lambda: _token(_claims(iat=NOW, exp=NOW)),
    "subject is no id": lambda: _token(_claims(sub="admin")),
    "subject in capitals": lambda: _token(_claims(sub=ids.uuid7().upper())),
    "subject is a number": lambda: _token(_claims(sub=1)),
    "roles as text": lambda: _token(_claims(roles="admin")),
    "no roles": lambda: _token(_claims(roles=[])),
    "unknown role": lambda: _token(_claims(roles=["root"])),
    "unknown tier": lambda: _token(_claims(tier="platinum")),
    "tier in a list": lambda: _token(_claims(tier=["free"])),
    "version as boolean": lambda: _token(_claims(ver=True)),
    "too long": lambda: _token(_claims(jti="x" * 9000)),
    "altered payload": lambda: _altered(_token()),
}


def _altered(token: str) -> str:
    header, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    claims["roles"] = ["admin"]
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return ".".join([header, changed, signature])


async def test_a_good_token_names_its_user() -> None:
    claims = _claims()
    principal = await identity.Verifier(await _trust()).principal(_token(claims))
    assert principal.user_id == claims["sub"]
    assert principal.roles == ("user",)


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_token_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = await _trust()

    async def at_once(issuer: str, kid: str, patience_s: float = 0.0) -> Any:
        return known.key(issuer, kid)

    monkeypatch.setattr(known, "awaited_key", at_once)
    with pytest.raises(errors.Unauthenticated):
        await identity.Verifier(known).principal(HOSTILE[name]())


async def test_a_revoked_session_is_refused_even_when_its_token_was_verified_before() -> None:
    known = await _trust()
    verifier, claims = identity.Verifier(known), _claims()
    token = _token(claims)
    await verifier.principal(token)
    await known.apply(auth_pb2.WatchTrustResponse(revocations=[auth_pb2.Revocation(session_id=claims["sid"])]))
    with pytest.raises(errors.Unauthenticated):
        await verifier.principal(token)


async def test_a_token_of_a_user_is_no_service_token() -> None:
    with pytest.raises(errors.Unauthenticated):
        await identity.Verifier(await _trust()).service(_token())


class TestAdmission:
    """An access rule lets in exactly those it names."""

    async def _admit(self, rule: access_pb2.Rule, metadata: dict[str, str]) -> identity.Caller:
        return await identity.Authenticator(await _trust()).admit(rule, metadata)

    async def test_a_permission_admits_a_user_who_has_it(self) -> None:
        rule = access_pb2.Rule(permission="runs:write")
        caller = await self._admit(rule, {"authorization": f"Bearer {_token()}"})
        assert caller.user.tier == "free"

    @pytest.mark.parametrize(
        ("rule", "roles"),
        [
            (access_pb2.Rule(permission="runs:write"), ["readonly"]),
            (access_pb2.Rule(permission="users:write"), ["user"]),
            (access_pb2.Rule(services=["dispatcher"]), ["user"]),
            (access_pb2.Rule(), ["user"]),
        ],
    )
    async def test_everything_else_is_denied(self, rule: access_pb2.Rule, roles: list[str]) -> None:
        with pytest.raises(errors.PermissionDenied):
            await self._admit(rule, {"authorization": f"Bearer {_token(_claims(roles=roles))}"})

    @pytest.mark.parametrize("metadata", [{}, {"authorization": "Basic abc"}, {"x-user-id": ids.uuid7()}, {"authorization": "Bearer "}])
    async def test_without_a_token_nobody_is_let_in(self, metadata: dict[str, str]) -> None:
        with pytest.raises(errors.Unauthenticated):
            await self._admit(access_pb2.Rule(permission="runs:read"), metadata)

    async def test_a_service_is_admitted_by_name_only(self) -> None:
        token = identity.sign(KEY, "k1", identity.SERVICE, {"sub": "events"}, 600)
        metadata = {"authorization": f"Bearer {token}"}
        assert (await self._admit(access_pb2.Rule(services=["events"]), metadata)).service == "events"
        with pytest.raises(errors.PermissionDenied):
            await self._admit(access_pb2.Rule(services=["dispatcher"], permission="runs:read"), metadata)

    async def test_a_service_that_must_carry_a_context_is_refused_without_one(self) -> None:
        token = identity.sign(KEY, "k1", identity.SERVICE, {"sub": "dispatcher"}, 600)
        with pytest.raises(errors.Unauthenticated):
            await self._admit(access_pb2.Rule(services=["dispatcher"], context=True), {"authorization": f"Bearer {token}"})
