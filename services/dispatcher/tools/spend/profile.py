"""usage_profile: how much, how large, when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import duckdb

from services.dispatcher.tools.spend import duck, figures

_SHARES = (50, 95, 99, 100)  # of a hundred; the hundredth is the greatest


def usage_profile(connection: duckdb.DuckDBPyConnection, usage: str) -> figures.UsageProfile:
    """The profile of a normalised log."""
    totals = "sum(requests), sum(input_tokens), sum(output_tokens), sum(cached_input_tokens), min(time), max(time)"
    found = duck.row(connection, f"SELECT {totals} FROM {usage}")
    requests, input_tokens, output_tokens, cached, begin, end = found
    (models,) = duck.row(connection, f"SELECT count(*) FROM (SELECT 1 FROM {usage} WHERE model IS NOT NULL GROUP BY model)")
    (users,) = duck.row(connection, f'SELECT count(*) FROM (SELECT 1 FROM {usage} WHERE "user" IS NOT NULL GROUP BY "user")')
    return {
        "requests": int(requests),
        "input_tokens": int(input_tokens),
        "output_tokens": int(output_tokens),
        "cached_input_tokens": int(cached),
        "from": moment(begin),
        "to": moment(end),
        "percentiles": {
            "input_tokens": _percentiles(connection, usage, "input_tokens"),
            "output_tokens": _percentiles(connection, usage, "output_tokens"),
        },
        "peak_minute": _peak(connection, usage, "minute"),
        "peak_hour": _peak(connection, usage, "hour"),
        "models": int(models),
        "users": int(users) or None,
    }


def nearest_rank(connection: duckdb.DuckDBPyConnection, usage: str, column: str, shares: Sequence[int]) -> list[int]:
    """For each share of a hundred the smallest value that so many per cent of the rows do not exceed."""
    # by how often each value occurs: there are far fewer values than rows, and none is kept twice
    counted = f"SELECT {column} AS value, count(*) AS times FROM {usage} GROUP BY ALL"
    ranked = f"SELECT value, sum(times) OVER (ORDER BY value) AS upto, sum(times) OVER () AS rows FROM ({counted})"
    wanted = ", ".join(f"min(value) FILTER (upto * 100 >= rows * {share})" for share in shares)
    return [int(value) for value in duck.row(connection, f"SELECT {wanted} FROM ({ranked})")]


def window(connection: duckdb.DuckDBPyConnection, usage: str) -> timedelta:
    """The time a log covers: from its first request to the end of what its last row stands for, at least a minute.

    A sum that does not say how long it took goes on for the smallest step between two rows, or a day.
    """
    ends = "max(time + to_microseconds(span)), max(time) FILTER (span IS NULL)"
    begin, end, unsure = duck.row(connection, f"SELECT min(time), {ends} FROM {usage}")
    if unsure is not None:
        end = max(end or begin, unsure + _step(connection, usage))
    covered: timedelta = end - begin
    return max(covered, timedelta(minutes=1))


def sums(connection: duckdb.DuckDBPyConnection, usage: str) -> int:
    """How many rows are sums of requests."""
    (found,) = duck.row(connection, f"SELECT count(*) FROM {usage} WHERE NOT single")
    return int(found)


def _step(connection: duckdb.DuckDBPyConnection, usage: str) -> timedelta:
    steps = f"SELECT time - lag(time) OVER (ORDER BY time) AS step FROM (SELECT time FROM {usage} GROUP BY time)"
    (smallest,) = duck.row(connection, f"SELECT min(step) FROM ({steps})")
    return smallest or timedelta(days=1)


def moment(time: datetime) -> str:
    """As `2023-11-16T18:15:46.680590Z`."""
    return f"{time:%Y-%m-%dT%H:%M:%S.%fZ}"


def _percentiles(connection: duckdb.DuckDBPyConnection, usage: str, column: str) -> figures.Percentiles:
    p50, p95, p99, greatest = nearest_rank(connection, usage, column, _SHARES)
    return figures.Percentiles(p50=p50, p95=p95, p99=p99, max=greatest)


def _peak(connection: duckdb.DuckDBPyConnection, usage: str, unit: str) -> figures.Peak:
    counted = f"SELECT date_trunc('{unit}', time) AS start, sum(requests) AS requests FROM {usage} GROUP BY ALL"
    start, requests = duck.row(connection, f"SELECT start, requests FROM ({counted}) ORDER BY requests DESC, start LIMIT 1")
    return figures.Peak(start=f"{start:%Y-%m-%dT%H:%M:%SZ}", requests=int(requests))
