"""A slice of `make prove-runs`: runs struck at many of their places, cancelled, restarted under; nothing is lost, doubled or done twice."""

from __future__ import annotations

import pytest

from tests.prove.runs import matrix, proof

_SLICE = proof.Wanted(
    volleys=1, cells=0.3, faults=(matrix.OWNER_KILLED, matrix.OWNER_STOPPED, "kill -9 events", "kill -9 postgres", matrix.GATEWAY),
    minutes=0.1, storms=4, cancels=14, users=10, runs=4, noise=150, seed=7,
)  # fmt: skip


@pytest.mark.timeout(300)
async def test_runs_hold_under_faults() -> None:
    told: list[str] = []
    report = await proof.prove(_SLICE, told.append)
    assert report["ok"], (report, told)
    assert report["cells"] == report["cells_wanted"] > 0
    assert report["strikes"] == len(_SLICE.faults)
    assert report["effects"] > 0
    assert report["restarts"]["accepted"] == _SLICE.users * _SLICE.runs
    assert report["cancels"]["cancelled"] == _SLICE.cancels
