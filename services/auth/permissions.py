"""Role and tier -> the set of permissions; pure."""

from __future__ import annotations

from collections.abc import Iterable

# counts up whenever the tables below change
VERSION = 2
ROLES = ("admin", "user", "readonly")
TIERS = ("free", "early", "business", "enterprise", "internal")

_READ = frozenset(
    {"agents:read", "artifacts:read", "contexts:read", "events:read", "runs:read", "session:read", "threads:read", "tools:read"}
)
_OWN = frozenset({"session:write"})
_USE = frozenset({"artifacts:write", "runs:write", "tools:execute"})
_ADMINISTER = frozenset({"users:write"})
ALL = _READ | _OWN | _USE | _ADMINISTER

OF_ROLE: dict[str, frozenset[str]] = {"readonly": _READ | _OWN, "user": _READ | _OWN | _USE, "admin": ALL}
OF_TIER: dict[str, frozenset[str]] = {"free": ALL, "early": ALL, "business": ALL, "enterprise": ALL, "internal": ALL}


def granted(role: str, tier: str) -> frozenset[str]:
    """What one role may do in one tier; nothing for unknown ones."""
    return OF_ROLE.get(role, frozenset()) & OF_TIER.get(tier, frozenset())


def of(roles: Iterable[str], tier: str) -> frozenset[str]:
    """What the roles together may do in the tier."""
    return frozenset().union(*(granted(role, tier) for role in roles))
