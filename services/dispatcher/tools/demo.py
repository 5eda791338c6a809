"""The demo triple: an analysis, an optimization and an action, as objects with `arun`; their figures never change."""

from __future__ import annotations

from typing import Any

from netra.tool import from_object


class Analysis:
    """Tells what was spent on what; a demonstration with fixed figures."""

    name = "demo_analysis"

    async def arun(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The figures."""
        return {
            "total_cost": 15420.50,
            "optimization_opportunities": [
                {"category": "compute", "potential_savings": 2500.00, "confidence": 0.9},
                {"category": "storage", "potential_savings": 850.75, "confidence": 0.8},
            ],
            "cost_breakdown": {"compute": 8500.00, "storage": 3200.00, "network": 3720.50},
        }


class Optimization:
    """Tells what to do about what was spent; a demonstration with fixed figures."""

    name = "demo_optimization"

    async def arun(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The recommendations."""
        return {
            "total_savings": 3350.75,
            "recommendations": [
                {"action": "resize_instances", "monthly_saving": 2500.00, "risk": "low"},
                {"action": "move_cold_storage", "monthly_saving": 850.75, "risk": "low"},
            ],
        }


class Action:
    """Plans what was decided; a demonstration that changes nothing."""

    name = "demo_action"

    async def arun(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plan."""
        return {
            "status": "planned",
            "actions": [
                {"action": "resize_instances", "state": "planned", "automated": True},
                {"action": "move_cold_storage", "state": "planned", "automated": True},
            ],
            "changed": False,
        }


analysis = from_object(Analysis(), tags=("demo",), category="demo", idempotent=True)
optimization = from_object(Optimization(), tags=("demo",), category="demo", idempotent=True)
action = from_object(Action(), tags=("demo",), category="demo", idempotent=True)
BUILT_IN = [analysis, optimization, action]
