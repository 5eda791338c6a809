"""May this caller call this tool: asked at each call, so that a change of the policy counts at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chassis import audit, identity, telemetry, trust
from netra import errors
from netra.auth.v1 import auth_pb2
from netra.tool import ToolSpec
from services.dispatcher import runs

_EXECUTE = "tools:execute"
_waiting = telemetry.meter.create_up_down_counter("netra.tools.waiting_for_auth", description="Calls that wait until auth is heard of.")


class Counted(Protocol):
    """Where calls are counted, for all processes."""

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count. Raises `RateLimited`, or `QuotaExceeded` when none is allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Holder:
    """On whose authority calls are made; `scope` narrows it."""

    user_id: str
    roles: tuple[str, ...]
    tier: str
    scope: frozenset[str] | None
    caller: identity.Caller
    session_id: str = ""
    issued_at: float = 0.0


class Permits:
    """What one caller may call, and how often. `now` tells what the user got in place of what `holder` says."""

    def __init__(
        self, holder: Holder, trusted: trust.Trust, counted: Counted, refusals: audit.Refusals,
        now: Callable[[], runs.Rights | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._holder, self._trust, self._counted, self._refusals, self._now = holder, trusted, counted, refusals, now

    def holders(self) -> list[Holder]:
        """All of whom must be allowed what is to be done: the user as they were, and as they are."""
        now = self._now()
        return [self._holder] if now is None else [self._holder, dataclasses.replace(self._holder, roles=now.roles, tier=now.tier)]

    def may_call(self, spec: ToolSpec) -> bool:
        """Whether `require` would let it pass."""
        try:
            self.require(spec)
        except errors.PermissionDenied:
            return False
        return True

    def require(self, spec: ToolSpec) -> None:
        """Raises `PermissionDenied` naming the missing permission, or the tiers or roles that may call the tool."""
        for holder in self.holders():
            self._require(holder, spec)

    def _require(self, holder: Holder, spec: ToolSpec) -> None:
        rule = self._trust.tool_rule(spec.name)
        for permission in filter(None, (_EXECUTE, spec.permission, rule.permission if rule is not None else "")):
            try:
                identity.require(self._trust, holder, permission)
            except errors.PermissionDenied as refused:
                denied = errors.PermissionDenied(f"The tool {spec.name}: {refused.message}", tool=spec.name)
                denied.details |= refused.details
                raise denied from None
        if rule is not None:
            _narrowed(rule, holder, spec.name)

    async def awaited(self, spec: ToolSpec) -> None:
        """Returns when auth was heard of lately and nothing stands against the call by now. What follows at once is allowed.

        Raises `PermissionDenied`; `Cancelled` when the user was stopped; `DeadlineExceeded` when the tool's own time passed.
        """
        if not self._trust.fresh:
            _waiting.add(1)
            try:
                async with asyncio.timeout(spec.timeout_s):
                    await self._trust.awaited_fresh()
            except TimeoutError:
                message = f"The tool {spec.name} was not called: whether you still may is not known while auth cannot be reached."
                raise errors.DeadlineExceeded(message, tool=spec.name) from None
            finally:
                _waiting.add(-1)
        try:
            self.require(spec)
        except errors.PermissionDenied as refused:
            self.note(f"tool {spec.name}", refused)
            raise
        withdrawn = self._trust.revocation(self._holder)
        if withdrawn is not None and withdrawn.security:
            # the cancel of the run is on its way, and ends it as what it is
            await asyncio.sleep(spec.timeout_s)
            raise errors.Cancelled("The session was ended for reasons of security.")

    async def count(self) -> None:
        """Count one call. Raises `RateLimited` when there were too many in a minute, `QuotaExceeded` when the tier has none."""
        holder = self.holders()[-1]
        await self._counted.take("tool_calls", holder.user_id, self._trust.limits(holder.tier).tool_calls_per_minute)

    def note(self, what: str, error: errors.NetraError) -> None:
        """Tell the record of access of a refusal."""
        self._refusals.note(what, error, self._holder.caller)


def _narrowed(rule: auth_pb2.ToolRule, holder: Holder, name: str) -> None:
    if rule.tiers and holder.tier not in rule.tiers:
        message = f"The tool {name} is not part of the tier {holder.tier}: it comes with {', '.join(rule.tiers)}."
        raise errors.PermissionDenied(message, tiers=",".join(rule.tiers), tool=name)
    if rule.roles and not set(rule.roles) & set(holder.roles):
        message = f"The tool {name} may be called by the roles {', '.join(rule.roles)} only."
        raise errors.PermissionDenied(message, roles=",".join(rule.roles), tool=name)
