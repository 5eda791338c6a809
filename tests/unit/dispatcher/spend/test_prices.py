"""The price list cut into segments says what it says of each request, for every model and at every boundary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction

import pytest
from genai_prices import Usage, data_snapshot, types

from services.dispatcher.tools.spend import pricing, siblings
from services.dispatcher.tools.spend.pricing import Priced, Tokens

_MARGIN = timedelta(microseconds=1)


CONTEXTS = {
    "": {}, "batch": {"processing": "batch"}, "flex": {"service_tier": "flex"}, "priority": {"service_tier": "priority"},
    "fast": {"service_tier": "fast", "speed": "fast"},
}  # fmt: skip


def _contexts(model: types.ModelInfo) -> list[str]:
    """The usual one, and those that the list has something for; for all others one model is enough."""
    named = [variant.when for variant in model.price_variants or ()]
    return [
        name
        for name, wanted in CONTEXTS.items()
        if not name or model.id == "gpt-4" or any(when.items() <= wanted.items() for when in named)
    ]


def _moments(model: types.ModelInfo) -> Iterator[datetime]:
    """Around each boundary of its prices, and far from all."""
    yield from (datetime(2023, 5, 5, 5, 5, tzinfo=UTC), datetime(2031, 1, 1, 12, tzinfo=UTC))
    prices = model.prices if isinstance(model.prices, list) else []
    for constraint in (price.constraint for price in (*prices, *(model.price_variants or ()))):
        if isinstance(constraint, types.StartDateConstraint):
            start = datetime.combine(constraint.start_date, time(), UTC)
            yield from (start - _MARGIN, start)
        elif isinstance(constraint, types.TimeOfDateConstraint):
            for clock in (constraint.start_time, constraint.end_time):
                there = datetime.combine(date(2026, 9, 20), clock)
                yield from (there - _MARGIN, there)


def _lengths(model: types.ModelInfo) -> set[int]:
    prices = [price.prices for price in model.prices] if isinstance(model.prices, list) else [model.prices]
    prices += [variant.prices for variant in model.price_variants or ()]
    values = [value for price in prices for value in price.__dict__.values() if isinstance(value, types.TieredPrices)]
    starts = {tier.start for value in values for tier in value.tiers}
    return {0, 5000} | {start + more for start in starts for more in (0, 1)}


def _charged(priced: Priced, tokens: Tokens, moment: datetime, context: str) -> Fraction:
    (segment,) = [
        segment for segment in priced.segments
        if context in segment.contexts
        and (segment.since is None or moment.date() >= segment.since) and (segment.until is None or moment.date() < segment.until)
        and segment.day_from <= _clock(moment) < segment.day_until and segment.above < tokens.all_input() <= segment.up_to
    ]  # fmt: skip
    return pricing.cost(tokens, segment.rates).total()


def _used(length: int) -> tuple[Tokens, Usage]:
    """Something of everything, as we and as the list count it."""
    cached, written = length // 3, length // 4
    plain = length - cached - written
    tokens = Tokens(1, plain, cached, written - written // 2, written // 2, 77, plain // 2, cached // 5, 33, 2)
    usage = Usage(
        input_tokens=length, cache_read_tokens=cached, cache_write_tokens=written, cache_write_1h_tokens=written // 2, output_tokens=77,
        input_audio_tokens=plain // 2 + cached // 5, cache_audio_read_tokens=cached // 5, output_audio_tokens=33, web_searches=2,
    )  # fmt: skip
    return tokens, usage


def _clock(moment: datetime) -> int:
    return (moment - datetime.combine(moment.date(), time(), UTC)) // _MARGIN


def _known() -> list[tuple[types.Provider, types.ModelInfo]]:
    """Every model that a log can name, as it is or after its provider."""
    return [(provider, model) for provider in data_snapshot.get_snapshot().providers for model in provider.models]


def test_every_model_at_every_boundary_costs_what_the_list_says() -> None:
    compared, seen = 0, set()
    for provider, model in _known():
        if (prices := repr((model.prices, model.price_variants))) in seen:
            continue  # the same prices under another name
        priced = pricing.find(f"{provider.id}/{model.id}")
        if priced is None or (priced.provider_id, priced.model_id) != (provider.id, model.id):
            continue  # shadowed by another name of the list
        seen.add(prices)
        cases = itertools.product(_contexts(model), set(_moments(model)), _lengths(model))
        for context, moment, length in cases:
            tokens, usage = _used(length)
            theirs = model.calc_price(usage, provider, genai_request_timestamp=moment, price_context=CONTEXTS[context]).total_price
            # their sums have 28 digits
            gap = abs(_charged(priced, tokens, moment, context) - Fraction(theirs))
            assert gap < Fraction(1, 10**24), (provider.id, model.id, context, moment, length)
            compared += 1
    assert compared > 5000


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "",
        "/",
        "gpt-4o/",
        "openai/",
        "nobody/gpt-4o-not",
        "gpt-4o\0",
        "not-openai/gpt-4o",
        "not-anthropic/claude-sonnet-4-5",
        "x/gemini-2.5-pro",
        "groq/gpt-4o",
    ],
)
def test_an_unknown_model_has_no_price(name: str) -> None:
    assert pricing.find(name) is None


def test_a_model_without_a_price_for_tokens_has_no_price() -> None:
    assert pricing.find("openai/whisper-1") is None
    assert pricing.find("openai/moderation") is None


def test_a_provider_may_stand_before_the_model() -> None:
    names = ("gpt-4o", "OpenAI/gpt-4o", "azure/gpt-4o", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-pro", "models/gemini-2.5-pro",
             "xai/grok-4.3", "@cf/meta/llama-3-8b-instruct")  # fmt: skip
    named = {name: pricing.find(name) for name in names}
    found = {name: priced and (priced.provider_id, priced.model_id) for name, priced in named.items()}
    assert found == {
        "gpt-4o": ("openai", "gpt-4o"), "OpenAI/gpt-4o": ("openai", "gpt-4o"), "azure/gpt-4o": ("azure", "gpt-4o"),
        "anthropic/claude-sonnet-4-5": ("anthropic", "claude-sonnet-4-5"), "gemini/gemini-2.5-pro": ("google", "gemini-2.5-pro"),
        "models/gemini-2.5-pro": ("google", "gemini-2.5-pro"), "xai/grok-4.3": ("x-ai", "grok-4.3"),
        "@cf/meta/llama-3-8b-instruct": ("cloudflare", "@cf/meta/llama-3-8b-instruct"),
    }  # fmt: skip


def test_each_alias_is_of_a_provider_and_hides_none() -> None:
    providers = {provider.id for provider in data_snapshot.get_snapshot().providers}
    assert set(pricing.ALIASES.values()) <= providers
    assert not set(pricing.ALIASES) & providers


@pytest.mark.parametrize(("model", "cheaper"), siblings.CHEAPER.items())
def test_a_cheaper_model_is_known_and_cheaper(model: str, cheaper: str) -> None:
    priced, other = pricing.find(model), pricing.sibling(model, cheaper)
    assert priced is not None
    assert other is not None
    assert (priced.model_id, other.model_id) == (model, cheaper)
    assert priced.provider_id == other.provider_id
    here, there = (
        next(segment.rates for segment in reversed(one.segments) if segment.above < 0 and "" in segment.contexts) for one in (priced, other)
    )
    assert there.input < here.input
    assert there.output < here.output


def test_batch_prices_are_parts_of_the_standard_ones() -> None:
    priced = pricing.find("gpt-4o")
    assert priced is not None
    assert priced.batch is not None
    # this list publishes no batch price for tokens from the cache: they keep theirs
    assert (priced.batch.input, priced.batch.output, priced.batch.cached) == (Fraction(1, 2), Fraction(1, 2), Fraction(1))
    assert priced.url.startswith("https://")


def test_the_price_list_is_named_with_its_version() -> None:
    told = pricing.price_list()
    assert told["source"] == "genai-prices"
    assert told["version"].split(".")[0].isdigit()
