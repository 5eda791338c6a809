"""Tokens are believed only when every part of them is what it must be."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import identity, trust
from netra import errors, ids
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2
from tests.fixtures import forge
from tests.prove import hostile

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
        auth_pb2.Grant(role="user", tier="business", permissions=["runs:read", "agents:make"]),
        auth_pb2.Grant(role="user", tier="enterprise", permissions=["runs:read", "agents:make"]),
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
_HEADER = json.dumps({"alg": "EdDSA", "kid": "k1", "typ": "at+jwt"})
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
    "not yet valid": lambda: _token(_claims(nbf=int(time.time()) + 300)),
    "issued in the future": lambda: _token(_claims(iat=int(time.time()) + 300)),
    "fractional expiry": lambda: _token(_claims(exp=NOW + 600.5)),
    "expiry as text": lambda: _token(_claims(exp=str(NOW + 600))),
    "lives too long": lambda: _token(_claims(exp=NOW + 100_000)),
    "ends before it begins": lambda: _token(_claims(iat=NOW, exp=NOW)),
    "subject is no id": lambda: _token(_claims(sub="admin")),
    "subject is empty": lambda: _token(_claims(sub="")),
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
    "key id with a path": lambda: _token(kid="../../k1"),
    "key id in a list": lambda: _raw_token(json.dumps({"alg": "EdDSA", "kid": ["k1"], "typ": "at+jwt"}), json.dumps(_claims())),
    "key id twice": lambda: _raw_token('{"alg":"EdDSA","kid":"k9","kid":"k1","typ":"at+jwt"}', json.dumps(_claims())),
    "claim twice": lambda: _raw_token(_HEADER, json.dumps(_claims())[:-1] + ',"roles":["admin"]}'),
    "claims as a list": lambda: _raw_token(_HEADER, "[]"),
    "infinite expiry": lambda: _raw_token(_HEADER, json.dumps(_claims(exp=float("inf")))),
    "abyss": lambda: _raw_token(_HEADER, "[" * 5000),
    "not UTF-8": lambda: _raw_token(_HEADER, json.dumps(_claims(jti="é"), ensure_ascii=False).encode("latin-1")),
    "signature written in another way": lambda: _sibling(_token()),
    "padded": lambda: _token() + "==",
    "line feed at the end": lambda: _token() + "\n",
    "four parts": lambda: _token() + ".e30",
    "signature in standard base64": lambda: _token()[:-1] + "+",
    "one role twice": lambda: _token(_claims(roles=["user", "user"])),
    "token id is no id": lambda: _token(_claims(jti="1")),
    "version zero": lambda: _token(_claims(ver=0)),
    "not valid before its end": lambda: _token(_claims(nbf=NOW + 4, exp=NOW + 3)),
    "empty scope": lambda: _token(_claims(scope=[])),
    "scope as text": lambda: _token(_claims(scope="runs:read")),
    "scope of anything": lambda: _token(_claims(scope=["*"])),
    "permission twice in the scope": lambda: _token(_claims(scope=["runs:read", "runs:read"])),
    "says who acts": lambda: _token(_claims(act={"sub": "dispatcher"})),
    "on behalf": lambda: _token(_behalf(), typ="obo+jwt"),
    "on behalf, called access": lambda: _token(_behalf()),
}


def _behalf(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    return _claims(**{"scope": ["runs:read"], "act": {"sub": "dispatcher"}, "exp": now + 60, **changes})


def _raw_token(header: str, claims: str | bytes) -> str:
    """A token of these very bytes, with a signature that is good."""
    raw = claims if isinstance(claims, bytes) else claims.encode()
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header.encode(), raw))
    return (signed + b"." + base64.urlsafe_b64encode(KEY.sign(signed)).rstrip(b"=")).decode()


def _sibling(token: str) -> str:
    """The same bytes: of the last letter's six bits only two count."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    changed = token[:-1] + letters[letters.index(token[-1]) + 1]
    assert base64.urlsafe_b64decode(changed[-86:] + "==") == base64.urlsafe_b64decode(token[-86:] + "==")
    return changed


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


