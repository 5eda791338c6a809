"""`make prove-sandbox` can fail: what gets through, what shows nothing, and what is late, is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.fixtures import sandboxes
from tests.prove.sandbox import judge, suite

GOOD: dict[str, Any] = {
    "tier": "python", "way": "root", "user": 0, "available": True, "probed": True, "refused": False, "enforcement": {}, "attacks": 139,
    "families": 26, "escaped": [], "controls_failed": [], "survivors": 0, "untouched": True, "reason": "",
    "endings": {"late_ms": [20.0] * 19 + [900.0], "unseen": 0, "left_to_init": 0, "killed": 2, "wrong": []},
}  # fmt: skip
ABSENT = {**GOOD, "tier": "command", "available": False, "refused": True, "reason": "no bubblewrap", "attacks": 0, "endings": {}}
ACTIVE = {
    "python": {"available": True, "unprobed": False, "reason": "", "refused": False},
    "command": {"available": False, "unprobed": False, "reason": "no bubblewrap", "refused": True},
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"escaped": ["read a secret"]}, "got through: read a secret"),
    ({"controls_failed": ["read a secret"]}, "control failed"),
    ({"survivors": 1}, "were left"),
    ({"untouched": False}, "was changed"),
    ({"attacks": 59}, "only 59 attacks"),
    ({"families": 3}, "of 3 families"),
    ({"probed": False}, "without a probe"),
    ({"endings": {**GOOD["endings"], "late_ms": [251.0] * 20}}, "after their deadline"),
    ({"endings": {**GOOD["endings"], "late_ms": [20.0] * 14, "unseen": 6}}, "only 14 of 20"),
    ({"endings": {**GOOD["endings"], "late_ms": [20.0] * 19}}, "only 19 of 20"),
    ({"endings": {**GOOD["endings"], "wrong": ["process 1 of 2 was killed, and the call went on"]}}, "went on"),
    ({"endings": {**GOOD["endings"], "killed": 0}}, "no call was killed"),
    ({"error": "it ended"}, "without a report"),
]


def test_what_is_as_it_must_be_is_good() -> None:
    assert judge.off([GOOD, ABSENT], ACTIVE, endings=20) == []
    # a few that are late are the machine's
    assert judge.figures(GOOD)["late_ms_p50"] == 20.0
    assert judge.figures(GOOD)["late_ms_max"] == 900.0


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_off_is_said(change: dict[str, Any], said: str) -> None:
    (found,) = judge.off([{**copy.deepcopy(GOOD), **change}, ABSENT], ACTIVE, endings=20)
    assert said in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refused": False}, "not refused"),
        ({"reason": ""}, "not refused"),
        ({"survivors": 2}, "were left"),
    ],
)
def test_a_tier_that_is_not_there_has_to_refuse(change: dict[str, Any], said: str) -> None:
    (found,) = judge.off([GOOD, {**ABSENT, **change}], ACTIVE, endings=20)
    assert said in found


def test_a_dispatcher_may_not_claim_what_was_not_shown() -> None:
    claims = {"available": True, "unprobed": False, "reason": "", "refused": False}
    (found,) = judge.off([GOOD, ABSENT], {**ACTIVE, "command": claims}, endings=20)
    assert "was not attacked" in found
    (found,) = judge.off([GOOD, ABSENT], {**ACTIVE, "python": {**claims, "unprobed": True}}, endings=20)
    assert "before it was probed" in found
    (found,) = judge.off([GOOD, ABSENT], {**ACTIVE, "command": {**ACTIVE["command"], "refused": False}}, endings=20)
    assert "not refused" in found
    assert judge.off([ABSENT], {}, endings=20) == ["nothing was attacked: no tier is available"]


@pytest.mark.parametrize(("forged", "said"), [("escape", "got through: forged"), ("control", "control failed: forged")])
async def test_an_attack_that_succeeds_and_a_control_that_does_not_are_found(forged: str, said: str) -> None:
    report = await sandboxes.attacked("script", "--each-family", f"--forge={forged}")
    assert not report["passed"]
    found = judge.off([{**report, "attacks": 60}], {}, endings=0)
    assert [said in what for what in found] == [True], found


async def test_calls_of_every_tier_end_when_they_are_told_and_when_their_process_does() -> None:
    """A part of what `make prove-sandbox` measures: here, that it is measured."""
    for tier in ("python",):
        report = await sandboxes.attacked(tier, "--forge=", "--endings=2", "--no-attacks")
        assert report["passed"], report
        endings = report["endings"]
        assert len(endings["late_ms"]) + endings["unseen"] == 2
        assert endings["killed"] >= 1
        assert not endings["wrong"]


def test_what_to_run_is_read_as_it_was_written() -> None:
    wanted = suite.Wanted("python", nobody=True, namespaces=False, each_family=True, endings=3, forge="control")
    assert suite.read(wanted.arguments()) == wanted
    for wrong in (["pyhton"], ["python", "--forge=nothing"], ["python", "--all"], []):
        with pytest.raises(ValueError, match=r"tier|what is"):
            suite.read(wrong)
