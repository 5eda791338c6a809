"""The table of hostile tokens: what attackers send, by class of attack; pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import identity
from netra import ids
from tests.fixtures.forge import Forge, encoded

ACCESS, SERVICE, CONTEXT, BEHALF, GRANT = identity.ACCESS, identity.SERVICE, identity.CONTEXT, identity.BEHALF, identity.GRANT
# what a token can want to be taken for
TYPES = (ACCESS, SERVICE, CONTEXT, GRANT)
_ORDER = 2**252 + 27742317777372353535851937790883648493
_STRANGER = Ed25519PrivateKey.generate()


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile token; `typ` is what it wants to be taken for."""

    attack: str
    name: str
    typ: str
    token: str


Made = Iterator[tuple[str, str]]


def table(forge: Forge) -> list[Case]:
    """All cases. Those that are wrong for every type of token are there once for each."""
    # first those that expire soon
    found = [Case(attack, name, ACCESS, token) for attack, make in _OF_USERS.items() for name, token in make(forge)]
    found += [Case(attack, name, typ, token) for typ in TYPES for attack, make in _EVERY.items() for name, token in make(forge, typ)]
    found += [Case("claims of services", name, SERVICE, token) for name, token in _of_services(forge)]
    found += [Case("claims of contexts", name, CONTEXT, token) for name, token in _of_contexts(forge)]
    found += [Case("claims of grants", name, GRANT, token) for name, token in _of_grants(forge)]
    return found


# wrong in every type of token


def _algorithms(forge: Forge, typ: str) -> Made:
    claims = forge.claims(typ)
    for alg in ("none", "None", "NONE", "nOnE", ""):
        parts = [encoded(json.dumps(part).encode()) for part in (forge.header(typ, alg=alg), claims)]
        yield f"alg {alg!r}, no signature", ".".join([*parts, ""])
        yield f"alg {alg!r}, a good signature", forge.token(typ, {"alg": alg})
    for alg in ("eddsa", "EDDSA", "EdDSA ", "Ed25519", "Ed448", "ES256K"):
        yield f"alg {alg!r}, a good signature", forge.token(typ, {"alg": alg})
    yield "alg is missing", forge.signed(typ, {"kid": forge.key(typ).kid, "typ": typ}, claims)
    yield "alg in a list", forge.token(typ, {"alg": ["EdDSA"]})
    public = forge.key(typ).private.public_key()
    raw = public.public_bytes_raw()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for name, secret in (("raw", raw), ("PEM", pem), ("base64", encoded(raw).encode()), ("hex", raw.hex().encode()), ("no", b"")):
        yield f"HS256 with the {name} public key", _hmac(forge.header(typ, alg="HS256"), claims, secret, hashlib.sha256)
    yield "EdDSA with an HMAC-SHA512 of the public key", _hmac(forge.header(typ), claims, raw, hashlib.sha512)
    yield "RS256 with a key of their own", _rsa(forge.header(typ, alg="RS256"), claims)
    yield "ES256 with a key of their own", _ecdsa(forge.header(typ, alg="ES256"), claims)


def _signing_input(header: Any, claims: Any) -> str:
    return ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))


def _hmac(header: Any, claims: Any, secret: bytes, kind: Callable[..., Any]) -> str:
    text = _signing_input(header, claims)
    return f"{text}.{encoded(hmac.new(secret, text.encode(), kind).digest())}"


def _rsa(header: Any, claims: Any) -> str:
    text = _signing_input(header, claims)
    signature = rsa.generate_private_key(65537, 2048).sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{text}.{encoded(signature)}"


def _ecdsa(header: Any, claims: Any) -> str:
    text = _signing_input(header, claims)
    return f"{text}.{encoded(ec.generate_private_key(ec.SECP256R1()).sign(text.encode(), ec.ECDSA(hashes.SHA256())))}"