async def test_no_token_of_the_hostile_table_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = await _trust()
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    verifier = identity.Verifier(known)
    who = await verifier.principal(_token(_claims(sub=forged.who["sub"], tid=forged.who["tid"])))
    monkeypatch.setattr(identity, "_MAX_WAITING", 0)
    meant: dict[str, Callable[[str], Any]] = {
        identity.ACCESS: verifier.principal, identity.SERVICE: verifier.service,
        identity.CONTEXT: lambda token: verifier.context(token, "dispatcher"),
        identity.GRANT: lambda token: verifier.grant(token, who),
    }  # fmt: skip
    for typ, believe in meant.items():
        await believe(forged.token(typ))
    cases = hostile.table(forged)
    assert len({case.token for case in cases}) == len(cases) > 600
    believed = []
    for case in cases:
        with contextlib.suppress(errors.Unauthenticated):
            await meant[case.typ](case.token)
            believed.append(f"{case.typ}, {case.attack}: {case.name}")
    assert believed == []


def _at(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """It is this time, for us and for the library."""

    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(now, tz)

    monkeypatch.setattr(identity, "time", SimpleNamespace(time=lambda: float(now)))
    monkeypatch.setattr(jwt.api_jwt, "datetime", Now)


async def test_what_is_believed_is_what_the_library_believes_and_reads() -> None:
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    tokens = {
        **{typ: forged.token(typ) for typ in hostile.TYPES},
        # our own way of writing them, and another one
        identity.BEHALF: _token(_behalf(), typ="obo+jwt"),
        identity.ACCESS: identity.sign(KEY, "k1", identity.ACCESS, _claims(), 600),
        "spaced": _raw_token(_HEADER, json.dumps(_claims(), indent=1)),
    }
    verifier = identity.Verifier(await _trust())
    for name, token in tokens.items():
        typ = name if name in identity._CLAIMS else identity.ACCESS
        key = (CONTEXT_KEY if identity._SIGNER[typ] == "context" else KEY).public_key()
        read = jwt.decode(token, key, algorithms=["EdDSA"], audience="netra", issuer="netra", leeway=identity.LEEWAY_S)
        assert (await verifier._verify(token, (typ,))).claims == read


@pytest.mark.parametrize(
    ("changes", "believed"),
    [
        ({"iat": 5}, True),
        ({"iat": 6}, False),
        ({"nbf": 5}, True),
        ({"nbf": 6}, False),
        ({"iat": -600, "nbf": -600, "exp": -4}, True),
        ({"iat": -600, "nbf": -600, "exp": -5}, False),
    ],
)
async def test_clocks_may_differ_by_five_seconds(changes: dict[str, int], believed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _at(monkeypatch, NOW)
    times = {name: NOW + late for name, late in {"iat": 0, "nbf": 0, "exp": 600, **changes}.items()}
    verifier, token = identity.Verifier(await _trust()), _token(_claims(**times))
    with contextlib.nullcontext() if believed else pytest.raises(errors.Unauthenticated):
        await verifier.principal(token)


async def test_a_revoked_session_is_refused_even_when_its_token_was_verified_before() -> None:
    known = await _trust()
    verifier, claims = identity.Verifier(known), _claims()
    token = _token(claims)
    await verifier.principal(token)
    await known.apply(auth_pb2.WatchTrustResponse(revocations=[auth_pb2.Revocation(session_id=claims["sid"])]))
    with pytest.raises(errors.Unauthenticated):
        await verifier.principal(token)


async def test_a_grant_that_was_believed_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    verifier = identity.Verifier(await _trust())
    who, token = await verifier.principal(_token(_claims(sub=forged.who["sub"], tid=forged.who["tid"]))), forged.token(identity.GRANT)
    assert (await verifier.grant(token, who)).allows("read")
    _at(monkeypatch, time.time() + 600)
    with pytest.raises(errors.Unauthenticated, match="expired"):
        await verifier.grant(token, who)


async def test_a_grant_of_another_kind_of_thing_is_no_grant_of_a_thread() -> None:
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    verifier = identity.Verifier(await _trust())
    who = await verifier.principal(_token(_claims(sub=forged.who["sub"], tid=forged.who["tid"])))
    for kind in ("run", None):
        with pytest.raises(errors.Unauthenticated):
            await verifier.grant(forged.token(identity.GRANT, kind=kind), who)


async def test_a_token_of_a_user_is_no_service_token() -> None:
    with pytest.raises(errors.Unauthenticated):
        await identity.Verifier(await _trust()).service(_token())


async def test_a_token_that_was_believed_is_still_no_token_for_something_else() -> None:
    verifier, token = identity.Verifier(await _trust()), _token(_behalf(), typ="obo+jwt")
    who = await verifier.caller(token)
    assert isinstance(who, identity.Principal)
    assert (who.actor, who.scope) == ("dispatcher", frozenset({"runs:read"}))
    for other in (verifier.principal, verifier.service, lambda token: verifier.context(token, "dispatcher")):
        with pytest.raises(errors.Unauthenticated):
            await other(token)


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW + 100_000},
        {"scope": None},
        {"act": None},
        {"act": "dispatcher"},
        {"act": {"sub": "dispatcher", "act": {}}},
        {"act": {"sub": 1}},
    ],
)
async def test_a_token_on_behalf_of_a_user_is_short_narrow_and_says_who_acts(changes: dict[str, Any]) -> None:
    with pytest.raises(errors.Unauthenticated):
        await identity.Verifier(await _trust()).caller(_token(_behalf(**changes), typ="obo+jwt"))


