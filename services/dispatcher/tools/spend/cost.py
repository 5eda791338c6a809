"""cost_breakdown: what a log cost, by model, day, hour and user, and what of it has no price."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

import duckdb
from typing_extensions import TypedDict

from netra import errors
from services.dispatcher.tools.spend import duck, figures, pricing, profile
from services.dispatcher.tools.spend.pricing import Cost, Priced, Segment, Tokens

MONTH_HOURS = 730
TOP_USERS = 20
# beyond two years a log is cut into days, beyond a century something is wrong with it
MOST_HOURS, MOST_DAYS = 17_568, 36_600
SUMS = ", ".join(f"sum({counted})" for counted in pricing.COUNTED)
_DAYS = f"The log has more than {MOST_HOURS:,} different hours: by_hour is left out, by_day has all of it."


class _Counted(TypedDict):
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


@dataclass(frozen=True, slots=True)
class Sum:
    """What came together under one key."""

    tokens: Tokens
    cost: Cost


def _zeros() -> list[int]:
    return [0] * len(pricing.PARTS)


@dataclass(slots=True)
class _Running:
    """A sum that is being made: how much of each of `pricing.PARTS`, and what that cost in units of `_Prices`."""

    counted: list[int] = field(default_factory=_zeros)
    amounts: list[int] = field(default_factory=_zeros)

    def add(self, counted: Sequence[int], rates: Sequence[int]) -> None:
        """Take in some more."""
        for place, count in enumerate(counted):
            if count:
                self.counted[place] += count
                self.amounts[place] += count * rates[place]


class _Prices:
    """Rates as whole numbers of so small a part of a USD that none is rounded: fractions would take fifty times as long."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        rates = [[getattr(segment.rates, part) for part in pricing.PARTS] for segment in segments]
        self._unit = math.lcm(*(rate.denominator for row in rates for rate in row))
        self._rates = [[int(rate * self._unit) for rate in row] for row in rates]
        self._free = _zeros()

    def of(self, segment: int | None) -> Sequence[int]:
        """The rates of a segment; what has none costs nothing."""
        return self._free if segment is None else self._rates[segment]

    def sum(self, found: _Running) -> Sum:
        """What was summed, in USD."""
        part = dict(zip(pricing.PARTS, (Fraction(amount, self._unit) for amount in found.amounts), strict=True))
        cost = Cost(
            input=part["input"] + part["input_audio"],
            cached=part["cached"] + part["cached_audio"],
            cache_write=part["cache_write"],
            cache_write_1h=part["cache_write_1h"],
            output=part["output"] + part["output_audio"],
            request=part["request"] + part["web_search"],
        )
        return Sum(Tokens(*found.counted), cost)


def cost_breakdown(connection: duckdb.DuckDBPyConnection, usage: str) -> figures.CostBreakdown:
    """The cost of a normalised log."""
    models = priced_models(connection, usage)
    segments = pricing.tabled(connection, "segments", models)
    prices, grain = _Prices(segments), _grain(connection, usage)
    models_, times = _summed(connection, usage, prices, grain)
    by_model = {name: prices.sum(found) for name, found in models_.items()}
    by_time = {time: prices.sum(found) for time, found in sorted(times.items())}
    total = sum((found.cost.total() for found in by_model.values()), Fraction())
    unpriced = {model: found for model, found in by_model.items() if model not in models}
    return figures.CostBreakdown(
        total_cost=figures.usd(total),
        currency="USD",
        cost_breakdown=figures.Breakdown(
            by_model=_models(by_model, models),
            by_day=_days(by_time),
            by_hour=[_hour(hour, found) for hour, found in by_time.items()] if grain == "hour" else [],
            by_user=_users(connection, usage, prices),
            unpriced=_unpriced(unpriced),
        ),
        monthly=_monthly(total, profile.window(connection, usage)),
        price_list=pricing.price_list(),
        notes=[*_notes(unpriced, by_model, models), *pricing.gaps(connection, usage, segments), *([] if grain == "hour" else [_DAYS])],
    )


def _grain(connection: duckdb.DuckDBPyConnection, usage: str) -> str:
    """How finely the time is cut. Raises `InvalidPayload` when there are more days than a log can have."""
    hours_, days = duck.row(
        connection, f"SELECT count(DISTINCT date_trunc('hour', time)), count(DISTINCT date_trunc('day', time)) FROM {usage}"
    )
    if days > MOST_DAYS:
        raise errors.InvalidPayload(
            f"The log has requests on {days:,} different days; at most {MOST_DAYS:,} can be told. Is this the column of the time?",
            field="inputs.columns",
        )
    return "hour" if hours_ <= MOST_HOURS else "day"


def _summed(
    connection: duckdb.DuckDBPyConnection, usage: str, prices: _Prices, grain: str
) -> tuple[dict[str | None, _Running], dict[datetime, _Running]]:
    """The log by model, and by hour or day."""
    models: dict[str | None, _Running] = {}
    times: dict[datetime, _Running] = {}
    join = f"{usage} u LEFT JOIN segments ON {pricing.joined('u', 'segments')}"
    query = f"SELECT u.model, seg, date_trunc('{grain}', u.time)::TIMESTAMP, {SUMS} FROM {join} GROUP BY ALL"
    for model, seg, time, *sums in duck.rows(connection, query):
        counted, rates = [int(each) for each in sums], prices.of(seg)
        models.setdefault(model, _Running()).add(counted, rates)
        times.setdefault(time, _Running()).add(counted, rates)
    return models, times


