"""AgentRegistry: finds agents by name and version, from entry points and built-ins, and holds what each user has of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from netra import declarations, errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher.agents import sessions, spend, text
from services.dispatcher.tools import schemas

AGENTS_PER_USER, SESSION_AGE_S = 50, 86_400.0


@dataclass(frozen=True, slots=True)
class Listed:
    """An agent as it is listed: the version that is taken when none is asked for, and all there are, oldest first."""

    name: str
    newest: AgentSpec
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Monitored:
    """What one user has just now, and what is out of the ordinary about it."""

    user_id: ids.UserId
    agents: int
    states: Mapping[str, int]
    age_s: float
    issues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """How the registry does: `healthy`, or `warning` when a user has more, or for longer, than is usual."""

    status: str
    agents: int
    versions: int
    users: int
    instances: int
    made: int
    over: int
    issues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """An agent with its schemas compiled."""

    spec: AgentSpec
    inputs: schemas.Validator | None = field(repr=False)
    result: schemas.Validator | None = field(repr=False)


class AgentRegistry:
    """The agents of this process, in one or several versions each; and, by user, the instances made of them.

    Users have nothing in common: whose instance it is decides who finds it. It may be used from several threads.
    """

    def __init__(
        self, agents: Iterable[AgentSpec], *, agents_per_user: int = AGENTS_PER_USER, session_age_s: float = SESSION_AGE_S,
        clock: sessions.Clock = time.monotonic,
    ) -> None:  # fmt: skip
        """Raises `ValueError` for two agents of one name and version, and for a schema that is not valid."""
        self._agents: dict[str, dict[str, _Known]] = {}
        for spec in agents:
            self._register(spec)
        self._newest = {name: _newest(versions) for name, versions in self._agents.items()}
        self._most, self._old_s, self._clock = agents_per_user, session_age_s, clock
        self._sessions: dict[ids.UserId, sessions.UserAgentSession] = {}
        # of sessions: one is dropped with its last instance, while another thread may add the next
        self._lock = threading.RLock()
        self._made = self._over = 0

    def _register(self, spec: AgentSpec) -> None:
        versions = self._agents.setdefault(spec.name, {})
        if spec.version in versions and versions[spec.version].spec.function is not spec.function:
            raise ValueError(f"two agents are named {spec.name} in version {spec.version}")
        versions[spec.version] = _Known(spec, *(_compiled(spec, name) for name in ("input_schema", "output_schema")))

    def get(self, name: str, version: str = "") -> AgentSpec:
        """The agent; the newest version when none is asked for. Raises `NotFound` naming those there are."""
        return self._known(name, version).spec

    def _known(self, name: str, version: str = "") -> _Known:
        if (versions := self._agents.get(name)) is None:
            known = ", ".join(self.names())
            raise errors.NotFound(f"There is no agent {name!r}. There are: {known}.", field="agent")
        if not version:
            return self._newest[name]
        if version not in versions:
            known = ", ".join(_in_order(versions))
            raise errors.NotFound(f"There is no version {version!r} of the agent {name}. There are: {known}.", field="agent_version")
        return versions[version]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._agents)

    def versions(self) -> list[tuple[str, str]]:
        """All agents with all their versions, by name, oldest first: what this process can execute."""
        return [(name, version) for name in self.names() for version in _in_order(self._agents[name])]

    def all(self) -> list[AgentSpec]:
        """The newest of each agent, by name."""
        return [self._newest[name].spec for name in self.names()]

    def list_agents(self) -> list[Listed]:
        """All agents with what there is of each, by name."""
        return [Listed(name, self.get(name), tuple(_in_order(self._agents[name]))) for name in self.names()]

    def check_inputs(self, spec: AgentSpec, inputs: Mapping[str, Any]) -> None:
        """Raises `InvalidPayload` naming the input that is not as the agent declares it."""
        if (found := _problem(self._known(spec.name, spec.version).inputs, "inputs", inputs)) is not None:
            place, message = found
            raise errors.InvalidPayload(f"{spec.name}: {place}: {message}", field=place)

    def check_result(self, spec: AgentSpec, result: object) -> None:
        """Raises `AgentFailed` when the agent did not return what it declares."""
        if (found := _problem(self._known(spec.name, spec.version).result, "result", result)) is not None:
            raise errors.AgentFailed(f"{spec.name} returned something else than it declares: {found[0]}: {found[1]}", field=found[0])

    def create_agent_for_user(
        self, context: UserExecutionContext, name: str, version: str = "", *, run_id: ids.RunId | None = None, accepted: bool = False
    ) -> sessions.AgentInstance:
        """Make an instance of an agent for the user of a context, and hold it in their session until it is over.

        Raises `NotFound` naming the agents there are, `InvalidContext` for what is no context of a user (theirs has no placeholders), and
        `ResourceExhausted` when the user has as many as one may have; what is `accepted` is made all the same, and seen by who monitors.
        """
        spec = self.get(name, version)
        if not isinstance(context, UserExecutionContext):
            raise errors.InvalidContext("An agent is made for the user of an execution context.", field="context")
        made = sessions.AgentInstance(context, spec, self._is_over, run_id=run_id, clock=self._clock)
        with self._lock:
            session = self._sessions.get(context.user_id)
            if session is not None and len(session.instances) >= self._most and not accepted:
                message = f"The user has {self._most} agents, which is as many as one may have. End some of them first."
                raise errors.ResourceExhausted(message, field="agents", limit=self._most)
            if session is None:
                session = self._sessions[context.user_id] = sessions.UserAgentSession(context.user_id, self._clock())
            session.add(made)
            self._made += 1
        return made

    def _is_over(self, instance: sessions.AgentInstance) -> None:
        with self._lock:
            self._over += 1
            if (session := self._sessions.get(instance.user_id)) is not None:
                session.instances.pop(instance.execution_id, None)
                if not session.instances:
                    del self._sessions[instance.user_id]

    def get_user_agent(self, user_id: str, execution_id: str) -> sessions.AgentInstance:
        """An instance of a user's. Raises `NotFound`, also for one of another user."""
        for instance in self.user_agents(user_id):
            if instance.execution_id == execution_id:
                return instance
        raise errors.NotFound(f"The user has no agent {execution_id!r}.", field="execution_id")

    def user_agents(self, user_id: str) -> list[sessions.AgentInstance]:
        """What a user has, oldest first. Raises `InvalidPayload` for what stands for no user."""
        with self._lock:
            session = self._sessions.get(ids.ensure_user_id(user_id))
            return [] if session is None else list(session.instances.values())

    def remove_user_agent(self, user_id: str, execution_id: str) -> sessions.AgentState:
        """Stop an instance and forget it; returns the state it is in then. Raises `NotFound`."""
        return _stopped(self.get_user_agent(user_id, execution_id), "removed")

    def reset_user_agents(self, user_id: str) -> list[sessions.AgentInstance]:
        """Stop what a user has and make the same afresh, in a session that begins now."""
        with self._lock:
            before = self.user_agents(user_id)
            for instance in before:
                _stopped(instance, "reset")
            return [
                self.create_agent_for_user(old.context, old.spec.name, old.spec.version, run_id=old.run_id, accepted=True)
                for old in before
            ]  # fmt: skip

    def cleanup_user_session(self, user_id: str) -> int:
        """Stop all that a user has, and forget the user; how many instances that were."""
        had = self.user_agents(user_id)
        for instance in had:
            _stopped(instance, "cleanup")
        return len(had)

    def monitor_all_users(self) -> list[Monitored]:
        """What each user has, the one with most of it first."""
        with self._lock:
            found = [self._monitored(session) for session in self._sessions.values()]
        return sorted(found, key=lambda one: (-one.agents, one.user_id))

    def _monitored(self, session: sessions.UserAgentSession) -> Monitored:
        many, age_s = len(session.instances), self._clock() - session.opened
        issues = []
        if many > self._most:
            issues.append(f"{many} agents: more than {self._most}")
        if age_s > self._old_s:
            issues.append(f"a session of {age_s:.0f} s: longer than {self._old_s:.0f} s")
        return Monitored(session.user_id, many, session.states(), age_s, tuple(issues))

    def expire(self) -> int:
        """Forget what was made but never begun within the age that a session may have; how many instances that were."""
        with self._lock:
            every = [instance for session in self._sessions.values() for instance in session.instances.values()]
        old = [one for one in every if one.current is sessions.AgentState.CREATED and one.age_s > self._old_s]
        for instance in old:
            instance.end(sessions.AgentState.TIMED_OUT)
        return len(old)

    def emergency_cleanup_all(self) -> int:
        """Stop everything of everybody, and forget all users; how many instances that were."""
        with self._lock:
            users = list(self._sessions)
        return sum(self.cleanup_user_session(user_id) for user_id in users)

    def get_registry_health(self) -> Health:
        """How the registry does."""
        users = self.monitor_all_users()
        issues = tuple(f"user {one.user_id}: {issue}" for one in users for issue in one.issues)
        with self._lock:
            instances, made, over = sum(one.agents for one in users), self._made, self._over
        return Health(
            "warning" if issues else "healthy", len(self._agents), len(self.versions()), len(users), instances, made, over, issues
        )  # fmt: skip


