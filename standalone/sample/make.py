"""python -m standalone.sample.make: writes usage.csv anew, the same bytes on every machine.

Nothing in it was measured anywhere: six workloads of an invented company, drawn from the tables below with a fixed seed.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from standalone import sample

SEED = 20260907
MONDAY = datetime(2026, 9, 7, tzinfo=UTC)
HEADER = "time,model,user,input_tokens,cached_input_tokens,output_tokens"
OFFICE = (0, 0, 0, 0, 0, 0, 1, 3, 7, 10, 10, 9, 6, 9, 10, 9, 7, 4, 2, 1, 0, 0, 0, 0)
AROUND_THE_CLOCK = (2, 1, 1, 1, 1, 2, 3, 5, 7, 8, 9, 9, 10, 9, 9, 8, 8, 8, 9, 10, 9, 7, 5, 3)
NIGHT = (0, 10, 10, 4) + (0,) * 20
AFTERNOON = (0,) * 14 + (10, 6) + (0,) * 8
ALL_WEEK = (10, 10, 10, 10, 9, 6, 5)
WORKDAYS = (10, 10, 10, 10, 8, 0, 0)
WEDNESDAY = (0, 0, 10, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Workload:
    """One use of one model. `a_peak_hour` is requests; hours and days are tenths of it; tokens are quartiles from least to most."""

    user: str
    model: str
    a_peak_hour: int
    hours: Sequence[int]
    days: Sequence[int]
    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    cached_prefix: int = 0
    cached_percent: int = 0


WORKLOADS = (
    # a long system prompt that is sent again with every question, never cached
    Workload("web-assistant", "gpt-4o", 12, AROUND_THE_CLOCK, ALL_WEEK, (1900, 2400, 3100, 4600, 14000), (40, 130, 240, 420, 2900)),
    # the same, cached well
    Workload("support-desk", "claude-sonnet-4-5", 6, OFFICE, ALL_WEEK, (3400, 4800, 7200, 11000, 30000), (60, 180, 310, 520, 1900),
             cached_prefix=3072, cached_percent=85),
    Workload("code-review", "gpt-5", 5, OFFICE, WORKDAYS, (2600, 6400, 12000, 21000, 88000), (220, 700, 1300, 2400, 9800),
             cached_prefix=2048, cached_percent=55),
    # nobody waits for it: what a batch interface is for
    Workload("nightly-reports", "gpt-4.1", 45, NIGHT, ALL_WEEK, (5200, 8800, 12500, 17000, 42000), (350, 620, 900, 1250, 3300)),
    Workload("search-summaries", "gpt-4o-mini", 16, AROUND_THE_CLOCK, ALL_WEEK, (250, 480, 700, 1100, 5200), (25, 60, 95, 150, 640)),
    Workload("evaluation", "gemini-2.5-pro", 180, AFTERNOON, WEDNESDAY, (700, 1500, 2300, 3600, 9000), (150, 900, 1700, 3100, 8200)),
    # of their own making, so no price list knows it
    Workload("search-summaries", "house-ranker-2", 2, OFFICE, WORKDAYS, (120, 200, 260, 340, 900), (1, 4, 6, 9, 20)),
)  # fmt: skip


def _between(quartiles: tuple[int, ...], chance: random.Random) -> int:
    """A number of the distribution: `random()` alone, whose sequence Python promises for good."""
    place = chance.random() * (len(quartiles) - 1)
    lower = int(place)
    return quartiles[lower] + int((place - lower) * (place - lower) * (quartiles[lower + 1] - quartiles[lower]))


def _rows(work: Workload, chance: random.Random) -> Iterator[tuple[datetime, str]]:
    for hour in range(7 * 24):
        expected = work.a_peak_hour * work.hours[hour % 24] * work.days[hour // 24] / 100
        for _ in range(int(expected + chance.random())):
            time = MONDAY + timedelta(hours=hour, milliseconds=int(chance.random() * 3_600_000))
            yield time, _row(time, work, chance)


def _row(time: datetime, work: Workload, chance: random.Random) -> str:
    inputs = _between(work.input_tokens, chance)
    cached = min(work.cached_prefix, inputs) if chance.random() * 100 < work.cached_percent else 0
    stamp = f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"
    return f"{stamp},{work.model},{work.user},{inputs},{cached},{_between(work.output_tokens, chance)}"


def text() -> str:
    """The whole file."""
    chance = random.Random(SEED)  # noqa: S311  reproducible on purpose
    rows = sorted(row for work in WORKLOADS for row in _rows(work, chance))
    return "\n".join([HEADER, *(row for _, row in rows)]) + "\n"


if __name__ == "__main__":
    sample.FILE.write_text(text(), encoding="utf-8", newline="\n")
