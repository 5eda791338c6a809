"""Which agent takes a request, and what is done first."""

from __future__ import annotations

from typing import Any

import pytest

from netra import errors
from services.dispatcher.agents import ranking, registry, shapes, spend


@pytest.mark.parametrize(
    ("request_", "inputs", "agent"),
    [
        ("Where does the money go?", {"artifact_id": "x"}, "spend-analyst"),
        ("Have a look.", {"artifact_id": "x"}, "spend-analyst"),
        ("Where does the money go?", {}, ""),
        ("How much did we SPEND last week?", {}, ""),
        ("What could be cheaper in our usage log?", {}, ""),
        ("Rivers carry water.", {}, "text-analyst"),
        ("The coast is accosted by a suspended hillbilly.", {}, "text-analyst"),
        ("Count the tokens of this sentence.", {"pace_s": 1}, "text-analyst"),
    ],
)
def test_a_request_goes_to_the_agent_for_it(request_: str, inputs: dict[str, Any], agent: str) -> None:
    assert spend.route(request_, inputs)[0] == agent


def test_the_agents_of_the_analysis_can_each_be_started() -> None:
    names = registry.AgentRegistry(registry.built_in()).names()
    assert names == ["actions", "data", "optimization", "reporting", "spend-analyst", "supervisor", "text-analyst", "triage"]


def _opportunity(kind: str, saving: float, overlaps_with: list[str]) -> dict[str, Any]:
    return {"kind": kind, "title": f"about {kind}", "monthly_saving": saving, "overlaps_with": overlaps_with}


def test_the_greatest_saving_comes_first_and_the_smaller_effort_of_equals() -> None:
    found = [
        _opportunity("peak_shaving", 0, []),
        _opportunity("batch_window", 40.0, ["prompt_cache"]),
        _opportunity("output_cap", 40.0, []),
        _opportunity("prompt_cache", 90.5, ["batch_window"]),
        _opportunity("something_new", 1.0, []),
    ]
    actions = ranking.ranked(found)
    assert [(one["rank"], one["kind"], one["monthly_saving"]) for one in actions] == [
        (1, "prompt_cache", 90.5), (2, "output_cap", 40.0), (3, "batch_window", 40.0), (4, "something_new", 1.0), (5, "peak_shaving", 0),
    ]  # fmt: skip
    assert all(one["action"] and one["effort"] and one["owner_hint"] for one in actions)


def test_an_action_says_when_an_earlier_one_takes_part_of_its_saving() -> None:
    found = [_opportunity("batch_window", 40.0, ["prompt_cache"]), _opportunity("prompt_cache", 90.5, ["batch_window"])]
    first, second = (str(action["action"]) for action in ranking.ranked(found))
    assert "saves less" not in first
    assert second.endswith("batch interface. Once 1 is done, this saves less.")


def test_an_action_names_what_was_found_even_with_braces_in_it() -> None:
    found = {**_opportunity("cheaper_model", 1.0, []), "title": "Move simple requests from {0} to {title}"}
    assert str(ranking.ranked([found])[0]["action"]).startswith("Move simple requests from {0} to {title}: ")


def test_nothing_found_is_nothing_to_do() -> None:
    assert ranking.ranked([]) == []


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"opportunities": {}}, "inputs.opportunities"),
        ({"opportunities": [1]}, "inputs.opportunities.0"),
        ({"opportunities": [{}]}, "inputs.opportunities.0.kind"),
        (
            {"opportunities": [{"kind": "x", "title": "y", "monthly_saving": "much", "overlaps_with": []}]},
            "inputs.opportunities.0.monthly_saving",
        ),
    ],
)
def test_opportunities_of_another_shape_are_refused_with_their_place(given: dict[str, Any], place: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        shapes.opportunities(given)
    assert refused.value.details["field"] == place


@pytest.mark.parametrize("given", [{}, [], {"usage_profile": {}, "cost_breakdown": None}])
def test_a_result_of_another_shape_is_refused(given: Any) -> None:
    with pytest.raises(errors.InvalidPayload, match=r"inputs\.result"):
        shapes.analysis({"result": given})
