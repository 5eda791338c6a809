"""Approvals: what a run asks people before it goes on, their votes, and what these decide; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from netra import errors, ids

PENDING, APPROVED, REJECTED, EXPIRED = "pending", "approved", "rejected", "expired"
STATES = (PENDING, APPROVED, REJECTED, EXPIRED)
APPROVE, REJECT = "approve", "reject"
DECISIONS = (APPROVE, REJECT)
MAX_QUORUM = 100
_MAX_COMMENT = 4 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run asks for: `quorum` users who approve before `expires_s` seconds are over; of a tool call which, and with what."""

    approval_id: str
    run_id: str
    step_key: str
    message: str
    quorum: int
    expires_s: float
    tool_name: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Vote:
    """What one user said."""

    user_id: str
    decision: str
    comment: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Approval:
    """An approval as it is now: of whose run, in which thread, and the votes so far, oldest first."""

    approval_id: str
    run_id: ids.RunId
    user_id: ids.UserId
    thread_id: ids.ThreadId
    message: str
    tool_name: str
    parameters: Mapping[str, Any]
    quorum: int
    state: str
    created_at: datetime
    expires_at: datetime
    resolved_at: datetime | None = None
    votes: tuple[Vote, ...] = ()

    def vote_of(self, user_id: str) -> Vote | None:
        """What a user said to it."""
        return next((vote for vote in self.votes if vote.user_id == user_id), None)


def after(approval: Approval, vote: Vote) -> Approval:
    """The approval with one more vote: approved by as many users as its quorum, rejected by the first who says so.

    A user's same vote again changes nothing. Raises `FailedPrecondition` for another vote of theirs, and for one that comes too late.
    """
    if (before := approval.vote_of(vote.user_id)) is not None:
        if before.decision == vote.decision:
            return approval
        raise errors.FailedPrecondition(f"You have said {before.decision} to it already.", state=approval.state)
    if approval.state != PENDING:
        raise errors.FailedPrecondition(f"The approval is {approval.state}.", state=approval.state)
    votes = (*approval.votes, vote)
    state = _decided(approval.quorum, votes)
    return dataclasses.replace(approval, votes=votes, state=state, resolved_at=None if state == PENDING else vote.at)


def _decided(quorum: int, votes: tuple[Vote, ...]) -> str:
    if any(vote.decision == REJECT for vote in votes):
        return REJECTED
    return APPROVED if sum(vote.decision == APPROVE for vote in votes) >= quorum else PENDING


def check_vote(decision: str, comment: str) -> None:
    """Raises `InvalidPayload` naming the field that no vote can have."""
    if decision not in DECISIONS:
        raise errors.InvalidPayload(f"decision must be one of {', '.join(DECISIONS)}", field="decision")
    if len(comment) > _MAX_COMMENT:
        raise errors.TooLarge(f"comment must have at most {_MAX_COMMENT} characters", field="comment", limit=_MAX_COMMENT)
    if "\0" in comment:
        raise errors.InvalidPayload("comment must not contain a null character", field="comment")


def check_state(state: str) -> None:
    """Raises `InvalidPayload` for a state that no approval has; empty is any."""
    if state and state not in STATES:
        raise errors.InvalidPayload(f"state must be one of {', '.join(STATES)}", field="state")
