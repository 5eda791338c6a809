"""What may come in: requests that say the same are the same, and the queue of all users has an end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from netra import errors, ids
from services.dispatcher import admission, runs


def _wanted(**more: Any) -> admission.Wanted:
    given: dict[str, Any] = {
        "kind": "agent", "name": "echo", "request_id": "r", "request": "What now?", "inputs": b"{}", "thread_id": "", "connection_id": "",
        "deadline_s": 60.0, **more,
    }  # fmt: skip
    return admission.Wanted(**given)


@pytest.mark.parametrize("other", [{"agent_version": "2.0.0"}, {"on_busy": runs.ROLLBACK}, {"deliver": True}, {"request_id": "s"}])
def test_how_it_is_to_be_done_makes_no_other_request(other: dict[str, Any]) -> None:
    assert dataclasses.replace(_wanted(), **other).digest() == _wanted().digest()


@pytest.mark.parametrize("other", [{"request": "Else?"}, {"name": "other"}, {"inputs": b'{"a":1}'}, {"deadline_s": 61.0}])
def test_what_is_to_be_done_makes_another_request(other: dict[str, Any]) -> None:
    assert dataclasses.replace(_wanted(), **other).digest() != _wanted().digest()


@pytest.mark.parametrize("kind", ["agent", "tool"])
def test_another_version_that_declares_another_deadline_makes_no_other_request(kind: str) -> None:
    here, there = (_wanted(kind=kind, deadline_s=deadline_s, deadline_declared=True) for deadline_s in (60.0, 90.0))
    assert here.digest() == there.digest()
    assert here.digest() != _wanted(kind=kind, deadline_s=60.0).digest()


class Waiting:
    """As many runs as the test says, and how often they were counted."""

    def __init__(self, count: int) -> None:
        self.count, self.looks = count, 0

    async def queued(self, most: int) -> int:
        self.looks += 1
        return min(self.count, most)


async def test_as_many_may_wait_as_the_setting_says() -> None:
    await admission.Room(Waiting(9), 10).require()
    with pytest.raises(errors.RateLimited) as refused:
        await admission.Room(Waiting(10), 10).require()
    assert refused.value.retry_after_ms


async def test_they_are_counted_once_a_second() -> None:
    now = [100.0]
    waiting = Waiting(10)
    room = admission.Room(waiting, 10, lambda: now[0])
    for _ in range(5):
        with pytest.raises(errors.RateLimited):
            await room.require()
    assert waiting.looks == 1
    waiting.count = 0
    now[0] += 1.0
    await room.require()
    assert waiting.looks == 2


class Kept:
    """Where nothing was started yet."""

    async def known(self, user_id: str, request_id: str, **asked: Any) -> None:
        return None


def _admission() -> admission.Admission:
    class Entitled:
        def queued(self, tier: str) -> int:
            return 1

    class Limits:
        max_deadline_s = 100.0

    parts: Any = (None, Kept(), Entitled(), Limits())
    return admission.Admission(*parts)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"on_busy": "queue"}, "on_busy"), ({"request": " "}, "user_request"), ({"thread_id": "x"}, "thread_id"),
        ({"deadline_s": 0.0}, "deadline"),
    ],
)  # fmt: skip
def test_what_no_run_can_have_is_refused_by_name(other: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        _admission().check(_wanted(**other))
    assert refused.value.details["field"] == field


@pytest.mark.parametrize("on_busy", runs.ON_BUSY)
def test_every_strategy_may_be_chosen(on_busy: str) -> None:
    _admission().check(_wanted(on_busy=on_busy, thread_id=ids.uuid7()))
