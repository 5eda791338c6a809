"""Twenty faults in a minute over two replicas of events and gateway: nothing acknowledged is lost, doubled or shown to others."""

from __future__ import annotations

import pytest

from tests.prove.record import proof


@pytest.mark.timeout(300)
async def test_the_record_holds_under_faults() -> None:
    told: list[str] = []
    report = await proof.prove(proof.Wanted(minutes=1, faults=20, seed=7), told.append)
    assert report["ok"], (report, told)
    assert sum(report["faults"].values()) == 20
    assert report["acknowledged"] > 1_000
    assert report["delivered"] >= report["recorded"] * 2


async def test_what_is_made_up_is_found() -> None:
    report = await proof.prove(proof.Wanted(minutes=0.05, faults=1, seed=7, users=2, forged=proof.HOLE + proof.DOUBLE), lambda _: None)
    assert not report["ok"]
    assert (report["gaps"], report["duplicates"], report["lost"], report["leaks"]) == (1, 1, 0, 0)
