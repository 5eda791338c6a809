"""A log of decades is cut into days, one of more days than there are is refused, and no count is too large to be summed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from netra import errors
from services.dispatcher.tools.spend import chart, cost
from tests.unit.dispatcher.spend import bench

_BEGIN = datetime(2001, 1, 1, tzinfo=UTC)


def _log(rows: int, step: timedelta) -> bytes:
    def lines() -> Iterator[str]:
        yield "time,model,user,input_tokens,output_tokens"
        for row in range(rows):
            yield f"{_BEGIN + step * row:%Y-%m-%dT%H:%M:%SZ},gpt-4o,u{row % 7},1000000,0"

    return "\n".join(lines()).encode()


def test_as_many_hours_as_can_be_told_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MOST_HOURS", 50)
    bench.load(tmp_path, _log(50, timedelta(hours=1)))
    found = bench.asked(tmp_path, {"tool": "cost_breakdown"})
    assert len(found["cost_breakdown"]["by_hour"]) == 50
    assert found["notes"] == []


def test_beyond_that_days_are_told_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MOST_HOURS", 50)
    bench.load(tmp_path, _log(51, timedelta(hours=1)))
    found = bench.asked(tmp_path, {"tool": "cost_breakdown"})
    breakdown = found["cost_breakdown"]
    assert breakdown["by_hour"] == []
    assert [row["requests"] for row in breakdown["by_day"]] == [24, 24, 3]
    assert sum(Decimal(str(row["cost"])) for row in breakdown["by_day"]) == Decimal(str(found["total_cost"]))
    assert "by_hour is left out" in found["notes"][-1]
    drawn = chart.arguments({"from": "x", "to": "y"}, found)
    assert sum(bar["requests"] for bar in drawn["bars"]) == 51


def test_more_days_than_a_log_can_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MOST_DAYS", 5)
    bench.load(tmp_path, _log(6, timedelta(days=1)))
    with pytest.raises(errors.InvalidPayload, match="6 different days"):
        bench.asked(tmp_path, {"tool": "cost_breakdown"})


def test_no_count_and_no_price_is_too_large_or_too_small_to_be_summed(tmp_path: Path) -> None:
    head = "time,model,user,input_tokens,output_tokens,requests\n"
    fine = "2026-09-01T00:00:00Z,openrouter/google/gemini-3.8-flash,a,1,1,1\n"
    great = "2026-09-01T00:00:00Z,perplexity/sonar-pro,b,999999999999,999999999999,999999999999\n"
    bench.load(tmp_path, (head + fine + great * 2000).encode())
    users = bench.asked(tmp_path, {"tool": "cost_breakdown"})["cost_breakdown"]["by_user"]
    assert [row["user"] for row in users] == ["b", "a"]
    assert users[0]["requests"] == 2000 * 999999999999
