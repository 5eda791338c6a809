"""What a log would have cost otherwise: each change alone and several one after another, exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import duckdb

from services.dispatcher.tools.spend import cost, duck, figures, pricing, profile, siblings
from services.dispatcher.tools.spend.pricing import Cost, Priced, Rates, Segment, Tokens

CACHE_FROM_TOKENS = 1024
CACHE_SHARE = Fraction(1, 2)
CACHE_READ_SHARE = Fraction(9, 10)
BATCH_SHARE = Fraction(1, 4)
CAP_PERCENTILE = 95
_NO_AUDIO = "input_audio_tokens + cached_audio_tokens + output_audio_tokens = 0"
# one request of text alone: what it would cost otherwise can be told
_PLAIN = f"single AND web_searches = 0 AND {_NO_AUDIO}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Which requests of a model are simple: neither their input nor their output is above the model's median."""

    cheaper: Priced
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Requests that have everything in common that matters: model, prices, whether they are simple, a cache takes them, they can wait."""

    model: str
    rates: Rates
    batch: Rates | None
    cheaper: Rates | None
    cheaper_batch: Rates | None
    cacheable: bool
    tokens: Tokens
    above_cap: int
    requests_above_cap: int

    def cost(self, *kinds: figures.Kind) -> Fraction:
        """What they cost once these changes are made."""
        move = self.cheaper is not None and "cheaper_model" in kinds
        rates, batch = (self.cheaper or self.rates, self.cheaper_batch) if move else (self.rates, self.batch)
        spent = pricing.cost(self.tokens, rates)
        if "output_cap" in kinds:
            spent = replace(spent, output=spent.output - self.above_cap * rates.output)
        if "prompt_cache" in kinds and self.cacheable and caches(rates):
            spent = _cached(spent, self.tokens.input * CACHE_SHARE, rates)
        return spent.total() - (BATCH_SHARE * _discount(spent, batch) if "batch_window" in kinds and batch else 0)


@dataclass(frozen=True, slots=True)
class Log:
    """A log as the what-ifs see it. `cap` is null where no row is a single request; `segments` are those of the table of that name."""

    cells: tuple[Cell, ...]
    models: Mapping[str, Priced]
    limits: Mapping[str, Limits]
    cap: int | None
    segments: Sequence[Segment]

    def saving(self, kinds: Collection[figures.Kind]) -> Fraction:
        """What all these changes together would have saved."""
        return sum((cell.cost() - cell.cost(*kinds) for cell in self.cells), Fraction())


def read(connection: duckdb.DuckDBPyConnection, usage: str) -> Log:
    """Sum a normalised log up, as finely as the what-ifs need it."""
    models = cost.priced_models(connection, usage)
    limits = _limits(connection, usage, models)
    cap = _cap(connection, usage)
    segments = pricing.tabled(connection, "segments", models)
    cheaper = pricing.tabled(connection, "cheaper", {name: limit.cheaper for name, limit in limits.items()})
    _table_limits(connection, limits)
    cells = list(_cells(connection, usage, segments, models, limits, cheaper, cap))
    kept = _without_losses(cells)
    return Log(tuple(kept), models, {name: limits[name] for name in {cell.model for cell in kept if cell.cheaper}}, cap, segments)


def _cells(
    connection: duckdb.DuckDBPyConnection,
    usage: str,
    segments: Sequence[Segment],
    models: Mapping[str, Priced],
    limits: Mapping[str, Limits],
    cheaper: Sequence[Segment],
    cap: int | None,
) -> Iterator[Cell]:
    over = f"CASE WHEN {_PLAIN} THEN greatest(output_tokens - {cap}, 0) ELSE 0 END" if cap is not None else "0"
    simple = f"{_PLAIN} AND input_tokens <= most_input AND output_tokens <= most_output"
    marked = f"SELECT *, {over} AS over, coalesce({simple}, false) AS simple FROM {usage} LEFT JOIN limits USING (model)"
    query = (
        f"SELECT u.model, segments.seg, cheaper.seg, {_PLAIN} AND input_tokens >= {CACHE_FROM_TOKENS}, u.context = '' AND {_NO_AUDIO},"
        f" {cost.SUMS}, sum(over), count(*) FILTER (over > 0) FROM ({marked}) u JOIN segments ON {pricing.joined('u', 'segments')}"
        f" LEFT JOIN cheaper ON u.simple AND {pricing.joined('u', 'cheaper')} GROUP BY ALL"
    )
    for model, seg, other, cacheable, may_wait, *sums, above, requests in duck.rows(connection, query):
        there = limits[model].cheaper if other is not None else None
        yield Cell(
            model=model,
            rates=segments[seg].rates,
            batch=models[model].batch if may_wait else None,
            cheaper=cheaper[other].rates if other is not None else None,
            cheaper_batch=there.batch if there and may_wait else None,
            cacheable=cacheable,
            tokens=Tokens(*map(int, sums)),
            above_cap=int(above),
            requests_above_cap=int(requests),
        )


def caches(rates: Rates) -> bool:
    """Whether tokens from the cache cost less, the writing included."""
    return _from_cache(rates) < rates.input


def _from_cache(rates: Rates) -> Fraction:
    """The price of a shared token. Where writing has a price of its own, one in ten is written."""
    if rates.cache_write == rates.input:
        return rates.cached
    return CACHE_READ_SHARE * rates.cached + (1 - CACHE_READ_SHARE) * rates.cache_write


def _cached(spent: Cost, shared: Fraction, rates: Rates) -> Cost:
    reads = shared if rates.cache_write == rates.input else shared * CACHE_READ_SHARE
    return replace(
        spent,
        input=spent.input - shared * rates.input,
        cached=spent.cached + reads * rates.cached,
        cache_write=spent.cache_write + (shared - reads) * rates.cache_write,
    )


def _discount(spent: Cost, batch: Rates) -> Fraction:
    return sum((getattr(spent, part) * (1 - getattr(batch, part)) for part in pricing.SHOWN), Fraction())


def _limits(connection: duckdb.DuckDBPyConnection, usage: str, models: Mapping[str, Priced]) -> dict[str, Limits]:
    """The models that have a cheaper sibling, with their medians over rows of one request."""
    found = {}
    for name, priced in models.items():
        sibling_id = siblings.CHEAPER.get(priced.model_id)
        cheaper = pricing.sibling(name, sibling_id) if sibling_id else None
        if cheaper is not None:
            found[name] = cheaper
    if not found:
        return {}
    medians = [_medians(connection, usage, column, list(found)) for column in ("input_tokens", "output_tokens")]
    return {name: Limits(cheaper, medians[0][name], medians[1][name]) for name, cheaper in found.items() if name in medians[0]}


def _medians(connection: duckdb.DuckDBPyConnection, usage: str, column: str, names: list[str]) -> dict[str, int]:
    counted = f"SELECT model, {column} AS value, count(*) AS times FROM {usage} WHERE single AND model IN (SELECT unnest(?)) GROUP BY ALL"
    ranked = (
        "SELECT model, value, sum(times) OVER (PARTITION BY model ORDER BY value) AS upto, sum(times) OVER (PARTITION BY model) AS rows"
        f" FROM ({counted})"
    )
    query = f"SELECT model, min(value) FILTER (upto * 2 >= rows) FROM ({ranked}) GROUP BY model"
    return {model: int(value) for model, value in duck.rows(connection, query, [names])}


def _cap(connection: duckdb.DuckDBPyConnection, usage: str) -> int | None:
    singles = f"(SELECT * FROM {usage} WHERE single)"
    (rows,) = duck.row(connection, f"SELECT count(*) FROM {singles}")
    return profile.nearest_rank(connection, singles, "output_tokens", [CAP_PERCENTILE])[0] if rows else None


def _table_limits(connection: duckdb.DuckDBPyConnection, limits: Mapping[str, Limits]) -> None:
    columns = [list(limits), [limit.input_tokens for limit in limits.values()], [limit.output_tokens for limit in limits.values()]]
    read = "unnest(?::VARCHAR[]) AS model, unnest(?::BIGINT[]) AS most_input, unnest(?::BIGINT[]) AS most_output"
    connection.execute(f"CREATE TEMP TABLE limits AS SELECT {read}", columns)


def _without_losses(cells: list[Cell]) -> list[Cell]:
    """Leave out moves that would cost more: some models are cheaper, but not for tokens from a cache."""
    saved: dict[str, Fraction] = {}
    for cell in cells:
        saved[cell.model] = saved.get(cell.model, Fraction()) + cell.cost() - cell.cost("cheaper_model")
    return [cell if saved[cell.model] > 0 else replace(cell, cheaper=None, cheaper_batch=None) for cell in cells]
