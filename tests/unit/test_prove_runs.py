"""The verdict of `make prove-runs`: what is right passes, and each fault that is made up is found."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tests.prove.runs import agents, cancels, fairness, judge, matrix, tools
from tests.prove.runs.outside import Line

pytestmark = pytest.mark.unit
_USER, _OTHER = "user-1", "user-2"
_MARK, _FOREIGN = "kx0123456789abn1", "kxba9876543210n1"


def _frames(mark: str, user_id: str, run_id: str) -> list[dict[str, Any]]:
    """The record of a run with two calls, at seconds 1, 2, 3 ... of a day."""
    number = itertools.count(1)

    def frame(kind: str, **data: Any) -> dict[str, Any]:
        at = next(number)
        return {
            "type": kind, "cursor": at, "seq": at, "event_id": f"{run_id}-{at}", "user_id": user_id, "run_id": run_id,
            "timestamp": f"2026-01-01T00:00:{at:02}.000000Z", "data": data,
        }  # fmt: skip

    def call(tool: str, step: str) -> list[dict[str, Any]]:
        begun = frame("tool_executing", tool_name=tool, tool_call_id=step, parameters={"key": f"{mark}.{step}"})
        return [begun, frame("tool_completed", tool_name=tool, tool_call_id=step, status="success")]

    return [
        frame("agent_started"), frame("agent_thinking", reasoning=f"{mark} considers one."), *call("put", "second"), *call("book", "third"),
        frame("agent_completed", result={"sum": 1}),
    ]  # fmt: skip


def _at(frame: dict[str, Any]) -> float:
    return float(datetime.fromisoformat(frame["timestamp"]).timestamp())


def _evidence() -> judge.Evidence:
    """Nothing is wrong with it: one that may be done again was, before it was committed."""
    found = judge.Evidence()
    for mark, user_id, run_id in ((_MARK, _USER, "run-1"), (_FOREIGN, _OTHER, "run-2")):
        record = _frames(mark, user_id, run_id)
        found.accepted.append(judge.Accepted(run_id, user_id, "sequence", mark, [{"sum": 1}]))
        found.records[user_id], found.seen[user_id] = record, copy.deepcopy(record)
        second, third = _at(record[3]), _at(record[5])
        found.effects += [Line(f"{mark}.second", "put", 1, second - 0.9), Line(f"{mark}.second", "put", 2, second - 0.1)]
        found.effects.append(Line(f"{mark}.third", "book", 2, third - 0.1))
    return found


def _both(evidence: judge.Evidence) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first user's record, and what their client saw."""
    return evidence.records[_USER], evidence.seen[_USER]


