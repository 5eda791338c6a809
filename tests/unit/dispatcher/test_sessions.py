"""Agents of users: which there are, in which versions; whose instances; their life, their heart, and what is kept of them."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from netra import errors, ids
from netra.agent import AgentSpec, Turn, agent
from netra.context import UserExecutionContext
from services.dispatcher import executions, runs
from services.dispatcher.agents import registry, sessions
from services.dispatcher.agents.sessions import AgentState


@agent("worker", version="1.9.0")
async def old_worker(turn: Turn) -> None:
    """As it was."""


@agent("worker", version="1.10.0")
async def worker(turn: Turn) -> None:
    """Works."""


@agent("other")
async def other(turn: Turn) -> None:
    """Is another one."""


def context(user_id: str = "") -> UserExecutionContext:
    """Of a run of somebody's."""
    return UserExecutionContext.from_request(
        user_id=user_id or ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(),
        request_id=ids.uuid7(), roles=("user",), tier="business",
    )  # fmt: skip


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """One that stands still."""
    return Clock()


@pytest.fixture
def agents(clock: Clock) -> registry.AgentRegistry:
    """A registry in which a user has three agents at most."""
    return registry.AgentRegistry([worker, other, old_worker], agents_per_user=3, session_age_s=60, clock=clock)


@pytest.fixture
def executing(agents: registry.AgentRegistry, clock: Clock) -> executions.Executions:
    """A process with it, in which an agent may be silent for ten seconds."""
    return executions.Executions(agents, silent_s=10, history=5, clock=clock)


def begun(executing: executions.Executions, of: UserExecutionContext | None = None, spec: AgentSpec = worker) -> sessions.AgentInstance:
    """An agent at work."""
    mine = of or context()
    return executing.begin(mine, spec, mine.run_id)


class TestVersions:
    """Several of one name."""

    def test_the_newest_by_number_is_taken_when_none_is_asked_for(self, agents: registry.AgentRegistry) -> None:
        assert agents.get("worker") is worker
        assert agents.get("worker", "1.9.0") is old_worker
        assert agents.versions() == [("other", "1.0.0"), ("worker", "1.9.0"), ("worker", "1.10.0")]
        assert agents.names() == ["other", "worker"]
        assert agents.all() == [other, worker]
        listed = agents.list_agents()
        assert [(one.name, one.newest.version, one.versions) for one in listed] == [
            ("other", "1.0.0", ("1.0.0",)), ("worker", "1.10.0", ("1.9.0", "1.10.0")),
        ]  # fmt: skip

    def test_an_unknown_agent_or_version_is_told_which_there_are(self, agents: registry.AgentRegistry) -> None:
        with pytest.raises(errors.NotFound, match=r"no agent 'nobody'\. There are: other, worker\.") as refused:
            agents.get("nobody")
        assert refused.value.details["field"] == "agent"
        with pytest.raises(errors.NotFound, match=r"no version '2\.0\.0' of the agent worker\. There are: 1\.9\.0, 1\.10\.0\."):
            agents.get("worker", "2.0.0")

    def test_a_name_and_version_is_declared_once(self) -> None:
        registry.AgentRegistry([worker, worker])
        with pytest.raises(ValueError, match=r"two agents are named worker in version 1\.10\.0"):
            registry.AgentRegistry([worker, replace(other, name="worker", version="1.10.0")])

    def test_entry_points_offer_one_agent_or_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offering(*names: str) -> None:
            points = [metadata.EntryPoint(name, f"{__name__}:{name}", "netra.agents") for name in names]
            monkeypatch.setattr(metadata, "entry_points", lambda group: points)
            monkeypatch.setattr(metadata.EntryPoint, "load", lambda point: globals()[point.name])

        offering("worker", "FAMILY")
        assert registry.installed() == [worker, old_worker, other]
        offering("context")
        with pytest.raises(ValueError, match="the entry point context of"):
            registry.installed()


FAMILY = [old_worker, other]
_SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}


