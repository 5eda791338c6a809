"""What to do about opportunities, and in which order; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class _Step:
    """`do` may name the opportunity's title, where that says more than the kind does."""

    do: str
    effort: str
    owner_hint: str


_EFFORTS = ("low", "medium", "high")
_STEPS = {
    "prompt_cache": _Step(
        "Put the part of a prompt that never changes first and let the provider cache it", "low", "who writes the prompts"
    ),
    "output_cap": _Step("{title}, in the code that calls the models", "low", "who owns the calling code"),
    "cheaper_model": _Step("{title}: behind a switch, after comparing answers", "medium", "who owns the application"),
    "batch_window": _Step("Move requests that nobody waits for to the provider's batch interface", "medium", "who owns the scheduled jobs"),
    "peak_shaving": _Step("Queue what can wait a minute at the peak: it saves capacity, not money", "medium", "who runs the platform"),
}  # fmt: skip
_OTHER = _Step("Look into this: {title}", "medium", "who owns the application")


def ranked(opportunities: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """One action for each opportunity: the greatest saving first, the smaller effort first where savings are equal."""
    ordered = sorted(opportunities, key=lambda one: (-one["monthly_saving"], _EFFORTS.index(_step(one).effort), one["kind"]))
    return [_action(rank, one, ordered[: rank - 1]) for rank, one in enumerate(ordered, 1)]


def _step(opportunity: Mapping[str, Any]) -> _Step:
    return _STEPS.get(opportunity["kind"], _OTHER)


def _action(rank: int, opportunity: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    step = _step(opportunity)
    shared = [str(place) for place, one in enumerate(earlier, 1) if one["kind"] in opportunity["overlaps_with"] and one["monthly_saving"]]
    done = f"Once {', '.join(shared)} {'is' if len(shared) == 1 else 'are'} done, this saves less."
    after = f" {done}" if shared and opportunity["monthly_saving"] else ""
    return {
        "rank": rank,
        "action": f"{step.do.format(title=opportunity['title'])}.{after}",
        "kind": opportunity["kind"],
        "monthly_saving": opportunity["monthly_saving"],
        "effort": step.effort,
        "owner_hint": step.owner_hint,
    }
