"""What users are entitled to at the edge: sockets, frames, requests; by the policy as it is now."""

from __future__ import annotations

from typing import Protocol

from chassis import audit, identity, trust
from gateway import addresses
from netra import errors


class Counted(Protocol):
    """Where requests are counted, for all gateways."""

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count. Raises `RateLimited`, or `QuotaExceeded` when none is allowed."""
        ...


class Entitlements:
    """Asks the policy, and counts."""

    def __init__(self, trusted: trust.Trust, counted: Counted, refusals: audit.Refusals, anonymous_per_minute: int) -> None:
        self._trust, self._counted, self._refusals, self._anonymous = trusted, counted, refusals, anonymous_per_minute

    def sockets(self, who: identity.Principal) -> int:
        """How many sockets a user may have here."""
        return self._trust.limits(who.tier).sockets

    def frames_per_minute(self, who: identity.Principal) -> int:
        """How many frames one socket of a user may send."""
        return self._trust.limits(who.tier).frames_per_minute

    async def count(self, who: identity.Principal) -> None:
        """Count a request of a user. Raises `RateLimited`, which says when to come back."""
        await self._counted.take("requests", who.user_id, self._trust.limits(who.tier).requests_per_minute)

    async def count_anonymous(self, address: str) -> None:
        """Count a request of nobody known. Raises `RateLimited`."""
        await self._counted.take("anonymous_requests", addresses.counted(address) or "unknown", self._anonymous)

    def refused(self, what: str, error: errors.NetraError, who: identity.Principal | None = None) -> None:
        """Tell the record of access of a refusal."""
        self._refusals.note(what, error, identity.Caller(principal=who))
