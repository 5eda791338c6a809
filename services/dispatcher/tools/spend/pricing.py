"""The price list: what a model costs when, cut into segments within which every token has one price. Exact, in whole numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction

import duckdb
import genai_prices
from genai_prices import data_snapshot, types

from services.dispatcher.tools.spend import duck, figures, values

SOURCE = "genai-prices"
NOTE = (
    "List prices for pay-per-token use. Each request is priced at its own time; where the list has no price for that time,"
    " its earliest one is taken. What was processed as a batch or in a service tier has the price for that from the day on which the list"
    " has one. Discounts and committed use are not in it."
)
# what a price is of, and the SQL of how much of it a row of a normalised log has; audio tokens are parts of the others
SHOWN = ("request", "input", "cached", "cache_write", "cache_write_1h", "output")
PARTS = (*SHOWN, "input_audio", "cached_audio", "output_audio", "web_search")
COUNTED = (
    "requests", "input_tokens - cached_input_tokens - cache_write_tokens", "cached_input_tokens",
    "cache_write_tokens - cache_write_1h_tokens", "cache_write_1h_tokens", "output_tokens",
    "input_audio_tokens", "cached_audio_tokens", "output_audio_tokens", "web_searches",
)  # fmt: skip
# what the list calls the ways in which a request is processed
_CONTEXTS: Mapping[str, Mapping[str, str]] = {
    "batch": {"processing": "batch"}, "flex": {"service_tier": "flex"}, "priority": {"service_tier": "priority"},
    "fast": {"service_tier": "fast", "speed": "fast"},
}  # fmt: skip
# what else may stand before the `/` of a model's name: the names of gateways for the providers of the list
ALIASES = {
    "amazon": "aws", "amazon-bedrock": "aws", "azure-openai": "azure", "azure_ai": "azure", "azure_openai": "azure", "bedrock": "aws",
    "cohere_chat": "cohere", "fireworks_ai": "fireworks", "gemini": "google", "github_copilot": "github-copilot",
    "google-ai-studio": "google", "google-vertex": "google", "mistralai": "mistral", "models": "google", "moonshot": "moonshotai",
    "together_ai": "together", "vertex": "google", "vertex_ai": "google", "voyage": "voyageai", "xai": "x-ai",
}  # fmt: skip
_DAY_US = 86_400_000_000
_FAR = 2**62
_ONE = 1_000_000


@dataclass(frozen=True, slots=True)
class Rates:
    """USD of one token of each class, of one request and one search; of audio what a token costs more than other ones of its class."""

    input: Fraction
    cached: Fraction
    cache_write: Fraction
    cache_write_1h: Fraction
    output: Fraction
    request: Fraction
    input_audio: Fraction = Fraction()
    cached_audio: Fraction = Fraction()
    output_audio: Fraction = Fraction()
    web_search: Fraction = Fraction()


@dataclass(frozen=True, slots=True)
class Segment:
    """When a price holds: days, a time of day (microseconds of it) and a length of the prompt; ends are exclusive but for `up_to`.

    And for what: `contexts` of `values.CONTEXTS`. `own` says that their price is not the usual one, `lacks` which parts have none.
    """

    contexts: tuple[str, ...]
    own: bool
    lacks: frozenset[str]
    since: date | None
    until: date | None
    day_from: int
    day_until: int
    above: int
    up_to: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class Priced:
    """A model of the price list. `batch` is what the list's batch prices are of its standard ones, at its latest date."""

    model_id: str
    provider_id: str
    segments: tuple[Segment, ...]
    batch: Rates | None
    has_output_price: bool
    url: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was used, summed. `input` is that which neither came from a cache nor went to one; audio is a part of the others."""

    requests: int = 0
    input: int = 0
    cached: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    output: int = 0
    input_audio: int = 0
    cached_audio: int = 0
    output_audio: int = 0
    web_searches: int = 0

    def all_input(self) -> int:
        """Every input token."""
        return self.input + self.cached + self.cache_write + self.cache_write_1h

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.requests + other.requests, self.input + other.input, self.cached + other.cached,
            self.cache_write + other.cache_write, self.cache_write_1h + other.cache_write_1h, self.output + other.output,
            self.input_audio + other.input_audio, self.cached_audio + other.cached_audio, self.output_audio + other.output_audio,
            self.web_searches + other.web_searches,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """USD, exact."""

    input: Fraction = Fraction()
    cached: Fraction = Fraction()
    cache_write: Fraction = Fraction()
    cache_write_1h: Fraction = Fraction()
    output: Fraction = Fraction()
    request: Fraction = Fraction()

    def total(self) -> Fraction:
        """All of it."""
        return self.input + self.cached + self.cache_write + self.cache_write_1h + self.output + self.request

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.input + other.input, self.cached + other.cached, self.cache_write + other.cache_write,
            self.cache_write_1h + other.cache_write_1h, self.output + other.output, self.request + other.request,
        )  # fmt: skip


def cost(tokens: Tokens, rates: Rates) -> Cost:
    """What these tokens cost at these rates."""
    return Cost(
        tokens.input * rates.input + tokens.input_audio * rates.input_audio,
        tokens.cached * rates.cached + tokens.cached_audio * rates.cached_audio,
        tokens.cache_write * rates.cache_write,
        tokens.cache_write_1h * rates.cache_write_1h,
        tokens.output * rates.output + tokens.output_audio * rates.output_audio,
        tokens.requests * rates.request + tokens.web_searches * rates.web_search,
    )


def price_list() -> figures.PriceList:
    """Where the prices come from."""
    return figures.PriceList(source=SOURCE, version=genai_prices.__version__, note=NOTE)


@functools.lru_cache(maxsize=16_384)
def find(reference: str) -> Priced | None:
    """The model that the price list knows by this name, also as `provider/model`; None without a price for its tokens."""
    found = _found(reference)
    if found is None:
        return None
    return _priced(*found)


def sibling(reference: str, model_id: str) -> Priced | None:
    """Another model of the same provider."""
    found = _found(reference)
    if found is None:
        return None
    provider = found[0]
    model = provider.find_model(model_id, all_providers=data_snapshot.get_snapshot().providers)
    return _priced(provider, model) if model is not None and model.id == model_id else None


def _priced(provider: types.Provider, model: types.ModelInfo) -> Priced | None:
    segments = tuple(_segments(provider, model))
    if not segments:
        return None
    has_output = any(segment.rates.output for segment in segments)
    return Priced(model.id, provider.id, segments, _batch(provider, model), has_output, next(iter(provider.pricing_urls or ()), ""))


def tabled(connection: duckdb.DuckDBPyConnection, table: str, models: Mapping[str, Priced]) -> list[Segment]:
    """Make a table of the segments of these models, to join a log with by `joined`. `seg` is the place in the list returned."""
    rows = [(name, context, segment) for name, priced in models.items() for segment in priced.segments for context in segment.contexts]
    segments = [segment for *_, segment in rows]
    columns: Sequence[Sequence[object]] = [
        list(range(len(rows))),
        [name for name, *_ in rows],
        [context for _, context, _ in rows],
        [datetime.combine(segment.since or date(1, 1, 1), time()) for segment in segments],
        [datetime.combine(segment.until or date(9999, 1, 1), time()) for segment in segments],
        *([getattr(segment, field) for segment in segments] for field in ("day_from", "day_until", "above", "up_to")),
    ]
    kinds = ("INTEGER", "VARCHAR", "VARCHAR", "TIMESTAMP", "TIMESTAMP", "BIGINT", "BIGINT", "BIGINT", "BIGINT")
    names = ("seg", "model", "context", "since", "until", "day_from", "day_until", "above", "up_to")
    read = ", ".join(f"unnest(?::{kind}[]) AS {name}" for name, kind in zip(names, kinds, strict=True))
    connection.execute(f"CREATE TEMP TABLE {table} AS SELECT {read}", columns)
    return segments


def joined(usage: str, table: str) -> str:
    """The condition under which a row of `usage` has the price of a row of `table`."""
    moment = f"(epoch_us({usage}.time) % {_DAY_US})"
    return (
        f"{usage}.model = {table}.model AND {usage}.context = {table}.context"
        f" AND {usage}.time >= {table}.since AND {usage}.time < {table}.until"
        f" AND {moment} >= {table}.day_from AND {moment} < {table}.day_until"
        f" AND {usage}.tier_tokens > {table}.above AND {usage}.tier_tokens <= {table}.up_to"
    )


def gaps(connection: duckdb.DuckDBPyConnection, usage: str, segments: Sequence[Segment]) -> Iterator[str]:
    """What of a log the list has no price of its own for, in words; `segments` are those of the table of that name."""
    audio = "input_audio_tokens + cached_audio_tokens"
    found: dict[str, tuple[int, set[str]]] = {}
    query = (
        f"SELECT u.model, u.context, seg, sum(requests), sum({audio}), sum(output_audio_tokens), sum(web_searches) FROM {usage} u"
        f" JOIN segments ON {joined('u', 'segments')}"
        f" WHERE u.context NOT IN ('', 'other') OR {audio} > 0 OR output_audio_tokens > 0 OR web_searches > 0 GROUP BY ALL"
    )
    for model, context, seg, requests, *counts in duck.rows(connection, query):
        lacks = [(context, requests)] if context not in ("", "other") and not segments[seg].own else []
        lacks += [(part, count) for part, count in zip(_SAID, counts, strict=True) if count and part in segments[seg].lacks]
        for what, count in lacks:
            before, models = found.get(what, (0, set()))
            found[what] = (before + int(count), models | {model})
    for what, (count, models) in sorted(found.items()):
        yield f"{count:,} {_SAID.get(what, _USUAL.format(what))} ({', '.join(sorted(models)[:10])})."


_USUAL = "requests were processed as {}, for which the list has no price at their time: they are priced as usual"
_SAID = {
    "input_audio": "audio tokens of the input have no price of their own: they are priced as text",
    "output_audio": "audio tokens of the output have no price of their own: they are priced as text",
    "web_search": "web searches have no price in the list: they are not in total_cost",
}


def _found(reference: str) -> tuple[types.Provider, types.ModelInfo] | None:
    """What stands before a `/` must be a provider, by its id or an alias; or the list itself writes the name with it."""
    snapshot = data_snapshot.get_snapshot()
    before, separator, rest = reference.partition("/")
    known = {provider.id for provider in snapshot.providers}
    provider_id = next((name for name in (before.lower(), ALIASES.get(before.lower(), "")) if name in known), None) if separator else None
    try:
        if provider_id is not None:
            return snapshot.find_provider_model(rest, None, provider_id, None) if rest else None
        provider, model = snapshot.find_provider_model(reference, None, None, None)
    except LookupError:
        return None
    return None if separator and "/" not in model.id else (provider, model)


def _segments(provider: types.Provider, model: types.ModelInfo) -> Iterator[Segment]:
    """Constraints are days and times of day: within the boundaries of all of them the list's answer does not change."""
    if not model.prices:
        return
    variants = {context: _variants(provider, model, context) for context in values.CONTEXTS}
    yield from _spans(model, tuple(context for context, found in variants.items() if not found), ())
    for context, found in variants.items():
        if found:
            yield from _spans(model, (context,), found)


