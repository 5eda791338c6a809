"""What one contained call may take, by the tier of its user; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from netra import declarations
from services.dispatcher.tools.sandbox import tiers

_MIB = 1024 * 1024
_NAMES = frozenset(field.name for field in dataclasses.fields(tiers.Limits)) - {"wall_s"}
_FREE = {"cpu_s": 5.0, "memory": 256 * _MIB, "processes": 16, "disk": 64 * _MIB, "files": 1024, "file_size": 32 * _MIB, "output": _MIB}
_EARLY = {"memory": 384 * _MIB, "disk": 128 * _MIB, "files": 2048, "file_size": 32 * _MIB, "output": 2 * _MIB}
_LARGE = {
    "cpu_s": 60.0, "memory": 1024 * _MIB, "processes": 64, "disk": 512 * _MIB, "files": 8192, "file_size": 256 * _MIB, "output": 4 * _MIB,
}  # fmt: skip
DEFAULT: Mapping[str, Mapping[str, float]] = {
    "free": _FREE,
    "early": _EARLY,
    "business": {"cpu_s": 30.0, "output": 4 * _MIB},
    "enterprise": _LARGE,
    "internal": _LARGE,
}


def problem(wanted: Mapping[str, Mapping[str, float]]) -> str:
    """What is wrong with limits that an operator sets; empty when nothing is."""
    for tier, limits in wanted.items():
        if tier not in declarations.TIERS:
            return f"{tier!r} is no tier: there are {', '.join(declarations.TIERS)}"
        for name, value in limits.items():
            if name not in _NAMES:
                return f"{tier}.{name} is no limit: there are {', '.join(sorted(_NAMES))}"
            if not value > 0:
                return f"{tier}.{name} must be more than 0"
    return ""


class Allowances:
    """The limits of users by their tier: those of the platform, with what an operator sets on top."""

    def __init__(self, wanted: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Raises `ValueError` naming the limit that cannot be."""
        wanted = wanted or {}
        if wrong := problem(wanted):
            raise ValueError(wrong)
        self._limits = {
            tier: tiers.Limits(wall_s=0.0, **_typed({**DEFAULT.get(tier, {}), **wanted.get(tier, {})})) for tier in declarations.TIERS
        }

    def of(self, tier: str, wall_s: float) -> tiers.Limits:
        """What a call of a user of this tier may take that has `wall_s` seconds left; of an unknown tier no more than the least."""
        return dataclasses.replace(self._limits.get(tier, self._limits[declarations.TIERS[0]]), wall_s=wall_s)


def _typed(limits: Mapping[str, float]) -> dict[str, int]:
    # seconds may be parts of one, everything else is a whole number
    return {name: value if name == "cpu_s" else int(value) for name, value in limits.items()}  # type: ignore[misc]
