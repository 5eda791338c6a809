"""Where in the partitions the next page of a user's record lies, and which days are too old; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

# so many days and classes one page looks into at most: a sparse record gives short pages
MAX_DAYS = 8
MAX_ROWS = 16
A_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Day:
    """A user has events of a class on a day (UTC), the first at a cursor."""

    day: date
    retention: str
    first_cursor: int


@dataclass(frozen=True, slots=True)
class Window:
    """All events of a user after some cursor up to `through` are of these classes, and were recorded from `begins` until before `ends`."""

    begins: datetime
    ends: datetime
    classes: tuple[str, ...]
    through: int


@dataclass(frozen=True, slots=True)
class Period:
    """How many days a class is kept, and the shorter period that is wanted since some time."""

    days: int
    wanted: int
    since: datetime


def window(days: Sequence[Day], last: int) -> Window:
    """Where events up to `last` lie.

    `days` are at least one, in the order of their first cursors: all that hold an event wanted, or the first `MAX_ROWS` of them.
    """
    full = days[: MAX_ROWS - 1]
    near = [day for day in full if day.day < days[0].day + MAX_DAYS * A_DAY]
    beyond = days[len(near)].first_cursor - 1 if len(near) < len(days) else last
    return Window(
        begin_of(days[0].day), begin_of(max(day.day for day in near) + A_DAY), tuple(sorted({day.retention for day in near})),
        min(beyond, last),
    )  # fmt: skip


def begin_of(day: date) -> datetime:
    """Its first moment, UTC."""
    return datetime.combine(day, time(), UTC)


def day_of(at: datetime) -> date:
    """The day of a moment, UTC."""
    return at.astimezone(UTC).date()


def kept(known: Period | None, wanted: int, now: datetime, grace: timedelta) -> Period:
    """How long a class is kept from now on.

    A longer period counts at once, a shorter one after `grace`: a policy can be taken back, a drop cannot.
    """
    wanted = max(wanted, 1)
    if known is None or wanted >= known.days:
        return Period(wanted, wanted, now)
    since = known.since if wanted == known.wanted else now
    return Period(wanted if now - since >= grace else known.days, wanted, since)


def oldest_kept(period: Period, now: datetime) -> date:
    """The first day that stays."""
    return day_of(now) - period.days * A_DAY