def _header_keys(forge: Forge, typ: str) -> Made:
    own = {"kty": "OKP", "crv": "Ed25519", "x": encoded(_STRANGER.public_key().public_bytes_raw())}
    extra: dict[str, Any] = {
        "jwk": own, "jku": "https://attacker.example/keys", "x5u": "https://attacker.example/cert", "x5c": ["MIIB"], "x5t": "AAAA",
        "crit": ["exp"], "cty": "JWT", "zip": "DEF", "enc": "A256GCM", "b64": False, "nonce": "1", "sub": "admin", "iss": "netra",
    }  # fmt: skip
    for name, value in extra.items():
        yield f"header key {name}", forge.token(typ, {name: value})
    yield "empty crit", forge.token(typ, {"crit": []})
    yield "crit with b64 off", forge.token(typ, {"crit": ["b64"], "b64": False})
    yield "jwk, signed with it", forge.token(typ, {"jwk": own}, _STRANGER)
    yield "jwk in place of kid", forge.token(typ, {"jwk": own, "kid": None}, _STRANGER)
    claims = forge.claims(typ)
    kid = forge.key(typ).kid
    yield "alg twice", forge.signed(typ, f'{{"alg":"none","alg":"EdDSA","kid":"{kid}","typ":"{typ}"}}'.encode(), claims)
    yield "kid twice", forge.signed(typ, f'{{"alg":"EdDSA","kid":"x","kid":"{kid}","typ":"{typ}"}}'.encode(), claims)
    yield "kid twice, once escaped", forge.signed(typ, f'{{"alg":"EdDSA","\\u006bid":"x","kid":"{kid}","typ":"{typ}"}}'.encode(), claims)
    yield "header is a list", forge.signed(typ, [forge.header(typ)], claims)
    yield "header is text", forge.signed(typ, "EdDSA", claims)
    yield "header is null", forge.signed(typ, b"null", claims)
    yield "header is not JSON", forge.signed(typ, b"{alg:EdDSA}", claims)
    yield "header begins with a byte order mark", forge.signed(typ, b"\xef\xbb\xbf" + json.dumps(forge.header(typ)).encode(), claims)


def _types(forge: Forge, typ: str) -> Made:
    for name in ("JWT", "jwt", typ.upper(), f"application/{typ}", f"{typ} ", "", "id+jwt", "dpop+jwt"):
        yield f"typ {name!r}", forge.token(typ, {"typ": name})
    yield "typ is missing", forge.token(typ, {"typ": None})
    yield "typ in a list", forge.token(typ, {"typ": [typ]})


def _key_ids(forge: Forge, typ: str) -> Made:
    good = forge.key(typ).kid
    strange = {
        "empty": "", "a path": f"../../{good}", "a file": "/dev/null", "SQL": f"{good}' OR '1'='1", "a NUL": f"{good}\0",
        "a line feed": f"{good}\n", "a URL": "https://attacker.example/key", "upper case": good.upper() + "X", "a shell": "$(id)",
        "very long": "k" * 3000,
    }  # fmt: skip
    for name, kid in strange.items():
        yield f"kid: {name}", forge.token(typ, {"kid": kid})
    yield "kid: unknown", forge.token(typ, {"kid": ids.uuid7()})
    yield "kid: a number", forge.token(typ, {"kid": 1})
    yield "kid: a list", forge.token(typ, {"kid": [good]})
    yield "kid: none", forge.token(typ, {"kid": None})
    other = forge.auth if typ in (CONTEXT, GRANT) else forge.context
    yield "kid and key of another signer", forge.token(typ, {"kid": other.kid}, other.private)
    yield "key of another signer", forge.token(typ, None, other.private)


def _signatures(forge: Forge, typ: str) -> Made:
    good = forge.token(typ)
    head, claims, signature = good.split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    yield "no signature", f"{head}.{claims}."
    yield "no third part", f"{head}.{claims}"
    yield "half a signature", f"{head}.{claims}.{encoded(raw[:32])}"
    yield "a signature twice", f"{head}.{claims}.{encoded(raw + raw)}"
    yield "one bit of the signature", f"{head}.{claims}.{encoded(bytes([raw[0] ^ 1]) + raw[1:])}"
    yield "zeros for a signature", f"{head}.{claims}.{encoded(bytes(64))}"
    yield "random signature", f"{head}.{claims}.{encoded(secrets.token_bytes(64))}"
    yield "the signature of another token", f"{head}.{claims}.{forge.token(typ).split('.')[2]}"
    raised = (int.from_bytes(raw[32:], "little") + _ORDER).to_bytes(32, "little")
    yield "S plus the order of the group", f"{head}.{claims}.{encoded(raw[:32] + raised)}"
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    yield "bits that do not count", good[:-1] + letters[letters.index(good[-1]) + 1]
    yield "padded signature", good + "=="
    yield "padded header", f"{head}==.{claims}.{signature}"
    yield "fourth part", f"{good}.{signature}"
    yield "dot in front", f".{good}"
    yield "dot behind", f"{good}."
    yield "signed by a stranger", forge.token(typ, None, _STRANGER)
    yield "five parts, as encrypted", f"{head}.{claims}.{signature}.{claims}.{signature}"


