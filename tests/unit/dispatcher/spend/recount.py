"""The figures of a log, computed a second time: row by row, in exact arithmetic, without any of the tools' code."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, localcontext
from fractions import Fraction
from typing import Any, TypeVar

from genai_prices import Usage, calc_price, data_snapshot, types

from tests.unit.dispatcher.spend.logs import Request

CHEAPER = {
    "gpt-4o": "gpt-4o-mini", "gemini-2.5-pro": "gemini-2.5-flash", "claude-sonnet-4-5": "claude-haiku-4-5",
    "claude-opus-4-1": "claude-sonnet-4-0", "o3": "o4-mini", "gemini-2.5-flash": "gemini-2.5-flash-lite",
    "claude-opus-5": "claude-sonnet-5",
}  # fmt: skip
# how the list is asked for what was processed otherwise
CONTEXTS = {
    "batch": {"processing": "batch"}, "flex": {"service_tier": "flex"}, "priority": {"service_tier": "priority"},
    "fast": {"service_tier": "fast", "speed": "fast"},
}  # fmt: skip
# digits enough for anything; whatever does not fit is an error, never a rounded figure
_EXACT = Context(prec=200, traps=[Inexact])
PARTS = ("input", "cached", "written", "written_1h", "output", "request")


_T = TypeVar("_T")


def _exactly(function: Callable[[Sequence[Request]], _T]) -> Callable[[Sequence[Request]], _T]:
    @functools.wraps(function)
    def computed(rows: Sequence[Request]) -> _T:
        with localcontext(_EXACT):
            return function(rows)

    return computed


def usd(amount: Fraction | Decimal) -> float:
    """Rounded once, half-even, to six places."""
    over, under = amount.as_integer_ratio()
    with localcontext(Context(prec=100)):
        return float((Decimal(over) / Decimal(under)).quantize(Decimal("0.000001"), ROUND_HALF_EVEN))


def percentile(values: Iterable[int], share: int) -> int:
    """Nearest rank: the ceil(share * n)-th smallest."""
    ordered = sorted(values)
    return ordered[math.ceil(Fraction(share * len(ordered), 100)) - 1]


def profile(rows: Sequence[Request]) -> dict[str, Any]:
    """What `usage_profile` must say."""
    models = {row.model for row in rows} - {None}
    users = {row.user for row in rows} - {None}
    return {
        "requests": sum(row.requests for row in rows),
        "input_tokens": sum(row.input for row in rows),
        "output_tokens": sum(row.output for row in rows),
        "cached_input_tokens": sum(row.cached for row in rows),
        "from": min(row.time for row in rows).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "to": max(row.time for row in rows).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "percentiles": {
            "input_tokens": _percentiles([row.input for row in rows]),
            "output_tokens": _percentiles([row.output for row in rows]),
        },
        "peak_minute": _peak(rows, "%Y-%m-%dT%H:%M:00Z"),
        "peak_hour": _peak(rows, "%Y-%m-%dT%H:00:00Z"),
        "models": len(models),
        "users": len(users) or None,
    }


def _percentiles(values: list[int]) -> dict[str, int]:
    return {"p50": percentile(values, 50), "p95": percentile(values, 95), "p99": percentile(values, 99), "max": max(values)}


def _peak(rows: Sequence[Request], form: str) -> dict[str, Any]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.time.strftime(form)] += row.requests
    most = max(counts.values())
    return {"start": min(start for start, count in counts.items() if count == most), "requests": most}


@_exactly
def costs(rows: Sequence[Request]) -> dict[str, Any]:
    """What `cost_breakdown` must say, but for its words."""
    charged = [(row, charge(row, row.model)) for row in rows]
    total = sum((sum(parts.values(), Decimal()) for _, parts in charged if parts), Decimal())
    return {
        "total_cost": usd(total),
        "currency": "USD",
        "cost_breakdown": {
            "by_model": _by_model(charged),
            "by_day": _by(charged, "day", lambda row: row.time.strftime("%Y-%m-%d")),
            "by_hour": _by(charged, "hour", lambda row: row.time.strftime("%Y-%m-%dT%H:00:00Z")),
            "by_user": _by_user(charged),
            "unpriced": _unpriced(charged),
        },
        "monthly": {"cost": usd(monthly(rows, total)), "hours": 730, "window_hours": usd(Fraction(window(rows), 3_600_000_000))},
    }


def window(rows: Sequence[Request]) -> int:
    """Microseconds."""
    times = sorted({row.time for row in rows})
    step = min((later - earlier for earlier, later in itertools.pairwise(times)), default=timedelta(days=1))
    end = max(row.time + (step if row.span is None else row.span) for row in rows)
    return max((end - times[0]) // timedelta(microseconds=1), 60_000_000)


def monthly(rows: Sequence[Request], amount: Decimal) -> Fraction:
    """An amount of the window for 730 hours."""
    return Fraction(amount) * 730 * 3_600_000_000 / window(rows)


@functools.lru_cache(maxsize=200_000)
def charge(row: Request, model: str | None) -> Mapping[str, Decimal] | None:
    """What a request costs, by part; None without a price."""
    if model is None or (found := _model(model)) is None:
        return None
    provider, info = found
    context = _context(provider, info, row.context) if row.context else {}
    prices = info.get_prices(row.time, context)
    if not prices.__dict__:
        return None
    units = _units(prices, _length(row)) if context else _listed(prices, _length(row))
    parts = {
        "input": (row.input - row.cached - row.written - row.audio) * units["input"] + row.audio * units["audio"],
        "cached": (row.cached - row.audio_cached) * units["cached"] + row.audio_cached * units["audio_cached"],
        "written": (row.written - row.written_1h) * units["written"],
        "written_1h": row.written_1h * units["written_1h"],
        "output": (row.output - row.audio_output) * units["output"] + row.audio_output * units["audio_output"],
        "request": row.requests * units["request"] + row.searches * units["search"],
    }
    if row.single and (row.input % 8 == 0 or row.cached % 8 == 1):  # not each: it takes longer than all the rest
        _agree(row, provider, info, sum(parts.values(), Decimal()))
    return parts


def _context(provider: types.Provider, info: types.ModelInfo, context: str) -> dict[str, str]:
    """A model that a provider takes over from another one has no such prices there."""
    return CONTEXTS.get(context, {}) if any(info is own for own in provider.models) else {}


_LISTED: dict[tuple[int, Fraction], dict[str, Decimal]] = {}


def _listed(prices: types.ModelPrice, length: Fraction) -> dict[str, Decimal]:
    """The same for prices of the list itself, which stay where they are: each is computed once."""
    tiered = any(isinstance(price, types.TieredPrices) for price in prices.__dict__.values())
    key = (id(prices), length if tiered else Fraction())
    if key not in _LISTED:
        _LISTED[key] = _units(prices, length)
    return _LISTED[key]


def _units(prices: types.ModelPrice, length: Fraction) -> dict[str, Decimal]:
    """The price of one token, of one request and of one search."""
    stated = prices.__dict__

    def price(name: str, *others: Decimal | None) -> Decimal | None:
        found = _price(stated.get(name), length)
        return next((other for other in others if other is not None), None) if found is None else found

    whole, output, heard = price("input_mtok", Decimal()), price("output_mtok", Decimal()), price("input_audio_mtok")
    read, write = price("cache_read_mtok"), price("cache_write_mtok", whole)
    tokens = {
        "input": whole, "cached": read if read is not None else whole, "written": write, "output": output,
        "written_1h": price("cache_write_1h_mtok", write), "audio": heard if heard is not None else whole,
        "audio_cached": price("cache_audio_read_mtok", read, heard, whole), "audio_output": price("output_audio_mtok", output),
    }  # fmt: skip
    counts = {"request": price("requests_kcount", Decimal()), "search": price("web_searches_kcount", Decimal())}
    return {name: unit / per for units, per in ((tokens, 10**6), (counts, 1000)) for name, unit in units.items() if unit is not None}


def usage(row: Request) -> Usage:
    """A request as the price list's own calculation takes it."""
    return Usage(
        input_tokens=row.input, cache_read_tokens=row.cached, cache_write_tokens=row.written, cache_write_1h_tokens=row.written_1h,
        output_tokens=row.output, input_audio_tokens=row.audio + row.audio_cached, cache_audio_read_tokens=row.audio_cached,
        output_audio_tokens=row.audio_output, web_searches=row.searches,
    )  # fmt: skip


