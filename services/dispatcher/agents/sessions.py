"""Agents as they execute: an instance for each of a user's executions, and the session that holds what one user has; pure."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from netra import errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext

Clock = Callable[[], float]


class AgentState(enum.StrEnum):
    """Where an instance is in its life."""

    CREATED = "created"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


ENDED = frozenset({AgentState.COMPLETED, AgentState.FAILED, AgentState.CANCELLED, AgentState.TIMED_OUT})
_STOPPED = ENDED - {AgentState.COMPLETED}
# only what is at work has a result
LEGAL: Mapping[AgentState, frozenset[AgentState]] = {
    AgentState.CREATED: frozenset({AgentState.ACTIVE, *_STOPPED}),
    AgentState.ACTIVE: frozenset({AgentState.SUSPENDED, *ENDED}),
    AgentState.SUSPENDED: frozenset({AgentState.ACTIVE, *_STOPPED}),
    **dict.fromkeys(ENDED, frozenset()),
}


def legal(old: AgentState, new: AgentState) -> bool:
    """Whether an instance may go from one state to the other."""
    return new in LEGAL[old]


class AgentInstance:
    """One agent, executing for one user in one context; nothing of it is shared. Its heart beats by a clock that never jumps.

    It is over when it has ended, or when it went where this process does not see it: another owner has its run, or nobody just now.
    """

    __slots__ = (
        "_began", "_clock", "_heard", "_on_over", "_on_stop", "_over_at", "_steps", "_stop", "_under_way", "context", "created_at",
        "current", "execution_id", "run_id", "spec", "transitions",
    )  # fmt: skip

    def __init__(
        self, context: UserExecutionContext, spec: AgentSpec, on_over: Callable[[AgentInstance], None], *,
        run_id: ids.RunId | None = None, clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        self.execution_id = ids.ExecutionId.new()
        self.context, self.spec, self.run_id = context, spec, context.run_id if run_id is None else run_id
        self.created_at = datetime.now(UTC)
        self.current = AgentState.CREATED
        self._clock, self._began = clock, clock()
        self._heard, self._over_at, self._steps, self._under_way = self._began, 0.0, 0, 0
        # each state it has been in, and after how many seconds it came there
        self.transitions: list[tuple[AgentState, float]] = [(AgentState.CREATED, 0.0)]
        self._on_over: list[Callable[[AgentInstance], None]] = [on_over]
        self._on_stop: Callable[[str], None] | None = None
        self._stop = ""

    @property
    def user_id(self) -> ids.UserId:
        """Whose it is."""
        return self.context.user_id

    @property
    def over(self) -> bool:
        """Whether this process is done with it."""
        return not self._on_over

    @property
    def age_s(self) -> float:
        """For how long there has been this instance; of one that is over, how long there was."""
        return (self._over_at if self.over else self._clock()) - self._began

    @property
    def steps(self) -> int:
        """How many steps it began."""
        return self._steps

    @property
    def silent_s(self) -> float:
        """For how long nothing was heard of it; 0 where nothing is to be heard: while a step is under way, and when it is not at work."""
        return self._clock() - self._heard if self.current is AgentState.ACTIVE and not self._under_way else 0.0

    def state(self, new: str) -> None:
        """Go to another state. Raises `FailedPrecondition` naming both when the one does not follow from the other."""
        wanted = AgentState(new)
        if self.over or not legal(self.current, wanted):
            message = f"An agent that is {self.current} cannot become {wanted}."
            raise errors.FailedPrecondition(message, field="state", state=self.current, asked=wanted)
        self.current, self._heard = wanted, self._clock()
        self.transitions.append((wanted, round(self._heard - self._began, 6)))
        if wanted in ENDED:
            self.leave()

    def beat(self) -> None:
        """It lives."""
        self._heard = self._clock()

    def step_began(self, *, counts: bool = True) -> None:
        """A step is under way; until it is over nobody waits for a sign of life. What is done beside the agent's steps `counts` not."""
        self._steps += counts
        self._under_way += 1

    def step_over(self) -> None:
        """A step is over, however it went."""
        self._under_way -= 1
        self._heard = self._clock()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step is under way for the time of the block."""
        self.step_began()
        try:
            yield
        finally:
            self.step_over()

    def end(self, state: str) -> bool:
        """The end of it here: a final state, or `suspended` when its run waits and nothing of it stays. False when it was over before.

        Raises `FailedPrecondition` when that state does not follow from the one it is in.
        """
        if self.over:
            return False
        if self.current != state:
            self.state(state)
        self.leave()
        return True

    def leave(self) -> None:
        """This process is done with it, and does not say how it ends; what was over stays so."""
        told, self._on_over = self._on_over, []
        self._over_at = self._over_at or self._clock()
        for tell in told:
            tell(self)

    def when_over(self, tell: Callable[[AgentInstance], None]) -> None:
        """Have this called, once, when the instance is over; at once when it is."""
        if self.over:
            tell(self)
        else:
            self._on_over.append(tell)

    @property
    def stopped(self) -> str:
        """Why it is to stop; empty as long as it may go on."""
        return self._stop

    def stop(self, why: str) -> None:
        """Ask whoever executes it to stop it; the first reason counts."""
        if self._stop or self.over:
            return
        self._stop = why
        if self._on_stop is not None:
            self._on_stop(why)

    def when_stopped(self, stop: Callable[[str], None]) -> None:
        """Have this called with the reason when the instance is to stop; at once when it is to already."""
        self._on_stop = stop
        if self._stop:
            stop(self._stop)


@dataclass(slots=True)
class UserAgentSession:
    """What one user has at a time: from their first instance until nothing is left of it."""

    user_id: ids.UserId
    opened: float
    opened_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    instances: dict[ids.ExecutionId, AgentInstance] = field(default_factory=dict)

    def add(self, instance: AgentInstance) -> None:
        """Hold an instance. Raises `PermissionDenied` for one of another user."""
        if instance.user_id != self.user_id:
            raise errors.PermissionDenied("An agent belongs to the session of its own user.", field="user_id")
        self.instances[instance.execution_id] = instance

    def states(self) -> dict[str, int]:
        """How many instances are in which state."""
        found: dict[str, int] = {}
        for instance in self.instances.values():
            found[instance.current] = found.get(instance.current, 0) + 1
        return found
