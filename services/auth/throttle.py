"""How often a secret may be tried. Failures cost most, and what an attacker uses up is not the owner's."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chassis import log, telemetry
from netra import errors
from services.auth import callers

_log = log.get(__name__)
_refused = telemetry.meter.create_counter("netra.auth.throttled", description="Attempts refused because too many failed before, by kind.")


class Counted(Protocol):
    """Where failures are counted, for all replicas."""

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count. Raises `RateLimited` when the budget is used up."""
        ...

    async def give_back(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Take back what was counted."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """So many failures at once, and so many more in each minute, for one key."""

    kind: str
    key: str
    burst: int
    per_minute: float

    @property
    def counted(self) -> tuple[str, str, float, int]:
        """As it is counted; the key as a digest, since it names people and places."""
        return self.kind, hashlib.sha256(self.key.encode()).hexdigest(), self.per_minute, self.burst


def sign_in(account: str, origin: callers.Origin, known: str) -> list[Budget]:
    """What a failed password costs. `known` says whether the account signed in before from this `device`, or this `address`, or neither.

    A stranger pays for the account at their address, for the account and for their address. Where the owner signed in before, the
    budget is a separate one: strangers cannot use it up.
    """
    if known == "device":
        return [Budget("login_device", f"{account}\0{origin.address}\0{origin.device}", 20, 2)]
    if known == "address":
        return [Budget("login_known", f"{account}\0{origin.address}", 20, 2)]
    return [
        Budget("login_stranger", f"{account}\0{origin.network}", 10, 1),
        Budget("login_account", account, 50, 2),
        Budget("login_address", origin.network, 100, 20),
    ]


def password_check(user_id: str) -> list[Budget]:
    """What a wrong present password costs somebody who has signed in."""
    return [Budget("password_check", user_id, 5, 1)]


def unguessable(kind: str, origin: callers.Origin, name: str = "") -> list[Budget]:
    """What a wrong token or secret of 256 random bits costs: it keeps noise out, no more."""
    return [Budget(kind, f"{name}\0{origin.network}", 60, 30)]


@dataclass(frozen=True, slots=True)
class Rates:
    """How many calls with a credential a place may make in a minute, and how many of one account, session or service may succeed."""

    per_address: int = 6000
    per_account: int = 600


def calls(kind: str, origin: callers.Origin, per_minute: int) -> Budget:
    """What every call with a credential costs the place it comes from, whatever becomes of it."""
    return Budget(f"{kind}_calls", origin.network, per_minute, per_minute)


def successes(kind: str, whose: str, per_minute: int) -> Budget:
    """What it costs when the credential is the right one."""
    return Budget(f"{kind}_successes", whose, per_minute, per_minute)


class Attempt:
    """One attempt; a failure costs."""

    def __init__(self) -> None:
        self.has_failed = False

    def failed(self) -> None:
        """The secret was wrong."""
        self.has_failed = True


class Throttle:
    """Counts attempts."""

    def __init__(self, counted: Counted, rates: Rates | None = None) -> None:
        self._counted, self._rates = counted, rates or Rates()

    async def called(self, kind: str, origin: callers.Origin) -> None:
        """A call with a credential. Raises `RateLimited` when there were too many from this place."""
        await self._counted.take(*calls(kind, origin, self._rates.per_address).counted)

    async def succeeded(self, kind: str, whose: str) -> None:
        """The credential is the right one. Raises `RateLimited` when it was too often: nothing is issued then."""
        await self._counted.take(*successes(kind, whose, self._rates.per_account).counted)

    async def wrong(self, budgets: Sequence[Budget]) -> None:
        """A secret that nobody can guess was wrong. Raises `RateLimited` when too many were: nothing needs to be noted then.

        It is looked at first, so that noise does not keep those out who have the real one.
        """
        for budget in budgets:
            try:
                await self._counted.take(*budget.counted)
            except errors.RateLimited as refused:
                raise _too_many(budget.kind, refused) from None

    @contextlib.asynccontextmanager
    async def guess(
        self, budgets: Sequence[Budget], ran_out: Callable[[Budget], Awaitable[None]] | None = None
    ) -> AsyncIterator[Attempt]:  # fmt: skip
        """An attempt with a secret that people choose. It is paid in advance, so that many at a time gain nothing, and given back
        unless it failed. Raises `RateLimited`, which does not say whether there is such an account; `ran_out` is told why."""
        taken: list[Budget] = []
        attempt = Attempt()
        try:
            for budget in budgets:
                await self._counted.take(*budget.counted)
                taken.append(budget)
        except errors.RateLimited as refused:
            await self._give_back(taken)
            spent = budgets[len(taken)]
            if ran_out is not None:
                await ran_out(spent)
            raise _too_many(spent.kind, refused) from None
        try:
            yield attempt
        except errors.NetraError:
            # what went wrong may have been the platform; whoever goes away in the middle has paid
            if not attempt.has_failed:
                await self._give_back(taken)
            raise
        if not attempt.has_failed:
            await self._give_back(taken)

    async def worth_noting(self, origin: callers.Origin, spent: Budget) -> bool:
        """Whether neither what ran out nor the place was noted within the last minute: few entries come of whatever is sent."""
        try:
            for key in (spent.counted[1], origin.network):
                await self._counted.take(*Budget("throttle_notes", f"{spent.kind}\0{key}", 1, 1).counted)
        except errors.RateLimited:
            return False
        return True

    async def _give_back(self, taken: Sequence[Budget]) -> None:
        for budget in taken:
            await self._counted.give_back(*budget.counted)


def _too_many(kind: str, refused: errors.RateLimited) -> errors.RateLimited:
    _refused.add(1, {"kind": kind})
    _log.info("too many failed attempts", kind=kind)
    return errors.RateLimited("Too many attempts failed. Wait, then try again.", retry_after_ms=refused.retry_after_ms)
