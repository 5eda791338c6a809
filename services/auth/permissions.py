"""Role and tier -> permissions, limits, features: the policy of an installation that has not changed it; pure."""

from __future__ import annotations

from collections.abc import Iterable

# counts up whenever the tables below change: installations that never changed their policy then get the new tables
VERSION = 4
ROLES = ("admin", "user", "readonly")
TIERS = ("free", "early", "business", "enterprise", "internal")

_READ = frozenset(
    {
        "agents:read", "api_keys:read", "artifacts:read", "contexts:read", "events:read", "runs:read", "session:read", "threads:read",
        "tools:read",
    }
)  # fmt: skip
_OWN = frozenset({"data:export", "session:write"})
_USE = frozenset({"api_keys:write", "artifacts:write", "data:erase", "events:erase", "runs:write", "threads:write", "tools:execute"})
_ADMINISTER = frozenset({"audit:read", "contexts:audit", "policy:read", "users:read", "users:write"})
# what concerns the users of all tenants is left to those who run the installation
_OPERATE = frozenset({"audit:export", "policy:write", "tools:register"})
ALL = _READ | _OWN | _USE | _ADMINISTER | _OPERATE

OF_ROLE: dict[str, frozenset[str]] = {"readonly": _READ | _OWN, "user": _READ | _OWN | _USE, "admin": ALL}
OF_TIER: dict[str, frozenset[str]] = {**dict.fromkeys(TIERS, ALL - _OPERATE), "internal": ALL}

_LIMITS = (
    "runs_per_minute", "concurrent_runs", "queued_runs", "tool_calls_per_minute", "sockets", "frames_per_minute", "requests_per_minute",
    "retention_days", "monthly_cost_micro_usd", "max_frame_bytes", "artifacts", "artifact_bytes",
)  # fmt: skip
_USD, _FRAME, _MIB = 1_000_000, 65_536, 1024 * 1024
_FIGURES = {
    "free": (10, 2, 20, 60, 3, 120, 120, 7, 5 * _USD, _FRAME, 100, 256 * _MIB),
    "early": (20, 3, 50, 120, 3, 120, 300, 14, 20 * _USD, _FRAME, 500, 1024 * _MIB),
    "business": (60, 10, 200, 600, 10, 300, 600, 30, 500 * _USD, _FRAME, 5_000, 10 * 1024 * _MIB),
    "enterprise": (300, 50, 1_000, 6_000, 50, 600, 3_000, 365, 10_000 * _USD, _FRAME, 50_000, 100 * 1024 * _MIB),
    "internal": (100_000, 200, 10_000, 1_000_000, 200, 100_000, 100_000, 365, 1_000_000 * _USD, _FRAME, 1_000_000, 1024 * 1024 * _MIB),
}
LIMITS: dict[str, dict[str, int]] = {tier: dict(zip(_LIMITS, figures, strict=True)) for tier, figures in _FIGURES.items()}

_PAID = ("business", "enterprise", "internal")
_LARGE = ("enterprise", "internal")
FEATURES: dict[str, tuple[str, ...]] = {
    "basic_agents": TIERS,
    "advanced_agents": _PAID,
    "integrations_basic": _PAID,
    "custom_agents": _LARGE,
    "dedicated_support": _LARGE,
    "integrations_custom": _LARGE,
    "sso": _LARGE,
}


def granted(role: str, tier: str) -> frozenset[str]:
    """What one role may do in one tier; nothing for unknown ones."""
    return OF_ROLE.get(role, frozenset()) & OF_TIER.get(tier, frozenset())


def of(roles: Iterable[str], tier: str) -> frozenset[str]:
    """What the roles together may do in the tier."""
    return frozenset().union(*(granted(role, tier) for role in roles))
