"""What the terminal shows: nothing is cut without a word, nothing moves the cursor, and figures are those of the result."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from netra import cli, show

REPORT: dict[str, Any] = {
    "message": "12 requests cost 3.50 USD.",
    "currency": "USD",
    "total_cost": 3.504211,
    "cost_breakdown": {
        "by_model": [
            {
                "model": "gpt-4o", "priced_as": "gpt-4o", "provider": "openai", "requests": 9, "input_tokens": 1234567,
                "cached_input_tokens": 1000, "output_tokens": 4321, "input_cost": 3.08, "cached_input_cost": 0.001,
                "output_cost": 0.0432, "cost": 3.1532,
            },
            {
                "model": "[red]mini\x1b[2J", "priced_as": "gpt-4o-mini", "provider": "openai", "requests": 2, "input_tokens": 10,
                "cached_input_tokens": 0, "output_tokens": 20, "input_cost": 0.3, "cached_input_cost": 0, "output_cost": 0.051011,
                "cost": 0.351011,
            },
        ],
        "by_day": [], "by_hour": [], "by_user": [],
        "unpriced": [{"model": None, "requests": 1, "input_tokens": 7, "output_tokens": 8}],
    },
    "usage_profile": {
        "requests": 12, "input_tokens": 1234584, "output_tokens": 4349, "from": "2026-09-07T00:03:55.591000Z",
        "to": "2026-09-07T10:00:00.000000Z",
        "percentiles": {
            "input_tokens": {"p50": 11, "p95": 22, "p99": 33, "max": 44000}, "output_tokens": {"p50": 1, "p95": 2, "p99": 3, "max": 4},
        },
        "peak_minute": {"start": "2026-09-07T09:01:00Z", "requests": 4}, "peak_hour": {"start": "2026-09-07T09:00:00Z", "requests": 6},
    },
    "monthly": {"cost": 257.49, "hours": 730, "window_hours": 9.934558, "note": ""},
    "price_list": {"source": "genai-prices", "version": "0.2.3", "note": ""},
    "optimization_opportunities": [
        {
            "kind": "batch_window", "title": "Send nightly work to the batch interface", "monthly_saving": 64.37,
            "assumption": "half of it can wait", "how_to_verify": "ask", "confidence": "medium", "overlaps_with": ["cheaper_model"],
        },
    ],
    "combined_monthly_saving": 60.11,
    "actions": [{"rank": 1, "action": "Move nightly reports", "monthly_saving": 64.37, "effort": "low", "owner_hint": "platform"}],
    "chart": {"artifact_id": "c-1", "name": "spend.svg", "media_type": "image/svg+xml", "bytes": 2048},
    "report": {"artifact_id": "r-1", "name": "spend.md", "media_type": "text/markdown", "bytes": 900},
    "notes": ["1 request has no price; the total excludes it."],
}  # fmt: skip


def console(width: int = 160) -> Console:
    return Console(record=True, width=width, force_terminal=True, file=io.StringIO())


def shown(result: dict[str, Any], saved: dict[str, Path] | None = None) -> str:
    on = console()
    show.report(on, result, saved or {})
    return on.export_text()


def test_a_report_shows_the_figures_of_the_result() -> None:
    text = shown(REPORT)
    for figure in ("3.504211 USD", "257.49 USD", "genai-prices 0.2.3", "1,234,567", "3.15", "0.35", "90.0%", "44,000", "60.11 USD"):
        assert figure in text, figure
    for words in ("batch interface", "half of it can wait", "medium", "cheaper_model", "Move nightly reports", "platform"):
        assert words in text, words
    assert "(none named)" in text
    assert "no price" in text
    assert "the total excludes it" in text
    assert "busiest minute: 2026-09-07T09:01:00Z with 4" in text


def test_a_report_tells_where_its_files_are(tmp_path: Path) -> None:
    text = shown(REPORT, {"chart": tmp_path / "spend.svg"})
    assert str(tmp_path / "spend.svg") in text
    assert "netra artifacts download c-1" not in text
    assert "netra artifacts download r-1" in text


def test_names_out_of_a_log_do_nothing_to_the_terminal() -> None:
    text = shown(REPORT)
    assert "[red]mini" in text
    assert "\x1b" not in text


def test_a_report_without_opportunities_or_requests_can_be_shown() -> None:
    empty = {**REPORT, "total_cost": 0, "optimization_opportunities": [], "actions": [], "notes": [], "combined_monthly_saving": None}
    text = shown(empty)
    assert "0.00 USD" in text
    assert "Opportunities" not in text


@pytest.mark.parametrize(
    ("value", "exact", "text"),
    [
        (1234567.891234, False, "1,234,567.89"),
        (1234567.891234, True, "1,234,567.891234"),
        (0.000123, False, "0.000123"),
        (0.5, False, "0.50"),
        (0, False, "0.00"),
        (2, True, "2.00"),
        (1e-6, False, "0.000001"),
        (-0.25, False, "-0.25"),
    ],
)
def test_money(value: float, exact: bool, text: str) -> None:
    assert show.money(value, exact=exact) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**41, "2.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(
    ("data", "gist"),
    [
        ({"agent_name": "a", "message": "a begins."}, "a begins."),
        ({"agent_name": "a", "reasoning": "hm"}, "hm"),
        ({"agent_name": "a", "tool_name": "t", "parameters": {"x": 1}}, 't {"x": 1}'),
        ({"agent_name": "a", "tool_name": "t", "parameters": {"message": "m"}}, 't {"message": "m"}'),
        ({"agent_name": "a", "tool_name": "t", "parameters": {}}, "t"),
        ({"agent_name": "a", "tool_name": "t", "result": {"x": 1}}, 't: {"x": 1}'),
        ({"agent_name": "a", "tool_name": "t", "result": {"message": "done", "rows": [1]}}, "t: done"),
        ({"agent_name": "a", "tool_name": "t", "error": {"message": "no"}}, "t no"),
        (
            {"agent_name": "a", "tool_name": "t", "result_ref": {"artifact_id": "i", "bytes": 2048}, "preview": "{"},
            "t: 2.0 KiB, kept as artifact i",
        ),
        ({"agent_name": "a", "error": {"message": "wrong"}, "message": "wrong"}, "wrong"),
        ({"agent_name": "a", "by": "user"}, "a"),
    ],
)
def test_what_an_event_is_about_fits_on_a_line(data: dict[str, Any], gist: str) -> None:
    assert show.gist(data) == gist


def line(frame: dict[str, Any], width: int) -> str:
    on = console(width)
    show.event(on, frame)
    return on.export_text()


def test_what_machines_tell_each_other_fits_on_the_line_and_says_that_it_is_cut() -> None:
    text = line({"seq": 12, "type": "tool_completed", "data": {"agent_name": "data", "tool_name": "t", "result": ["x" * 5000]}}, 100)
    assert text.startswith("  12 tool_completed   data           t: ")
    assert text.endswith("… 5,007 characters\n")
    assert len(text) == 101


def test_what_is_said_is_never_cut_and_moves_no_cursor() -> None:
    said = "why \x1b]0;title\x07\nnot " + "x" * 5000
    for kind, data in (("agent_thinking", {"reasoning": said}), ("agent_failed", {"error": {"message": said}})):
        text = line({"seq": 1, "type": kind, "data": {"agent_name": "a", **data}}, 60)
        assert "why �]0;title� not " + "x" * 5000 in text


def test_progress_is_shown_to_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with show.transfer(Console(stderr=True, force_terminal=False), "Uploading x") as advance:
        advance(1, 2)
        advance(2, 2)
    assert capsys.readouterr() == ("", "")
    watched = console()
    with show.transfer(watched, "Uploading [b]x") as advance:
        advance(1024, 2048)
    assert "Uploading [b]x" in watched.export_text()


def test_a_file_that_is_not_there_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["run", "spend-analyst", "--file", str(tmp_path / "none.csv")])
    assert done.exit_code == 2
    # a long path is broken into lines in a frame
    assert "none.csv" in re.sub(r"[\s│]", "", done.output)


def test_a_file_and_an_artifact_are_one_too_many(tmp_path: Path) -> None:
    file = tmp_path / "usage.csv"
    file.write_text("time\n")
    done = CliRunner().invoke(cli.app, ["run", "spend-analyst", "--file", str(file), "--input", "artifact_id=x"])
    assert done.exit_code == 2
    assert "give one of them" in done.output


def test_a_run_needs_something_to_do() -> None:
    done = CliRunner().invoke(cli.app, ["run"])
    assert done.exit_code == 2
    assert "name an agent" in done.output
