"""What the policy in force allows, ready to be asked; pure."""

from __future__ import annotations

from collections.abc import Iterable

from netra.auth.v1 import auth_pb2

_WILD = "*"


class Rules:
    """One version of the policy, compiled. What it does not name is allowed to nobody, and nobody is entitled to any of it."""

    def __init__(self, policy: auth_pb2.Policy) -> None:
        self.policy = policy
        self._grants = {(grant.role, grant.tier): frozenset(grant.permissions) for grant in policy.grants}
        self._limits = {limits.tier: limits for limits in policy.limits}
        self._tools = {rule.tool: rule for rule in policy.tools if not rule.tool.endswith(_WILD)}
        wild = [(rule.tool.removesuffix(_WILD), rule) for rule in policy.tools if rule.tool.endswith(_WILD)]
        # the longest one that fits says most exactly what it means
        self._wild = sorted(wild, key=lambda pair: len(pair[0]), reverse=True)
        self._features = {rule.feature: frozenset(rule.tiers) for rule in policy.features}

    def __bool__(self) -> bool:
        return bool(self._grants)

    def permissions(self, roles: Iterable[str], tier: str) -> frozenset[str]:
        """What the roles allow in the tier; nothing for unknown ones."""
        granted = (self._grants.get((role, tier), frozenset()) for role in roles)
        return frozenset().union(*granted)

    def limits(self, tier: str) -> auth_pb2.TierLimits:
        """What users of the tier are entitled to; nothing at all in an unknown one."""
        known = self._limits.get(tier)
        # what is optional means "no limit of the tier" where it is unset
        return known if known is not None else auth_pb2.TierLimits(tier=tier, artifacts=0, artifact_bytes=0)

    def tool(self, name: str) -> auth_pb2.ToolRule | None:
        """The one rule that counts for a name: the rule of that name, else the longest pattern that fits."""
        exact = self._tools.get(name)
        return exact if exact is not None else next((rule for prefix, rule in self._wild if name.startswith(prefix)), None)

    def tiers_with(self, feature: str) -> frozenset[str]:
        """Who has a feature; nobody, when there is no rule for it."""
        return self._features.get(feature, frozenset())
