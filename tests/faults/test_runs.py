"""A slice of `make prove-runs`: runs struck at a third of their places, cancelled, restarted under; nothing is lost, doubled or done twice.

Other tests run beside it: the time of takeovers is judged, that of cancels and waits told, and judged where `make prove-runs` runs alone.
That one strikes all places, and at them also with `kill -9` of context, auth, Valkey and the other dispatcher.
"""

from __future__ import annotations

import json

import pytest

from tests.prove.runs import matrix, proof

_SLICE = proof.Wanted(
    volleys=1, cells=0.3, faults=(matrix.OWNER_KILLED, matrix.OWNER_STOPPED, "kill -9 events", "kill -9 postgres", matrix.GATEWAY),
    minutes=0.1, storms=4, cancels=14, users=10, runs=4, noise=150, seed=7,
    alone=False,
)  # fmt: skip


@pytest.mark.timeout(300)
async def test_runs_hold_under_faults() -> None:
    told: list[str] = []
    report = await proof.prove(_SLICE, told.append)
    # shown by `pytest -s`, and when it fails
    print(*told, json.dumps(report), sep="\n")
    assert report["ok"], (report, told)
    assert report["cells"] == report["cells_wanted"] > 0
    assert report["strikes"] == len(_SLICE.faults)
    assert report["effects"] > 0
    assert report["restarts"]["accepted"] == _SLICE.users * _SLICE.runs
    assert report["cancels"]["cancelled"] == _SLICE.cancels
