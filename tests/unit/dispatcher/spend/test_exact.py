"""Every figure of the spend tools equals one that is computed a second time, row by row, without their code."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis import environment
from netra import errors
from services.dispatcher.tools.spend import figures
from tests.unit.dispatcher.spend import bench, logs, recount
from tests.unit.dispatcher.spend.logs import Request

DATA = Path(environment.get_environment().get("NETRA_TEST_DATA", "") or bench.ROOT.parent / "shared" / "data")
TRACES = ("AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv")
Truth = Callable[[Sequence[Request]], list[Request]]


def same(folder: Path, rows: Sequence[Request]) -> None:
    """Every figure of the log that was loaded is the one of these rows."""
    assert bench.asked(folder, {"tool": "usage_profile"}) == recount.profile(rows)
    costs, wanted = bench.asked(folder, {"tool": "cost_breakdown"}), recount.costs(rows)
    assert {name: costs[name] for name in ("total_cost", "currency")} == {name: wanted[name] for name in ("total_cost", "currency")}
    for name, found in costs["cost_breakdown"].items():
        assert found == wanted["cost_breakdown"][name], name
    assert {name: costs["monthly"][name] for name in wanted["monthly"]} == wanted["monthly"]
    same_savings(bench.asked(folder, {"tool": "spend_opportunities"}), rows)


def same_savings(found: dict[str, Any], rows: Sequence[Request]) -> None:
    """The savings of the opportunities, each and all."""
    wanted = recount.savings(rows)
    combined = wanted.pop("combined")
    assert found["combined_window_saving"] == recount.usd(combined)
    assert found["combined_monthly_saving"] == recount.usd(recount.monthly(rows, combined))
    savings = {one["kind"]: (one["window_saving"], one["monthly_saving"]) for one in found["opportunities"]}
    assert savings.pop("peak_shaving", None) == ((0, 0) if all(row.single for row in rows) else None)
    assert savings == {kind: (recount.usd(saving), recount.usd(recount.monthly(rows, saving))) for kind, saving in wanted.items()}


def _trace(name: str) -> tuple[bytes, str]:
    """A production trace; where it is not at hand, a log of the same form."""
    if (path := DATA / name).exists():
        return path.read_bytes(), "the trace"
    print(f"{path} is not there: a generated log is analysed instead; NETRA_TEST_DATA names the folder of the traces")
    rows = logs.requests(len(name), 5000, models=["gpt-4o"], users=[None], cached=False)
    return logs.azure_csv(rows), "generated"


def _traced(content: bytes, model: str | None) -> list[Request]:
    rows = []
    for time, inputs, outputs in list(csv.reader(content.decode().splitlines()))[1:]:
        moment = datetime.fromisoformat(time[:26]).replace(tzinfo=UTC)
        rows.append(Request(moment, int(inputs), int(outputs), model))
    return rows


@pytest.mark.parametrize("name", [name if (DATA / name).exists() else f"{name} (not there: generated)" for name in TRACES])
def test_a_trace_is_analysed_exactly(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    content, source = _trace(name.split(" ")[0])
    record_property("log", source)
    loaded = bench.load(tmp_path, content, name=name, model="gpt-4o")
    rows = _traced(content, "gpt-4o")
    assert (loaded["recognised_as"], loaded["rows"], loaded["bytes"]) == ("azure-llm-trace", len(rows), len(content))
    assert loaded["timezone"] == "UTC (assumed: times carry none)"
    same(tmp_path, rows)


def test_the_price_list_itself_says_the_same_of_each_request(tmp_path: Path) -> None:
    content, _ = _trace(TRACES[1])
    bench.load(tmp_path, content, model="gemini-2.5-pro")
    total = Decimal()
    for row in _traced(content, "gemini-2.5-pro"):
        usage = Usage(input_tokens=row.input, output_tokens=row.output)
        total += calc_price(usage, "gemini-2.5-pro", genai_request_timestamp=row.time).total_price
    assert bench.asked(tmp_path, {"tool": "cost_breakdown"})["total_cost"] == recount.usd(total)


def test_a_trace_without_a_model_has_no_price_and_says_so(tmp_path: Path) -> None:
    content, _ = _trace(TRACES[1])
    bench.load(tmp_path, content)
    found = bench.asked(tmp_path, {"tool": "cost_breakdown"})
    assert found["total_cost"] == 0
    assert found["cost_breakdown"]["unpriced"][0]["requests"] == len(_traced(content, None))
    assert "name no model and are not in total_cost" in found["notes"][0]


def _told(*fields: str, seconds: bool = False) -> Truth:
    """The truth of a log that tells no more than these of: cached, written, context, audio, audio_cached, audio_output, searches."""
    more = ("written", "written_1h", "context", "audio", "audio_cached", "audio_output", "searches")
    untold: dict[str, Any] = {name: "" if name == "context" else 0 for name in more if name not in fields}

    def truth(rows: Sequence[Request]) -> list[Request]:
        return [replace(row, **untold) for row in (logs.in_seconds(rows) if seconds else rows)]

    return truth


def _without_model(rows: Sequence[Request]) -> list[Request]:
    return [replace(row, model="gpt-4o", user=None, cached=0) for row in _told()(rows)]


def _openai_sums(rows: Sequence[Request]) -> list[Request]:
    """The export tells how many requests a row is and which minute; that a row is a sum is so also where it is of one."""
    told = _told("context", "audio", "audio_cached", "audio_output", seconds=True)(rows)
    return [replace(row, single=False, span=timedelta(minutes=1)) for row in told]


def _older_sums(rows: Sequence[Request]) -> list[Request]:
    return [replace(row, single=False, span=None) for row in _told(seconds=True)(rows)]


def _days(rows: Sequence[Request]) -> list[Request]:
    midnight: dict[str, Any] = {"hour": 0, "minute": 0, "second": 0, "microsecond": 0}
    return [
        replace(row, time=row.time.replace(**midnight), single=False, known_requests=False, span=timedelta(days=1)) for row in _told()(rows)
    ]


def _anthropic_days(rows: Sequence[Request]) -> list[Request]:
    told = [replace(row, context=row.context if row.context == "batch" else "") for row in rows]
    return [replace(day, **_parts(row)) for day, row in zip(_days(told), told, strict=True)]


def _parts(row: Request) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("written", "written_1h", "context", "searches")}


def _anthropic_hours(rows: Sequence[Request]) -> list[Request]:
    told = _told("written", "written_1h", "context", "searches")(rows)
    return [replace(row, single=False, known_requests=False, span=timedelta(hours=1)) for row in told]


def _chat(rows: Sequence[Request]) -> list[Request]:
    told = _told("context", "audio", "audio_output", seconds=True)(rows)
    return [replace(row, context="" if row.context == "batch" else row.context) for row in told]


def _batch(rows: Sequence[Request]) -> list[Request]:
    return [replace(row, context="batch") for row in _told("audio", "audio_output", seconds=True)(rows)]


def _of_both(rows: Sequence[Request]) -> list[Request]:
    one, other = _told("context")(rows), _told("written", "written_1h", "context", "searches")(rows)
    return [other[number] if logs.of_anthropic(number, row) else one[number] for number, row in enumerate(rows)]


# of each kind of log: how it is written, what it tells, how it is asked for, as what it is recognised
_WRITES = ("written", "written_1h")
LOGS: dict[str, tuple[logs.Writer, Truth, dict[str, Any], str]] = {
    "generic csv": (logs.generic_csv, _told(), {}, "generic"),
    "daily csv": (logs.daily_csv, lambda rows: [replace(row, user=None) for row in _days(rows)], {}, "generic"),
    "azure csv": (logs.azure_csv, _without_model, {"model": "gpt-4o"}, "azure-llm-trace"),
    "openai export csv": (logs.openai_export, _openai_sums, {}, "openai-usage"),
    "openai context totals csv": (logs.context_totals, _older_sums, {}, "openai-usage"),
    "openai chat jsonl": (logs.openai_chat, _chat, {}, "openai-usage"),
    "openai batch output jsonl": (logs.batch_output, _batch, {}, "openai-usage"),
    "openai responses jsonl": (logs.openai_responses, _told("context"), {}, "openai-usage"),
    "anthropic export csv": (logs.anthropic_export, _anthropic_days, {}, "anthropic-usage"),
    "anthropic report jsonl": (logs.anthropic_report, _anthropic_hours, {}, "anthropic-usage"),
    "anthropic messages jsonl": (logs.anthropic_messages, _told(*_WRITES, "context", "searches"), {}, "anthropic-usage"),
    "anthropic flat jsonl": (logs.anthropic_flat, _told(*_WRITES), {}, "anthropic-usage"),
    "anthropic flat csv": (logs.anthropic_flat_csv, _told(*_WRITES), {}, "anthropic-usage"),
    "litellm jsonl": (logs.litellm, _told(*_WRITES, seconds=True), {}, "openai-usage"),
    "mixed providers jsonl": (logs.mixed_providers, _of_both, {}, "openai-usage"),
    "generic parquet": (logs.generic_parquet, _told(), {}, "generic"),
    "nested parquet": (logs.nested_parquet, _told(seconds=True), {}, "openai-usage"),
}


@pytest.mark.parametrize("log", LOGS)
def test_a_log_of_any_kind_is_analysed_exactly(log: str, tmp_path: Path) -> None:
    write, truth, given_, style = LOGS[log]
    rows = logs.requests(len(log), 300, models=[*logs.MODELS, None], users=[*logs.USERS, None], writes=True, more=True)
    told = truth(rows)
    if not any(row.written for row in told):  # what a log cannot tell, is not in it
        rows = [replace(row, written=0, written_1h=0) for row in rows]
    if log.startswith("openai") and log.endswith("csv"):
        rows = [replace(row, requests=number % 3 + 1) for number, row in enumerate(rows)]
    content, packed = write(rows), len(log) % 2 == 0  # half of them as a gzip
    loaded = bench.load(tmp_path, logs.zipped(content) if packed else content, **given_)
    assert (loaded["recognised_as"], loaded["rows"], loaded["compression"]) == (style, 300, "gzip" if packed else "none")
    assert loaded["format"] == log.split()[-1]
    same(tmp_path, truth(rows))


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    rows = logs.requests(5, 300)
    (tmp_path / "log").write_bytes(logs.generic_csv(rows))
    request = {"tool": "usage_load", "file": "log", "name": "a.csv", "model": "", "named": {}, "zone": ""}
    assert bench.asked_apart(tmp_path, request)["rows"] == 300
    assert bench.asked_apart(tmp_path, {"tool": "cost_breakdown"})["total_cost"] == recount.costs(rows)["total_cost"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "usage.parquet"]


def test_tools_that_come_before_the_log_say_what_is_missing(tmp_path: Path) -> None:
    for name in ("usage_profile", "cost_breakdown", "spend_opportunities"):
        with pytest.raises(errors.FailedPrecondition, match="call usage_load first"):
            bench.asked(tmp_path, {"tool": name})


_MOMENTS = st.datetimes(datetime(2025, 6, 9), datetime(2026, 9, 12))  # noqa: DTZ001 - made UTC below
_ROWS = st.lists(
    st.builds(
        lambda time, size, held, output, model, user: Request(time.replace(tzinfo=UTC), size, output, model, user, min(held, size)),
        _MOMENTS, st.integers(0, 400_000), st.integers(0, 400_000), st.integers(0, 10**12 - 1),
        st.sampled_from([*logs.MODELS, None]), st.sampled_from(["a", "b", None]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_ROWS)
def test_no_log_is_too_small_or_too_odd(rows: list[Request], tmp_path: Path) -> None:
    bench.load(tmp_path, logs.generic_csv(rows))
    same(tmp_path, rows)


def test_amounts_are_rounded_half_even() -> None:
    assert [figures.usd(Fraction(number, 2 * 10**6)) for number in (1, 3, 5, -1)] == [0.0, 2e-06, 2e-06, 0.0]


def test_percentiles_are_of_the_nearest_rank_and_ties_take_the_earliest(tmp_path: Path) -> None:
    begin = datetime(2025, 1, 1, tzinfo=UTC)
    rows = [Request(begin + timedelta(minutes=10 * (number % 7)), number, 100 - number) for number in range(1, 21)]
    bench.load(tmp_path, logs.generic_csv(rows))
    found = bench.asked(tmp_path, {"tool": "usage_profile"})
    assert found["percentiles"]["input_tokens"] == {"p50": 10, "p95": 19, "p99": 20, "max": 20}
    assert found["peak_minute"] == {"start": "2025-01-01T00:10:00Z", "requests": 3}
    assert found["users"] is None