def _agree(row: Request, provider: types.Provider, info: types.ModelInfo, total: Decimal) -> None:
    """The price list's own calculation says the same."""
    context = CONTEXTS.get(row.context)
    if row.model == info.id:
        theirs = calc_price(usage(row), row.model, genai_request_timestamp=row.time, price_context=context)
    else:
        theirs = info.calc_price(usage(row), provider, genai_request_timestamp=row.time, price_context=context)
    assert theirs.total_price == total, (row, info.id)


@functools.lru_cache
def _model(name: str) -> tuple[types.Provider, types.ModelInfo] | None:
    snapshot = data_snapshot.get_snapshot()
    provider, separator, rest = name.partition("/")
    try:
        return snapshot.find_provider_model(rest if separator else name, None, provider if separator else None, None)
    except LookupError:
        return None


def _length(row: Request) -> Fraction:
    if row.single:
        return Fraction(row.input)
    return Fraction(row.input, row.requests) if row.known_requests else Fraction()


def _price(price: Decimal | types.TieredPrices | None, length: Fraction) -> Decimal | None:
    if isinstance(price, types.TieredPrices):
        reached = [tier.price for tier in price.tiers if length > tier.start]
        return reached[-1] if reached else price.base
    return price


Charged = Sequence[tuple[Request, Mapping[str, Decimal] | None]]


