"""The database's time between its answers: as near as an answer allows, and no further away because another one was late."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from services.events import clock

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def _off(told: clock.DatabaseClock, began: float) -> float:
    """By how many seconds it is ahead of a database that was at `_NOW` when it began."""
    now = told.now()
    assert now is not None
    return (now - _NOW).total_seconds() - (time.monotonic() - began)


def _at(seconds: float) -> datetime:
    return _NOW + timedelta(seconds=seconds)


def test_who_was_never_told_does_not_know() -> None:
    assert clock.DatabaseClock().now() is None


def test_the_first_answer_is_taken_to_be_from_the_middle_of_its_way() -> None:
    told, came = clock.DatabaseClock(), time.monotonic()
    # asked two seconds before it came: on its way back for one
    told.told(_NOW, came - 2)
    assert _off(told, came - 1) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("back", [0.0, 1.0, 2.0], ids=["late there", "halfway", "late here"])
def test_an_answer_that_was_long_under_way_moves_nothing(back: float) -> None:
    told, began = clock.DatabaseClock(), time.monotonic() - 10
    told.told(_at(10), time.monotonic())
    # asked two seconds before it came, and made so long before
    told.told(_at(10 - back), time.monotonic() - 2)
    assert _off(told, began) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("jump", [-30.0, -0.5, 0.5, 30.0])
def test_an_answer_that_shows_another_time_is_believed(jump: float) -> None:
    told, began = clock.DatabaseClock(), time.monotonic() - 10
    told.told(_at(10), time.monotonic())
    told.told(_at(10 + jump), time.monotonic())
    assert _off(told, began) == pytest.approx(jump, abs=0.1)