def _payloads(forge: Forge, typ: str) -> Made:
    head, _, signature = forge.token(typ).split(".")
    yield "claims of another token", f"{head}.{encoded(json.dumps(forge.claims(typ)).encode())}.{signature}"
    text = json.dumps(forge.claims(typ))
    header = forge.header(typ)
    raw: dict[str, bytes] = {
        "claims are a list": f"[{text}]".encode(), "claims are text": json.dumps(text).encode(), "claims are null": b"null",
        "claims are empty": b"{}", "no bytes": b"", "not JSON": text.replace('"', "'").encode(), "something behind": f"{text}x".encode(),
        "two objects": f"{text}{text}".encode(), "subject twice": f'{text[:-1]},"sub":"{ids.uuid7()}"}}'.encode(),
        "subject twice, once escaped": f'{text[:-1]},"\\u0073ub":"{ids.uuid7()}"}}'.encode(),
        "expiry twice": f'{{"exp":9999999999,{text[1:]}'.encode(), "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"), "no UTF-8": text.encode()[:-1] + b',"x":"\xff"}', "abyss of lists": b"[" * 1500 + b"]" * 1500,
        "abyss of objects": b'{"a":' * 600 + b"1" + b"}" * 600, "NaN": f'{text[:-1]},"x":NaN}}'.encode(),
        "comment": f"/**/{text}".encode(), "number of 5000 digits": f'{text[:-1]},"x":{"9" * 5000}}}'.encode(),
    }  # fmt: skip
    for name, claims in raw.items():
        yield name, forge.signed(typ, header, claims)


def _issuers(forge: Forge, typ: str) -> Made:
    for value in ("netr", "netra.attacker.example", "netra/", "Netra", " netra", "netra\0", "https://netra", "auth", ""):
        yield f"issuer {value!r}", forge.token(typ, iss=value)
    yield "issuer in a list", forge.token(typ, iss=["netra"])
    yield "issuer is a number", forge.token(typ, iss=1)
    yield "no issuer", forge.token(typ, iss=None)
    for value in ("other", "netra-staging", "netr", "Netra", "*", ""):
        yield f"audience {value!r}", forge.token(typ, aud=value)
    yield "audience in a list", forge.token(typ, aud=["netra"])
    yield "audience among others", forge.token(typ, aud=["other", "netra"])
    yield "no audience", forge.token(typ, aud=None)


def _times(forge: Forge, typ: str) -> Made:
    now = int(time.time())
    wrong: dict[str, dict[str, Any]] = {
        "expired": {"iat": now - 120, "nbf": now - 120, "exp": now - 60},
        "expired a moment ago": {"iat": now - 60, "nbf": now - 60, "exp": now - 7},
        "expired long ago": {"iat": 0, "nbf": 0, "exp": 60}, "before 1970": {"iat": -60, "nbf": -60, "exp": -1},
        "not valid yet": {"nbf": now + 600}, "issued in the future": {"iat": now + 600, "exp": now + 900}, "lives for ever": {"exp": 2**53},
        "lives too long": {"exp": now + 3700}, "ends beyond 64 bits": {"exp": 2**70}, "ends when it begins": {"exp": now, "iat": now},
        "ends before it begins": {"iat": now + 4, "exp": now + 3}, "no expiry": {"exp": None}, "no beginning": {"iat": None},
        "no not-before": {"nbf": None}, "expiry as text": {"exp": str(now + 60)}, "expiry with a fraction": {"exp": now + 60.5},
        "expiry as a whole float": {"exp": float(now + 60)}, "expiry is true": {"exp": True}, "expiry in a list": {"exp": [now + 60]},
        "beginning as text": {"iat": str(now)}, "beginning with a fraction": {"iat": now - 0.5}, "not-before as text": {"nbf": str(now)},
        "not-before is false": {"nbf": False},
    }  # fmt: skip
    for name, changes in wrong.items():
        yield name, forge.token(typ, **changes)


def _sizes(forge: Forge, typ: str) -> Made:
    yield "a claim more", forge.token(typ, admin=True)
    yield "a claim more, empty", forge.token(typ, **{"": ""})
    yield "id of the token is none", forge.token(typ, jti="1")
    yield "no id of the token", forge.token(typ, jti=None)
    yield "id of the token is a number", forge.token(typ, jti=1)
    yield "17,000 bytes", forge.token(typ, jti="x" * 12_500)