def _variants(provider: types.Provider, model: types.ModelInfo, context: str) -> Sequence[types.PriceVariant]:
    """What the list has for this context; models that a provider takes over from another one have nothing."""
    if not any(model is own for own in provider.models):
        return ()
    price_context = _CONTEXTS.get(context, {})
    return [one for one in model.price_variants or () if all(price_context.get(key) == value for key, value in one.when.items())]


def _spans(model: types.ModelInfo, contexts: tuple[str, ...], variants: Sequence[types.PriceVariant]) -> Iterator[Segment]:
    usual = [] if isinstance(model.prices, types.ModelPrice) else [price.constraint for price in model.prices]
    conditions = [*usual, *(variant.constraint for variant in variants)]
    days = sorted({condition.start_date for condition in conditions if isinstance(condition, types.StartDateConstraint)})
    clock = {0, _DAY_US}
    for condition in conditions:
        if isinstance(condition, types.TimeOfDateConstraint):
            clock |= {_us(condition.start_time), _us(condition.end_time)}
    spans: list[tuple[date | None, date | None]] = list(itertools.pairwise([None, *days, None]))
    for since, until in spans:
        day = since or (until - timedelta(days=1) if until else date(2000, 1, 1))
        for begin, end in itertools.pairwise(sorted(clock)):
            moment = datetime.combine(day, time(), UTC) + timedelta(microseconds=begin)
            prices = model.get_prices(moment, _CONTEXTS[contexts[0]] if variants else None)
            own = prices != model.get_prices(moment)
            lacks = frozenset(part for part, field in _FIELDS.items() if getattr(prices, field) is None)
            for above, up_to, rates in _tiers(prices):
                yield Segment(contexts, own, lacks, since, until, begin, end, above, up_to, rates)


