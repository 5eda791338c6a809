"""The price list cut into segments says what it says of each request, for every model and at every boundary."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction

import pytest
from genai_prices import Usage, data_snapshot, types

from services.dispatcher.tools.spend import pricing, siblings
from services.dispatcher.tools.spend.pricing import Priced, Tokens

_MARGIN = timedelta(microseconds=1)


def _moments(model: types.ModelInfo) -> Iterator[datetime]:
    """Around each boundary of its prices, and far from all."""
    yield from (datetime(2023, 5, 5, 5, 5, tzinfo=UTC), datetime(2031, 1, 1, 12, tzinfo=UTC))
    for price in model.prices if isinstance(model.prices, list) else []:
        if isinstance(price.constraint, types.StartDateConstraint):
            start = datetime.combine(price.constraint.start_date, time(), UTC)
            yield from (start - _MARGIN, start, start + timedelta(hours=2))
        elif isinstance(price.constraint, types.TimeOfDateConstraint):
            for clock in (price.constraint.start_time, price.constraint.end_time):
                there = datetime.combine(date(2026, 9, 20), clock)
                yield from (there - _MARGIN, there)


def _lengths(model: types.ModelInfo) -> set[int]:
    prices = [price.prices for price in model.prices] if isinstance(model.prices, list) else [model.prices]
    values = [value for price in prices for value in price.__dict__.values() if isinstance(value, types.TieredPrices)]
    starts = {tier.start for value in values for tier in value.tiers}
    return {0, 1, 5000} | {start + more for start in starts for more in (-1, 0, 1)}


def _charged(priced: Priced, tokens: Tokens, moment: datetime) -> Fraction:
    (segment,) = [
        segment for segment in priced.segments
        if (segment.since is None or moment.date() >= segment.since) and (segment.until is None or moment.date() < segment.until)
        and segment.day_from <= _clock(moment) < segment.day_until and segment.above < tokens.all_input() <= segment.up_to
    ]  # fmt: skip
    return pricing.cost(tokens, segment.rates).total()


def _clock(moment: datetime) -> int:
    return (moment - datetime.combine(moment.date(), time(), UTC)) // _MARGIN


def _known() -> list[tuple[types.Provider, types.ModelInfo]]:
    """Every model that a log can name, as it is or after its provider."""
    return [(provider, model) for provider in data_snapshot.get_snapshot().providers for model in provider.models]


def test_every_model_at_every_boundary_costs_what_the_list_says() -> None:
    compared = 0
    for provider, model in _known():
        priced = pricing.find(f"{provider.id}/{model.id}")
        if priced is None or (priced.provider_id, priced.model_id) != (provider.id, model.id):
            continue  # shadowed by another name of the list
        for moment in set(_moments(model)):
            for length in _lengths(model):
                cached, written = length // 3, length // 4
                tokens = Tokens(1, length - cached - written, cached, written - written // 2, written // 2, 77)
                usage = Usage(
                    input_tokens=length, cache_read_tokens=cached, cache_write_tokens=written, cache_write_1h_tokens=written // 2,
                    output_tokens=77,
                )  # fmt: skip
                theirs = model.calc_price(usage, provider, genai_request_timestamp=moment).total_price
                # their sums have 28 digits
                assert abs(_charged(priced, tokens, moment) - Fraction(theirs)) < Fraction(1, 10**24), (
                    provider.id,
                    model.id,
                    moment,
                    length,
                )
                compared += 1
    assert compared > 5000


@pytest.mark.parametrize("name", ["no-such-model", "", "/", "gpt-4o/", "openai/", "nobody/gpt-4o-not", "gpt-4o\0"])
def test_an_unknown_model_has_no_price(name: str) -> None:
    assert pricing.find(name) is None


def test_a_model_without_a_price_for_tokens_has_no_price() -> None:
    assert pricing.find("openai/whisper-1") is None
    assert pricing.find("openai/moderation") is None


def test_a_provider_may_stand_before_the_model() -> None:
    named = {name: pricing.find(name) for name in ("gpt-4o", "openai/gpt-4o", "azure/gpt-4o", "anthropic/claude-sonnet-4-5")}
    found = {name: priced and (priced.provider_id, priced.model_id) for name, priced in named.items()}
    assert found == {
        "gpt-4o": ("openai", "gpt-4o"), "openai/gpt-4o": ("openai", "gpt-4o"), "azure/gpt-4o": ("azure", "gpt-4o"),
        "anthropic/claude-sonnet-4-5": ("anthropic", "claude-sonnet-4-5"),
    }  # fmt: skip


@pytest.mark.parametrize(("model", "cheaper"), siblings.CHEAPER.items())
def test_a_cheaper_model_is_known_and_cheaper(model: str, cheaper: str) -> None:
    priced, other = pricing.find(model), pricing.sibling(model, cheaper)
    assert priced is not None
    assert other is not None
    assert (priced.model_id, other.model_id) == (model, cheaper)
    assert priced.provider_id == other.provider_id
    here, there = (next(segment.rates for segment in reversed(one.segments) if segment.above < 0) for one in (priced, other))
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
