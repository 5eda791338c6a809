"""spend_opportunities: what the same work could cost less, each with what must be true for it and how to find out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from typing import Literal

import duckdb

from services.dispatcher.tools.spend import cost, figures, pricing, profile, whatif
from services.dispatcher.tools.spend.figures import Kind, Opportunity

_SINGLE = "Single savings touch the same requests and do not add up; the combined saving applies them one after another:"
_SUMS = (
    "Rows that are sums of several requests are left out of cheaper_model, prompt_cache and output_cap, and no peak_shaving is told: nobody"
    " knows in which minute they were made."
)


def spend_opportunities(connection: duckdb.DuckDBPyConnection, usage: str) -> figures.Opportunities:
    """The opportunities of a normalised log, the greatest saving first."""
    log, window = whatif.read(connection, usage), profile.window(connection, usage)
    savings = {kind: log.saving([kind]) for kind in figures.KINDS}
    offered = [kind for kind in figures.KINDS if savings[kind] > 0]
    found = [_MAKERS[kind](log, savings[kind], window, [other for other in offered if other != kind]) for kind in offered]
    combined = log.saving(offered)
    sums = profile.sums(connection, usage)
    # the busiest minute of sums is that in which most of them begin: it says nothing about rate limits
    peaks = [] if sums else [_peak_shaving(connection, usage, window)]
    return figures.Opportunities(
        opportunities=[*sorted(found, key=lambda one: -one["monthly_saving"]), *peaks],
        combined_monthly_saving=figures.usd(cost.in_a_month(combined, window)),
        combined_window_saving=figures.usd(combined),
        notes=[*_notes(log, offered, sums), *pricing.gaps(connection, usage, log.segments)],
    )


def _cheaper_model(log: whatif.Log, saving: Fraction, window: timedelta, others: list[Kind]) -> Opportunity:
    moved = [_moved(log, name) for name in sorted(log.limits)]
    pairs = ", ".join(f"{one['model']} to {one['cheaper']}" for one in moved)
    requests, of = (sum(int(str(one[name])) for one in moved) for name in ("moved_requests", "requests"))
    return _opportunity(
        "cheaper_model", saving, window, others, "medium",
        title=f"Move simple requests from {pairs}",
        method=f"The {requests:,} of {of:,} requests whose input and output are both at most the model's median are priced as the other"
        " model, at the price of their own time.",
        assumption="The cheaper model of the same provider answers short requests well enough, with as many tokens.",
        how_to_verify="Replay a few hundred of these requests on the cheaper model and compare the answers before moving the rest.",
        details={"models": moved},
    )  # fmt: skip


def _moved(log: whatif.Log, name: str) -> dict[str, object]:
    cells, limit = [cell for cell in log.cells if cell.model == name], log.limits[name]
    moved = [cell for cell in cells if cell.cheaper]
    return {
        "model": name,
        "cheaper": limit.cheaper.model_id,
        "moved_requests": sum(cell.tokens.requests for cell in moved),
        "requests": sum(cell.tokens.requests for cell in cells),
        "input_tokens_at_most": limit.input_tokens,
        "output_tokens_at_most": limit.output_tokens,
        "window_saving": figures.usd(sum((cell.cost() - cell.cost("cheaper_model") for cell in moved), Fraction())),
    }


def _output_cap(log: whatif.Log, saving: Fraction, window: timedelta, others: list[Kind]) -> Opportunity:
    tokens, requests = sum(cell.above_cap for cell in log.cells), sum(cell.requests_above_cap for cell in log.cells)
    return _opportunity(
        "output_cap", saving, window, others, "medium",
        title=f"Cap answers at {log.cap:,} output tokens",
        method=f"{log.cap:,} is the 95th percentile of output tokens. The {tokens:,} tokens that {requests:,} answers have above it"
        " are taken off.",
        assumption="What the longest answers say after that many tokens is not needed.",
        how_to_verify="Set the limit for a part of the traffic; count answers that end because of it and read some of them.",
        details={"output_tokens_at_most": log.cap, "requests": requests, "output_tokens_saved": tokens},
    )  # fmt: skip


def _prompt_cache(log: whatif.Log, saving: Fraction, window: timedelta, others: list[Kind]) -> Opportunity:
    cells = [cell for cell in log.cells if cell.cacheable and whatif.caches(cell.rates)]
    requests, tokens = sum(cell.tokens.requests for cell in cells), sum(cell.tokens.input for cell in cells)
    return _opportunity(
        "prompt_cache", saving, window, others, "low",
        title="Let prompts share a cached beginning",
        method=f"Half of the {tokens:,} input tokens that came from no cache, in {requests:,} requests of at least"
        f" {whatif.CACHE_FROM_TOKENS:,} tokens, at the list's price for cached tokens. Where writing to the cache has a price, a tenth of"
        " that half is written instead.",
        assumption="Half of a long prompt is the same as that of an earlier request, and comes first in it.",
        how_to_verify="Compare the beginnings of the prompts of one hour; then watch cached tokens in the usage that the provider reports.",
        details={
            "input_tokens_at_least": whatif.CACHE_FROM_TOKENS,
            "share": float(whatif.CACHE_SHARE),
            "requests": requests,
            "input_tokens": tokens,
        },
    )  # fmt: skip


def _batch_window(log: whatif.Log, saving: Fraction, window: timedelta, others: list[Kind]) -> Opportunity:
    cells = [cell for cell in log.cells if cell.batch]
    return _opportunity(
        "batch_window", saving, window, others, "low",
        title="Send what can wait as a batch",
        method="A quarter of the cost of models that have batch prices, at these. The prices are those of the list's latest date, taken as"
        " parts of the standard price of the same date.",
        assumption="A quarter of the work needs no answer at once, but within a day.",
        how_to_verify="Name the jobs nobody waits for (evaluations, summaries, imports) and add up what they cost.",
        details={"share": float(whatif.BATCH_SHARE), "models": [_batched(log, name) for name in sorted({cell.model for cell in cells})]},
    )  # fmt: skip


def _batched(log: whatif.Log, name: str) -> dict[str, object]:
    priced = log.models[name]
    parts = {} if priced.batch is None else {"input": float(priced.batch.input), "output": float(priced.batch.output)}
    return {"model": name, "priced_as": priced.model_id, "batch_price_of_standard": parts, "source": priced.url}


def _peak_shaving(connection: duckdb.DuckDBPyConnection, usage: str, window: timedelta) -> Opportunity:
    told = profile.usage_profile(connection, usage)
    peak = told["peak_minute"]
    mean = Fraction(told["requests"]) / Fraction(window // timedelta(microseconds=1), 60_000_000)
    return _opportunity(
        "peak_shaving", Fraction(), window, [], "high",
        title="Spread the busiest minutes",
        method=f"The busiest minute has {peak['requests']:,} requests, the mean one {figures.usd(mean):,.1f}. Tokens cost the same"
        " at any minute: this saves capacity (rate limits, reserved throughput), not money.",
        assumption="Usage is paid per token. With reserved throughput the peak is what is paid for.",
        how_to_verify="Look for requests refused by rate limits in the busiest minutes.",
        details={"start": peak["start"], "requests": peak["requests"], "mean_requests_per_minute": figures.usd(mean)},
    )  # fmt: skip


_MAKERS = {"cheaper_model": _cheaper_model, "output_cap": _output_cap, "prompt_cache": _prompt_cache, "batch_window": _batch_window}


def _opportunity(
    kind: Kind,
    saving: Fraction,
    window: timedelta,
    others: list[Kind],
    confidence: Literal["high", "medium", "low"],
    *,
    title: str,
    method: str,
    assumption: str,
    how_to_verify: str,
    details: dict[str, object],
) -> Opportunity:
    return Opportunity(
        kind=kind,
        title=title,
        method=method,
        monthly_saving=figures.usd(cost.in_a_month(saving, window)),
        window_saving=figures.usd(saving),
        assumption=assumption,
        how_to_verify=how_to_verify,
        confidence=confidence,
        overlaps_with=others,
        details=details,
    )


def _notes(log: whatif.Log, offered: Sequence[Kind], sums: int) -> Iterator[str]:
    if len(offered) > 1:
        yield f"{_SINGLE} {', '.join(offered)}."
    if offered:
        yield f"Savings are those of the log's window, scaled to {cost.MONTH_HOURS} h."
    if sums:
        yield _SUMS
    if none := _few(name for name in log.models if name not in log.limits):
        yield f"No cheaper model of the same provider is stated, or none would save, for {none}."
    if none := _few(name for name, priced in log.models.items() if priced.batch is None):
        yield f"The price list has no batch price for {none}."


def _few(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
