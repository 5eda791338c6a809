"""Issues access and service tokens; looks into access tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from chassis import identity
from netra import errors
from services.auth import keys, users


@dataclass(frozen=True, slots=True)
class Session:
    """The live session that a token is issued in."""

    session_id: str
    remaining_s: int


@dataclass(frozen=True, slots=True)
class Issued:
    """What a sign-in or a refresh yields."""

    access_token: str
    expires_in_s: int
    refresh_token: str = ""
    user_id: str = ""
    scope: tuple[str, ...] = ()
    session_id: str = ""


class Tokens:
    """Signs with the current key of auth, and verifies as everybody does."""

    def __init__(self, signing: keys.Keys, verifier: identity.Verifier, access_s: int, service_s: int) -> None:
        self._signing = signing
        self._verifier = verifier
        self._access_s, self._service_s = access_s, service_s

    def for_user(self, user: users.User, session: Session, refresh_token: str = "", scope: Iterable[str] = ()) -> Issued:
        """An access token of a session, which it never outlives, and the refresh token beside it. A scope narrows it."""
        lifetime = min(self._access_s, session.remaining_s)
        if lifetime <= 0:
            raise errors.Unauthenticated("The session has ended. Sign in again.")
        claims: dict[str, object] = {
            "sub": user.user_id, "sid": session.session_id, "tid": user.tenant_id,
            "roles": list(user.roles), "tier": user.tier, "ver": user.version,
        }  # fmt: skip
        narrowed = tuple(sorted(set(scope)))
        if narrowed:
            claims["scope"] = list(narrowed)
        return Issued(self._sign(identity.ACCESS, claims, lifetime), lifetime, refresh_token, user.user_id, narrowed, session.session_id)

    def for_service(self, name: str) -> Issued:
        """A token that proves which service is calling."""
        return Issued(self._sign(identity.SERVICE, {"sub": name}, self._service_s), self._service_s)

    def on_behalf(self, who: identity.Principal, service: str, scope: tuple[str, ...], lifetime_s: int) -> Issued:
        """A token that a service presents for a user; it never outlives the one it was made from."""
        lifetime = min(lifetime_s, int(who.expires_at - time.time()))
        if lifetime <= 0:
            raise errors.Unauthenticated("The token has expired.")
        claims = {
            "sub": str(who.user_id), "sid": str(who.session_id), "tid": str(who.tenant_id), "roles": list(who.roles), "tier": who.tier,
            "ver": who.version, "scope": list(scope), "act": {"sub": service},
        }  # fmt: skip
        return Issued(self._sign(identity.BEHALF, claims, lifetime), lifetime, user_id=who.user_id, scope=scope)

    async def inspect(self, token: str) -> identity.Principal | None:
        """The user of an access token, or None when it may not be believed."""
        try:
            return await self._verifier.principal(token)
        except errors.Unauthenticated:
            return None

    def _sign(self, typ: str, claims: dict[str, object], lifetime_s: int) -> str:
        signer = self._signing.signer
        return identity.sign(signer.private_key, signer.kid, typ, claims, lifetime_s)