class TestSchemas:
    """What an agent declares of its inputs and its result holds."""

    def test_what_is_not_as_declared_is_named(self) -> None:
        declared = replace(worker, input_schema=_SCHEMA, output_schema={"type": "object", "properties": {"sum": {"type": "number"}}})
        agents = registry.AgentRegistry([declared, old_worker])
        agents.check_inputs(declared, {"days": 30})
        agents.check_result(declared, {"sum": 1.5})
        with pytest.raises(errors.InvalidPayload, match=r"worker: inputs\.days: ") as refused:
            agents.check_inputs(declared, {"days": "many"})
        assert refused.value.details["field"] == "inputs.days"
        with pytest.raises(errors.InvalidPayload, match="days"):
            agents.check_inputs(declared, {})
        with pytest.raises(errors.AgentFailed, match=r"worker returned something else than it declares: result\.sum: "):
            agents.check_result(declared, {"sum": "much"})

    def test_an_agent_without_schemas_takes_and_returns_anything(self, agents: registry.AgentRegistry) -> None:
        agents.check_inputs(worker, {"anything": [None]})
        agents.check_result(worker, object())

    @pytest.mark.parametrize("name", ["input_schema", "output_schema"])
    def test_a_schema_that_is_none_is_refused_at_once(self, name: str) -> None:
        declaration: dict[str, Any] = {name: {"type": "nonsense"}}
        with pytest.raises(ValueError, match=f"agent worker: {name}: "):
            registry.AgentRegistry([replace(worker, **declaration)])


class TestStates:
    """The life of an instance."""

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(AgentState, AgentState)))
    def test_only_what_follows_is_legal(self, old: AgentState, new: AgentState) -> None:
        ends = {"failed", "cancelled", "timed_out"}
        follows: dict[str, set[str]] = {
            "created": {"active", *ends}, "active": {"suspended", "completed", *ends}, "suspended": {"active", *ends},
        }  # fmt: skip
        assert sessions.legal(old, new) == (new in follows.get(old, set()))

    def test_an_illegal_step_is_refused_and_changes_nothing(self, agents: registry.AgentRegistry) -> None:
        made = agents.create_agent_for_user(context(), "worker")
        with pytest.raises(errors.FailedPrecondition, match="created cannot become completed") as refused:
            made.state("completed")
        assert (refused.value.details["state"], refused.value.details["asked"]) == ("created", "completed")
        assert made.current == "created"
        with pytest.raises(ValueError, match="dancing"):
            made.state("dancing")
        made.state("active")
        made.state(runs.RunState.COMPLETED)
        with pytest.raises(errors.FailedPrecondition):
            made.state("active")

    def test_every_state_is_kept_with_the_time_it_took(self, agents: registry.AgentRegistry, clock: Clock) -> None:
        made = agents.create_agent_for_user(context(), "worker")
        for state in ("active", "suspended", "active", "failed"):
            clock.now += 2
            made.state(state)
        assert made.transitions == [("created", 0), ("active", 2), ("suspended", 4), ("active", 6), ("failed", 8)]
        clock.now += 50
        assert made.age_s == 8

    def test_an_end_counts_once(self, agents: registry.AgentRegistry) -> None:
        told: list[str] = []
        made = agents.create_agent_for_user(context(), "worker")
        made.when_over(lambda instance: told.append(instance.current))
        made.state("active")
        assert made.end("completed")
        assert not made.end("failed")
        made.leave()
        made.when_over(lambda instance: told.append("late"))
        assert (made.current, told) == ("completed", ["completed", "late"])

    def test_what_waits_or_is_given_away_is_over_without_an_end(self, agents: registry.AgentRegistry) -> None:
        waits, given = (agents.create_agent_for_user(context(), "worker") for _ in range(2))
        waits.state("active")
        assert waits.end("suspended")
        given.state("active")
        given.leave()
        assert (waits.over, waits.current, given.over, given.current) == (True, "suspended", True, "active")
        # whoever goes on with it makes another instance
        for gone, state in ((waits, "active"), (given, "completed")):
            with pytest.raises(errors.FailedPrecondition):
                gone.state(state)
        assert agents.get_registry_health().instances == 0

    def test_who_executes_it_is_told_once_to_stop_it(self, agents: registry.AgentRegistry) -> None:
        told: list[str] = []
        early, late = (agents.create_agent_for_user(context(), "worker") for _ in range(2))
        early.when_stopped(told.append)
        early.stop("first")
        early.stop("second")
        late.stop("before")
        late.when_stopped(told.append)
        assert (told, early.stopped) == (["first", "before"], "first")


