"""A narrower token for a service that acts on behalf of a user (RFC 8693), for a minute at most."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from chassis import identity
from chassis.trust import Trust
from netra import errors
from services.auth import callers, clients, throttle, tokens

LIFETIME_S = 60
_PERMISSION = re.compile(r"[a-z_]{1,32}:[a-z_]{1,32}", re.ASCII)


class Audited(Protocol):
    """Where it is recorded who acts for whom."""

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str, actor: str = "anonymous") -> None:
        """Add a line."""
        ...


class Exchange:
    """Exchanges access tokens of users."""

    def __init__(
        self, services: clients.Clients, verifier: identity.Verifier, issue: tokens.Tokens, trusted: Trust, rows: Audited,
        guesses: throttle.Throttle,
    ) -> None:  # fmt: skip
        self._services, self._verifier, self._issue = services, verifier, issue
        self._trust, self._rows, self._guesses = trusted, rows, guesses

    async def on_behalf(
        self, subject_token: str, client_id: str, client_secret: str, scope: Iterable[str], origin: callers.Origin
    ) -> tokens.Issued:
        """A token of the user's that the service presents. It cannot be exchanged again: what acts for a user does not pass that on.

        Raises `Unauthenticated` for a wrong secret or subject, `InvalidPayload` for a scope that is not one, `PermissionDenied` for
        one that the user does not have.
        """
        await self._guesses.called("exchange", origin)
        if not self._services.known(client_id, client_secret):
            await self._guesses.wrong(throttle.unguessable("client", origin, client_id[:64]))
            raise errors.Unauthenticated("The client id or its secret is wrong.")
        who = await self._verifier.principal(subject_token)
        narrowed = self._narrowed(who, scope)
        await self._guesses.succeeded("exchange", who.session_id)
        issued = self._issue.on_behalf(who, client_id, narrowed, LIFETIME_S)
        await self._rows.audit(who.user_id, "exchange", "ok", f"scope {' '.join(narrowed)}", f"service:{client_id} for user:{who.user_id}")
        return issued

    def _narrowed(self, who: identity.Principal, scope: Iterable[str]) -> tuple[str, ...]:
        wanted = tuple(sorted(set(scope)))
        if not 1 <= len(wanted) <= identity.MAX_SCOPE:
            raise errors.InvalidPayload(f"scope must name 1 to {identity.MAX_SCOPE} permissions", field="scope")
        # what is refused is named in the record of access: nothing but names may get there
        if not all(map(_PERMISSION.fullmatch, wanted)):
            raise errors.InvalidPayload("scope must name permissions, for example runs:read", field="scope")
        missing = sorted(set(wanted) - who.narrowed(self._trust.permissions(who.roles, who.tier)))
        if missing:
            raise errors.PermissionDenied(f"The user does not have the permission {missing[0]}.", permission=missing[0])
        return wanted
