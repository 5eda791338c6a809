"""Where the next page lies in the partitions, and how long a class is kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.events import days

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
_GRACE = timedelta(hours=24)


@dataclass(frozen=True)
class _Event:
    cursor: int
    day: date
    retention: str


@st.composite
def _records(draw: st.DrawFn) -> list[_Event]:
    """Events in the order of cursors; days do not go back, some are skipped."""
    events: list[_Event] = []
    day = date(2026, 1, 1)
    for _ in range(draw(st.integers(1, 60))):
        day += timedelta(days=draw(st.sampled_from([0, 0, 0, 1, 1, 5, 40])))
        events.append(_Event(len(events) + 1, day, draw(st.sampled_from(["free", "early", "business"]))))
    return events


def _marks(events: list[_Event], after: int, limit: int) -> list[days.Day]:
    """What the query for the days of a page finds."""
    first: dict[tuple[date, str], int] = {}
    for event in events:
        first.setdefault((event.day, event.retention), event.cursor)
    rows = [days.Day(day, retention, cursor) for (day, retention), cursor in first.items() if cursor <= after + limit]
    begins = max(row.day for row in rows if row.first_cursor <= after + 1)
    return sorted((row for row in rows if row.day >= begins), key=lambda row: row.first_cursor)[: days.MAX_ROWS]


@given(_records(), st.data())
def test_a_window_holds_all_that_is_up_to_its_end(events: list[_Event], data: st.DataObject) -> None:
    after, limit = data.draw(st.integers(0, len(events) - 1)), data.draw(st.integers(1, 80))
    wanted = min(len(events), after + limit)
    window = days.window(_marks(events, after, limit), wanted)
    inside = [
        event.cursor
        for event in events
        if window.begins <= days.begin_of(event.day) < window.ends and event.retention in window.classes and after < event.cursor
    ]
    assert after < window.through <= wanted
    assert [cursor for cursor in inside if cursor <= window.through] == list(range(after + 1, window.through + 1))
    assert window.ends - window.begins <= days.MAX_DAYS * days.A_DAY


@pytest.mark.parametrize(
    ("known", "wanted", "kept"),
    [
        (None, 7, 7),
        (None, 0, 1),
        ((30, 30, 0), 365, 365),
        ((30, 30, 100), 7, 30),
        ((30, 7, 23), 7, 30),
        ((30, 7, 24), 7, 7),
        ((30, 7, 100), 5, 30),
        ((30, 7, 100), 30, 30),
    ],
)
def test_a_longer_period_counts_at_once_and_a_shorter_one_later(known: tuple[int, int, int] | None, wanted: int, kept: int) -> None:
    before = days.Period(known[0], known[1], _NOW - timedelta(hours=known[2])) if known is not None else None
    period = days.kept(before, wanted, _NOW, _GRACE)
    assert (period.days, period.wanted) == (kept, max(wanted, 1))
    assert days.oldest_kept(period, _NOW) == _NOW.date() - timedelta(days=kept)


def test_the_wait_begins_anew_with_another_wish() -> None:
    period = days.kept(days.Period(30, 30, _NOW), 7, _NOW, _GRACE)
    later = days.kept(period, 5, _NOW + timedelta(hours=23), _GRACE)
    assert (later.days, later.since) == (30, _NOW + timedelta(hours=23))
    assert days.kept(later, 5, _NOW + timedelta(hours=46), _GRACE).days == 30
    assert days.kept(later, 5, _NOW + timedelta(hours=47), _GRACE).days == 5


def test_a_day_is_one_of_utc() -> None:
    late = datetime(2026, 11, 20, 23, 30, tzinfo=UTC).astimezone()
    assert days.day_of(late) == date(2026, 11, 20)
    assert days.begin_of(date(2026, 11, 20)).isoformat() == "2026-11-20T00:00:00+00:00"
