"""What agents of the analysis take as input from one another, or from a person: checked, with the place of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from typing_extensions import TypedDict

from netra import errors
from services.dispatcher.tools.spend import figures


class Opportunity(TypedDict):
    """What a ranking needs of an opportunity."""

    kind: str
    title: str
    monthly_saving: float
    overlaps_with: list[str]


class Action(TypedDict):
    """Something to do."""

    rank: int
    action: str
    kind: str
    monthly_saving: float
    effort: str
    owner_hint: str


class Analysis(figures.CostBreakdown):
    """The result of an analysis but for its files."""

    message: str
    usage_profile: figures.UsageProfile
    optimization_opportunities: list[figures.Opportunity]
    combined_monthly_saving: float
    actions: list[Action]
    input: figures.Loaded


_OPPORTUNITIES = pydantic.TypeAdapter(list[Opportunity])
_ANALYSIS = pydantic.TypeAdapter(Analysis)


def opportunities(inputs: Mapping[str, Any]) -> list[Opportunity]:
    """`inputs.opportunities`. Raises `InvalidPayload` naming what is wrong in it."""
    found: list[Opportunity] = _checked(_OPPORTUNITIES, inputs, "opportunities")
    return found


def analysis(inputs: Mapping[str, Any]) -> Analysis:
    """`inputs.result`, as spend-analyst returns it. Raises `InvalidPayload` naming what is wrong in it."""
    found: Analysis = _checked(_ANALYSIS, inputs, "result")
    return found


def _checked(shape: pydantic.TypeAdapter[Any], inputs: Mapping[str, Any], name: str) -> Any:
    try:
        return shape.validate_python(inputs[name])
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(["inputs", name, *map(str, first["loc"])])
        raise errors.InvalidPayload(f"{place}: {first['msg']}. Give what spend-analyst or optimization returned.", field=place) from None
