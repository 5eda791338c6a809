"""May this caller call this tool: asked at each call, so that a change of the policy counts at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chassis import audit, identity, telemetry, trust
from netra import declarations, errors
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
        # the tools that passed, under this policy and with what the user has by now
        self._under: tuple[object, object] = (None, None)
        self._passed: dict[str, ToolSpec] = {}

    def holders(self) -> list[Holder]:
        """All of whom must be allowed what is to be done: the user as they were, and as they are."""
        now = self._now()
        return [self._holder] if now is None else [self._holder, dataclasses.replace(self._holder, roles=now.roles, tier=now.tier)]

    def may_call(self, spec: ToolSpec) -> bool:
        """Whether `require` would let it pass."""
        return self.sight()(spec)

    def sight(self) -> Callable[[ToolSpec], bool]:
        """Tells of one tool after the other whether `require` would let it pass, by what is known now: for lists of thousands."""
        holders = [(holder, self._permissions(holder)) for holder in self.holders()]
        rule_of = self._trust.tool_rule
        return lambda spec: all(_allowed(holder, mine, spec, rule_of(spec.name)) for holder, mine in holders)

    def _permissions(self, holder: Holder) -> frozenset[str]:
        found = self._trust.permissions(holder.roles, holder.tier)
        return found if holder.scope is None else found & holder.scope

    def comes_with(self, spec: ToolSpec, tier: str) -> bool:
        """Whether users of a tier have the tool, if their role and permissions allow it: by its own minimum and the policy's rule."""
        rule = self._trust.tool_rule(spec.name)
        return _reaches(tier, spec.min_tier) and (rule is None or not rule.tiers or tier in rule.tiers)

    def require(self, spec: ToolSpec) -> None:
        """Raises `PermissionDenied` naming the missing permission, or the tiers or roles that may call the tool."""
        rules, now = self._trust.rules, self._now()
        if self._under[0] is not rules or self._under[1] is not now:
            self._under, self._passed = (rules, now), {}
        if self._passed.get(spec.name) is not spec:
            for holder in self.holders():
                self._require(holder, spec)
            self._passed[spec.name] = spec

    def _require(self, holder: Holder, spec: ToolSpec) -> None:
        rule = self._trust.tool_rule(spec.name)
        for permission in filter(None, (_EXECUTE, spec.permission, rule.permission if rule is not None else "")):
            try:
                identity.require(self._trust, holder, permission)
            except errors.PermissionDenied as refused:
                denied = errors.PermissionDenied(f"The tool {spec.name}: {refused.message}", tool=spec.name)
                denied.details |= refused.details
                raise denied from None
        _declared(spec, holder)
        if rule is not None:
            _narrowed(rule, holder, spec.name)

    def ready(self, spec: ToolSpec) -> bool:
        """Whether `awaited` would return at once. Raises `PermissionDenied`."""
        if not self._trust.fresh or self._trust.revocation(self._holder) is not None:
            return False
        self._require_noted(spec)
        return True

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
        self._require_noted(spec)
        withdrawn = self._trust.revocation(self._holder)
        if withdrawn is not None and withdrawn.security:
            # the cancel of the run is on its way, and ends it as what it is
            await asyncio.sleep(spec.timeout_s)
            raise errors.Cancelled("The session was ended for reasons of security.")

    def _require_noted(self, spec: ToolSpec) -> None:
        try:
            self.require(spec)
        except errors.PermissionDenied as refused:
            self.note(f"tool {spec.name}", refused)
            raise

    async def count(self) -> None:
        """Count one call. Raises `RateLimited` when there were too many in a minute, `QuotaExceeded` when the tier has none."""
        holder = self.holders()[-1]
        await self._counted.take("tool_calls", holder.user_id, self._trust.limits(holder.tier).tool_calls_per_minute)

    def concurrent(self) -> int:
        """How many runs the user may have executing at a time."""
        return int(self._trust.limits(self.holders()[-1].tier).concurrent_runs)

    def note(self, what: str, error: errors.NetraError) -> None:
        """Tell the record of access of a refusal."""
        self._refusals.note(what, error, self._holder.caller)


def _reaches(tier: str, least: str) -> bool:
    return not least or (tier in declarations.TIERS and declarations.TIERS.index(tier) >= declarations.TIERS.index(least))


def _high_enough(least: str) -> tuple[str, ...]:
    """The roles from one upwards."""
    return declarations.ROLES[declarations.ROLES.index(least) :] if least else declarations.ROLES


def _allowed(holder: Holder, mine: frozenset[str], spec: ToolSpec, rule: auth_pb2.ToolRule | None) -> bool:
    if _EXECUTE not in mine or spec.permission not in mine or not _reaches(holder.tier, spec.min_tier):
        return False
    if spec.min_role and not set(holder.roles) & set(_high_enough(spec.min_role)):
        return False
    if rule is None:
        return True
    permitted = not rule.permission or rule.permission in mine
    return permitted and (not rule.tiers or holder.tier in rule.tiers) and (not rule.roles or not set(rule.roles).isdisjoint(holder.roles))


def _declared(spec: ToolSpec, holder: Holder) -> None:
    """What the tool itself asks for. Raises `PermissionDenied`."""
    if not _reaches(holder.tier, spec.min_tier):
        having = declarations.TIERS[declarations.TIERS.index(spec.min_tier) :]
        message = f"The tool {spec.name} is not part of the tier {holder.tier}: it comes with {', '.join(having)}."
        raise errors.PermissionDenied(message, tiers=",".join(having), tool=spec.name)
    roles = _high_enough(spec.min_role)
    if spec.min_role and set(roles).isdisjoint(holder.roles):
        message = f"The tool {spec.name} may be called by the roles {', '.join(roles)} only."
        raise errors.PermissionDenied(message, roles=",".join(roles), tool=spec.name)


def _narrowed(rule: auth_pb2.ToolRule, holder: Holder, name: str) -> None:
    if rule.tiers and holder.tier not in rule.tiers:
        message = f"The tool {name} is not part of the tier {holder.tier}: it comes with {', '.join(rule.tiers)}."
        raise errors.PermissionDenied(message, tiers=",".join(rule.tiers), tool=name)
    if rule.roles and not set(rule.roles) & set(holder.roles):
        message = f"The tool {name} may be called by the roles {', '.join(rule.roles)} only."
        raise errors.PermissionDenied(message, roles=",".join(rule.roles), tool=name)
