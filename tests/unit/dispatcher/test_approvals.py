"""What votes make of an approval: a quorum approves, one rejects, and nobody says two things."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from netra import errors, ids
from services.dispatcher import approvals

_NOW = datetime(2026, 11, 22, tzinfo=UTC)
_USERS = [ids.UserId.new() for _ in range(4)]


def _approval(quorum: int = 1, **more: object) -> approvals.Approval:
    found = approvals.Approval(
        approval_id=ids.uuid7(), run_id=ids.RunId.new(), user_id=_USERS[0], thread_id=ids.ThreadId.new(), message="Go on?", tool_name="",
        parameters={}, quorum=quorum, state=approvals.PENDING, created_at=_NOW, expires_at=_NOW + timedelta(hours=1),
    )  # fmt: skip
    return dataclasses.replace(found, **more)  # type: ignore[arg-type]


def _vote(user: int, decision: str = approvals.APPROVE, comment: str = "") -> approvals.Vote:
    return approvals.Vote(_USERS[user], decision, comment, _NOW + timedelta(seconds=user))


@pytest.mark.parametrize("quorum", [1, 2, 3])
def test_so_many_as_its_quorum_approve_it(quorum: int) -> None:
    found = _approval(quorum)
    for user in range(quorum):
        assert found.state == approvals.PENDING
        assert found.resolved_at is None
        found = approvals.after(found, _vote(user))
    assert (found.state, found.resolved_at, len(found.votes)) == (approvals.APPROVED, _vote(quorum - 1).at, quorum)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_first_who_rejects_decides(before: int) -> None:
    found = _approval(4)
    for user in range(before):
        found = approvals.after(found, _vote(user))
    found = approvals.after(found, _vote(before, approvals.REJECT, "No."))
    assert (found.state, found.votes[-1].comment) == (approvals.REJECTED, "No.")


@pytest.mark.parametrize("quorum", [1, 2])
@pytest.mark.parametrize("decision", approvals.DECISIONS)
def test_the_same_vote_again_changes_nothing_also_after_the_end(quorum: int, decision: str) -> None:
    found = approvals.after(_approval(quorum), _vote(0, decision))
    assert approvals.after(found, _vote(0, decision, "Once more.")) is found


def test_who_has_said_one_thing_cannot_say_another() -> None:
    found = approvals.after(_approval(2), _vote(0))
    with pytest.raises(errors.FailedPrecondition, match="approve"):
        approvals.after(found, _vote(0, approvals.REJECT))


@pytest.mark.parametrize("state", [approvals.APPROVED, approvals.REJECTED, approvals.EXPIRED])
@pytest.mark.parametrize("decision", approvals.DECISIONS)
def test_after_its_end_nobody_else_has_a_say(state: str, decision: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match=state):
        approvals.after(_approval(state=state), _vote(1, decision))


def test_the_approval_before_a_vote_stays_as_it_was() -> None:
    found = _approval()
    approvals.after(found, _vote(0))
    assert (found.state, found.votes) == (approvals.PENDING, ())


@pytest.mark.parametrize(("decision", "comment", "field"), [("maybe", "", "decision"), ("", "", "decision"), ("approve", "\0", "comment")])
def test_what_no_vote_can_be_is_refused_by_name(decision: str, comment: str, field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        approvals.check_vote(decision, comment)
    assert refused.value.details["field"] == field


def test_a_comment_has_its_limit() -> None:
    approvals.check_vote("approve", "x" * 4096)
    with pytest.raises(errors.TooLarge):
        approvals.check_vote("approve", "x" * 4097)


@pytest.mark.parametrize("state", ["", *approvals.STATES])
def test_every_state_may_be_asked_for(state: str) -> None:
    approvals.check_state(state)


def test_a_state_that_there_is_not_may_not_be_asked_for() -> None:
    with pytest.raises(errors.InvalidPayload):
        approvals.check_state("decided")
