"""What changes the price of a request besides its length and its time: batches, service tiers, audio, searches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, calc_price

from tests.unit.dispatcher.spend import bench, recount

TIME = datetime(2026, 10, 20, tzinfo=UTC)
EPOCH = int(TIME.timestamp())
USED = {"input_tokens": 10_000, "output_tokens": 500}


def price(model: str, context: Mapping[str, str], **usage: int) -> float:
    """What the price list itself says."""
    return recount.usd(calc_price(Usage(**usage), model, genai_request_timestamp=TIME, price_context=context).total_price)


def analysed(folder: Path, text: str, **given: Any) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """How a log was read, its cost, its opportunities."""
    loaded = bench.load(folder, text.encode(), **given)
    costs, found = bench.asked(folder, {"tool": "cost_breakdown"}), bench.asked(folder, {"tool": "spend_opportunities"})
    return loaded, costs["total_cost"], found


def export(*columns: tuple[str, str], model: str = "gpt-4o") -> str:
    """A row of OpenAI's usage export with more columns."""
    head = "start_time,end_time,model,input_tokens,output_tokens,num_model_requests"
    names, values = ("".join(f",{column[place]}" for column in columns) for place in (0, 1))
    return f"{head}{names}\n{EPOCH},{EPOCH + 86400},{model},10000,500,5{values}\n"


def console(usage_type: str, searches: int = 0) -> str:
    """A row of Anthropic's console export."""
    head = "usage_date_utc,model_version,usage_type,usage_input_tokens_no_cache,usage_output_tokens,web_search_count"
    return f"{head}\n2026-10-20,claude-sonnet-4-5,{usage_type},10000,500,{searches}\n"


def answer(model: str, usage: Mapping[str, object] | None = None, **more: object) -> str:
    """A line of an OpenAI chat log."""
    made = {"created": EPOCH, "model": model, "usage": {"prompt_tokens": 10_000, "completion_tokens": 500, **(usage or {})}, **more}
    return json.dumps(made) + "\n"


def batched(model: str) -> str:
    """A line that OpenAI's batch interface gives back."""
    return json.dumps({"id": "b", "custom_id": "c", "response": {"status_code": 200, "body": json.loads(answer(model))}}) + "\n"


def message(**usage: object) -> str:
    """A line of an Anthropic log."""
    return json.dumps({"timestamp": "2026-10-20T00:00:00Z", "model": "claude-opus-5", "usage": {**USED, **usage}}) + "\n"


BATCH, FLEX, PRIORITY = {"processing": "batch"}, {"service_tier": "flex"}, {"service_tier": "priority"}


@pytest.mark.parametrize(
    ("text", "model", "context", "way"),
    [
        (export(("batch", "True")), "gpt-4o", BATCH, "batch"),
        (export(("batch", "False"), ("service_tier", "")), "gpt-4o", {}, ""),
        (export(("service_tier", "flex"), model="gpt-5"), "gpt-5", FLEX, "flex"),
        (console("batch"), "claude-sonnet-4-5", BATCH, "batch"),
        (console("standard"), "claude-sonnet-4-5", {}, ""),
        (answer("gpt-4o", service_tier="priority"), "gpt-4o", PRIORITY, "priority"),
        (answer("gpt-4o", service_tier="default"), "gpt-4o", {}, ""),
        (batched("gpt-4o"), "gpt-4o", BATCH, "batch"),
        (message(service_tier="batch"), "claude-opus-5", BATCH, "batch"),
        (message(service_tier="standard", speed="fast"), "claude-opus-5", {"speed": "fast"}, "fast"),
    ],
    ids=["export batch", "export", "export flex", "console batch", "console", "priority", "default", "batch output", "message", "speed"],
)
def test_what_was_processed_otherwise_has_the_price_for_that(
    text: str, model: str, context: dict[str, str], way: str, tmp_path: Path
) -> None:
    loaded, total, found = analysed(tmp_path, text)
    assert total == price(model, context, **USED)
    assert any(f"1 as {way}" in said for said in loaded["assumptions"]) == bool(way)
    # what is a batch, or was paid for not to wait, is not offered as a batch
    assert ("batch_window" in [one["kind"] for one in found["opportunities"]]) == (not way)
    assert not any("no price" in said for said in found["notes"])


