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

from services.dispatcher.tools.spend import figures

SOURCE = "genai-prices"
NOTE = (
    "List prices for pay-per-token use. Each request is priced at its own time; where the list has no price for that time,"
    " its earliest one is taken. Discounts and committed use are not in it."
)
# what a price is of, and the SQL of how much of it a row of a normalised log has
PARTS = ("request", "input", "cached", "cache_write", "cache_write_1h", "output")
COUNTED = (
    "requests", "input_tokens - cached_input_tokens - cache_write_tokens", "cached_input_tokens",
    "cache_write_tokens - cache_write_1h_tokens", "cache_write_1h_tokens", "output_tokens",
)  # fmt: skip
_DAY_US = 86_400_000_000
_FAR = 2**62
_BATCH = {"processing": "batch"}
_ONE = 1_000_000


@dataclass(frozen=True, slots=True)
class Rates:
    """USD of one token of each class, and of one request."""

    input: Fraction
    cached: Fraction
    cache_write: Fraction
    cache_write_1h: Fraction
    output: Fraction
    request: Fraction


@dataclass(frozen=True, slots=True)
class Segment:
    """When a price holds: days, a time of day (microseconds of it) and a length of the prompt; ends are exclusive but for `up_to`."""

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
    """What was used, summed. `input` is that which neither came from a cache nor went to one."""

    requests: int = 0
    input: int = 0
    cached: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    output: int = 0

    def all_input(self) -> int:
        """Every input token."""
        return self.input + self.cached + self.cache_write + self.cache_write_1h

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.requests + other.requests, self.input + other.input, self.cached + other.cached,
            self.cache_write + other.cache_write, self.cache_write_1h + other.cache_write_1h, self.output + other.output,
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
        tokens.input * rates.input,
        tokens.cached * rates.cached,
        tokens.cache_write * rates.cache_write,
        tokens.cache_write_1h * rates.cache_write_1h,
        tokens.output * rates.output,
        tokens.requests * rates.request,
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
    provider, model = found
    segments = tuple(_segments(model))
    if not segments:
        return None
    has_output = any(segment.rates.output for segment in segments)
    return Priced(model.id, provider.id, segments, _batch(model), has_output, next(iter(provider.pricing_urls or ()), ""))


def sibling(reference: str, model_id: str) -> Priced | None:
    """Another model of the same provider."""
    found = _found(reference)
    if found is None:
        return None
    provider = found[0]
    model = provider.find_model(model_id, all_providers=data_snapshot.get_snapshot().providers)
    if model is None or model.id != model_id or not (segments := tuple(_segments(model))):
        return None
    return Priced(model.id, provider.id, segments, _batch(model), True, next(iter(provider.pricing_urls or ()), ""))


def tabled(connection: duckdb.DuckDBPyConnection, table: str, models: Mapping[str, Priced]) -> list[Segment]:
    """Make a table of the segments of these models, to join a log with by `joined`. `seg` is the place in the list returned."""
    rows = [(name, segment) for name, priced in models.items() for segment in priced.segments]
    columns: Sequence[Sequence[object]] = [
        list(range(len(rows))),
        [name for name, _ in rows],
        [datetime.combine(segment.since or date(1, 1, 1), time()) for _, segment in rows],
        [datetime.combine(segment.until or date(9999, 1, 1), time()) for _, segment in rows],
        *([getattr(segment, field) for _, segment in rows] for field in ("day_from", "day_until", "above", "up_to")),
    ]
    kinds = ("INTEGER", "VARCHAR", "TIMESTAMP", "TIMESTAMP", "BIGINT", "BIGINT", "BIGINT", "BIGINT")
    names = ("seg", "model", "since", "until", "day_from", "day_until", "above", "up_to")
    read = ", ".join(f"unnest(?::{kind}[]) AS {name}" for kind, name in zip(kinds, names, strict=True))
    connection.execute(f"CREATE TEMP TABLE {table} AS SELECT {read}", columns)
    return [segment for _, segment in rows]


def joined(usage: str, table: str) -> str:
    """The condition under which a row of `usage` has the price of a row of `table`."""
    moment = f"(epoch_us({usage}.time) % {_DAY_US})"
    return (
        f"{usage}.model = {table}.model AND {usage}.time >= {table}.since AND {usage}.time < {table}.until"
        f" AND {moment} >= {table}.day_from AND {moment} < {table}.day_until"
        f" AND {usage}.tier_tokens > {table}.above AND {usage}.tier_tokens <= {table}.up_to"
    )


def _found(reference: str) -> tuple[types.Provider, types.ModelInfo] | None:
    snapshot = data_snapshot.get_snapshot()
    provider, separator, rest = reference.partition("/")
    for name, provider_id in ((reference, None), (rest, provider)):
        if name and (name == reference or separator):
            try:
                return snapshot.find_provider_model(name, None, provider_id, None)
            except LookupError:
                continue
    return None


def _segments(model: types.ModelInfo) -> Iterator[Segment]:
    """Constraints are days and times of day: within the boundaries of all of them the list's answer does not change."""
    if not model.prices:
        return
    conditions = [] if isinstance(model.prices, types.ModelPrice) else [price.constraint for price in model.prices]
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
            for above, up_to, rates in _tiers(model.get_prices(moment)):
                yield Segment(since, until, begin, end, above, up_to, rates)


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
    whole = _price(prices.input_mtok, length) or Fraction()
    read, write = _price(prices.cache_read_mtok, length), _price(prices.cache_write_mtok, length)
    stays = _price(prices.cache_write_1h_mtok, length)
    written = whole if write is None else write
    return Rates(
        input=whole / _ONE,
        cached=(whole if read is None else read) / _ONE,
        cache_write=written / _ONE,
        cache_write_1h=(written if stays is None else stays) / _ONE,
        output=(_price(prices.output_mtok, length) or Fraction()) / _ONE,
        request=(_price(prices.requests_kcount, length) or Fraction()) / 1000,
    )


def _price(price: Decimal | types.TieredPrices | None, length: int) -> Fraction | None:
    if isinstance(price, types.TieredPrices):
        price = next((tier.price for tier in reversed(price.tiers) if length > tier.start), price.base)
    return None if price is None else Fraction(price)


def _batch(model: types.ModelInfo) -> Rates | None:
    """Batch prices as parts of the standard ones; None where the list has none."""
    latest = datetime(9999, 1, 1, tzinfo=UTC)
    plain, batched = (
        next((rates for *_, rates in _tiers(prices)), None) for prices in (model.get_prices(latest), model.get_prices(latest, _BATCH))
    )
    if plain is None or batched is None or plain == batched:
        return None
    parts = {name: _part(getattr(batched, name), getattr(plain, name)) for name in PARTS}
    return Rates(**parts)


def _part(part: Fraction, whole: Fraction) -> Fraction:
    return part / whole if whole else Fraction(1)