def priced_models(connection: duckdb.DuckDBPyConnection, usage: str) -> dict[str, Priced]:
    """The models of a log that the price list knows."""
    names = [name for (name,) in duck.rows(connection, f"SELECT model FROM {usage} WHERE model IS NOT NULL GROUP BY model ORDER BY model")]
    return {name: priced for name in names if (priced := pricing.find(name)) is not None}


def in_a_month(amount: Fraction, window: timedelta) -> Fraction:
    """An amount of the window, scaled to a month."""
    microsecond = timedelta(microseconds=1)
    return amount * (timedelta(hours=MONTH_HOURS) // microsecond) / (window // microsecond)


def hours(window: timedelta) -> float:
    """A window in hours."""
    return figures.usd(Fraction(window // timedelta(microseconds=1), timedelta(hours=1) // timedelta(microseconds=1)))


def _models(found: Mapping[str | None, Sum], models: Mapping[str, Priced]) -> list[figures.ModelCost]:
    rows = [(name, models[name], entry) for name, entry in found.items() if name is not None and name in models]
    return [_model(name, priced, entry) for name, priced, entry in sorted(rows, key=lambda row: (-row[2].cost.total(), row[0]))]


def _model(name: str, priced: Priced, found: Sum) -> figures.ModelCost:
    tokens, cost = found.tokens, found.cost
    return figures.ModelCost(
        model=name,
        priced_as=priced.model_id,
        provider=priced.provider_id,
        requests=tokens.requests,
        input_tokens=tokens.all_input(),
        cached_input_tokens=tokens.cached,
        cache_write_tokens=tokens.cache_write + tokens.cache_write_1h,
        output_tokens=tokens.output,
        input_cost=figures.usd(cost.input),
        cached_input_cost=figures.usd(cost.cached),
        cache_write_cost=figures.usd(cost.cache_write + cost.cache_write_1h),
        output_cost=figures.usd(cost.output),
        request_cost=figures.usd(cost.request),
        cost=figures.usd(cost.total()),
    )


def _days(by_time: Mapping[datetime, Sum]) -> list[figures.DayCost]:
    days = itertools.groupby(by_time.items(), key=lambda row: f"{row[0]:%Y-%m-%d}")
    return [figures.DayCost(day=day, **_counted(_together(found for _, found in rows))) for day, rows in days]


def _together(sums: Iterable[Sum]) -> Sum:
    tokens, cost = Tokens(), Cost()
    for found in sums:
        tokens, cost = tokens + found.tokens, cost + found.cost
    return Sum(tokens, cost)


def _hour(hour: datetime, found: Sum) -> figures.HourCost:
    return figures.HourCost(hour=f"{hour:%Y-%m-%dT%H:%M:%SZ}", **_counted(found))


def _counted(found: Sum) -> _Counted:
    tokens = found.tokens
    return _Counted(
        requests=tokens.requests, input_tokens=tokens.all_input(), output_tokens=tokens.output, cost=figures.usd(found.cost.total())
    )


def _users(connection: duckdb.DuckDBPyConnection, usage: str, prices: _Prices) -> list[figures.UserCost]:
    """Those who cost most, then those who come first; nobody when no user is named. Users come sorted: millions need no memory."""
    join = f"{usage} u LEFT JOIN segments ON {pricing.joined('u', 'segments')}"
    query = f'SELECT u."user", seg, {SUMS} FROM {join} GROUP BY ALL ORDER BY u."user" NULLS LAST'
    grouped = itertools.groupby(duck.rows(connection, query), key=operator.itemgetter(0))
    summed = ((user, _user(rows, prices)) for user, rows in grouped)
    top = heapq.nsmallest(TOP_USERS, summed, key=lambda row: (-sum(row[1].amounts), row[0] is None, row[0] or ""))
    if [user for user, _ in top] == [None]:
        return []
    return [figures.UserCost(user=user, **_counted(prices.sum(found))) for user, found in top]


def _user(rows: Iterable[tuple[Any, ...]], prices: _Prices) -> _Running:
    found = _Running()
    for _, seg, *sums in rows:
        found.add([int(each) for each in sums], prices.of(seg))
    return found


def _unpriced(found: Mapping[str | None, Sum]) -> list[figures.Unpriced]:
    rows = sorted(found.items(), key=lambda row: (-row[1].tokens.requests, row[0] is None, row[0] or ""))
    return [
        figures.Unpriced(model=model, requests=sum_.tokens.requests, input_tokens=sum_.tokens.all_input(), output_tokens=sum_.tokens.output)
        for model, sum_ in rows
    ]


def _monthly(total: Fraction, window: timedelta) -> figures.Monthly:
    note = f"The {hours(window):g} h of the log, scaled to {MONTH_HOURS} h. A month that is used otherwise costs otherwise."
    return figures.Monthly(cost=figures.usd(in_a_month(total, window)), hours=MONTH_HOURS, window_hours=hours(window), note=note)


def _notes(unpriced: Mapping[str | None, Sum], found: Mapping[str | None, Sum], models: Mapping[str, Priced]) -> list[str]:
    notes = []
    if names := sorted(name for name in unpriced if name is not None):
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        requests = sum(unpriced[name].tokens.requests for name in names)
        notes.append(
            f"The price list has no price for {listed}: {requests:,} requests are not in total_cost. A name can also be written"
            " provider/model, such as openai/text-embedding-3-small."
        )
    if None in unpriced:
        notes.append(
            f"{unpriced[None].tokens.requests:,} requests name no model and are not in total_cost. Give one with the input model,"
            " such as model=gpt-4o."
        )
    if silent := sorted(name for name, priced in models.items() if not priced.has_output_price and found[name].tokens.output):
        notes.append(f"The price list has no price for the output of {', '.join(silent[:10])}; it counts as free.")
    return notes
