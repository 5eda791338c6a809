"""Stages of a message: what is believed of the edge, what counts, in what order they are shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.dispatcher import stages

NOW = datetime(2026, 11, 20, 20, 15, 4, 123456, UTC)


def ago(seconds: float) -> datetime:
    """A time before now."""
    return NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("received", "validated", "believed"),
    [
        (ago(2), ago(1), (ago(2), ago(1))),
        (None, None, (NOW, NOW)),
        (ago(2), None, (ago(2), NOW)),
        (ago(-1), ago(1), (NOW, NOW)),
        (ago(3600), ago(1), (NOW, NOW)),
        (ago(1), ago(2), (ago(1), NOW)),
    ],
)
def test_a_time_that_cannot_be_is_now(received: datetime | None, validated: datetime | None, believed: tuple[datetime, datetime]) -> None:
    passed = stages.accepted(received, validated, NOW)
    assert passed.times == dict(zip(stages.ORDER, believed, strict=False))


def test_the_first_time_counts() -> None:
    passed = stages.Passed({stages.STARTED: ago(5)})
    passed.now(stages.STARTED)
    passed.now(stages.COMPLETED)
    assert passed.times[stages.STARTED] == ago(5)
    assert passed.times[stages.COMPLETED] > ago(0)


def test_they_are_kept_as_they_are_and_shown_in_order() -> None:
    times = {stage: ago(place) for place, stage in enumerate(stages.ORDER)}
    kept = stages.read(stages.written(dict(reversed(times.items()))))
    assert list(stages.in_order(kept)) == list(times.items())
    assert len(stages.ORDER) == 9


def test_those_that_were_not_passed_are_not_shown() -> None:
    assert list(stages.in_order({"something": NOW, stages.NOTIFIED: NOW, stages.RECEIVED: NOW})) == [
        (stages.RECEIVED, NOW), (stages.NOTIFIED, NOW),
    ]  # fmt: skip
