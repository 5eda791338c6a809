"""What users are entitled to at the edge: sockets, frames, requests; by the policy as it is now."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from typing import Protocol

from chassis import audit, identity, trust
from gateway import addresses
from netra import errors

_REMEMBERED = 10_000


class Counted(Protocol):
    """Where requests are counted, for all gateways."""

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count. Raises `RateLimited`, or `QuotaExceeded` when none is allowed."""
        ...


class _Allowance:
    """A token bucket: a minute's worth at once, then as many as a minute allows. What a minute allows may change at any time."""

    __slots__ = ("_at", "_left")

    def __init__(self) -> None:
        self._left = math.inf
        self._at = time.monotonic()

    def take(self, per_minute: int) -> int:
        """0 when a frame may pass, else the milliseconds until one may."""
        now = time.monotonic()
        self._left = min(per_minute, self._left + (now - self._at) * per_minute / 60)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0
        return int((1 - self._left) * 60_000 / max(per_minute, 1)) + 1


class Entitlements:
    """Asks the policy, and counts."""

    def __init__(self, trusted: trust.Trust, counted: Counted, refusals: audit.Refusals, anonymous_per_minute: int) -> None:
        self._trust, self._counted, self._refusals, self._anonymous = trusted, counted, refusals, anonymous_per_minute
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def sockets(self, who: identity.Principal) -> int:
        """How many sockets a user may have."""
        return self._trust.limits(who.tier).sockets

    def frames_per_minute(self, who: identity.Principal) -> int:
        """How many frames a user may send, through all their sockets here together."""
        return self._trust.limits(who.tier).frames_per_minute

    def take_frame(self, who: identity.Principal) -> int:
        """Count a frame: 0 when it may pass, else the milliseconds until one may."""
        # kept when the last socket is closed, so that a new one is no new allowance
        allowance = self._allowances.pop(who.user_id, None) or _Allowance()
        self._allowances[who.user_id] = allowance
        if len(self._allowances) > _REMEMBERED:
            self._allowances.popitem(last=False)
        return allowance.take(self.frames_per_minute(who))

    def max_frame_bytes(self, who: identity.Principal, most: int) -> int:
        """How large a frame of a user may be, `most` at the largest."""
        return min(self._trust.limits(who.tier).max_frame_bytes or most, most)

    async def count(self, who: identity.Principal) -> None:
        """Count a request of a user. Raises `RateLimited`, which says when to come back."""
        await self._counted.take("requests", who.user_id, self._trust.limits(who.tier).requests_per_minute)

    async def count_anonymous(self, address: str) -> None:
        """Count a request of nobody known. Raises `RateLimited`."""
        await self._counted.take("anonymous_requests", addresses.counted(address) or "unknown", self._anonymous)

    def require(self, what: str, permission: str, who: identity.Principal) -> None:
        """Raises `PermissionDenied`, of which the record of access is told, when the user may not do this."""
        try:
            identity.require(self._trust, who, permission)
        except errors.PermissionDenied as error:
            self.refused(what, error, who)
            raise

    def refused(self, what: str, error: errors.NetraError, who: identity.Principal | None = None) -> None:
        """Tell the record of access of a refusal."""
        self._refusals.note(what, error, identity.Caller(principal=who))
