"""Breakers, quarantine, limits and the availability of tiers."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from netra import errors
from netra.tool import ToolContext, tool
from services.dispatcher.tools import breakers, quarantine
from services.dispatcher.tools.sandbox import allowances, sandboxes, tiers
from tests.fixtures import contained


@tool(enforcement="python")
async def glue(context: ToolContext) -> Any:
    """Runs what it is sent."""


def failing(known: breakers.Breakers, user: str, count: int) -> None:
    """Calls of a user fail."""
    for _ in range(count):
        known.failed(known.enter("t", user), "t", user)


def test_the_failures_of_one_user_keep_that_user_away_alone() -> None:
    told: list[tuple[bool, str, str]] = []
    known = breakers.Breakers(3, 60.0, lambda *what: told.append(what))
    failing(known, "one", 3)
    with pytest.raises(errors.Unavailable) as refused:
        known.enter("t", "one")
    assert refused.value.retry_after_ms is not None
    assert 0 < refused.value.retry_after_ms <= 60_000
    known.enter("t", "other")
    known.enter("other tool", "one")
    assert told == [(True, "t", "user")]
    # of two users they are the tool's own
    failing(known, "other", 1)
    assert (known.state("t"), told[-1]) == ("open", (True, "t", "all"))
    with pytest.raises(errors.Unavailable):
        known.enter("t", "third")


def test_a_breaker_that_is_off_never_opens() -> None:
    known = breakers.Breakers(0, 60.0)
    failing(known, "one", 100)
    assert known.state("t", "one") == "closed"


def test_a_success_forgets_what_was_before() -> None:
    known = breakers.Breakers(3, 60.0)
    for _ in range(5):
        failing(known, "one", 2)
        known.succeeded(known.enter("t", "one"), "t", "one")
    assert known.state("t", "one") == "closed"


class Clock:
    """Goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_violations_take_a_tool_from_its_user_and_a_tool_of_that_code_from_all() -> None:
    clock = Clock()
    kept = quarantine.Quarantine(2, 100.0, clock)
    assert [kept.violated(glue, "one") for _ in range(2)] == [False, True]
    kept.require(glue, "other")
    with pytest.raises(errors.PermissionDenied, match="quarantine for 100 s"):
        kept.require(glue, "one")
    # where the code is the tool's own, who calls it does not matter
    assert [kept.violated(contained.contained, user) for user in ("one", "other")] == [False, True]
    with pytest.raises(errors.PermissionDenied):
        kept.require(contained.contained, "third")
    clock.now = 100.0
    kept.require(glue, "one")
    # what is long ago does not count
    assert kept.violated(glue, "one") is False


def test_quarantine_can_be_switched_off() -> None:
    kept = quarantine.Quarantine(0, 100.0)
    assert not any(kept.violated(glue, "one") for _ in range(100))
    kept.require(glue, "one")


def test_limits_grow_with_the_tier_and_operators_change_them() -> None:
    known = allowances.Allowances({"free": {"memory": 64 << 20, "cpu_s": 0.5}})
    assert (known.of("free", 3.0).memory, known.of("free", 3.0).cpu_s, known.of("free", 3.0).wall_s) == (64 << 20, 0.5, 3.0)
    assert known.of("no such tier", 3.0) == known.of("free", 3.0)
    plain = allowances.Allowances()
    for least, more in (("free", "early"), ("early", "business"), ("business", "enterprise"), ("enterprise", "internal")):
        pairs = zip(dataclasses.astuple(plain.of(least, 1.0)), dataclasses.astuple(plain.of(more, 1.0)), strict=True)
        assert all(small <= large for small, large in pairs), (least, more)


@pytest.mark.parametrize("wanted", [{"gold": {}}, {"free": {"wall_s": 1}}, {"free": {"memory": 0}}, {"free": {"cpu_s": float("nan")}}])
def test_limits_that_cannot_be_are_named(wanted: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match=r"gold|free"):
        allowances.Allowances(wanted)


class Tier:
    """A tier whose probe ends when the test says so, or that does not start."""

    def __init__(self, *, starts: bool = True, holds: bool = True) -> None:
        self._starts, self._holds, self.go = starts, holds, asyncio.Event()
        self.closed = False

    async def start(self) -> None:
        """Starts, or does not."""
        if not self._starts:
            raise errors.SandboxUnavailable("no namespaces", remedy="get some")

    async def run(self, job: tiers.Job) -> tiers.Ended:
        """Runs nothing."""
        raise AssertionError

    async def probe(self) -> tiers.Availability:
        """What was found."""
        await self.go.wait()
        return tiers.Availability("script", "test", self._holds, {"disk_quota": True}, "" if self._holds else "it got through", "report it")

    async def close(self) -> None:
        """Is over."""
        self.closed = True


async def test_a_tier_is_handed_out_when_its_probe_held_and_refused_with_the_reason_otherwise() -> None:
    good, bad, dead = Tier(), Tier(holds=False), Tier(starts=False)
    told: list[tiers.Availability] = []

    async def tell(found: tiers.Availability) -> None:
        told.append(found)

    for one, reason in ((good, ""), (bad, "it got through"), (dead, "no namespaces")):
        known = sandboxes.Sandboxes({"script": one})
        await known.start()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(known.tier("script")) if not reason else None
            group.create_task(known.probe(tell))
            await asyncio.sleep(0)
            # nothing is handed out before it is probed
            assert waiting is None or not waiting.done()
            one.go.set()
        if reason:
            with pytest.raises(errors.SandboxUnavailable, match=reason) as refused:
                await known.tier("script")
            assert refused.value.details["remedy"]
        else:
            assert await known.tier("script") is good
        with pytest.raises(errors.SandboxUnavailable, match="switched off"):
            await known.tier("python")
        await known.close()
        assert one.closed
    assert [found.available for found in told] == [True, False, False]
