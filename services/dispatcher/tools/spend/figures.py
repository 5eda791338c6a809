"""What the tools of the spend analyst return; money is USD with at most six places, times are UTC."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from typing_extensions import TypedDict

PLACES = 6
Kind = Literal["cheaper_model", "batch_window", "prompt_cache", "output_cap", "peak_shaving"]
# in the order in which the combined saving applies them
KINDS: tuple[Kind, ...] = ("cheaper_model", "output_cap", "prompt_cache", "batch_window", "peak_shaving")


class Loaded(TypedDict):
    """What a file turned out to be, and how it was read."""

    name: str
    format: Literal["csv", "jsonl", "parquet"]
    compression: Literal["none", "gzip"]
    bytes: int
    rows: int
    columns: dict[str, str]
    recognised_as: str
    timezone: str
    model: str | None
    assumptions: list[str]


class Percentiles(TypedDict):
    """Nearest-rank percentiles of a column."""

    p50: int
    p95: int
    p99: int
    max: int


class TokenPercentiles(TypedDict):
    """Percentiles per column."""

    input_tokens: Percentiles
    output_tokens: Percentiles


class Peak(TypedDict):
    """The busiest minute or hour; the earliest of equals."""

    start: str
    requests: int


# `from` is a keyword: this one cannot be written as a class
UsageProfile = TypedDict(
    "UsageProfile",
    {
        "requests": int,
        "input_tokens": int,
        "output_tokens": int,
        "cached_input_tokens": int,
        "from": str,
        "to": str,
        "percentiles": TokenPercentiles,
        "peak_minute": Peak,
        "peak_hour": Peak,
        "models": int,
        "users": int | None,
    },
)


class ModelCost(TypedDict):
    """What one model cost; `input_cost` is that of the input that came from no cache and went to none."""

    model: str
    priced_as: str
    provider: str
    requests: int
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    input_cost: float
    cached_input_cost: float
    cache_write_cost: float
    output_cost: float
    request_cost: float
    cost: float


class DayCost(TypedDict):
    """What one day cost."""

    day: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


class HourCost(TypedDict):
    """What one hour cost."""

    hour: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


class UserCost(TypedDict):
    """What one user cost; null stands for requests that name none."""

    user: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


class Unpriced(TypedDict):
    """What was used of a model that the price list has no price for; null stands for requests that name none."""

    model: str | None
    requests: int
    input_tokens: int
    output_tokens: int


class Breakdown(TypedDict):
    """The cost along each line it can be cut along."""

    by_model: list[ModelCost]
    by_day: list[DayCost]
    by_hour: list[HourCost]
    by_user: list[UserCost]
    unpriced: list[Unpriced]


class Monthly(TypedDict):
    """The cost of the window, scaled to a month of 730 hours."""

    cost: float
    hours: int
    window_hours: float
    note: str


class PriceList(TypedDict):
    """Where the prices come from."""

    source: str
    version: str
    note: str


class CostBreakdown(TypedDict):
    """What the log cost."""

    total_cost: float
    currency: Literal["USD"]
    cost_breakdown: Breakdown
    monthly: Monthly
    price_list: PriceList
    notes: list[str]


class Opportunity(TypedDict):
    """Something that would cost less, and what has to be true for that."""

    kind: Kind
    title: str
    method: str
    monthly_saving: float
    window_saving: float
    assumption: str
    how_to_verify: str
    confidence: Literal["high", "medium", "low"]
    overlaps_with: list[Kind]
    details: dict[str, object]


class Opportunities(TypedDict):
    """What could be saved, each alone and all together."""

    opportunities: list[Opportunity]
    combined_monthly_saving: float
    combined_window_saving: float
    notes: list[str]


def usd(amount: Fraction) -> float:
    """An exact amount, rounded once, half-even, to six places."""
    return float(Fraction(round(amount * 10**PLACES), 10**PLACES))
