"""Rows that are sums: over what time, at which tier, and what they cannot tell."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price

from tests.unit.dispatcher.spend import bench, recount


def analysed(folder: Path, text: str, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How a log was read, its cost, its opportunities."""
    loaded = bench.load(folder, text.encode(), **given)
    return loaded, bench.asked(folder, {"tool": "cost_breakdown"}), bench.asked(folder, {"tool": "spend_opportunities"})


def days(*numbers: int) -> str:
    """A generic log of days, each with more tokens than any one prompt has."""
    return "date,model,input_tokens,output_tokens\n" + "".join(f"2025-10-{number:02},claude-sonnet-4-5,900000,1000\n" for number in numbers)


@pytest.mark.parametrize(("text", "hours"), [(days(*range(1, 8)), 168), (days(1), 24), (days(1, 8), 192)], ids=["week", "day", "two"])
def test_a_date_is_a_day_of_short_prompts(text: str, hours: int, tmp_path: Path) -> None:
    loaded, costs, found = analysed(tmp_path, text)
    rows = loaded["rows"]
    short = (
        calc_price(Usage(input_tokens=150_000), "claude-sonnet-4-5", genai_request_timestamp=datetime(2025, 10, 1, tzinfo=UTC)).total_price
        * 6
    )
    answers = calc_price(
        Usage(input_tokens=0, output_tokens=1000), "claude-sonnet-4-5", genai_request_timestamp=datetime(2025, 10, 1, tzinfo=UTC)
    )
    assert costs["total_cost"] == recount.usd((short + answers.total_price) * rows)
    assert costs["monthly"]["window_hours"] == hours
    assert f"{rows:,} rows have a day and no time: each is the sum of that day." in loaded["assumptions"]
    assert any("as if its prompts were short" in said for said in loaded["assumptions"])
    assert [one["kind"] for one in found["opportunities"]] in ([], ["batch_window"])


def test_a_day_of_requests_whose_number_is_known_has_the_tier_of_their_mean(tmp_path: Path) -> None:
    text = "date,model,input_tokens,output_tokens,requests\n2025-10-01,claude-sonnet-4-5,900000,0,3\n"
    _, costs, _ = analysed(tmp_path, text)
    one = calc_price(Usage(input_tokens=300_000), "claude-sonnet-4-5", genai_request_timestamp=datetime(2025, 10, 1, tzinfo=UTC))
    assert costs["total_cost"] == recount.usd(one.total_price * 3)


def test_a_day_on_which_the_clocks_change_has_its_own_length(tmp_path: Path) -> None:
    _, costs, _ = analysed(tmp_path, days(26), zone="Europe/Berlin")
    assert costs["monthly"]["window_hours"] == 25


HEAD = "start_time,end_time,model,input_tokens,output_tokens,num_model_requests\n"


def test_a_bucket_lasts_until_it_ends_also_with_one_request(tmp_path: Path) -> None:
    loaded, costs, found = analysed(tmp_path, f"{HEAD}1760000000,1760086400,gpt-4o,10000,500,1\n")
    assert costs["monthly"]["window_hours"] == 24
    assert [one["kind"] for one in found["opportunities"]] == ["batch_window"]
    assert any("nobody knows in which minute" in said for said in found["notes"])
    assert any("busiest minute and hour are those in which most of it begins" in said for said in loaded["assumptions"])


def test_buckets_of_which_some_do_not_say_when_they_end_last_as_long_as_the_smallest_step(tmp_path: Path) -> None:
    text = f"{HEAD}1760000000,,gpt-4o,1,1,1\n1760003600,1760003700,gpt-4o,1,1,1\n1760010800,,gpt-4o,1,1,2\n"
    assert analysed(tmp_path, text)[1]["monthly"]["window_hours"] == 4


def test_single_requests_have_a_busiest_minute(tmp_path: Path) -> None:
    _, _, found = analysed(tmp_path, "time,model,input,output\n2025-10-01T00:00:00Z,gpt-4o,1,1\n")
    assert [one["kind"] for one in found["opportunities"]][-1] == "peak_shaving"
