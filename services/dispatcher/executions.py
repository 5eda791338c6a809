"""UserExecutionEngine, one per user, and Executions, all of this process: what executes, what did, and what has fallen silent."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from chassis import log, telemetry
from netra import errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher.agents import registry, sessions

_log = log.get(__name__)
_silent = telemetry.meter.create_counter("netra.agents.silent", description="Agents that were stopped for want of a heartbeat, by agent.")
_executing = telemetry.meter.create_gauge("netra.agents.executing", description="Agents that execute here.")
_unheard = telemetry.meter.create_gauge("netra.agents.unheard", description="Those that gave no sign of life for as long as they may.")
NO_HEARTBEAT = "no_heartbeat"
# what executed is forgotten so long after the last of it
_KEPT_S = 60.0
# how an execution that this process gave away is counted
LEFT = "left"
_OFTEN = 10


@dataclass(frozen=True, slots=True)
class Executed:
    """One execution that is over here: whose, of what, how it went. `outcome` is its last state, or `left`: it goes on elsewhere."""

    execution_id: ids.ExecutionId
    agent_id: str
    agent_version: str
    user_id: ids.UserId
    thread_id: ids.ThreadId
    run_id: ids.RunId
    request_id: ids.RequestId
    correlation_id: ids.CorrelationId
    outcome: str
    created_at: datetime
    ended_at: datetime
    duration_s: float
    steps: int
    stopped: str
    transitions: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Statistics:
    """Counts of executions: how many began, how those went that are over, and what they took together."""

    began: int = 0
    over: collections.Counter[str] = field(default_factory=collections.Counter)
    steps: int = 0
    busy_s: float = 0.0
    longest_s: float = 0.0
    silent: int = 0

    def add(self, one: Executed) -> None:
        """Count one that is over."""
        self.over[one.outcome] += 1
        self.steps += one.steps
        self.busy_s += one.duration_s
        self.longest_s = max(self.longest_s, one.duration_s)
        self.silent += one.stopped == NO_HEARTBEAT

    @property
    def mean_s(self) -> float:
        """How long one took, on average."""
        return self.busy_s / max(self.over.total(), 1)

    @property
    def success_rate(self) -> float:
        """The part of those that ended, one way or another, which completed; 1 where none has ended."""
        ended = sum(self.over[state] for state in sessions.ENDED)
        return self.over[sessions.AgentState.COMPLETED] / ended if ended else 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """`healthy`, or `silent` when something that executes has given no sign of life for as long as it may."""

    status: str
    executing: int
    states: Mapping[str, int]
    silent: tuple[ids.ExecutionId, ...]
    success_rate: float


class UserExecutionEngine:
    """What of one user's executes in this process, and the last of it that did; no other user's is ever in it."""

    def __init__(self, user_id: ids.UserId, silent_s: float, history: int) -> None:
        self.user_id, self._silent_s = user_id, silent_s
        self._executing: dict[ids.ExecutionId, sessions.AgentInstance] = {}
        self._history: collections.deque[Executed] = collections.deque(maxlen=history)
        self.statistics = Statistics()
        # by the clock of the instances; of one that has none under way
        self.idle_since = 0.0

    @property
    def executing(self) -> list[sessions.AgentInstance]:
        """What executes, oldest first."""
        return list(self._executing.values())

    @property
    def history(self) -> list[Executed]:
        """The last of what executed, oldest first."""
        return list(self._history)

    def add(self, instance: sessions.AgentInstance) -> None:
        """Have this execute. Raises `PermissionDenied` for what is another user's."""
        if instance.user_id != self.user_id:
            raise errors.PermissionDenied("An execution belongs to the engine of its own user.", field="user_id")
        self._executing[instance.execution_id] = instance
        self.statistics.began += 1

    def over(self, instance: sessions.AgentInstance, now: float) -> Executed | None:
        """Keep how an instance went that is over; None when it was kept before."""
        if self._executing.pop(instance.execution_id, None) is None:
            return None
        told = _executed(instance)
        self._history.append(told)
        self.statistics.add(told)
        self.idle_since = now
        return told

    def silent(self) -> list[sessions.AgentInstance]:
        """What executes, has no step under way and took none, nor gave another sign of life, for too long."""
        return [instance for instance in self._executing.values() if instance.silent_s > self._silent_s]

    def health(self) -> Health:
        """How the user's executions do."""
        silent = tuple(instance.execution_id for instance in self.silent())
        states = collections.Counter(str(instance.current) for instance in self._executing.values())
        return Health("silent" if silent else "healthy", len(self._executing), states, silent, self.statistics.success_rate)


