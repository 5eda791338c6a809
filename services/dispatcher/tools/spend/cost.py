"""cost_breakdown: what a log cost, by model, day, hour and user, and what of it has no price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction

import duckdb
from typing_extensions import TypedDict

from services.dispatcher.tools.spend import duck, figures, pricing, profile
from services.dispatcher.tools.spend.pricing import Cost, Priced, Segment, Tokens

MONTH_HOURS = 730
TOP_USERS = 20
SUMS = ", ".join(f"sum({counted})" for counted in pricing.COUNTED)


class _Counted(TypedDict):
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


@dataclass(slots=True)
class Sum:
    """What came together under one key."""

    tokens: Tokens = field(default_factory=Tokens)
    cost: Cost = field(default_factory=Cost)

    def add(self, tokens: Tokens, cost: Cost) -> None:
        """Take in some more."""
        self.tokens += tokens
        self.cost += cost


def cost_breakdown(connection: duckdb.DuckDBPyConnection, usage: str) -> figures.CostBreakdown:
    """The cost of a normalised log."""
    models = priced_models(connection, usage)
    segments = pricing.tabled(connection, "segments", models)
    by_model: dict[str | None, Sum] = {}
    by_hour: dict[datetime, Sum] = {}
    join = f"{usage} u LEFT JOIN segments ON {pricing.joined('u', 'segments')}"
    query = f"SELECT u.model, seg, date_trunc('hour', u.time), {SUMS} FROM {join} GROUP BY ALL"
    for model, seg, hour, *sums in duck.rows(connection, query):
        tokens = Tokens(*map(int, sums))
        cost = Cost() if seg is None else pricing.cost(tokens, segments[seg].rates)
        by_model.setdefault(model, Sum()).add(tokens, cost)
        by_hour.setdefault(hour, Sum()).add(tokens, cost)
    total = sum((found.cost.total() for found in by_model.values()), Fraction())
    unpriced = {model: found for model, found in by_model.items() if model not in models}
    return figures.CostBreakdown(
        total_cost=figures.usd(total),
        currency="USD",
        cost_breakdown=figures.Breakdown(
            by_model=_models(by_model, models),
            by_day=_days(by_hour),
            by_hour=[_hour(hour, found) for hour, found in sorted(by_hour.items())],
            by_user=_users(connection, usage, segments),
            unpriced=_unpriced(unpriced),
        ),
        monthly=_monthly(total, profile.window(connection, usage)),
        price_list=pricing.price_list(),
        notes=_notes(unpriced, by_model, models),
    )


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


def _days(by_hour: Mapping[datetime, Sum]) -> list[figures.DayCost]:
    days: dict[str, Sum] = {}
    for hour, found in sorted(by_hour.items()):
        days.setdefault(f"{hour:%Y-%m-%d}", Sum()).add(found.tokens, found.cost)
    return [figures.DayCost(day=day, **_counted(found)) for day, found in days.items()]


def _hour(hour: datetime, found: Sum) -> figures.HourCost:
    return figures.HourCost(hour=f"{hour:%Y-%m-%dT%H:%M:%SZ}", **_counted(found))


def _counted(found: Sum) -> _Counted:
    tokens = found.tokens
    return _Counted(
        requests=tokens.requests, input_tokens=tokens.all_input(), output_tokens=tokens.output, cost=figures.usd(found.cost.total())
    )


def _users(connection: duckdb.DuckDBPyConnection, usage: str, segments: list[Segment]) -> list[figures.UserCost]:
    """Those who cost most, then those who come first; nobody when no user is named."""
    join = f"{usage} u LEFT JOIN segments ON {pricing.joined('u', 'segments')}"
    names = _most_expensive(connection, join, segments)
    if names in ([], [None]):
        return []
    query = f'SELECT u."user", seg, {SUMS} FROM {join} WHERE list_contains(?, u."user") OR u."user" IS NULL GROUP BY ALL'
    found: dict[str | None, Sum] = {name: Sum() for name in names}
    for user, seg, *sums in duck.rows(connection, query, [[name for name in names if name is not None]]):
        if user in found:
            tokens = Tokens(*map(int, sums))
            found[user].add(tokens, Cost() if seg is None else pricing.cost(tokens, segments[seg].rates))
    return [figures.UserCost(user=user, **_counted(sum_)) for user, sum_ in found.items()]


def _most_expensive(connection: duckdb.DuckDBPyConnection, join: str, segments: list[Segment]) -> list[str | None]:
    """Found in DuckDB: there may be millions of users. Amounts are whole numbers of so small a part of a USD that none is rounded."""
    rates = [[getattr(segment.rates, name) for segment in segments] for name in pricing.PARTS]
    unit = math.lcm(*(rate.denominator for part in rates for rate in part))
    read = ", ".join(f"unnest(?::VARCHAR[])::HUGEINT AS {name}_rate" for name in pricing.PARTS)
    whole = [[str(rate * unit) for rate in part] for part in rates]
    connection.execute(f"CREATE TEMP TABLE rates AS SELECT unnest(?::INTEGER[]) AS seg, {read}", [list(range(len(segments))), *whole])
    amounts = " + ".join(f"({tokens}) * {name}_rate" for name, tokens in zip(pricing.PARTS, pricing.COUNTED, strict=True))
    query = (
        f'SELECT u."user" FROM {join} LEFT JOIN rates USING (seg) GROUP BY u."user"'
        f' ORDER BY coalesce(sum({amounts}), 0) DESC, u."user" NULLS LAST LIMIT {TOP_USERS}'
    )
    return [name for (name,) in duck.rows(connection, query)]


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