@pytest.mark.parametrize("name", ["", "Dispatcher", "a b", "dispatcher\n", "x" * 33])
async def test_a_service_token_names_a_service(name: str) -> None:
    token = identity.sign(KEY, "k1", identity.SERVICE, {"sub": name}, 600)
    with pytest.raises(errors.Unauthenticated):
        await identity.Verifier(await _trust()).service(token)


async def test_a_key_that_was_withdrawn_takes_its_tokens_along(monkeypatch: pytest.MonkeyPatch) -> None:
    known = await _trust()
    verifier, token = identity.Verifier(known), _token()
    await verifier.principal(token)
    await known.apply(auth_pb2.WatchTrustResponse(keys=[auth_pb2.Key(kid="k2", public_key=_raw(STRANGER), issuer="auth")]))
    monkeypatch.setattr(identity, "_MAX_WAITING", 0)
    with pytest.raises(errors.Unauthenticated):
        await verifier.principal(token)


async def test_what_was_signed_here_is_believed_as_if_it_had_been_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    known = await _trust()
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    token, elsewhere, here = forged.token(identity.CONTEXT), identity.Verifier(known), identity.Verifier(known)
    strange = forged.token(identity.CONTEXT, None, STRANGER)
    read = await elsewhere.context(token, "dispatcher")
    here.believe(token, "c1", NOW + 600)
    for _ in range(2):
        assert await here.context(token, "dispatcher") == read
    # no more than if it had been verified: for no other service, as nothing else, and for no longer than its key
    for refused in (here.context(token, "events"), here.service(token), here.context(strange, "dispatcher")):
        with pytest.raises(errors.Unauthenticated):
            await refused
    monkeypatch.setattr(identity, "_MAX_WAITING", 0)
    await known.apply(auth_pb2.WatchTrustResponse(keys=[auth_pb2.Key(kid="k1", public_key=_raw(KEY), issuer="auth")]))
    with pytest.raises(errors.Unauthenticated):
        await here.context(token, "dispatcher")


