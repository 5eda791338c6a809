"""Who is calling: signs, verifies and carries the caller across hops."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from netra import errors, ids
from netra.context import UserExecutionContext

if TYPE_CHECKING:
    from chassis.trust import Trust
    from netra.access.v1 import access_pb2

ISSUER = "netra"
AUDIENCE = "netra"
ACCESS, SERVICE, CONTEXT, BEHALF, GRANT = "at+jwt", "svc+jwt", "ctx+jwt", "obo+jwt", "grant+jwt"
ACCESSES = ("read", "write", "own")
THREAD = "thread"
_KINDS = frozenset({THREAD})
ROLES = frozenset({"admin", "user", "readonly"})
_UPWARDS = ("free", "early", "business", "enterprise", "internal")
TIERS = frozenset(_UPWARDS)
LEEWAY_S = 5
MAX_SCOPE = 64
_SIGNER = {ACCESS: "auth", SERVICE: "auth", BEHALF: "auth", CONTEXT: "context", GRANT: "context"}
_MAX_LIFETIME_S = {ACCESS: 900, SERVICE: 3600, BEHALF: 60, CONTEXT: 3600, GRANT: 300}
_USER = frozenset({"iss", "aud", "sub", "sid", "jti", "tid", "roles", "tier", "ver", "iat", "nbf", "exp"})
_CLAIMS = {
    ACCESS: _USER,
    SERVICE: frozenset({"iss", "aud", "sub", "jti", "iat", "nbf", "exp"}),
    BEHALF: _USER | {"scope", "act"},
    CONTEXT: frozenset({"iss", "aud", "sub", "azp", "jti", "iat", "nbf", "exp", "ctx"}),
    GRANT: frozenset({"iss", "aud", "sub", "jti", "tid", "kind", "res", "acc", "iat", "nbf", "exp"}),
}
_OPTIONAL = {ACCESS: frozenset({"scope"})}
_MAX_BYTES = {ACCESS: 8 * 1024, SERVICE: 8 * 1024, BEHALF: 8 * 1024, CONTEXT: 16 * 1024, GRANT: 2 * 1024}
_PARTS = re.compile(r"([A-Za-z0-9_\-]+)\.([A-Za-z0-9_\-]+)\.([A-Za-z0-9_\-]{86})", re.ASCII)
_KID = re.compile(r"[A-Za-z0-9._\-]{1,64}", re.ASCII)
_SERVICE_NAME = re.compile(r"[a-z][a-z0-9\-]{0,31}", re.ASCII)
_PERMISSION = re.compile(r"[a-z_]{1,32}:[a-z_]{1,32}", re.ASCII)
_CACHED_S = 60.0
_CACHE_ENTRIES = 20_000
# unknown keys are waited for, a moment; not by everybody at once
_MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class Principal:
    """A signed-in user as their access token describes them."""

    user_id: ids.UserId
    tenant_id: ids.TenantId
    session_id: ids.SessionId
    roles: tuple[str, ...]
    tier: str
    expires_at: float
    token: str
    issued_at: float = 0.0
    # counts up with every change of roles or tier
    version: int = 1
    # the permissions the token is narrowed to; None when it is not
    scope: frozenset[str] | None = None
    # the service that acts for the user; empty when they act themselves
    actor: str = ""

    def narrowed(self, permissions: frozenset[str]) -> frozenset[str]:
        """Of what role and tier allow, what the token does."""
        return permissions if self.scope is None else permissions & self.scope


@dataclass(frozen=True, slots=True)
class Grant:
    """What one user may do with one thread, as the context service signed it for a few minutes."""

    resource: ids.Id
    access: str
    expires_at: float

    def allows(self, access: str) -> bool:
        """Whether it lets its user `read`, `write` or `own` the resource."""
        return ACCESSES.index(access) <= ACCESSES.index(self.access)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: a user, or a service (perhaps for the user of an execution context), or nobody (public)."""

    principal: Principal | None = None
    service: str = ""
    context: UserExecutionContext | None = None

    @property
    def user_id(self) -> ids.UserId:
        """The user for whom the call is made. Raises `Unauthenticated` when there is none."""
        if self.principal is not None:
            return self.principal.user_id
        if self.context is not None:
            return self.context.user_id
        raise errors.Unauthenticated("This call needs a user.")

    @property
    def user(self) -> Principal:
        """The signed-in user. Raises `Unauthenticated` when the caller is a service."""
        if self.principal is None:
            raise errors.Unauthenticated("This call needs a signed-in user.")
        return self.principal

    @property
    def frame(self) -> UserExecutionContext:
        """The execution context the call carries. Raises `Unauthenticated` when there is none."""
        if self.context is None:
            raise errors.Unauthenticated("This call needs an execution context in x-netra-context.")
        return self.context


_caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - frozen


def current() -> Caller:
    """The caller of the call at hand."""
    return _caller.get()


def bind(caller: Caller) -> None:
    """Make `caller` the caller of the current task."""
    _caller.set(caller)


def sign(private_key: Ed25519PrivateKey, kid: str, typ: str, claims: dict[str, Any], lifetime_s: int) -> str:
    """A token of one type; adds issuer, audience, id and times."""
    now = int(time.time())
    full = {"iss": ISSUER, "aud": AUDIENCE, "jti": ids.uuid7(), "iat": now, "nbf": now, "exp": now + lifetime_s, **claims}
    # by hand: jwt.encode costs more than the signature does, and every context is signed
    signed = b".".join((_header(kid, typ), _part(full)))
    return b".".join((signed, _unpadded(private_key.sign(signed)))).decode()


@functools.lru_cache(maxsize=64)
def _header(kid: str, typ: str) -> bytes:
    return _part({"alg": "EdDSA", "kid": kid, "typ": typ})


def _part(content: dict[str, Any]) -> bytes:
    return _unpadded(orjson.dumps(content))


def _unpadded(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


class Verifier:
    """Verifies tokens strictly against published keys, and remembers the verdict for up to a minute."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self._verified: OrderedDict[bytes, _Believed] = OrderedDict()
        self._waiting = 0

    async def principal(self, token: str) -> Principal:
        """The user of an access token. Raises `Unauthenticated`."""
        return self._principal(await self._believed(token, ACCESS))

    async def user(self, token: str) -> Principal:
        """The user of an access token, or of one with which a service acts on their behalf. Raises `Unauthenticated`."""
        return self._principal(await self._believed(token, ACCESS, BEHALF))

    async def caller(self, token: str) -> Principal | str:
        """Who brings a token: a user, or a service on their behalf; or the name of a service that speaks for itself."""
        believed = await self._believed(token, ACCESS, BEHALF, SERVICE)
        return str(believed.claims["sub"]) if believed.typ == SERVICE else self._principal(believed)

    async def service(self, token: str) -> str:
        """The service of a service token. Raises `Unauthenticated`."""
        return str((await self._believed(token, SERVICE)).claims["sub"])

    async def grant(self, token: str, principal: Principal) -> Grant:
        """What a grant token lets this very user do. Raises `Unauthenticated` when it was signed for somebody else, or has ended."""
        claims = (await self._believed(token, GRANT)).claims
        if claims["sub"] != principal.user_id or claims["tid"] != principal.tenant_id:
            raise _refused("it was given to somebody else")
        return Grant(ids.Id(claims["res"]), claims["acc"], float(claims["exp"]))

    async def context(self, token: str, service: str) -> UserExecutionContext:
        """The execution context of a context token that was signed for the service which brings it. Raises `Unauthenticated`."""
        believed = await self._believed(token, CONTEXT)
        # what this process has signed it has not read
        claims = believed.claims or _read(token, (CONTEXT,))[2]
        if claims["azp"] != service:
            raise _refused(f"it was given to another service than {service}")
        return believed.context or _context(claims)

    def believe(self, token: str, kid: str, expires_at: int) -> None:
        """Know a context token that this very process has signed with its key, as if it had been verified just now."""
        until = min(expires_at + LEEWAY_S, time.time() + _CACHED_S)
        # read when somebody brings it: most are brought somewhere else, and to forget what each one says costs more than that it is known
        self._remember(_digest(token), _Believed(until, CONTEXT, kid, {}, None, None))

    def _principal(self, believed: _Believed) -> Principal:
        principal = believed.principal
        if principal is None:
            raise _refused("it is a token for something else")
        if self.trust.revoked(principal):
            raise errors.Unauthenticated("The session has ended. Sign in again.")
        return principal

    async def _believed(self, token: str, *typs: str) -> _Believed:
        digest = _digest(token)
        known = self._verified.get(digest)
        # a key that was withdrawn takes what it signed along
        if known is None or known.until <= time.time() or self.trust.key(_SIGNER[known.typ], known.kid) is None:
            known = await self._verify(token, typs)
            self._remember(digest, known)
        if known.typ not in typs:
            raise _refused("it is a token for something else")
        return known

    def _remember(self, digest: bytes, believed: _Believed) -> None:
        self._verified[digest] = believed
        while len(self._verified) > _CACHE_ENTRIES:
            self._verified.popitem(last=False)

    async def _verify(self, token: str, typs: tuple[str, ...]) -> _Believed:
        if len(token) > max(_MAX_BYTES[typ] for typ in typs):
            raise _refused("it is too long")
        typ, kid, signed = _read(token, typs)
        key = await self._key(_SIGNER[typ], kid)
        if key is None:
            raise _refused("its key is not known")
        try:
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER, leeway=LEEWAY_S,
                options={"require": sorted(_CLAIMS[typ])},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise errors.Unauthenticated("The token has expired.") from None
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError, OverflowError):
            raise _refused("its signature or claims are not valid") from None
        if claims != signed:
            raise _refused("it can be read in two ways")
        _check_claims(claims, typ)
        principal = _principal(token, claims) if typ in (ACCESS, BEHALF) else None
        context = _context(claims) if typ == CONTEXT else None
        return _Believed(min(claims["exp"] + LEEWAY_S, time.time() + _CACHED_S), typ, kid, claims, principal, context)

    async def _key(self, issuer: str, kid: str) -> Any:
        if self._waiting >= _MAX_WAITING:
            return self.trust.key(issuer, kid)
        self._waiting += 1
        try:
            return await self.trust.awaited_key(issuer, kid)
        finally:
            self._waiting -= 1


@dataclass(frozen=True, slots=True)
class _Believed:
    """What a verified token says, and until when that need not be looked at again."""

    until: float
    typ: str
    kid: str
    # empty until the token is read
    claims: dict[str, Any]
    # made once: checking its ids anew would be half of the price of a call's verification
    principal: Principal | None
    # frozen: all calls that bring the token may have the same one
    context: UserExecutionContext | None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _context(claims: dict[str, Any]) -> UserExecutionContext:
    try:
        context = UserExecutionContext.from_claims(claims["ctx"])
    except (errors.InvalidPayload, KeyError, TypeError, ValueError):
        raise _refused("its context is malformed") from None
    if context.user_id != claims["sub"]:
        raise _refused("its context names another subject")
    return context


def _principal(token: str, claims: dict[str, Any]) -> Principal:
    return Principal(
        ids.UserId(claims["sub"]), ids.TenantId(claims["tid"]), ids.SessionId(claims["sid"]),
        tuple(claims["roles"]), claims["tier"], float(claims["exp"]), token, float(claims["iat"]), claims["ver"],
        frozenset(claims["scope"]) if "scope" in claims else None, claims["act"]["sub"] if "act" in claims else "",
    )  # fmt: skip


def _refused(why: str) -> errors.Unauthenticated:
    return errors.Unauthenticated(f"The token is refused: {why}.")


def _read(token: str, typs: tuple[str, ...]) -> tuple[str, str, dict[str, Any]]:
    """Type, key id and claims of a token, which nobody has verified yet. Raises `Unauthenticated`."""
    parts = _PARTS.fullmatch(token)
    if parts is None:
        raise _refused("it is malformed")
    typ, kid = _header_of(parts[1])
    claims = _object(parts[2])
    _decoded(parts[3])
    if typ not in typs:
        raise _refused("its header is not what it must be")
    if len(token) > _MAX_BYTES[typ]:
        raise _refused("it is too long")
    return typ, kid, claims


# one for each key and type; what is refused is not kept
@functools.lru_cache(maxsize=64)
def _header_of(part: str) -> tuple[str, str]:
    """Type and key id. Raises `Unauthenticated`."""
    header = _object(part)
    known = set(header) == {"alg", "kid", "typ"} and header["alg"] == "EdDSA" and isinstance(header["typ"], str)
    if not known or not isinstance(header["kid"], str) or not _KID.fullmatch(header["kid"]):
        raise _refused("its header is not what it must be")
    return header["typ"], header["kid"]


def _decoded(part: str) -> bytes:
    """base64url in its one canonical form: otherwise one signature could be written in many ways."""
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError):
        raise _refused("it is malformed") from None
    if _unpadded(raw) != part.encode():
        raise _refused("it is not in canonical form")
    return raw


def _object(part: str) -> dict[str, Any]:
    raw = _decoded(part)
    try:
        value = orjson.loads(raw)
        # what is just as we write it says nothing twice; all else is read with more care, which takes five times as long
        if orjson.dumps(value) != raw:
            value = _strictly(raw.decode())
    except (ValueError, TypeError, RecursionError):
        raise _refused("it is malformed") from None
    if not isinstance(value, dict):
        raise _refused("it is malformed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_number(_: str) -> Any:
    raise ValueError


# one for all: json.loads makes a new one for each call with options
_strictly = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_no_number).decode


def _check_claims(claims: dict[str, Any], typ: str) -> None:
    optional: frozenset[str] = _OPTIONAL.get(typ, frozenset())
    if set(claims) - optional != _CLAIMS[typ] or claims["aud"] != AUDIENCE or claims["iss"] != ISSUER:
        raise _refused("it has not exactly the claims it must have")
    if any(type(claims[name]) is not int for name in ("iat", "nbf", "exp")):
        raise _refused("its times are not integers")
    if not 0 < claims["exp"] - claims["iat"] <= _MAX_LIFETIME_S[typ] or claims["nbf"] > claims["exp"]:
        raise _refused("its lifetime is out of range")
    _check_id(claims["jti"])
    if typ == SERVICE:
        _check_service(claims["sub"])
    elif typ == CONTEXT:
        _check_id(claims["sub"])
        _check_service(claims["azp"])
    elif typ == GRANT:
        _check_grant(claims)
    else:
        _check_user(claims)


def _check_id(value: Any) -> None:
    try:
        ids.Id(value)
    except errors.InvalidPayload:
        raise _refused("an id in it is not a UUID") from None


def _check_service(value: Any) -> None:
    if not isinstance(value, str) or not _SERVICE_NAME.fullmatch(value):
        raise _refused("it names a service that cannot be")


def _check_grant(claims: dict[str, Any]) -> None:
    for name in ("sub", "tid", "res"):
        _check_id(claims[name])
    # an id alone does not say of what it is
    if not isinstance(claims["kind"], str) or claims["kind"] not in _KINDS:
        raise _refused("it grants another kind of thing")
    if not isinstance(claims["acc"], str) or claims["acc"] not in ACCESSES:
        raise _refused("it grants what does not exist")


def _check_user(claims: dict[str, Any]) -> None:
    for name in ("sub", "sid", "tid"):
        _check_id(claims[name])
    if not _distinct(claims["roles"], len(ROLES)) or not ROLES.issuperset(claims["roles"]):
        raise _refused("it names a role that does not exist")
    if not isinstance(claims["tier"], str) or claims["tier"] not in TIERS:
        raise _refused("it names a tier that does not exist")
    if type(claims["ver"]) is not int or claims["ver"] < 1:
        raise _refused("its version is not a positive integer")
    if "scope" in claims and not (_distinct(claims["scope"], MAX_SCOPE) and all(map(_PERMISSION.fullmatch, claims["scope"]))):
        raise _refused("its scope is not a list of permissions")
    if "act" in claims:
        if not isinstance(claims["act"], dict) or set(claims["act"]) != {"sub"}:
            raise _refused("it does not say who acts")
        _check_service(claims["act"]["sub"])


def _distinct(value: Any, most: int) -> bool:
    """Whether this is a list of texts, one to `most`, none twice."""
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return texts and 0 < len(value) <= most and len(set(value)) == len(value)


class Authenticator:
    """Decides on each call by its access rule: default deny."""

    def __init__(self, trust: Trust) -> None:
        self.verifier = Verifier(trust)
        self._trust = trust

    async def admit(self, rule: access_pb2.Rule, metadata: dict[str, str], peer: frozenset[str] | None = None) -> Caller:
        """The caller, if the rule lets them in. Raises `Unauthenticated` or `PermissionDenied`.

        `peer` is the names in the certificate of the other end, None where connections have none.
        """
        if rule.public:
            return Caller(service=await self._perhaps_service(metadata, peer))
        if not self._trust.ready:
            raise errors.Unavailable("The keys are not known here yet. Try again.")
        known = await self.verifier.caller(_bearer(metadata))
        if isinstance(known, Principal):
            if known.actor:
                _check_peer(known.actor, peer)
            return self._admit_user(rule, known)
        _check_peer(known, peer)
        return await self._admit_service(rule, known, metadata.get("x-netra-context", ""))

    async def _perhaps_service(self, metadata: dict[str, str], peer: frozenset[str] | None) -> str:
        """Which service makes a call that anybody may make; empty when no service proves that it does."""
        try:
            name = await self.verifier.service(_bearer(metadata))
            _check_peer(name, peer)
        except errors.Unauthenticated:
            return ""
        return name

    async def _admit_service(self, rule: access_pb2.Rule, name: str, context_token: str) -> Caller:
        # whoever is refused is known all the same: the record of access names them
        bind(Caller(service=name))
        if name not in rule.services:
            raise errors.PermissionDenied(f"The service {name} may not call this.")
        context = await self.verifier.context(context_token, name) if rule.context else None
        return Caller(service=name, context=context)

    def _admit_user(self, rule: access_pb2.Rule, principal: Principal) -> Caller:
        bind(Caller(principal=principal))
        if not rule.permission:
            raise errors.PermissionDenied("Only services of the platform may call this.")
        require(self._trust, principal, rule.permission)
        return Caller(principal=principal)


class Authority(Protocol):
    """On what something is allowed."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles."""
        ...

    @property
    def tier(self) -> str:
        """The tier."""
        ...

    @property
    def scope(self) -> frozenset[str] | None:
        """What it is narrowed to; None when it is not."""
        ...


def require(trust: Trust, principal: Authority, permission: str) -> None:
    """Raises `PermissionDenied` naming the permission the user lacks, or the tiers that have it."""
    if permission not in trust.permissions(principal.roles, principal.tier):
        having = [tier for tier in _UPWARDS if permission in trust.permissions(principal.roles, tier)]
        if having:
            message = f"This needs the permission {permission}, which the tier {principal.tier} does not have; {', '.join(having)} do."
            raise errors.PermissionDenied(message, permission=permission, tiers=",".join(having))
        raise errors.PermissionDenied(f"This needs the permission {permission}, which your role does not have.", permission=permission)
    if principal.scope is not None and permission not in principal.scope:
        message = f"This needs the permission {permission}, which is not in the scope of your token."
        raise errors.PermissionDenied(message, permission=permission)


def _check_peer(name: str, peer: frozenset[str] | None) -> None:
    if peer is not None and name not in peer:
        raise _refused(f"the certificate of the connection does not name the service {name}")


def _bearer(metadata: dict[str, str]) -> str:
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise errors.Unauthenticated()
    return token