class TestSessions:
    """What each user has."""

    def test_users_have_nothing_in_common(self, agents: registry.AgentRegistry) -> None:
        mine, theirs = context(), context()
        one, two = agents.create_agent_for_user(mine, "worker"), agents.create_agent_for_user(theirs, "worker")
        assert agents.get_user_agent(mine.user_id, one.execution_id) is one
        for call in (agents.get_user_agent, agents.remove_user_agent):
            with pytest.raises(errors.NotFound):
                call(mine.user_id, two.execution_id)
        assert agents.user_agents(theirs.user_id) == [two]
        session = sessions.UserAgentSession(mine.user_id, 0.0)
        with pytest.raises(errors.PermissionDenied):
            session.add(two)

    @pytest.mark.parametrize("nobody", ["", "default", "placeholder_1", "00000000-0000-0000-0000-000000000000", None, 7])
    def test_nobody_has_a_session(self, agents: registry.AgentRegistry, nobody: Any) -> None:
        calls = (
            agents.user_agents, agents.cleanup_user_session, agents.reset_user_agents,
            lambda user_id: agents.get_user_agent(user_id, "x"), lambda user_id: agents.remove_user_agent(user_id, "x"),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(errors.InvalidPayload):
                call(nobody)
        with pytest.raises(errors.InvalidContext):
            agents.create_agent_for_user(nobody, "worker")

    def test_an_unknown_agent_leaves_no_session(self, agents: registry.AgentRegistry) -> None:
        with pytest.raises(errors.NotFound, match="There are: other, worker"):
            agents.create_agent_for_user(context(), "nobody")
        assert agents.monitor_all_users() == []

    def test_a_user_has_so_many_and_accepted_work_is_not_refused(self, agents: registry.AgentRegistry) -> None:
        mine = context()
        for _ in range(3):
            agents.create_agent_for_user(mine, "worker")
        with pytest.raises(errors.ResourceExhausted) as refused:
            agents.create_agent_for_user(mine, "worker")
        assert refused.value.details["limit"] == "3"
        agents.create_agent_for_user(context(), "worker")
        assert agents.get_registry_health().status == "healthy"
        agents.create_agent_for_user(mine, "worker", accepted=True)
        health = agents.get_registry_health()
        assert (health.status, health.users, health.instances) == ("warning", 2, 5)
        assert health.issues == (f"user {mine.user_id}: 4 agents: more than 3",)

    def test_an_empty_session_is_dropped_and_nothing_of_it_stays(self, agents: registry.AgentRegistry) -> None:
        mine = context()
        made = [agents.create_agent_for_user(mine, "worker") for _ in range(3)]
        seen = [weakref.ref(one.context) for one in made]
        assert agents.remove_user_agent(mine.user_id, made[0].execution_id) == "cancelled"
        assert agents.cleanup_user_session(mine.user_id) == 2
        assert agents.cleanup_user_session(mine.user_id) == 0
        assert [one.stopped for one in made] == ["removed", "cleanup", "cleanup"]
        assert agents.monitor_all_users() == []
        del made, mine
        gc.collect()
        assert [one() for one in seen] == [None] * 3

    def test_a_reset_makes_the_same_afresh(self, agents: registry.AgentRegistry, clock: Clock) -> None:
        mine = context()
        old = agents.create_agent_for_user(mine, "worker", "1.9.0")
        old.state("active")
        agents.create_agent_for_user(mine, "other")
        clock.now += 30
        fresh = agents.reset_user_agents(mine.user_id)
        assert [(one.spec, one.current, one.run_id) for one in fresh] == [
            (old_worker, "created", mine.run_id), (other, "created", mine.run_id),
        ]  # fmt: skip
        assert (old.current, old.stopped) == ("cancelled", "reset")
        assert agents.user_agents(mine.user_id) == fresh
        assert agents.monitor_all_users()[0].age_s == 0

    def test_an_old_session_is_told_of_and_what_never_began_is_forgotten(self, agents: registry.AgentRegistry, clock: Clock) -> None:
        mine = context()
        never, active = (agents.create_agent_for_user(mine, "worker") for _ in range(2))
        active.state("active")
        clock.now += 61
        assert agents.monitor_all_users()[0].issues == ("a session of 61 s: longer than 60 s",)
        assert agents.expire() == 1
        assert (never.current, active.current) == ("timed_out", "active")
        assert agents.user_agents(mine.user_id) == [active]

    def test_an_emergency_stops_everything_of_everybody(self, agents: registry.AgentRegistry) -> None:
        made = [agents.create_agent_for_user(context(), "worker") for _ in range(5)]
        told: list[str] = []
        for one in made:
            one.when_stopped(told.append)
        assert agents.emergency_cleanup_all() == 5
        health = agents.get_registry_health()
        assert (health.users, health.instances, health.made, health.over) == (0, 0, 5, 5)
        assert told == ["cleanup"] * 5

    def test_threads_do_not_lose_each_others_instances(self, agents: registry.AgentRegistry) -> None:
        users = [context() for _ in range(4)]

        def live(at: int) -> None:
            for _ in range(200):
                made = agents.create_agent_for_user(users[at % 4], "worker", accepted=True)
                assert agents.get_user_agent(made.user_id, made.execution_id) is made
                made.state("active")
                assert made.end("completed")

        with ThreadPoolExecutor(max_workers=8) as threads:
            list(threads.map(live, range(8)))
        health = agents.get_registry_health()
        assert (health.users, health.instances, health.made, health.over) == (0, 0, 1600, 1600)


class TestExecutions:
    """What executes, and what did."""

    def test_an_execution_is_counted_from_its_begin_to_its_end(self, executing: executions.Executions, clock: Clock) -> None:
        mine = context()
        made = begun(executing, mine)
        engine = executing.of(mine.user_id)
        assert (made.current, engine.executing, engine.health().states) == ("active", [made], {"active": 1})
        for _ in range(3):
            with made.step():
                clock.now += 1
        made.end(runs.RunState.COMPLETED)
        (told,) = engine.history
        assert (told.outcome, told.steps, told.duration_s, told.agent_id, told.agent_version) == ("completed", 3, 3, "worker", "1.10.0")
        assert (told.user_id, told.run_id, told.thread_id, told.correlation_id) == (
            mine.user_id, mine.run_id, mine.thread_id, mine.correlation_id,
        )  # fmt: skip
        assert told.transitions == (("created", 0), ("active", 0), ("completed", 3))
        assert engine.executing == []
        for counted in (engine.statistics, executing.statistics):
            assert (counted.began, counted.over, counted.steps, counted.mean_s, counted.success_rate) == (1, {"completed": 1}, 3, 3, 1)

    def test_accepted_runs_are_begun_however_many_there_are(self, executing: executions.Executions) -> None:
        mine = context()
        assert len({begun(executing, mine).execution_id for _ in range(10)}) == 10

    def test_the_history_has_the_last_ones_and_the_statistics_have_all(self, executing: executions.Executions) -> None:
        mine = context()
        made = [begun(executing, mine) for _ in range(12)]
        for at, one in enumerate(made):
            one.end("failed" if at % 3 == 0 else "completed")
        engine = executing.of(mine.user_id)
        assert [one.execution_id for one in engine.history] == [one.execution_id for one in made[-5:]]
        assert engine.statistics.over == {"failed": 4, "completed": 8}
        assert engine.health().success_rate == pytest.approx(2 / 3)

    def test_what_waits_or_goes_on_elsewhere_did_not_fail(self, executing: executions.Executions) -> None:
        mine = context()
        begun(executing, mine).end("suspended")
        begun(executing, mine).leave()
        engine = executing.of(mine.user_id)
        assert [one.outcome for one in engine.history] == ["suspended", "left"]
        assert engine.statistics.success_rate == 1

    def test_users_executions_are_apart(self, executing: executions.Executions) -> None:
        mine, theirs = context(), context()
        begun(executing, mine)
        foreign = begun(executing, theirs)
        with pytest.raises(errors.PermissionDenied):
            executing.of(mine.user_id).add(foreign)
        foreign.end("failed")
        assert executing.of(mine.user_id).statistics.over == {}
        assert executing.of(mine.user_id).history == []
        with pytest.raises(errors.NotFound):
            executing.of(ids.uuid7())
        with pytest.raises(errors.InvalidPayload):
            executing.of("default")


class TestSilence:
    """An agent that gives no sign of life is noticed."""

    @staticmethod
    def _looks(executing: executions.Executions, clock: Clock, seconds: int) -> Iterator[sessions.AgentInstance]:
        for _ in range(seconds):
            clock.now += 1
            yield from executing.look()

    def test_it_is_stopped_once_after_as_long_as_it_may_be_silent(self, executing: executions.Executions, clock: Clock) -> None:
        told: list[str] = []
        made = begun(executing)
        made.when_stopped(told.append)
        assert list(self._looks(executing, clock, 10)) == []
        assert executing.health().status == "healthy"
        assert list(self._looks(executing, clock, 5)) == [made]
        assert (told, executing.health().silent) == (["no_heartbeat"], (made.execution_id,))
        made.end("failed")
        engine = executing.of(made.user_id)
        assert (engine.history[0].stopped, engine.statistics.silent, engine.health().status) == ("no_heartbeat", 1, "healthy")

    def test_metrics_have_how_many_execute_and_how_many_are_silent(
        self, executing: executions.Executions, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = InMemoryMetricReader()
        meter = MeterProvider(metric_readers=[reader]).get_meter("test")
        for name, known in (("_executing", "executing"), ("_unheard", "unheard")):
            monkeypatch.setattr(executions, name, meter.create_gauge(known))

        def told() -> dict[str, float]:
            data: Any = reader.get_metrics_data()
            return {one.name: one.data.data_points[0].value for one in data.resource_metrics[0].scope_metrics[0].metrics}

        silent, lively = begun(executing), begun(executing)
        assert (executing.measured().status, told()) == ("healthy", {"executing": 2, "unheard": 0})
        for _ in self._looks(executing, clock, 8):
            raise AssertionError("nobody has been silent for long enough")
        lively.beat()
        assert list(self._looks(executing, clock, 3)) == [silent]
        assert (executing.measured().status, told()) == ("silent", {"executing": 2, "unheard": 1})
        for one in (silent, lively):
            one.end("failed")
        assert (executing.measured().status, told()) == ("healthy", {"executing": 0, "unheard": 0})

    def test_a_beat_or_a_step_is_a_sign_of_life(self, executing: executions.Executions, clock: Clock) -> None:
        beating, stepping = begun(executing), begun(executing)
        for _ in range(6):
            assert list(self._looks(executing, clock, 5)) == []
            beating.beat()
            with stepping.step():
                pass
        stepping.end("completed")
        assert list(self._looks(executing, clock, 15)) == [beating]

    def test_nothing_is_to_be_heard_while_a_step_is_under_way_or_it_waits(self, executing: executions.Executions, clock: Clock) -> None:
        busy, waiting = begun(executing), begun(executing)
        busy.step_began()
        with busy.step():
            waiting.state("suspended")
        assert list(self._looks(executing, clock, 100)) == []
        busy.step_over()
        waiting.state("active")
        assert list(self._looks(executing, clock, 10)) == []
        assert list(self._looks(executing, clock, 1)) == [busy, waiting]

    def test_nobody_is_blamed_when_the_whole_process_stood_still(self, executing: executions.Executions, clock: Clock) -> None:
        made = begun(executing)
        clock.now += 100
        assert executing.look() == []
        assert list(self._looks(executing, clock, 11)) == [made]

    def test_what_a_user_had_is_forgotten_a_minute_after_the_last_of_it(self, executing: executions.Executions, clock: Clock) -> None:
        mine, theirs = context(), context()
        begun(executing, mine).end("completed")
        still = begun(executing, theirs)
        still.step_began()
        list(self._looks(executing, clock, 60))
        assert executing.users() == [mine.user_id, theirs.user_id]
        list(self._looks(executing, clock, 1))
        assert executing.users() == [theirs.user_id]
        assert executing.statistics.over == {"completed": 1}
