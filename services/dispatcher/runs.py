"""Run and RunState: the legal transitions; pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from netra import ids

# between the word that a user has other rights now and the storing of what they asked for just before
LATE = timedelta(seconds=5)


# what becomes of a start while the thread has a run under way
ENQUEUE, REJECT, INTERRUPT, ROLLBACK = "enqueue", "reject", "interrupt", "rollback"
ON_BUSY = (ENQUEUE, REJECT, INTERRUPT, ROLLBACK)


class RunState(enum.StrEnum):
    """Where a run is in its life."""

    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    SUSPENDED = "suspended"
    FINISHING = "finishing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


ENDED = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED, RunState.TIMED_OUT})
# what may be asked to stop, and be sent a message
GOES_ON = (RunState.QUEUED, RunState.RUNNING, RunState.SUSPENDED)
LEGAL: dict[RunState, frozenset[RunState]] = {
    RunState.CREATED: frozenset({RunState.QUEUED, RunState.FAILED}),
    RunState.QUEUED: frozenset({RunState.RUNNING}),
    # a call of a tool has no thread to free: it goes to its end at once
    RunState.RUNNING: frozenset({RunState.SUSPENDED, RunState.FINISHING, *ENDED}),
    RunState.SUSPENDED: frozenset({RunState.RUNNING, RunState.FINISHING}),
    RunState.FINISHING: ENDED,
    **dict.fromkeys(ENDED, frozenset()),
}
_BY_EVENT = {
    "agent_completed": RunState.COMPLETED,
    "agent_failed": RunState.FAILED,
    "agent_cancelled": RunState.CANCELLED,
    "agent_timed_out": RunState.TIMED_OUT,
    # a tool run whose owner died before its answer was kept: how it went is in the record
    "tool_completed": RunState.FAILED,
}


def legal(old: RunState, new: RunState) -> bool:
    """Whether a run may go from one state to the other."""
    return new in LEGAL[old]


def state_after(terminal_type: str) -> RunState:
    """The final state that a terminal event means."""
    return _BY_EVENT[terminal_type]


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of one agent, or of one tool for kind `tool`, as its owner sees it."""

    run_id: ids.RunId
    user_id: ids.UserId
    thread_id: ids.ThreadId
    request_id: str
    message_id: str
    digest: bytes
    kind: str
    agent: str
    state: RunState
    correlation_id: str
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: bytes = b""
    agent_version: str = ""
    # what a run that is suspended waits for: `message`, `approval` or `timer`
    waits_for: str = ""
    # when its message passed which stage; read for one run alone, not for lists of them
    stages: Mapping[str, datetime] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run: everything a process needs that takes the run over. Times are seconds."""

    run_id: ids.RunId
    kind: str
    agent: str
    request: str
    inputs: bytes
    deadline_s: float
    message_id: str
    context: bytes
    context_token: str
    traceparent: str
    # the version of the agent that it was started in; empty for a run older than that, and for a tool
    agent_version: str = ""


@dataclass(frozen=True, slots=True)
class Rights:
    """What a user has from some time on. What they started before does no more than both allow: this and what they had then."""

    roles: tuple[str, ...]
    tier: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Claim:
    """An order that this process owns at an epoch, for as long as it renews the lease.

    `cancelled` is who asked for its end: `user`, `security`, or empty.
    `expired` means that nobody renewed its context token in time: the record cannot be opened for it any more.
    `rights` is what its user got meanwhile in place of what they had; None when that is the same.
    `finishing` means that an earlier owner was at its end already: it is brought there, and never begun.
    `takeovers` counts the owners whose lease ran out since the run last got further; one that let go of it, or that it waited for, is none.
    `ran_s` is how long it ran before this claim; what it was queued or suspended is not in that.
    `orphaned` means that nobody has had its agent in its version for `missing_s`: it is brought to its end, and never begun.
    `overdue` means that it waited in the queue for longer than any run may.
    `rolled_back` means that its messages are to be hidden at its end.
    """

    order: Order
    epoch: int
    cancelled: str
    expired: bool
    rights: Rights | None = None
    finishing: bool = False
    takeovers: int = 0
    ran_s: float = 0.0
    orphaned: bool = False
    overdue: bool = False
    rolled_back: bool = False
    missing_s: float = 0.0


class Claims(list[Claim]):
    """What one look at the queue came to; `after` is the user behind whom the next look begins, so that each has a turn.

    `more` means that there may be more that may begin just now. `waits` means that something is ready that was not taken: it may
    begin once there is room for it, or for its user, or on its thread.
    """

    def __init__(self, claims: Iterable[Claim] = (), after: str = "", *, more: bool = False, waits: bool = False) -> None:
        super().__init__(claims)
        self.after, self.more, self.waits = after, more, waits


@dataclass(frozen=True, slots=True)
class Held:
    """What the row of a run says whose lease was renewed; the fields are those of a claim.

    `woken` means that something came since it was claimed that the run may wait for: a message, or the end of an approval.
    """

    epoch: int
    cancelled: str = ""
    token_old: bool = False
    rights: Rights | None = None
    woken: bool = False
    rolled_back: bool = False


@dataclass(frozen=True, slots=True)
class Mail:
    """A message that a user sent to a run; numbers of a run's messages begin at 1 and leave none out."""

    number: int
    message_id: str
    user_id: str
    content: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A message on its way to a run. `message_id` is that of the entry in the thread."""

    run_id: ids.RunId
    request_id: str
    message_id: str
    content: str


@dataclass(frozen=True, slots=True)
class Added:
    """A run that was stored, or was there before, and the user's earlier ones on its thread that were asked to stop for it.

    One that runs at once, whoever stored it owns; its lease began at `leased_at`, by `time.monotonic`, or later. 0 for all others.
    """

    run: Run
    stopped: tuple[ids.RunId, ...] = ()
    leased_at: float = 0.0