_EVERY: dict[str, Callable[[Forge, str], Made]] = {
    "algorithm": _algorithms, "header keys": _header_keys, "typ": _types, "key id": _key_ids, "signature": _signatures,
    "payload": _payloads, "issuer and audience": _issuers, "times": _times, "size and shape": _sizes,
}  # fmt: skip


# wrong in a token of a user


def _claims_of_users(forge: Forge) -> Made:
    user = ids.uuid7()
    values: dict[str, list[Any]] = {
        "sub": ["", "admin", user.upper(), f"{{{user}}}", f"urn:uuid:{user}", user.replace("-", ""), f" {user}", 1, [user], {"id": user}],
        "sid": ["", "1", [user]],
        "tid": ["", "1", {"id": user}],
        "roles": ["admin", [], ["root"], ["Admin"], ["admin "], [["admin"]], {"admin": True}, ["user", "user"], [1], ["*"]],
        "tier": ["", "platinum", "Internal", "mid", ["internal"], 1],
        "ver": [0, -1, True, 1.5, "1", [1]],
        "scope": [[], "session:read", ["*"], ["session:read", "session:read"], [1], {"session:read": True}, ["Session:Read"], ["x:y"] * 65],
    }
    for name, wrong in values.items():
        for value in wrong:
            yield f"{name} {str(value)[:40]!r}", forge.token(ACCESS, **{name: value})
        if name != "scope":
            yield f"no {name}", forge.token(ACCESS, **{name: None})
    for name, value in {
        "permissions": ["users:write"], "is_admin": True, "cnf": {"jkt": "x"}, "client_id": "x", "ctx": {}, "act": {"sub": "dispatcher"},
    }.items():  # fmt: skip
        yield f"a claim more: {name}", forge.token(ACCESS, **{name: value})


def _confused(forge: Forge) -> Made:
    for typ in (SERVICE, CONTEXT, GRANT):
        yield f"a good {typ}", forge.token(typ)
        yield f"claims of {typ} under {ACCESS}", forge.signed(ACCESS, forge.header(ACCESS), forge.claims(typ))
        yield f"claims of {ACCESS} under {typ}", forge.signed(typ, forge.header(typ), forge.claims(ACCESS))
    yield "on behalf, called access", forge.signed(ACCESS, forge.header(ACCESS), forge.claims(BEHALF))
    behalf: dict[str, dict[str, Any]] = {
        "ten minutes": {"exp": int(time.time()) + 600}, "nobody acts": {"act": None}, "no scope": {"scope": None},
        "empty scope": {"scope": []}, "who acts is text": {"act": "dispatcher"},
        "who acts is a user": {"act": {"sub": ids.uuid7()}}, "a chain": {"act": {"sub": "a", "act": {"sub": "b"}}},
    }  # fmt: skip
    for name, changes in behalf.items():
        yield f"on behalf: {name}", forge.token(BEHALF, **changes)
    yield "like a refresh token", f"nrt_{secrets.token_urlsafe(32)}"
    yield "like a reset token", f"nrs_{secrets.token_urlsafe(32)}"
    yield "like an API key", f"nak_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"
    yield "an API key of the wrong form", "nak_x"
    yield "PASETO", f"v4.public.{encoded(json.dumps(forge.claims(ACCESS)).encode())}"


def _nonsense(forge: Forge) -> Made:
    good = forge.token(ACCESS)
    for text in (
        "null",
        "undefined",
        "[object Object]",
        "0",
        "-",
        ".",
        "..",
        "...",
        "a.b.c",
        "{}",
        f'"{good}"',
        f"<{good}>",
        "' OR 1=1 --",
    ):
        yield f"text {text[:12]!r}", text
    yield "two tokens", f"{good},{good}"
    yield "two tokens with a space", f"{good} {good}"
    yield "the scheme twice", f"Bearer {good}"
    yield "in capitals", good.upper()
    yield "a letter that looks like another", good.replace("e", "\u0435", 1)
    yield "percent-encoded", good.replace(".", "%2E")
    yield "a line feed behind", f"{good}\n"
    yield "a NUL behind", f"{good}\0"


_OF_USERS: dict[str, Callable[[Forge], Made]] = {"type confusion": _confused, "claims of users": _claims_of_users, "nonsense": _nonsense}


# wrong in a token of a service, of an execution context, of a grant


