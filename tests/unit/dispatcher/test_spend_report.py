"""The report: every part of the result is in it, and a file cannot put markup into it."""

from __future__ import annotations

from typing import Any

import orjson

from services.dispatcher.tools import dispatch, registry
from services.dispatcher.tools.spend import report, wording


def result(model: str = "gpt-4o", models: int = 1, days: int = 2) -> dict[str, Any]:
    tokens = {"input_tokens": 1_200_000, "cached_input_tokens": 200_000, "output_tokens": 30_000}
    percentiles = {name: {"p50": 10, "p95": 90, "p99": 99, "max": 1234} for name in ("input_tokens", "output_tokens")}
    return {
        "message": "2,000 requests cost $3.05.",
        "total_cost": 3.05,
        "cost_breakdown": {
            "by_model": [
                {"model": model, "priced_as": "gpt-4o", "requests": 2000, **tokens, "cost": 3.05} for _ in range(models)
            ],
            "by_hour": [],
            "by_day": [{"day": f"2026-09-{7 + day % 20:02}", "requests": 1000, "cost": 1.5} for day in range(days)],
            "by_user": [{"user": "support", "requests": 2000, "cost": 3.05}],
            "unpriced": [{"model": None, "requests": 7, "input_tokens": 70, "output_tokens": 7}],
        },
        "usage_profile": {
            "requests": 2007, **tokens, "from": "2026-09-07T00:00:00.5Z", "to": "2026-09-08T23:59:00Z", "percentiles": percentiles,
            "peak_minute": {"start": "2026-09-07T09:31:00Z", "requests": 1}, "peak_hour": {"start": "2026-09-07T09:00:00Z", "requests": 44},
        },
        "optimization_opportunities": [
            {
                "kind": "prompt_cache", "title": "Cache the prompt", "method": "By the list.", "monthly_saving": 12.5,
                "assumption": "Half.", "how_to_verify": "Try it.", "confidence": "medium", "overlaps_with": ["batch_window"],
            }
        ],
        "combined_monthly_saving": 11.0,
        "actions": [{"rank": 1, "action": "Cache it.", "kind": "x", "monthly_saving": 12.5, "effort": "low", "owner_hint": "you"}],
        "monthly": {"cost": 46.4, "hours": 730, "window_hours": 48, "note": "Scaled from 48 h to 730 h."},
        "price_list": {"source": "genai-prices", "version": "0.2.3", "note": "List prices."},
        "input": {
            "name": "usage.csv", "format": "csv", "bytes": 5, "rows": 2007, "columns": {"time": "ts"}, "recognised_as": "generic",
            "timezone": "UTC", "model": None, "assumptions": ["Times carry no offset."],
        },
        "notes": ["7 requests have no price."],
    }  # fmt: skip


def written(question: str = "Where does the money go?", **more: Any) -> str:
    given = report.arguments(question, result(**more))
    registry.ToolRegistry([report.spend_report]).get("spend_report").check_arguments(given)
    assert len(orjson.dumps(given)) < dispatch.MAX_ARGUMENT_BYTES
    return report.written(**given)


def test_every_part_of_the_result_is_in_it() -> None:
    text = written()
    for line in (
        "# AI spend: $3.05",
        "> Where does the money go?",
        "| gpt-4o | gpt-4o | 2,000 | 1,200,000 | 200,000 | 30,000 | $3.05 | 100 % |",
        r"| (no model) | no price | 7 | 70 |  | 7 |  |  |",
        "| support | 2,000 | $3.05 | 100 % |",
        "| 2026-09-07 | 1,000 | $1.50 |",
        "A month at this pace: $46.40. Scaled from 48 h to 730 h.",
        "| input tokens | 10 | 90 | 99 | 1,234 | 1,200,000 |",
        "The busiest minute is 2026-09-07 09:31 with 1 request, the busiest hour 2026-09-07 09:00 with 44 requests.",
        "### 1. Cache the prompt: $12.50 a month",
        "- **How to verify:** Try it.",
        "- **Overlaps with:** batch window",
        "| 1 | Cache it. | $12.50 | low | you |",
        "- Columns: time from ts. Times: UTC.",
        "- Prices: genai-prices 0.2.3. List prices.",
        "- 7 requests have no price.",
    ):
        assert line in text.splitlines(), line
    assert "All of it together: $11.00 a month." in text


def test_a_name_from_the_file_stays_text() -> None:
    text = written(model="a|b`<img src=x>`\n# [x](javascript:y) &copy; *z* input_tokens _u_", question="<b>\n# why?")
    assert r"| a\|b\`\<img src=x\>\` \# \[x\](javascript:y) &amp;copy; \*z\* input_tokens \_u\_ |" in text
    assert r"> \<b\> \# why?" in text


def test_a_great_result_makes_a_report_that_can_be_read_and_recorded() -> None:
    text = written(model="m" * 4000, models=400, days=5000)
    assert "350 more models cost less than these." in text
    assert text.count("m" * 100) == 50
    assert "| Day |" not in text


def test_amounts_are_rounded_half_even_and_small_ones_keep_their_digits() -> None:
    amounts = [0, 0.0, 1234567.125, 1234567.135, 0.33039, 0.0125, 0.000012, -3.5]
    assert [wording.usd(amount) for amount in amounts] == [
        "$0.00", "$0.00", "$1,234,567.12", "$1,234,567.14", "$0.33", "$0.0125", "$0.000012", "-$3.50",
    ]  # fmt: skip
    assert [wording.share(part, 8) for part in (0, 0.01, 2, 8)] == ["0 %", "under 1 %", "25 %", "100 %"]
    assert wording.share(0, 0) == "0 %"