def test_a_batch_for_which_the_list_has_no_price_is_priced_as_usual_and_named(tmp_path: Path) -> None:
    text = batched("gpt-4o").replace(str(EPOCH), "1750000000") + batched("grok-3") + batched("gpt-4o")
    _, _, found = analysed(tmp_path, text)
    assert (
        "2 requests were processed as batch, for which the list has no price at their time: they are priced as usual (gpt-4o, grok-3)."
        in (found["notes"])
    )


def test_a_tier_that_the_list_does_not_know_is_priced_as_usual_and_named(tmp_path: Path) -> None:
    text = answer("gpt-4o", service_tier="scale") + answer("gpt-4o", service_tier="default")
    loaded, total, _ = analysed(tmp_path, text)
    assert total == price("gpt-4o", {}, input_tokens=20_000, output_tokens=1000)
    assert "1 rows have a service tier that the list has no price for (scale): they are priced as usual." in loaded["assumptions"]


def test_a_model_that_a_provider_takes_over_has_no_batch_price_there(tmp_path: Path) -> None:
    _, total, found = analysed(tmp_path, batched("azure/gpt-4o"))
    assert total == price("gpt-4o", {}, **USED)
    assert any("1 requests were processed as batch" in said for said in found["notes"])


AUDIO = {"prompt_tokens_details": {"audio_tokens": 4000}, "completion_tokens_details": {"audio_tokens": 200}}
HEARD = {**USED, "input_audio_tokens": 4000, "output_audio_tokens": 200}


def test_audio_has_its_own_price(tmp_path: Path) -> None:
    assert analysed(tmp_path, answer("gpt-audio", AUDIO))[1] == price("gpt-audio", {}, **HEARD)


def test_audio_from_a_cache_has_its_own_price(tmp_path: Path) -> None:
    usage = {**USED, "input_token_details": {"cached_tokens": 3000, "audio_tokens": 4000, "cached_tokens_details": {"audio_tokens": 1000}}}
    text = json.dumps({"created_at": EPOCH, "model": "gpt-realtime-mini", "usage": usage}) + "\n"
    wanted = price("gpt-realtime-mini", {}, **USED, cache_read_tokens=3000, input_audio_tokens=4000, cache_audio_read_tokens=1000)
    assert analysed(tmp_path, text)[1] == wanted


def test_audio_without_a_price_is_priced_as_text_and_named(tmp_path: Path) -> None:
    _, total, found = analysed(tmp_path, answer("gpt-4o", AUDIO))
    assert total == price("gpt-4o", {}, **USED)
    assert "4,000 audio tokens of the input have no price of their own: they are priced as text (gpt-4o)." in found["notes"]
    assert "200 audio tokens of the output have no price of their own: they are priced as text (gpt-4o)." in found["notes"]


@pytest.mark.parametrize("name", ["web_search_count", "server_tool_use.web_search_requests", "Web Searches"])
def test_searches_have_their_price(name: str, tmp_path: Path) -> None:
    text = console("standard", 7).replace("web_search_count", name)
    assert analysed(tmp_path, text)[1] == price("claude-sonnet-4-5", {}, **USED, web_searches=7)


def test_searches_without_a_price_are_named(tmp_path: Path) -> None:
    text = json.dumps({"created": EPOCH, "model": "grok-3", **USED, "web_search_count": 3}) + "\n"
    _, total, found = analysed(tmp_path, text)
    assert total == price("grok-3", {}, **USED)
    assert "3 web searches have no price in the list: they are not in total_cost (grok-3)." in found["notes"]