def _stopped(instance: sessions.AgentInstance, why: str) -> sessions.AgentState:
    instance.stop(why)
    # who executes it may have ended it just now
    instance.end(sessions.AgentState.CANCELLED)
    return instance.current


def _newest(versions: Mapping[str, _Known]) -> _Known:
    return versions[max(versions, key=declarations.version_of)]


def _in_order(versions: Mapping[str, _Known]) -> list[str]:
    return sorted(versions, key=declarations.version_of)


def _compiled(spec: AgentSpec, name: str) -> schemas.Validator | None:
    schema = getattr(spec, name)
    if schema is None:
        return None
    try:
        return schemas.compiled(schema)
    except ValueError as error:
        raise ValueError(f"agent {spec.name}: {name}: {error}") from None


def _problem(validator: schemas.Validator | None, root: str, value: object) -> tuple[str, str] | None:
    """The first place that is not as declared, and what is wrong with it."""
    if validator is None or validator.is_valid(value):
        return None
    problem = next(validator.iter_errors(value))
    return ".".join([root, *map(str, problem.instance_path)]), problem.message


def built_in() -> list[AgentSpec]:
    """The agents that come with Netra."""
    specialists = [spend.triage, spend.data, spend.optimization, spend.actions, spend.reporting]
    return [spend.supervisor, spend.analyst, *specialists, text.analyst]


def installed() -> list[AgentSpec]:
    """The agents that installed packages offer under the entry-point group `netra.agents`: each point one, or several in a list.

    Raises `ValueError` naming an entry point that offers something else.
    """
    found: list[AgentSpec] = []
    for point in metadata.entry_points(group="netra.agents"):
        offered = point.load()
        offers = list(offered) if isinstance(offered, (list, tuple)) else [offered]
        if not all(isinstance(one, AgentSpec) for one in offers):
            raise ValueError(f"the entry point {point.name} of netra.agents must be an agent, or a list of agents: {point.value}")
        found += offers
    return found
