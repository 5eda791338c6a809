"""The chart: every figure is in it, it is readable in light and dark, and a file cannot put anything into it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from xml.etree import ElementTree

import pytest

from services.dispatcher.tools import registry
from services.dispatcher.tools.spend import chart

SVG = "{http://www.w3.org/2000/svg}"
PROFILE = {"from": "2026-09-07T00:03:55.591000Z", "to": "2026-09-08T02:59:00.000000Z"}


def costs(hours: int = 27, models: int = 2, *, priced: bool = True, name: str = "gpt-4o") -> dict[str, Any]:
    first = datetime(2026, 9, 7, tzinfo=UTC)
    by_hour = [
        {
            "hour": f"{first + timedelta(hours=hour):%Y-%m-%dT%H:%M:%SZ}",
            "requests": hour + 1,
            "cost": round(hour * 0.1, 6) if priced else 0.0,
        }
        for hour in range(hours)
    ]
    by_model = [{"model": f"{name}-{number}", "requests": 5, "cost": 2.5 / (number + 1)} for number in range(models)] if priced else []
    breakdown = {"by_hour": by_hour, "by_model": by_model, "unpriced": [{"model": None, "requests": 3}]}
    return {"total_cost": 3.75 if priced else 0, "cost_breakdown": breakdown}


def drawn(found: dict[str, Any]) -> ElementTree.Element:
    given = chart.arguments(PROFILE, found)
    registry.ToolRegistry([chart.spend_chart]).get("spend_chart").check_arguments(given)
    text = chart.draw("a to b", given["total_cost"], given["step_h"], given["bars"], given["models"])
    return ElementTree.fromstring(text)  # noqa: S314  drawn a line above


def titles(root: ElementTree.Element) -> list[str]:
    return [str(title.text) for title in root.iter(f"{SVG}title")]


def test_every_bar_tells_its_figures() -> None:
    root = drawn(costs())
    told = titles(root)
    assert told[0] == "AI spend: $3.75"
    assert "2026-09-07 05:00 to 2026-09-07 06:00 UTC: $0.50, 6 requests" in told
    assert told[-3:] == ["gpt-4o-0: $2.50, 5 requests", "gpt-4o-1: $1.25, 5 requests", "(no model): no price, 3 requests"]
    assert sum(" UTC: " in title for title in told) == 27


def test_it_says_what_it_is_to_who_cannot_see_it() -> None:
    root = drawn(costs())
    assert root.get("role") == "img"
    described = {str(element.get("id")): str(element.text) for element in root.iter() if element.get("id")}
    assert str(root.get("aria-labelledby")).split() == list(described)
    assert "gpt-4o-0: $2.50, 5 requests" in described["about"]


def test_it_has_colours_for_light_and_dark_and_refers_to_nothing() -> None:
    given = chart.arguments(PROFILE, costs())
    text = chart.draw("a to b", given["total_cost"], given["step_h"], given["bars"], given["models"])
    assert "prefers-color-scheme: dark" in text
    assert not re.findall(r"href|url\(|@import|<script|<image|<foreignObject", text)
    assert re.findall(r"\w+://[^\"']+", text) == ["http://www.w3.org/2000/svg"]


def test_every_coloured_thing_has_a_dark_colour_of_its_own() -> None:
    root = drawn(costs())
    style = str(next(root.iter(f"{SVG}style")).text)
    for element in root.iter():
        for attribute in ("fill", "stroke"):
            if element.get(attribute):
                classes = str(element.get("class")).split()
                assert any(re.search(rf"\.{name} {{ {attribute}: #", style) for name in classes), (element.tag, element.attrib)


def test_a_name_from_the_file_stays_text() -> None:
    root = drawn(costs(name='</title><script>alert("1")</script>\x00\x1b\ud800'))
    assert not list(root.iter(f"{SVG}script"))
    assert any("<script>" in title and "\ufffd" in title for title in titles(root))


def test_without_prices_it_shows_requests() -> None:
    told = titles(drawn(costs(priced=False)))
    assert told[0] == "AI usage: 378 requests"
    assert "2026-09-07 05:00 to 2026-09-07 06:00 UTC: no price, 6 requests" in told


@pytest.mark.parametrize("hours", [1, 2, 192, 193, 24 * 60, 24 * 365 * 3])
def test_a_long_log_has_few_bars_that_add_up_to_the_same(hours: int) -> None:
    found = costs(hours)["cost_breakdown"]["by_hour"]
    step_h, bars = chart.binned(found)
    assert len(bars) <= chart.MOST_BARS
    assert (step_h == 1) == (hours <= 192)
    assert sum(bar["requests"] for bar in bars) == sum(row["requests"] for row in found)
    assert sum(Decimal(str(bar["cost"])) for bar in bars) == sum(Decimal(str(row["cost"])) for row in found)
    drawn(costs(hours))


def test_a_log_with_a_time_far_off_can_still_be_drawn() -> None:
    found = costs(1)
    found["cost_breakdown"]["by_hour"] = [
        {"hour": "0001-01-01T00:00:00Z", "requests": 1, "cost": 1.0},
        {"hour": "9999-12-31T23:00:00Z", "requests": 1, "cost": 1.0},
    ]
    assert sum(" UTC: " in title for title in titles(drawn(found))) == 2


def test_many_models_are_put_together_and_long_names_cut() -> None:
    told = titles(drawn(costs(models=30, name=f"gpt-4o{'o' * 100_000}")))
    assert max(map(len, told)) < 200
    assert told[-1].startswith("20 others: $")
    assert len([title for title in told if title.startswith("gpt-4o")]) == chart.MOST_MODELS - 1


@pytest.mark.parametrize(
    ("most", "in_usd", "labels"),
    [
        (5.46, True, ["$0", "$2", "$4", "$6", "$8"]),
        (0.3, True, ["$0.00", "$0.10", "$0.20", "$0.30", "$0.40"]),
        (0.00002, True, ["$0.00000", "$0.00001", "$0.00002", "$0.00003"]),
        (15606, False, ["0", "5,000", "10,000", "15,000", "20,000"]),
        (1, False, ["0", "1", "2"]),
        (0, False, ["0", "1", "2"]),
        (380_000_000, True, ["$0M", "$200M", "$400M", "$600M"]),
    ],
)
def test_the_axis_has_round_numbers(most: float, in_usd: bool, labels: list[str]) -> None:
    assert [label for _, label in chart._Measure(in_usd).axis(most)] == labels
