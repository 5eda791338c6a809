"""A run goes from state to state along legal transitions only, and every end is final."""

from __future__ import annotations

import pytest

from services.dispatcher import runs
from services.dispatcher.runs import RunState


@pytest.mark.parametrize("state", sorted(runs.ENDED))
def test_nothing_follows_an_end(state: RunState) -> None:
    assert not any(runs.legal(state, other) for other in RunState)


def test_every_state_has_its_transitions() -> None:
    assert set(runs.LEGAL) == set(RunState)


def test_every_run_can_end() -> None:
    reachable = {RunState.CREATED}
    for _ in RunState:
        reachable |= {new for old in reachable for new in runs.LEGAL[old]}
    assert reachable == set(RunState)


def test_an_end_is_reached_through_finishing_or_by_a_call_or_before_the_start() -> None:
    before = {old for old in RunState for new in runs.ENDED if runs.legal(old, new)}
    assert before == {RunState.CREATED, RunState.RUNNING, RunState.FINISHING}


@pytest.mark.parametrize("terminal", ["agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"])
def test_every_terminal_event_means_an_end(terminal: str) -> None:
    assert runs.state_after(terminal) in runs.ENDED


def test_what_may_be_stopped_or_sent_a_message_has_not_begun_to_end() -> None:
    assert set(runs.GOES_ON) == set(RunState) - runs.ENDED - {RunState.CREATED, RunState.FINISHING}


def test_a_run_that_waits_goes_on_or_ends_without_having_been_begun_again() -> None:
    assert runs.LEGAL[RunState.SUSPENDED] == {RunState.RUNNING, RunState.FINISHING}


def test_a_look_at_the_queue_is_its_claims_and_whose_turn_it_was() -> None:
    assert (runs.Claims(), runs.Claims(after="x").after) == ([], "x")
