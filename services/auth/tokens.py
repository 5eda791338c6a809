"""Issues access, service and refresh tokens; looks into access tokens."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from chassis import identity
from netra import errors
from services.auth import keys, users

_REFRESH = re.compile(r"nrt_[A-Za-z0-9_\-]{43}")


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


def new_refresh() -> str:
    """A refresh token: 256 random bits behind a prefix that secret scanners can find."""
    return "nrt_" + secrets.token_urlsafe(32)


def digest(refresh_token: str) -> bytes:
    """What is stored of a refresh token."""
    return hashlib.sha256(refresh_token.encode()).digest()


def looks_like_refresh(text: str) -> bool:
    """Whether the text has the form of a refresh token."""
    return _REFRESH.fullmatch(text) is not None


class Tokens:
    """Signs with the current key of auth, and verifies as everybody does."""

    def __init__(self, signing: keys.Keys, verifier: identity.Verifier, access_s: int, service_s: int) -> None:
        self._signing = signing
        self._verifier = verifier
        self._access_s, self._service_s = access_s, service_s

    def for_user(self, user: users.User, session: Session, refresh_token: str) -> Issued:
        """An access token of a session, which it never outlives, and the refresh token beside it."""
        lifetime = min(self._access_s, session.remaining_s)
        if lifetime <= 0:
            raise errors.Unauthenticated("The session has ended. Sign in again.")
        claims = {
            "sub": user.user_id, "sid": session.session_id, "tid": user.tenant_id,
            "roles": list(user.roles), "tier": user.tier, "ver": user.version,
        }  # fmt: skip
        return Issued(self._sign(identity.ACCESS, claims, lifetime), lifetime, refresh_token, user.user_id)

    def for_service(self, name: str) -> Issued:
        """A token that proves which service is calling."""
        return Issued(self._sign(identity.SERVICE, {"sub": name}, self._service_s), self._service_s)

    async def inspect(self, token: str) -> identity.Principal | None:
        """The user of an access token, or None when it may not be believed."""
        try:
            return await self._verifier.principal(token)
        except errors.Unauthenticated:
            return None

    def _sign(self, typ: str, claims: dict[str, object], lifetime_s: int) -> str:
        signer = self._signing.signer
        return identity.sign(signer.private_key, signer.kid, typ, claims, lifetime_s)