def _of_services(forge: Forge) -> Made:
    for name in ("", "Dispatcher", "dispatcher ", "dispatcher\n", "dispatcher,gateway", "*", "x" * 40, "../dispatcher"):
        yield f"service {name[:20]!r}", forge.token(SERVICE, sub=name)
    yield "no service", forge.token(SERVICE, sub=None)
    yield "service in a list", forge.token(SERVICE, sub=["dispatcher"])
    yield "a good context token", forge.token(CONTEXT)
    yield "claims of a user", forge.signed(SERVICE, forge.header(SERVICE), forge.claims(ACCESS))
    yield "roles beside", forge.token(SERVICE, roles=["admin"])
    yield "a service in a token of a user", forge.signed(SERVICE, forge.header(ACCESS), forge.claims(SERVICE))


def _of_contexts(forge: Forge) -> Made:
    good = forge.claims(CONTEXT)["ctx"]
    changes: dict[str, Any] = {
        "empty": {}, "a list": [good], "text": "x", "another user": {**good, "user_id": ids.uuid7()}, "no user": {**good, "user_id": ""},
        "a field more": {**good, "admin": True}, "depth 11": {**good, "depth": 11, "parent_request_id": "x"},
        "no roles": {**good, "roles": []},
        "a placeholder": {**good, "run_id": "default"}, "times as text": {**good, "created_at": "now"},
        "no digest": {**good, "agent_context_sha256": ""},
    }  # fmt: skip
    for name, context in changes.items():
        yield f"context: {name}", forge.token(CONTEXT, ctx=context)
    yield "no context", forge.token(CONTEXT, ctx=None)
    yield "subject of another", forge.token(CONTEXT, sub=ids.uuid7())
    yield "subject is no id", forge.token(CONTEXT, sub="dispatcher")
    yield "given to another service", forge.token(CONTEXT, azp="gateway")
    yield "given to no service", forge.token(CONTEXT, azp=None)
    yield "given to a list of services", forge.token(CONTEXT, azp=["dispatcher"])
    yield "given to all services", forge.token(CONTEXT, azp="*")
    yield "a good token of a user", forge.token(ACCESS)
    yield "a good token of a service", forge.token(SERVICE)
    yield "signed by auth", forge.signed(CONTEXT, forge.header(CONTEXT, kid=forge.auth.kid), forge.claims(CONTEXT), forge.auth.private)


def _of_grants(forge: Forge) -> Made:
    thread, now = ids.uuid7(), int(time.time())
    values: dict[str, list[Any]] = {
        "sub": ["", "admin", "dispatcher", ids.uuid7(), [forge.who["sub"]], forge.who["sub"].upper(), f"{forge.who['sub']} ", 1],
        "tid": ["", "*", ids.uuid7(), [forge.who["tid"]], {"id": forge.who["tid"]}],
        "kind": ["", "*", "Thread", "thread ", "threads", "run", "artifact", "user", ["thread"], {"thread": True}, 1, True],
        "res": ["", "*", thread.upper(), f"{{{thread}}}", thread.replace("-", ""), f"{thread}\n", "' OR 1=1", [thread], {"id": thread}, 1],
        "acc": ["", "admin", "Own", "OWN", "own ", "*", "read,own", ["own"], ["read", "own"], {"own": True}, 2, True],
    }  # fmt: skip
    for name, wrong in values.items():
        for value in wrong:
            yield f"{name} {str(value)[:40]!r}", forge.token(GRANT, **{name: value})
        yield f"no {name}", forge.token(GRANT, **{name: None})
    yield "lives a second too long", forge.token(GRANT, iat=now, nbf=now, exp=now + 301)
    for name, value in {"scope": ["runs:write"], "roles": ["admin"], "azp": "dispatcher", "ctx": {}, "act": {"sub": "dispatcher"}}.items():
        yield f"a claim more: {name}", forge.token(GRANT, **{name: value})
    for typ in (ACCESS, SERVICE, CONTEXT):
        yield f"a good token: {typ}", forge.token(typ)
        yield f"claims of {typ} under {GRANT}", forge.signed(GRANT, forge.header(GRANT), forge.claims(typ))
        yield f"claims of {GRANT} under {typ}", forge.signed(typ, forge.header(typ), forge.claims(GRANT))
    yield "signed by auth", forge.signed(GRANT, forge.header(GRANT, kid=forge.auth.kid), forge.claims(GRANT), forge.auth.private)