_FIELDS = {"input_audio": "input_audio_mtok", "output_audio": "output_audio_mtok", "web_search": "web_searches_kcount"}


def _us(moment: time) -> int:
    there = datetime.combine(date(1970, 1, 2), moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return (there - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) % _DAY_US


def _tiers(prices: types.ModelPrice) -> Iterator[tuple[int, int, Rates]]:
    """A prompt that is longer than a tier's start pays that tier's price for all of it."""
    values = [value for value in prices.__dict__.values() if value is not None]
    starts = sorted({tier.start for value in values if isinstance(value, types.TieredPrices) for tier in value.tiers})
    if prices.input_mtok is None and prices.output_mtok is None and prices.requests_kcount is None:
        return
    for above, up_to in itertools.pairwise([-1, *starts, _FAR]):
        yield above, up_to, _rates(prices, above + 1)


def _rates(prices: types.ModelPrice, length: int) -> Rates:
    """A class of tokens without a price of its own costs what the class it is a part of does."""
    whole, output = (_price(price, length) or Fraction() for price in (prices.input_mtok, prices.output_mtok))
    read, write, heard = (_price(price, length) for price in (prices.cache_read_mtok, prices.cache_write_mtok, prices.input_audio_mtok))
    cached, written = whole if read is None else read, whole if write is None else write
    recalled = heard if heard is not None and read is None else cached
    return Rates(
        input=whole / _ONE,
        cached=cached / _ONE,
        cache_write=written / _ONE,
        cache_write_1h=_or(_price(prices.cache_write_1h_mtok, length), written) / _ONE,
        output=output / _ONE,
        request=_or(_price(prices.requests_kcount, length), Fraction()) / 1000,
        input_audio=(_or(heard, whole) - whole) / _ONE,
        cached_audio=(_or(_price(prices.cache_audio_read_mtok, length), recalled) - cached) / _ONE,
        output_audio=(_or(_price(prices.output_audio_mtok, length), output) - output) / _ONE,
        web_search=_or(_price(prices.web_searches_kcount, length), Fraction()) / 1000,
    )


def _or(price: Fraction | None, otherwise: Fraction) -> Fraction:
    return otherwise if price is None else price


def _price(price: Decimal | types.TieredPrices | None, length: int) -> Fraction | None:
    if isinstance(price, types.TieredPrices):
        price = next((tier.price for tier in reversed(price.tiers) if length > tier.start), price.base)
    return None if price is None else Fraction(price)


def _batch(provider: types.Provider, model: types.ModelInfo) -> Rates | None:
    """Batch prices as parts of the standard ones; None where the list has none. Audio and searches are left as they are."""
    if not _variants(provider, model, "batch"):
        return None
    latest = datetime(9999, 1, 1, tzinfo=UTC)
    usual, batch = model.get_prices(latest), model.get_prices(latest, _CONTEXTS["batch"])
    plain, batched = (next((rates for *_, rates in _tiers(prices)), None) for prices in (usual, batch))
    if plain is None or batched is None or plain == batched:
        return None
    return Rates(**{name: _part(getattr(batched, name), getattr(plain, name)) for name in SHOWN})


def _part(part: Fraction, whole: Fraction) -> Fraction:
    return part / whole if whole else Fraction(1)
