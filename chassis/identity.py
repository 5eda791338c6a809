"""Who is calling: signs, verifies and carries the caller across hops."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from netra import errors, ids
from netra.context import UserExecutionContext

if TYPE_CHECKING:
    from chassis.trust import Trust
    from netra.access.v1 import access_pb2

ISSUER = "netra"
AUDIENCE = "netra"
ACCESS, SERVICE, CONTEXT = "at+jwt", "svc+jwt", "ctx+jwt"
ROLES = frozenset({"admin", "user", "readonly"})
TIERS = frozenset({"free", "early", "business", "enterprise", "internal"})
LEEWAY_S = 5
_SIGNER = {ACCESS: "auth", SERVICE: "auth", CONTEXT: "context"}
_MAX_LIFETIME_S = {ACCESS: 900, SERVICE: 3600, CONTEXT: 3600}
_CLAIMS = {
    ACCESS: frozenset({"iss", "aud", "sub", "sid", "jti", "tid", "roles", "tier", "ver", "iat", "nbf", "exp"}),
    SERVICE: frozenset({"iss", "aud", "sub", "jti", "iat", "nbf", "exp"}),
    CONTEXT: frozenset({"iss", "aud", "sub", "jti", "iat", "nbf", "exp", "ctx"}),
}
_MAX_BYTES = {ACCESS: 8 * 1024, SERVICE: 8 * 1024, CONTEXT: 128 * 1024}
_CACHED_S = 60.0
_CACHE_ENTRIES = 20_000


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
    return jwt.encode(full, private_key, algorithm="EdDSA", headers={"kid": kid, "typ": typ})


class Verifier:
    """Verifies tokens strictly against published keys, and remembers the verdict for up to a minute."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self._verified: OrderedDict[bytes, tuple[float, dict[str, Any]]] = OrderedDict()

    async def principal(self, token: str) -> Principal:
        """The user of an access token. Raises `Unauthenticated`."""
        claims = await self._claims(token, ACCESS)
        if self.trust.revoked(claims["sid"]):
            raise errors.Unauthenticated("The session has ended. Sign in again.")
        return Principal(
            ids.UserId(claims["sub"]), ids.TenantId(claims["tid"]), ids.SessionId(claims["sid"]),
            tuple(claims["roles"]), claims["tier"], float(claims["exp"]), token,
        )  # fmt: skip

    async def service(self, token: str) -> str:
        """The service of a service token. Raises `Unauthenticated`."""
        return str((await self._claims(token, SERVICE))["sub"])

    async def context(self, token: str) -> UserExecutionContext:
        """The execution context of a context token. Raises `Unauthenticated`."""
        claims = await self._claims(token, CONTEXT)
        try:
            context = UserExecutionContext.from_claims(claims["ctx"])
        except (errors.InvalidPayload, KeyError, TypeError, ValueError):
            raise _refused("its context is malformed") from None
        if context.user_id != claims["sub"]:
            raise _refused("its context names another subject")
        return context

    async def _claims(self, token: str, typ: str) -> dict[str, Any]:
        digest = hashlib.sha256(f"{typ} {token}".encode()).digest()
        known = self._verified.get(digest)
        if known is not None and known[0] > time.time():
            return known[1]
        claims = await self._verify(token, typ)
        self._verified[digest] = (min(claims["exp"] + LEEWAY_S, time.time() + _CACHED_S), claims)
        while len(self._verified) > _CACHE_ENTRIES:
            self._verified.popitem(last=False)
        return claims

    async def _verify(self, token: str, typ: str) -> dict[str, Any]:
        if len(token) > _MAX_BYTES[typ]:
            raise _refused("it is too long")
        kid = _checked_header(token, typ)
        key = await self.trust.awaited_key(_SIGNER[typ], kid)
        if key is None:
            raise _refused("its key is not known")
        required = sorted(_CLAIMS[typ])
        try:
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER, leeway=LEEWAY_S, options={"require": required}
            )
        except jwt.ExpiredSignatureError:
            raise errors.Unauthenticated("The token has expired.") from None
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError):
            raise _refused("its signature or claims are not valid") from None
        _check_claims(claims, typ)
        return claims


def _refused(why: str) -> errors.Unauthenticated:
    return errors.Unauthenticated(f"The token is refused: {why}.")


def _checked_header(token: str, typ: str) -> str:
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError):
        raise _refused("it is malformed") from None
    if set(header) != {"alg", "kid", "typ"} or header["alg"] != "EdDSA" or header["typ"] != typ:
        raise _refused("its header is not what it must be")
    kid = header["kid"]
    if not isinstance(kid, str) or not 1 <= len(kid) <= 64:
        raise _refused("its header is not what it must be")
    return kid


def _check_claims(claims: dict[str, Any], typ: str) -> None:
    if set(claims) != _CLAIMS[typ] or claims["aud"] != AUDIENCE:
        raise _refused("it has not exactly the claims it must have")
    if any(type(claims[name]) is not int for name in ("iat", "nbf", "exp")):
        raise _refused("its times are not integers")
    if not 0 < claims["exp"] - claims["iat"] <= _MAX_LIFETIME_S[typ]:
        raise _refused("its lifetime is out of range")
    if typ == ACCESS:
        _check_user(claims)


def _check_user(claims: dict[str, Any]) -> None:
    try:
        ids.UserId(claims["sub"]), ids.SessionId(claims["sid"]), ids.TenantId(claims["tid"])
    except errors.InvalidPayload:
        raise _refused("an id in it is not a UUID") from None
    roles = claims["roles"]
    if not isinstance(roles, list) or not roles or not all(isinstance(role, str) and role in ROLES for role in roles):
        raise _refused("it names a role that does not exist")
    if not isinstance(claims["tier"], str) or claims["tier"] not in TIERS or type(claims["ver"]) is not int:
        raise _refused("it names a tier that does not exist")


class Authenticator:
    """Decides on each call by its access rule: default deny."""

    def __init__(self, trust: Trust) -> None:
        self.verifier = Verifier(trust)
        self._trust = trust

    async def admit(self, rule: access_pb2.Rule, metadata: dict[str, str]) -> Caller:
        """The caller, if the rule lets them in. Raises `Unauthenticated` or `PermissionDenied`."""
        if rule.public:
            return Caller()
        if not self._trust.ready:
            raise errors.Unavailable("The keys are not known here yet. Try again.")
        token = _bearer(metadata)
        if _typ(token) == SERVICE:
            return await self._admit_service(rule, token, metadata.get("x-netra-context", ""))
        return self._admit_user(rule, await self.verifier.principal(token))

    async def _admit_service(self, rule: access_pb2.Rule, token: str, context_token: str) -> Caller:
        name = await self.verifier.service(token)
        if name not in rule.services:
            raise errors.PermissionDenied(f"The service {name} may not call this.")
        context = await self.verifier.context(context_token) if rule.context else None
        return Caller(service=name, context=context)

    def _admit_user(self, rule: access_pb2.Rule, principal: Principal) -> Caller:
        if not rule.permission:
            raise errors.PermissionDenied("Only services of the platform may call this.")
        if rule.permission not in self._trust.permissions(principal.roles, principal.tier):
            message = f"This needs the permission {rule.permission}, which your role and tier do not have."
            raise errors.PermissionDenied(message, permission=rule.permission)
        return Caller(principal=principal)


def _bearer(metadata: dict[str, str]) -> str:
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise errors.Unauthenticated()
    return token


def _typ(token: str) -> str:
    try:
        return str(jwt.get_unverified_header(token).get("typ"))
    except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError):
        raise _refused("it is malformed") from None