def _by_model(charged: Charged) -> list[dict[str, Any]]:
    groups: dict[str, list[tuple[Request, Mapping[str, Decimal]]]] = defaultdict(list)
    for row, parts in charged:
        if parts is not None and row.model is not None:
            groups[row.model].append((row, parts))
    made = []
    for name, group in groups.items():
        provider, info = _model(name) or (None, None)
        assert provider is not None
        assert info is not None
        spent = {part: sum((parts[part] for _, parts in group), Decimal()) for part in PARTS}
        total = sum(spent.values(), Decimal())
        made.append((total, name, {
            "model": name, "priced_as": info.id, "provider": provider.id,
            "requests": sum(row.requests for row, _ in group),
            "input_tokens": sum(row.input for row, _ in group),
            "cached_input_tokens": sum(row.cached for row, _ in group),
            "cache_write_tokens": sum(row.written for row, _ in group),
            "output_tokens": sum(row.output for row, _ in group),
            "input_cost": usd(spent["input"]), "cached_input_cost": usd(spent["cached"]),
            "cache_write_cost": usd(spent["written"] + spent["written_1h"]), "output_cost": usd(spent["output"]),
            "request_cost": usd(spent["request"]), "cost": usd(total),
        }))  # fmt: skip
    return [entry for _, _, entry in sorted(made, key=lambda one: (-one[0], one[1]))]


def _by(charged: Charged, name: str, key: Callable[[Request], str]) -> list[dict[str, Any]]:
    groups: dict[str, list[tuple[Request, Mapping[str, Decimal] | None]]] = defaultdict(list)
    for row, parts in charged:
        groups[key(row)].append((row, parts))
    return [{name: start, **_sum(groups[start])} for start in sorted(groups)]


def _by_user(charged: Charged) -> list[dict[str, Any]]:
    groups: dict[str | None, list[tuple[Request, Mapping[str, Decimal] | None]]] = defaultdict(list)
    for row, parts in charged:
        groups[row.user].append((row, parts))
    if set(groups) == {None}:
        return []
    spent = {user: sum((sum(parts.values(), Decimal()) for _, parts in group if parts), Decimal()) for user, group in groups.items()}
    order = sorted(groups, key=lambda user: (-spent[user], user is None, user or ""))
    return [{"user": user, **_sum(groups[user])} for user in order[:20]]


def _sum(group: Charged) -> dict[str, Any]:
    return {
        "requests": sum(row.requests for row, _ in group),
        "input_tokens": sum(row.input for row, _ in group),
        "output_tokens": sum(row.output for row, _ in group),
        "cost": usd(sum((sum(parts.values(), Decimal()) for _, parts in group if parts), Decimal())),
    }


def _unpriced(charged: Charged) -> list[dict[str, Any]]:
    groups: dict[str | None, list[Request]] = defaultdict(list)
    for row, parts in charged:
        if parts is None:
            groups[row.model].append(row)
    counts = {model: sum(row.requests for row in group) for model, group in groups.items()}
    return [
        {"model": model, "requests": counts[model], "input_tokens": sum(row.input for row in groups[model]),
         "output_tokens": sum(row.output for row in groups[model])}
        for model in sorted(groups, key=lambda model: (-counts[model], model is None, model or ""))
    ]  # fmt: skip