class Executions:
    """All that executes in this process, by user. What a user had is forgotten a minute after the last of it."""

    def __init__(
        self, agents: registry.AgentRegistry, *, silent_s: float = 10.0, history: int = 100, clock: sessions.Clock = time.monotonic
    ) -> None:
        self._agents, self._silent_s, self._most, self._clock = agents, silent_s, history, clock
        self._users: dict[ids.UserId, UserExecutionEngine] = {}
        self._looked_at = clock()
        self.statistics = Statistics()

    def begin(self, context: UserExecutionContext, spec: AgentSpec, run_id: ids.RunId) -> sessions.AgentInstance:
        """An instance of the agent that is at work from now on, whatever else its user has: the run was accepted."""
        made = self._agents.create_agent_for_user(context, spec.name, spec.version, run_id=run_id, accepted=True)
        engine = self._users.get(made.user_id)
        if engine is None:
            engine = self._users[made.user_id] = UserExecutionEngine(made.user_id, self._silent_s, self._most)
        engine.add(made)
        self.statistics.began += 1
        made.when_over(self._is_over)
        made.state(sessions.AgentState.ACTIVE)
        return made

    def _is_over(self, instance: sessions.AgentInstance) -> None:
        if (engine := self._users.get(instance.user_id)) is not None and (told := engine.over(instance, self._clock())) is not None:
            self.statistics.add(told)

    def of(self, user_id: str) -> UserExecutionEngine:
        """The engine of a user. Raises `NotFound` when nothing of theirs has executed for a while."""
        try:
            return self._users[ids.ensure_user_id(user_id)]
        except KeyError:
            raise errors.NotFound("Nothing of this user's executes here.", field="user_id") from None

    def users(self) -> list[ids.UserId]:
        """Whose executions there are, or were a moment ago."""
        return list(self._users)

    def health(self) -> Health:
        """How all executions do."""
        found = [engine.health() for engine in self._users.values()]
        states: collections.Counter[str] = collections.Counter()
        for one in found:
            states.update(one.states)
        silent = tuple(execution_id for one in found for execution_id in one.silent)
        return Health("silent" if silent else "healthy", states.total(), states, silent, self.statistics.success_rate)

    def measured(self) -> Health:
        """The same, as the metrics have it from now on."""
        health = self.health()
        _executing.set(health.executing)
        _unheard.set(len(health.silent))
        return health

    def look(self) -> list[sessions.AgentInstance]:
        """Stop what has fallen silent, and return it; forget whose executions were over long ago."""
        now, before = self._clock(), self._looked_at
        self._looked_at = now
        if now - before > self._silent_s / 2:
            # this process stood still: nobody could give a sign of life
            for instance in self._executing():
                instance.beat()
        found = [instance for engine in self._users.values() for instance in engine.silent() if not instance.stopped]
        for instance in found:
            _silent.add(1, {"agent": instance.spec.name})
            _log.warning("an agent has fallen silent", agent=instance.spec.name, run_id=instance.run_id, silent_s=instance.silent_s)
            instance.stop(NO_HEARTBEAT)
        for engine in [one for one in self._users.values() if not one.executing and now - one.idle_since > _KEPT_S]:
            del self._users[engine.user_id]
        self._agents.expire()
        return found

    def _executing(self) -> list[sessions.AgentInstance]:
        return [instance for engine in self._users.values() for instance in engine.executing]

    async def watch(self, tell: Callable[[bool], Awaitable[None]] | None = None) -> None:
        """Look, for ever, and tell whether all that executes gives signs of life: now, and whenever that changes."""
        told = ""
        while True:
            self.look()
            if told != (now := self.measured().status):
                told = now
                if tell is not None:
                    await tell(now == "healthy")
            await asyncio.sleep(self._silent_s / _OFTEN)


def _executed(instance: sessions.AgentInstance) -> Executed:
    context, took = instance.context, instance.age_s
    gone = instance.current not in sessions.ENDED and instance.current is not sessions.AgentState.SUSPENDED
    return Executed(
        instance.execution_id, instance.spec.name, instance.spec.version, context.user_id, context.thread_id, instance.run_id,
        context.request_id, context.correlation_id, LEFT if gone else str(instance.current), instance.created_at,
        instance.created_at + timedelta(seconds=took), took, instance.steps, instance.stopped,
        tuple((str(state), at) for state, at in instance.transitions),
    )  # fmt: skip