def _hole(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        del frames[1]


def _double(evidence: judge.Evidence) -> None:
    """What was told is told again after a takeover, as an event of its own."""
    for frames in _both(evidence):
        frames.insert(2, {**frames[1], "event_id": "again"})
        for at, frame in enumerate(frames, 1):
            frame |= {"cursor": at, "seq": at}


def _same_event_twice(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames[2]["event_id"] = frames[1]["event_id"]


def _done_again(evidence: judge.Evidence) -> None:
    evidence.effects.append(Line(f"{_MARK}.second", "put", 3, _at(evidence.records[_USER][3]) + 1))


def _done_late(evidence: judge.Evidence) -> None:
    evidence.effects = [line for line in evidence.effects if line.of != f"{_MARK}.second"]
    _done_again(evidence)


def _done_twice(evidence: judge.Evidence) -> None:
    """Not committed yet, but it may be done once."""
    evidence.effects.append(Line(f"{_MARK}.third", "book", 3, _at(evidence.records[_USER][5]) - 0.05))


def _never_done(evidence: judge.Evidence) -> None:
    evidence.effects = [line for line in evidence.effects if line.of != f"{_MARK}.third"]


def _stuck(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        del frames[-1]


def _lost(evidence: judge.Evidence) -> None:
    evidence.accepted.append(judge.Accepted("run-3", _USER, "sequence", f"{_MARK}3"))


def _foreign_event(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames[1]["data"]["reasoning"] = f"{_FOREIGN} considers one."


def _foreign_run(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames.append({**evidence.records[_OTHER][0], "cursor": len(frames) + 1})


def _unpaired(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames[3]["data"]["tool_call_id"] = "another"


def _after_the_end(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames.append({**frames[1], "event_id": "late", "cursor": 8, "seq": 8, "data": {"reasoning": "more"}})


def _failed(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames[-1] |= {"type": "agent_failed", "data": {"error": {"code": "OWNER_LOST", "message": "It is lost."}}}


def _other_result(evidence: judge.Evidence) -> None:
    for frames in _both(evidence):
        frames[-1]["data"]["result"] = {"sum": 2}


def _unseen(evidence: judge.Evidence) -> None:
    del evidence.seen[_USER][-2]


def _seen_again(evidence: judge.Evidence) -> None:
    evidence.seen[_USER].append(evidence.seen[_USER][-1])


_FORGED: dict[str, tuple[Callable[[judge.Evidence], None], set[str]]] = {
    "a hole": (_hole, {"holes"}),
    "a double": (_double, {"doubles"}),
    "an event twice": (_same_event_twice, {"doubles"}),
    "an effect after its commit": (_done_again, {"committed_twice"}),
    "an effect that was committed before": (_done_late, {"unmade"}),
    "an effect twice": (_done_twice, {"committed_twice"}),
    "an effect never": (_never_done, {"unmade"}),
    "a run that is stuck": (_stuck, {"stuck"}),
    "a run that is lost": (_lost, {"lost"}),
    "a foreign event": (_foreign_event, {"foreign"}),
    "an event of a foreign run": (_foreign_run, {"foreign"}),
    "a call without its end": (_unpaired, {"unpaired"}),
    "an event after the end": (_after_the_end, {"after_the_end"}),
    "a run that fails": (_failed, {"another_end"}),
    "a wrong result": (_other_result, {"wrong_result"}),
    "an event that no client saw": (_unseen, {"seen_differently"}),
    "an event that a client saw twice": (_seen_again, {"seen_differently"}),
}


def test_what_is_right_passes() -> None:
    verdict = judge.judged(_evidence())
    assert (verdict.ok, verdict.first, verdict.repeated) == (True, [], 2)


@pytest.mark.parametrize("fault", _FORGED)
def test_a_forged_fault_turns_it_red(fault: str) -> None:
    evidence = _evidence()
    forge, kinds = _FORGED[fault]
    forge(evidence)
    verdict = judge.judged(evidence)
    assert not verdict.ok
    assert set(verdict.found) == kinds
    assert set(verdict.found) <= set(judge.KINDS)


def test_what_a_person_let_be_done_again_may_be() -> None:
    evidence = _evidence()
    evidence.effects.append(Line(f"{_MARK}.third", "book", 3, _at(evidence.records[_USER][5]) - 0.05))
    evidence.again[f"{_MARK}.third"] += 1
    assert judge.judged(evidence).ok


@pytest.mark.parametrize("name", agents.PLACES)
def test_each_place_of_an_agent_has_marks_that_come_to_it(name: str) -> None:
    for place in agents.PLACES[name]:
        assert any(agents.suits(name, place, f"kx0123456789abn{number}") for number in range(20))


def test_the_way_of_a_branch_is_the_one_its_tool_says() -> None:
    marks = [f"kx0123456789abn{number}" for number in range(20)]
    for mark in marks:
        odd = tools.value(f"{mark}.choice") % 2 == 1
        assert agents.suits("branch", "odd", mark) is odd
        assert agents.suits("branch", "even", mark) is not odd


def test_percentiles_are_nearest_rank() -> None:
    assert judge.percentiles(range(1, 101)) == {"n": 100, "p50": 50, "p99": 99, "max": 100}
    assert judge.percentiles([]) == {"n": 0}


@pytest.mark.parametrize(
    ("times", "alone", "shared"),
    [([], True, True), ([250.0] * 99 + [9000.0], True, True), ([251.0] * 3, False, True), ([10_001.0] * 3, False, False)],
)
def test_what_takes_longer_than_promised_is_wrong_and_grossly_so_anywhere(times: list[float], alone: bool, shared: bool) -> None:
    assert [not cancels.BOUND.exceeded("a cancel", times, alone=here) for here in (True, False)] == [alone, shared]


def test_takeovers_are_judged_by_what_happened_to_the_owner() -> None:
    figures = matrix.Figures(resumed={matrix.GATEWAY: [9000.0]}, taken_over={matrix.OWNER_KILLED: [4900.0], matrix.OWNER_STOPPED: [5100.0]})
    for alone in (True, False):
        (line,) = figures.exceeded(alone=alone)
        assert matrix.OWNER_STOPPED in line
    assert figures.report(1)["takeover_ms"][matrix.OWNER_KILLED]["p99"] == 4900.0


_GOOD = fairness.First(900.0, 1)


@pytest.mark.parametrize(
    ("before", "firsts", "waiting", "wrong"),
    [
        ([_GOOD], [_GOOD, _GOOD], [80, 20], ""),
        ([_GOOD], [_GOOD, "another's first run was refused"], [80, 20], "refused"),
        ([_GOOD], ["another's first run did not begin"], [80], "did not begin"),
        (["another's first run did not end"], [_GOOD], [80], "did not end"),
        ([_GOOD], [fairness.First(2100.0, 1)], [80], "waited for its slot"),
        ([_GOOD], [fairness.First(900.0, 2)], [80], "went before"),
        ([_GOOD], [_GOOD], [0], "shows nothing"),
        ([_GOOD], [], [], "shows nothing"),
    ],
)  # fmt: skip
def test_fairness_is_only_shown_by_runs_that_came_to_their_slot_in_time(
    before: list[fairness.First | str], firsts: list[fairness.First | str], waiting: list[int], wrong: str
) -> None:
    found = fairness.report(before, firsts, waiting, alone=True)["wrong"]
    assert ([wrong in one for one in found] == [True]) if wrong else found == []