@_exactly
def savings(rows: Sequence[Request]) -> dict[str, Decimal]:
    """What each opportunity and all of them save in the window, row by row."""
    priced = [row for row in rows if charge(row, row.model) is not None]
    cap = percentile([row.output for row in rows if row.single], 95) if any(row.single for row in rows) else None
    cheaper = {row.model: other for row in priced if row.model and (other := _cheaper(row.model))}
    medians = {
        model: (percentile([row.input for row in rows if row.model == model and row.single], 50),
                percentile([row.output for row in rows if row.model == model and row.single], 50))
        for model in cheaper if any(row.single for row in rows if row.model == model)
    }  # fmt: skip
    moves: dict[str, list[Request]] = defaultdict(list)
    for row in priced:
        if _plain(row) and row.model in medians and row.input <= medians[row.model][0] and row.output <= medians[row.model][1]:
            moves[row.model].append(row)
    gains = {model: sum((_cost(row) - _cost(row, as_model=cheaper[model]) for row in group), Decimal()) for model, group in moves.items()}
    moved = {id(row): cheaper[model] for model, group in moves.items() if gains[model] > 0 for row in group}
    kinds = ("cheaper_model", "output_cap", "prompt_cache", "batch_window")

    def after(row: Request, *made: str) -> Decimal:
        return _cost(
            row, as_model=moved.get(id(row)) if "cheaper_model" in made else None, cap=cap if "output_cap" in made else None,
            cache="prompt_cache" in made, batch="batch_window" in made,
        )  # fmt: skip

    before = sum((_cost(row) for row in priced), Decimal())
    alone = {kind: before - sum((after(row, kind) for row in priced), Decimal()) for kind in kinds}
    offered = [kind for kind in kinds if alone[kind] > 0]
    return {**{kind: alone[kind] for kind in offered}, "combined": before - sum((after(row, *offered) for row in priced), Decimal())}


def _plain(row: Request) -> bool:
    return row.single and not (row.searches or _heard(row))


def _heard(row: Request) -> bool:
    return row.audio + row.audio_cached + row.audio_output > 0


def _cheaper(model: str) -> str | None:
    found = _model(model)
    other = CHEAPER.get(found[1].id) if found else None
    if found is None or other is None:
        return None
    return f"{found[0].id}/{other}" if "/" in model else other


def _cost(row: Request, *, as_model: str | None = None, cap: int | None = None, cache: bool = False, batch: bool = False) -> Decimal:
    model = as_model or row.model
    charged = charge(row, row.model) if as_model is None else charge(replace(row, model=as_model), as_model)
    assert model is not None
    assert charged is not None
    parts = dict(charged)
    if cap is not None and _plain(row) and row.output > cap:
        parts["output"] = parts["output"] * cap / row.output
    if cache and _plain(row) and row.input >= 1024:
        _share(row, model, parts)
    total = sum(parts.values(), Decimal())
    if not batch or row.context or _heard(row):
        return total
    return total - sum((parts[name] * (1 - share) for name, share in _batch(model).items()), Decimal()) / 4


def _share(row: Request, model: str, parts: dict[str, Decimal]) -> None:
    """Half of the plain input from the cache; where writing has a price of its own, a tenth of that half is written."""
    found = _model(model)
    assert found is not None
    context = _context(*found, row.context) if row.context else {}
    prices = found[1].get_prices(row.time, context)
    one = _units(prices, _length(row)) if context else _listed(prices, _length(row))
    has_write = one["written"] != one["input"]
    shared = one["cached"] * Decimal("0.9") + one["written"] / 10 if has_write else one["cached"]
    if shared < one["input"]:
        half = Decimal(row.input - row.cached - row.written) / 2
        parts["input"] -= half * one["input"]
        parts["cached"] += half * one["cached"] * (Decimal("0.9") if has_write else 1)
        parts["written"] += half * one["written"] / 10 if has_write else 0


@functools.lru_cache
def _batch(model: str) -> dict[str, Decimal]:
    """What the latest batch price is of the latest standard one, by part."""
    found = _model(model)
    assert found is not None
    time = datetime(9998, 1, 1, tzinfo=UTC)
    unit = Request(time, 6, 1, cached=2, written=3, written_1h=1)
    plain, batched = charge(unit, model), charge(replace(unit, context="batch"), model)
    assert plain is not None
    assert batched is not None
    return {part: batched[part] / plain[part] if plain[part] else Decimal(1) for part in PARTS}
