"""What users are entitled to here: agents, runs, tool calls; by the policy as it is now."""

from __future__ import annotations

from collections.abc import Callable

from chassis import audit, identity, trust
from netra import errors
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher import runs
from services.dispatcher.settings import DispatcherSettings
from services.dispatcher.tools import permits

_NAME = "dispatcher"
# what it takes to start a run
_START = "runs:write"


class Entitlements:
    """Asks the policy, and counts."""

    def __init__(
        self, trusted: trust.Trust, counted: permits.Counted, refusals: audit.Refusals, settings: DispatcherSettings
    ) -> None:  # fmt: skip
        self._trust, self._counted, self._refusals, self._settings = trusted, counted, refusals, settings

    def of_user(self, user: identity.Principal) -> permits.Permits:
        """What a signed-in user may call."""
        caller = identity.Caller(principal=user)
        holder = permits.Holder(user.user_id, user.roles, user.tier, user.scope, caller, user.session_id, user.issued_at)
        return permits.Permits(holder, self._trust, self._counted, self._refusals)

    def of_context(self, context: UserExecutionContext, now: Callable[[], runs.Rights | None]) -> permits.Permits:
        """What may be called in an execution context: never more than whoever it was opened for, or than they may by now."""
        caller = identity.Caller(service=_NAME, context=context)
        began = context.created_at.timestamp()
        holder = permits.Holder(context.user_id, context.roles, context.tier, context.scope, caller, context.session_id, began)
        return permits.Permits(holder, self._trust, self._counted, self._refusals, now)

    def has_agent(self, user: identity.Principal, spec: AgentSpec) -> bool:
        """Whether `require_agent` would let it pass."""
        return self._trust.has_feature(user.tier, spec.feature)

    def require_agent(self, user: identity.Principal, spec: AgentSpec) -> None:
        """Raises `PermissionDenied` naming the tiers that have the feature the agent belongs to."""
        self._trust.require_feature(user.tier, spec.feature)

    def require_begin(self, mine: permits.Permits, spec: AgentSpec) -> None:
        """Whether a run that waited may still begin. Raises `PermissionDenied` naming what is missing by now."""
        try:
            for holder in mine.holders():
                identity.require(self._trust, holder, _START)
                self._trust.require_feature(holder.tier, spec.feature)
        except errors.PermissionDenied as refused:
            mine.note(f"agent {spec.name}", refused)
            raise

    def require_part(self, mine: permits.Permits, spec: AgentSpec) -> None:
        """Whether an agent may do a part of a run's work. Raises `PermissionDenied` naming the tiers that have its feature."""
        try:
            for holder in mine.holders():
                self._trust.require_feature(holder.tier, spec.feature)
        except errors.PermissionDenied as refused:
            mine.note(f"agent {spec.name}", refused)
            raise

    async def count_run(self, user: identity.Principal) -> None:
        """Count a run that begins. Raises `RateLimited`, or `QuotaExceeded` when the tier has no runs."""
        limits = self._trust.limits(user.tier)
        if not limits.concurrent_runs:
            raise errors.QuotaExceeded(f"The tier {user.tier} has no runs.", tier=user.tier, limit=0)
        await self._counted.take("runs", user.user_id, limits.runs_per_minute)

    def queued(self, tier: str) -> int:
        """How many runs of a user may wait."""
        return min(self._trust.limits(tier).queued_runs, self._settings.queued_per_user)

    def concurrent(self) -> dict[str, int]:
        """How many runs of a user may execute at a time, by tier."""
        return {tier: self._trust.limits(tier).concurrent_runs for tier in sorted(identity.TIERS)}
