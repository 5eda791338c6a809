"""What a log calls the parts of its input, where they are counted, and which of two columns is meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price

from netra import errors
from services.dispatcher.tools.spend import reading
from tests.unit.dispatcher.spend import bench, recount

TIME = datetime(2025, 10, 1, tzinfo=UTC)
EPOCH = int(TIME.timestamp())
CLAUDE = {"timestamp": "2025-10-01T00:00:00Z", "model": "claude-sonnet-4-5"}


def cost(folder: Path, text: str | bytes, **given: Any) -> tuple[dict[str, Any], float]:
    """What a log was understood as, and its cost."""
    loaded = bench.load(folder, text if isinstance(text, bytes) else text.encode(), **given)
    return loaded, bench.asked(folder, {"tool": "cost_breakdown"})["total_cost"]


def price(model: str, *rows: Mapping[str, int]) -> float:
    """What the price list itself makes of these usages."""
    parts = [calc_price(Usage(**row), model, genai_request_timestamp=TIME).total_price for row in rows]
    return recount.usd(sum(parts[1:], parts[0]))


def lines(values: Iterable[object]) -> str:
    """A JSONL file."""
    return "".join(f"{json.dumps(value)}\n" for value in values)


FLAT = (
    "timestamp,model,input_tokens,output_tokens,cache_read_input_tokens,cache_creation_input_tokens\n2025-10-01T00:00:00Z,claude-sonnet-4-5"
)
REPORT = {
    "starting_at": "2025-10-01T00:00:00Z", "ending_at": "2025-10-02T00:00:00Z", "model": "claude-sonnet-4-5", "uncached_input_tokens": 1000,
    "output_tokens": 0, "cache_read_input_tokens": 900,
}  # fmt: skip
HOUR = {"cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 400}}


@pytest.mark.parametrize(
    ("text", "usage"),
    [
        (f"{FLAT},1000,200,300,400\n", {"input_tokens": 1700, "output_tokens": 200, "cache_read_tokens": 300, "cache_write_tokens": 400}),
        (f"{FLAT},10,200,300,0\n", {"input_tokens": 310, "output_tokens": 200, "cache_read_tokens": 300}),
        (lines([REPORT]), {"input_tokens": 1900, "cache_read_tokens": 900}),
        (
            lines([REPORT | HOUR]),
            {"input_tokens": 2300, "cache_read_tokens": 900, "cache_write_tokens": 400, "cache_write_1h_tokens": 400},
        ),
        (
            lines([CLAUDE | HOUR | {"input_tokens": 1000, "output_tokens": 0, "cache_creation_input_tokens": 400}]),
            {"input_tokens": 1400, "cache_write_tokens": 400, "cache_write_1h_tokens": 400},
        ),
        (
            lines([CLAUDE | HOUR | {"input_tokens": 1000, "output_tokens": 0}]),
            {"input_tokens": 1400, "cache_write_tokens": 400, "cache_write_1h_tokens": 400},
        ),
        (
            lines([CLAUDE | {"usage": {"input_tokens": 1000, "output_tokens": 0, "cache_creation": {"ephemeral_5m_input_tokens": 400}}}]),
            {"input_tokens": 1400, "cache_write_tokens": 400},
        ),
        (
            lines([CLAUDE | {"usage": {"prompt_tokens": 1400, "completion_tokens": 0, "cache_creation_input_tokens": 400,
                                       "cache_read_input_tokens": 900}}]),
            {"input_tokens": 1400, "cache_write_tokens": 400, "cache_read_tokens": 900},
        ),
        (
            lines([CLAUDE | {"usage": {"prompt_tokens": 1400, "completion_tokens": 0, "prompt_tokens_details": {
                "cached_tokens": 900, "cache_creation_tokens": 400, "cache_creation_token_details": {"ephemeral_1h_input_tokens": 400}}}}]),
            {"input_tokens": 1400, "cache_write_tokens": 400, "cache_write_1h_tokens": 400, "cache_read_tokens": 900},
        ),
        (
            lines([CLAUDE | {"inputTokens": 1000, "outputTokens": 5, "cacheReadInputTokens": 300, "cacheWriteInputTokens": 400}]),
            {"input_tokens": 1700, "output_tokens": 5, "cache_read_tokens": 300, "cache_write_tokens": 400},
        ),
    ],
    ids=["flat", "reads above input", "report", "report 1h", "flat 1h", "flat 1h alone", "nested 5m alone", "litellm", "litellm 1h",
         "bedrock"],
)  # fmt: skip
def test_each_token_of_a_cache_is_counted_once_at_its_price(text: str, usage: dict[str, int], tmp_path: Path) -> None:
    assert cost(tmp_path, text)[1] == price("claude-sonnet-4-5", usage)


def test_openai_and_anthropic_in_one_log_are_each_read_by_their_own_rules(tmp_path: Path) -> None:
    openai = {"input_tokens": 1000, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 600}}
    anthropic = {"input_tokens": 1000, "output_tokens": 5, "cache_read_input_tokens": 3000, "cache_creation_input_tokens": 400}
    loaded, total = cost(tmp_path, lines([CLAUDE | {"usage": openai}, CLAUDE | {"usage": anthropic}]))
    wanted = price(
        "claude-sonnet-4-5",
        {"input_tokens": 1000, "output_tokens": 5, "cache_read_tokens": 600},
        {"input_tokens": 4400, "output_tokens": 5, "cache_read_tokens": 3000, "cache_write_tokens": 400},
    )
    assert total == wanted
    assert loaded["columns"]["cached_input_tokens"] == "usage.input_tokens_details.cached_tokens or usage.cache_read_input_tokens"


@pytest.mark.parametrize("given", [{"cache_read": "cached"}, {"cache_read": "cached", "cached": ""}], ids=["one role", "both roles"])
def test_a_column_that_the_caller_names_has_no_other_role(given: dict[str, str], tmp_path: Path) -> None:
    text = "time,model,input,output,cached\n2025-10-01T00:00:00Z,claude-sonnet-4-5,1000,200,900\n"
    wanted = price("claude-sonnet-4-5", {"input_tokens": 1900, "output_tokens": 200, "cache_read_tokens": 900})
    assert cost(tmp_path, text, named=given)[1] == wanted


def test_a_given_column_of_a_known_log_leaves_its_role(tmp_path: Path) -> None:
    usage = {"input_tokens": 1000, "output_tokens": 200, "cache_read_tokens": 300}
    named = {"cached": "cache_read_input_tokens"}
    assert cost(tmp_path, f"{FLAT},1000,200,300,0\n", named=named)[1] == price("claude-sonnet-4-5", usage)


@pytest.mark.parametrize(
    ("text", "named", "column", "said"),
    [
        ("time,input,output,cached\n1,1,1,1\n", {"cached": "cached", "cache_read": "cached"}, "cached", "both name 'cached'"),
        ("time,input_tokens,output_tokens,cache_read_input_tokens,cached_tokens\n1,1,1,1,1\n", {}, "cached_tokens",
         "both tell of tokens from a cache. If they say the same, inputs.columns = {'cached': ''} reads"),
        ("start_time,model,Model,input_tokens,output_tokens,num_model_requests\n1,a,b,1,1,1\n", {}, "model",
         "'model' and 'Model' could each be the model"),
        ('{"usage":{"prompt_tokens":1,"completion_tokens":1},"response":{"usage":{"prompt_tokens":1,"completion_tokens":1}}}\n', {},
         "usage.prompt_tokens", "could each be the input"),
    ],
)  # fmt: skip
def test_two_columns_of_one_role_and_two_roles_of_one_column_are_refused(
    text: str, named: dict[str, str], column: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        bench.load(tmp_path, text.encode(), named=named)
    assert said in caught.value.message
    assert caught.value.details["column"] == column


def test_a_log_with_both_says_which_of_them_it_is(tmp_path: Path) -> None:
    head = "timestamp,model,input_tokens,output_tokens,cache_read_input_tokens,cached_tokens\n2025-10-01T00:00:00Z,claude-sonnet-4-5"
    same = {"input_tokens": 1900, "output_tokens": 5, "cache_read_tokens": 900}
    assert cost(tmp_path, f"{head},1000,5,900,900\n", named={"cached": ""})[1] == price("claude-sonnet-4-5", same)
    either = {"input_tokens": 1000, "output_tokens": 5, "cache_read_tokens": 900}
    assert cost(tmp_path, f"{head},1000,5,,900\n", named={"cached": "cached_tokens"})[1] == price("claude-sonnet-4-5", either)


def test_the_model_is_that_of_the_answer(tmp_path: Path) -> None:
    body = {"created": EPOCH, "model": "gpt-4o", "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
    loaded, total = cost(tmp_path, lines([{"model": "our-alias", "response": {"body": body}}]))
    assert total == price("gpt-4o", {"input_tokens": 10, "output_tokens": 5})
    assert loaded["columns"]["model"] == "response.body.model or model"


def _answer(**details: object) -> dict[str, Any]:
    usage = {"prompt_tokens": 1000, "completion_tokens": 5, **details}
    return {"response": {"body": {"created": EPOCH, "model": "gpt-4o", "usage": usage}}}


def _flat(**more: int) -> dict[str, Any]:
    return {**CLAUDE, "input_tokens": 1000, "output_tokens": 5, **more}


def _responses(**more: int) -> dict[str, Any]:
    return {**CLAUDE, "usage": {"input_tokens": 1000, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 0}, **more}}


def _generic(**more: int) -> dict[str, Any]:
    return {**CLAUDE, "prompt": 7, "prompt_tokens": 1000, "completion_tokens": 5, **more}


PLAIN = {"input_tokens": 1000, "output_tokens": 5}


@pytest.mark.parametrize(
    ("make", "late", "usage", "model"),
    [
        (_answer, {"prompt_tokens_details": {"cached_tokens": 600}}, {**PLAIN, "cache_read_tokens": 600}, "gpt-4o"),
        (_flat, {"cache_read_input_tokens": 3000}, {**PLAIN, "input_tokens": 4000, "cache_read_tokens": 3000}, "claude-sonnet-4-5"),
        (_flat, {"cache_creation_input_tokens": 400}, {**PLAIN, "input_tokens": 1400, "cache_write_tokens": 400}, "claude-sonnet-4-5"),
        (_flat, {"cached_tokens": 600}, {**PLAIN, "cache_read_tokens": 600}, "claude-sonnet-4-5"),
        (_responses, {"cache_read_input_tokens": 3000}, {**PLAIN, "input_tokens": 4000, "cache_read_tokens": 3000}, "claude-sonnet-4-5"),
        (_generic, {"cache_read_input_tokens": 600}, {**PLAIN, "cache_read_tokens": 600}, "claude-sonnet-4-5"),
        (_generic, {"cache_creation_input_tokens": 600}, {**PLAIN, "cache_write_tokens": 600}, "claude-sonnet-4-5"),
    ],
    ids=["wrapped", "flat read", "flat write", "flat openai", "mixed", "generic read", "generic write"],
)
def test_columns_that_only_later_rows_have_mean_what_they_would_have_meant_at_once(
    make: Callable[..., dict[str, Any]],
    late: dict[str, Any],
    usage: dict[str, int],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_SAMPLE_ROWS", 2)
    for rows in ([make(), make(), make(**late)], [make(**late), make(), make()]):
        assert cost(tmp_path, lines(rows))[1] == price(model, usage, PLAIN, PLAIN)


def test_a_name_in_a_text_is_no_late_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_SAMPLE_ROWS", 1)
    late = {**_flat(), "prompt": '{"cache_read_input_tokens": 5}', "service_tier": None, "other": {"cached_tokens": 7}}
    loaded, total = cost(tmp_path, lines([_flat(), late]))
    assert total == price("claude-sonnet-4-5", PLAIN, PLAIN)
    assert set(loaded["columns"]) == {"time", "input_tokens", "output_tokens", "model"}


def test_the_caller_says_whether_writes_are_counted(tmp_path: Path) -> None:
    text = "time,model,input,output,from_cache,cache_write_tokens\n2025-10-01T00:00:00Z,claude-sonnet-4-5,1000,5,300,400\n"
    beside = {"input_tokens": 1700, "output_tokens": 5, "cache_read_tokens": 300, "cache_write_tokens": 400}
    assert cost(tmp_path, text, named={"cache_read": "from_cache"})[1] == price("claude-sonnet-4-5", beside)
    uncounted = {"input_tokens": 1300, "output_tokens": 5, "cache_read_tokens": 300}
    named = {"cache_read": "from_cache", "cache_write": ""}
    assert cost(tmp_path, text, named=named)[1] == price("claude-sonnet-4-5", uncounted)


def test_what_is_assumed_of_the_cache_is_said_as_it_is_read(tmp_path: Path) -> None:
    beside = "Tokens read from and written to the cache come on top of the counted input, and are added to it."
    usage = {"prompt_tokens": 1400, "completion_tokens": 0, "cache_creation_input_tokens": 400, **HOUR}
    litellm, _ = cost(tmp_path, lines([CLAUDE | {"usage": usage}]))
    assert beside not in litellm["assumptions"]
    assert "Tokens written to a cache (usage.cache_creation_input_tokens) are a part of the input tokens." in litellm["assumptions"]
    assert beside in cost(tmp_path, lines([REPORT | HOUR]))[0]["assumptions"]


def test_cached_tokens_beside_writes_that_come_on_top_are_read(tmp_path: Path) -> None:
    row = _flat(cached_tokens=600, cache_creation_input_tokens=400)
    wanted = {"input_tokens": 1400, "output_tokens": 5, "cache_read_tokens": 600, "cache_write_tokens": 400}
    assert cost(tmp_path, lines([row]))[1] == price("claude-sonnet-4-5", wanted)


def test_a_late_column_that_makes_a_log_ambiguous_is_refused_as_an_early_one_is(tmp_path: Path) -> None:
    rows = [_flat(cached_tokens=1)] * 1100 + [_flat(cache_read_input_tokens=1)]
    with pytest.raises(errors.InvalidPayload, match="both tell of tokens from a cache"):
        bench.load(tmp_path, lines(rows).encode())