async def test_what_was_signed_here_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = forge.Forge(forge.Key("k1", KEY), forge.Key("c1", CONTEXT_KEY), _claims())
    verifier, token = identity.Verifier(await _trust()), forged.token(identity.CONTEXT, iat=NOW - 600, nbf=NOW - 600, exp=NOW + 20)
    _at(monkeypatch, NOW + 10)
    verifier.believe(token, "c1", NOW + 20)
    await verifier.context(token, "dispatcher")
    _at(monkeypatch, NOW + 30)
    with pytest.raises(errors.Unauthenticated, match="expired"):
        await verifier.context(token, "dispatcher")


async def test_not_everybody_waits_for_a_key_that_nobody_knows() -> None:
    verifier, began = identity.Verifier(await _trust()), time.monotonic()

    async def ask() -> None:
        with pytest.raises(errors.Unauthenticated):
            await verifier.principal(_token(kid=ids.uuid7()))

    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(ask()) for _ in range(identity._MAX_WAITING)]
        await asyncio.sleep(0)
        await ask()
        assert time.monotonic() - began < 1.0
        assert not any(task.done() for task in waiting)


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

    async def test_a_scope_narrows_what_role_and_tier_allow(self) -> None:
        token = {"authorization": f"Bearer {_token(_claims(scope=['runs:read', 'users:write']))}"}
        caller = await self._admit(access_pb2.Rule(permission="runs:read"), token)
        assert caller.user.narrowed(frozenset({"runs:read", "runs:write"})) == {"runs:read"}
        for permission, reason in (("runs:write", "scope of your token"), ("users:write", "your role does not have")):
            with pytest.raises(errors.PermissionDenied, match=reason):
                await self._admit(access_pb2.Rule(permission=permission), token)

    async def test_a_denial_names_the_tiers_that_have_the_permission(self) -> None:
        with pytest.raises(errors.PermissionDenied) as caught:
            await self._admit(access_pb2.Rule(permission="agents:make"), {"authorization": f"Bearer {_token()}"})
        assert caught.value.details == {"permission": "agents:make", "tiers": "business,enterprise"}
        assert "business, enterprise do" in caught.value.message

    async def test_what_anybody_may_call_knows_the_service_that_proves_itself(self) -> None:
        rule = access_pb2.Rule(public=True)
        token = identity.sign(KEY, "k1", identity.SERVICE, {"sub": "gateway"}, 600)
        forged = identity.sign(STRANGER, "k1", identity.SERVICE, {"sub": "gateway"}, 600)
        assert (await self._admit(rule, {"authorization": f"Bearer {token}"})).service == "gateway"
        for other in (
            {},
            {"authorization": "Bearer nonsense"},
            {"authorization": f"Bearer {forged}"},
            {"authorization": f"Bearer {_token()}"},
        ):
            assert await self._admit(rule, other) == identity.Caller()

    async def test_with_certificates_a_service_token_counts_on_its_own_connection_only(self) -> None:
        rule = access_pb2.Rule(services=["events"])
        metadata = {"authorization": f"Bearer {identity.sign(KEY, 'k1', identity.SERVICE, {'sub': 'events'}, 600)}"}
        authenticator = identity.Authenticator(await _trust())
        assert (await authenticator.admit(rule, metadata, frozenset({"events", "events.netra"}))).service == "events"
        for peer in (frozenset({"gateway"}), frozenset[str]()):
            with pytest.raises(errors.Unauthenticated):
                await authenticator.admit(rule, metadata, peer)

    async def test_a_service_that_must_carry_a_context_is_refused_without_one(self) -> None:
        token = identity.sign(KEY, "k1", identity.SERVICE, {"sub": "dispatcher"}, 600)
        with pytest.raises(errors.Unauthenticated):
            await self._admit(access_pb2.Rule(services=["dispatcher"], context=True), {"authorization": f"Bearer {token}"})
