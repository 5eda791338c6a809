"""AgentRegistry over real services: which agents there are, whose instances execute, what is told of them, and that nothing stays."""

from __future__ import annotations

import asyncio
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import executions
from services.dispatcher.agents import registry, sessions
from tests.fixtures import agents as crew_
from tests.fixtures import web
from tests.fixtures.agents import CONTEXTS, GATES, MEET, Crew, Process, canaries, of, socket_of, until
from tests.fixtures.sockets import CRITICAL, contiguous, in_legal_order
from tests.fixtures.storage import Services
from tests.fixtures.user_execution_context_fixtures import Somebody, made
from tests.fixtures.users import User
from tests.integration.conftest import types

pytestmark = pytest.mark.real_services
DEFAULT = ["actions", "data", "optimization", "reporting", "spend-analyst", "supervisor", "text-analyst", "triage"]
MOST = 5


@pytest.fixture
async def crew(services: Services) -> Crew:
    """All services, with agents of all kinds, of which a user has five at most."""
    await services.all(agents=[crew_.OLDER, *crew_.AGENTS], tools=crew_.TOOLS, agents_per_user=MOST)
    return Crew(services)


class TestAgentRegistryComprehensive:
    """Business value: many users work with agents at the same time in one process, each as if it were theirs alone."""

    async def test_agent_registry_initialization(self, crew: Crew) -> None:
        """Business value: what a customer was sold can be started from the first second, and nobody starts with the rest of another."""
        agents = crew.process.agents
        assert set(agents.names()) == {*DEFAULT, *(spec.name for spec in crew_.AGENTS)}
        assert [pair for pair in agents.versions() if pair[0] == "crew-analyst"] == [("crew-analyst", "1.1.0"), ("crew-analyst", "1.2.0")]
        assert agents.get("crew-analyst") is crew_.analyst
        health = agents.get_registry_health()
        assert (health.status, health.users, health.instances, health.made, health.issues) == ("healthy", 0, 0, 0, ())
        assert health.agents == len(agents.names()) == health.versions - 1
        assert crew.process.executions.users() == []
        # another process has users of its own
        await crew.services.dispatcher(agents=crew_.AGENTS, tools=crew_.TOOLS)
        other = Process(crew.services.started["dispatcher"])
        assert other.agents is not agents
        other.agents.create_agent_for_user(made(), "crew-analyst")
        assert (other.agents.get_registry_health().users, agents.get_registry_health().users) == (1, 0)
        assert other.agents.emergency_cleanup_all() == 1

    async def test_default_agent_registration(self, crew: Crew) -> None:
        """Business value: an installation is of use before anybody has written an agent for it."""
        user = await crew.services.user()
        found = (await crew.dispatcher.ListAgents(pb.ListAgentsRequest(), metadata=user.bearer, timeout=20)).agents
        listed = {one.name: one for one in found}
        assert [name for name in listed if not name.startswith("crew-")] == DEFAULT
        assert all(one.version and one.description for one in found)
        events = await crew.ended(user, (await crew.start(user, request="Rivers carry boats.")).run_id)
        assert (events[0]["data"]["agent_name"], events[-1]["type"]) == ("supervisor", "agent_completed")
        assert events[-1]["data"]["result"]["agent"] == "text-analyst"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await crew.start(user, "goals_triage")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert "text-analyst, triage" in (caught.value.details() or "")
        # the agent that does a part of the work is in the same execution
        assert [one.agent_id for one in await crew.process.executed(user)] == ["supervisor"]

    async def test_agent_discovery_across_services(self, crew: Crew) -> None:
        """Business value: what the edge offers is what the dispatcher executes and what the record says was executed."""
        user = await crew.services.user()
        await crew.services.gateway()
        async with web.client(base_url=f"http://127.0.0.1:{crew.services.ports['gateway']}", trust_env=False) as client:
            offered = (await client.get("/v1/agents", headers={"Authorization": f"Bearer {user.token}"})).json()["agents"]
        inside = crew.process.agents.list_agents()
        assert [(one["name"], one["version"]) for one in offered] == [(one.name, one.newest.version) for one in inside]
        assert next(one.versions for one in inside if one.name == "crew-analyst") == ("1.1.0", "1.2.0")
        for name in ("crew-analyst", "triage"):
            events = await crew.ended(user, (await crew.start(user, name)).run_id)
            spec = crew.process.agents.get(name)
            assert (events[0]["data"]["agent_name"], events[0]["data"]["agent_version"]) == (spec.name, spec.version)
        # a tier that lacks the feature is offered less, by every service alike
        free = await crew.services.user(tier="free")
        fewer = (await crew.dispatcher.ListAgents(pb.ListAgentsRequest(), metadata=free.bearer, timeout=20)).agents
        assert {one.name for one in fewer} <= {one.name for one in inside}

    async def test_user_agent_session_isolation(self, crew: Crew) -> None:
        """Business value: nobody sees, stops or even finds an agent of somebody else's, whichever way they ask."""
        mine, theirs = [await crew.services.user() for _ in range(2)]
        (run, mark), (foreign, foreign_mark) = await crew.held(mine), await crew.held(theirs)
        agents = crew.process.agents
        one, other = crew.process.instance(mine, run), crew.process.instance(theirs, foreign)
        assert (one.user_id, other.user_id) == (mine.user_id, theirs.user_id)
        for call in (agents.get_user_agent, agents.remove_user_agent):
            with pytest.raises(errors.NotFound):
                call(mine.user_id, other.execution_id)
        with pytest.raises(errors.PermissionDenied):
            crew.process.of(mine).add(other)
        for asked in (crew.run(mine, foreign), crew.cancel(mine, foreign)):
            assert await crew.refused(asked) == grpc.StatusCode.NOT_FOUND
        assert (other.current, crew.process.of(mine).executing) == ("active", [one])
        GATES[mark].set()
        GATES[foreign_mark].set()
        assert (await crew.ended(theirs, foreign))[-1]["data"]["result"]["user"] == theirs.user_id
        await crew.process.empty()
        assert {told.user_id for told in await crew.process.executed(mine)} == {mine.user_id}

    async def test_multi_user_agent_creation_isolation(self, crew: Crew) -> None:
        """Business value: ten users who begin at the same moment get ten times their own, and each may have as many as all others."""
        users = [await crew.services.user() for _ in range(10)]
        await asyncio.gather(*(crew.result(user, "crew-analyst") for user in users))
        # contexts that the context service signed, one of each user
        contexts = [next(iter((await crew.contexts(user)).values())) for user in users]
        agents = crew.process.agents
        await crew.process.empty()

        async def create(at: int) -> sessions.AgentInstance:
            await asyncio.sleep(0)
            return agents.create_agent_for_user(contexts[at % 10], "crew-analyst", ("1.1.0", "1.2.0")[at % 2])

        instances = await asyncio.gather(*(create(at) for at in range(10 * MOST)))
        assert len({one.execution_id for one in instances}) == 10 * MOST
        for at, user in enumerate(users):
            own = agents.user_agents(user.user_id)
            assert own == [one for one in instances if one.context is contexts[at]]
            assert {one.spec.version for one in own} == {("1.1.0", "1.2.0")[at % 2]}
            with pytest.raises(errors.ResourceExhausted):
                agents.create_agent_for_user(contexts[at], "crew-analyst")
        for nobody in ("default", "placeholder", ""):
            with pytest.raises(errors.InvalidPayload):
                agents.user_agents(nobody)
        assert agents.cleanup_user_session(users[0].user_id) == MOST
        assert [one.user_id for one in agents.monitor_all_users()] == sorted(user.user_id for user in users[1:])
        assert agents.emergency_cleanup_all() == 9 * MOST

    async def test_concurrent_multi_user_execution(self, crew: Crew) -> None:
        """Business value: fifty users are served at the same time by one process, and each gets the answer to their own question."""
        many, mark = 50, ids.uuid7()
        MEET[mark] = asyncio.Barrier(many)
        users = await asyncio.gather(*(crew.services.user() for _ in range(many)))
        # none of them goes on before all of them execute
        results = await asyncio.gather(
            *(crew.result(user, "crew-meeting", inputs={"mark": mark, "canary": f"of-{user.user_id}"}) for user in users)
        )
        for user, result in zip(users, results, strict=True):
            assert (result["user"], result["canary"]) == (user.user_id, f"of-{user.user_id}")
        await crew.process.empty()
        statistics = crew.process.executions.statistics
        assert (statistics.began, statistics.over) == (many, {"completed": many})
        assert len(crew.process.executions.users()) == many

    async def test_websocket_manager_integration(self, crew: Crew) -> None:
        """Business value: whoever sits before several screens sees the same work on all of them, live."""
        user = await crew.services.user()
        await crew.services.gateway()
        async with socket_of(crew.services, user) as desk, socket_of(crew.services, user) as phone:
            mark = crew_.gate()
            run_id = (await desk.run(agent="crew-waiting", inputs={"mark": mark}))["run_id"]
            await crew_.came(mark)
            instance = crew.process.instance(user, run_id)
            # the instance knows the socket it was asked for at
            assert instance.context.connection_id == desk.frames[0]["connection_id"]
            GATES[mark].set()
            seen, also = [[event for event in await socket.ended(run_id) if "seq" in event] for socket in (desk, phone)]
        assert [event["event_id"] for event in seen] == [event["event_id"] for event in also]
        in_legal_order(seen)
        assert {event["data"]["agent_id"] for event in seen} == {run_id}

    async def test_websocket_events_during_agent_creation(self, crew: Crew) -> None:
        """Business value: a user sees that an agent took up their request, what it thinks and does, and that it is done."""
        user = await crew.services.user()
        await crew.services.gateway()
        async with socket_of(crew.services, user) as socket:
            mark = crew_.gate()
            run_id = (await socket.run(agent="crew-waiting", inputs={"mark": mark}))["run_id"]
            begun = await socket.until(type="agent_started")
            instance = crew.process.instance(user, run_id)
            assert (begun["run_id"], begun["data"]["agent_name"]) == (instance.run_id, instance.spec.name)
            assert begun["data"]["agent_version"] == instance.spec.version
            executing = await socket.until(type="tool_executing")
            # it executes until its tool has been told to go on
            assert (instance.current, executing["data"]["tool_name"]) == ("active", "crew.wait")
            assert of(socket.frames, "agent_completed") == []
            GATES[mark].set()
            events = [event for event in await socket.ended(run_id) if "seq" in event]
        in_legal_order(events)
        contiguous(events)
        assert [kind for kind in types(events) if kind in CRITICAL] == CRITICAL
        (told,) = await crew.process.executed(user)
        assert (told.run_id, told.outcome, told.correlation_id) == (run_id, "completed", events[0]["correlation_id"])

    async def test_multi_user_websocket_isolation(self, crew: Crew) -> None:
        """Business value: five users who watch their agents at the same time never read a word of each other's."""
        await crew.services.gateway()
        users = [await crew.services.user() for _ in range(5)]

        async def watch(user: User) -> list[dict[str, object]]:
            async with socket_of(crew.services, user) as socket:
                inputs = {"canary": f"of-{user.user_id}"}
                for _ in range(3):
                    await socket.ended((await socket.run(agent="crew-analyst", inputs=inputs))["run_id"])
                return socket.frames

        for user, frames in zip(users, await asyncio.gather(*(watch(user) for user in users)), strict=True):
            assert canaries(frames, users) == [user.user_id]
            assert {frame["user_id"] for frame in frames if "seq" in frame} == {user.user_id}
        assert [len(await crew.process.executed(user, 3)) for user in users] == [3] * 5

    async def test_agent_lifecycle_registration_to_cleanup(self, crew: Crew) -> None:
        """Business value: an agent's whole life can be told: declared, found, begun, parked, taken up, ended, and gone."""
        user = await crew.services.user()
        assert "crew-interview" in crew.process.agents.names()
        mark = crew_.gate()
        run_id = (await crew.start(user, "crew-interview", inputs={"mark": mark})).run_id
        await crew.state(user, run_id, pb.RUN_STATE_SUSPENDED)
        # what waits for a person has no place in a process
        await crew.process.empty()
        await crew.send(user, run_id, "Go on.")
        assert (await crew.ended(user, run_id))[-1]["data"]["result"]["message"] == "You said: Go on."
        before, after = await crew.process.executed(user, 2)
        assert [state for state, _ in before.transitions] == ["created", "active", "suspended"]
        assert [state for state, _ in after.transitions] == ["created", "active", "completed"]
        assert (before.run_id, before.execution_id != after.execution_id) == (after.run_id, True)
        assert crew.process.agents.monitor_all_users() == []

    async def test_agent_resource_cleanup_prevention(self, crew: Crew) -> None:
        """Business value: a process that has served for months is as light as on its first day, however its agents ended."""
        user = await crew.services.user()
        held = [await crew.held(user) for _ in range(3)]
        for run_id, _ in held:
            await crew.cancel(user, run_id)
        slow = [(await crew.start(user, "crew-slow", inputs={"mark": crew_.gate()})).run_id for _ in range(2)]
        others = [(await crew.start(user, name)).run_id for name in ("crew-analyst", "crew-failing") for _ in range(3)]
        for run_id in [*(run_id for run_id, _ in held), *slow, *others]:
            await crew.ended(user, run_id)
        await crew.process.empty()
        engine = crew.process.of(user)
        await until(lambda: engine.statistics.over.total() == 11)
        assert engine.statistics.over == {"cancelled": 3, "timed_out": 2, "completed": 3, "failed": 3}
        assert (engine.executing, crew.process.agents.user_agents(user.user_id)) == ([], [])
        await until(lambda: crew.process.dispatchers.live_of(user.user_id) == 0)

        def forgotten() -> bool:
            gc.collect()
            return not any(context.user_id == user.user_id for context in CONTEXTS)

        # neither a registry nor a task nor a history holds what an agent worked in
        await until(forgotten)

    async def test_user_session_reset_functionality(self, crew: Crew) -> None:
        """Business value: one user's trouble is cleared away without anybody else noticing."""
        mine, theirs = [await crew.services.user() for _ in range(2)]
        run_id, mark = await crew.held(theirs)
        await crew.result(mine, "crew-analyst")
        (context,) = (await crew.contexts(mine)).values()
        await until(lambda: not crew.process.agents.user_agents(mine.user_id))
        agents, told = crew.process.agents, list[str]()
        stuck = [agents.create_agent_for_user(context, name) for name in ("crew-waiting", "crew-analyst")]
        for one in stuck:
            one.state("active")
            one.when_stopped(told.append)
        fresh = agents.reset_user_agents(mine.user_id)
        assert (told, [one.current for one in stuck]) == (["reset"] * 2, ["cancelled"] * 2)
        assert [(one.spec.name, one.current) for one in fresh] == [("crew-waiting", "created"), ("crew-analyst", "created")]
        assert agents.user_agents(mine.user_id) == fresh
        assert agents.cleanup_user_session(mine.user_id) == 2
        assert [one.user_id for one in agents.monitor_all_users()] == [theirs.user_id]
        GATES[mark].set()
        assert (await crew.ended(theirs, run_id))[-1]["type"] == "agent_completed"

    async def test_tool_dispatcher_factory_integration(self, crew: Crew) -> None:
        """Business value: the tools of an agent act in the name of exactly the user whose agent it is, and for as long as it executes."""
        user = await crew.services.user()
        run_id, mark = await crew.held(user)
        instance = crew.process.instance(user, run_id)
        assert crew.process.dispatchers.live_of(user.user_id) == 1
        GATES[mark].set()
        await crew.ended(user, run_id)
        await until(lambda: crew.process.dispatchers.live_of(user.user_id) == 0)
        assert instance.current == "completed"
        started = await crew.start(user, "crew-analyst")
        events = await crew.ended(user, started.run_id)
        whose, context = events[-1]["data"]["result"]["whose"], (await crew.contexts(user))[started.run_id]
        assert (whose["user"], whose["run"], whose["thread"]) == (user.user_id, started.run_id, started.thread_id)
        assert whose["signed_in"] == context.session_id

    async def test_agent_tool_dispatcher_isolation(self, crew: Crew) -> None:
        """Business value: what one user's tools leave behind, or break, is nothing to any other user."""
        users = [await crew.services.user() for _ in range(4)]
        held = await crew.held(users[0])
        assert [crew.process.dispatchers.live_of(user.user_id) for user in users] == [1, 0, 0, 0]
        results = await asyncio.gather(
            *(crew.result(user, "crew-analyst", inputs={"canary": f"of-{user.user_id}"}) for user in users for _ in range(2)),
            *(crew.result(user, "crew-recovering") for user in users),
        )
        for at, result in enumerate(results[:8]):
            user = users[at // 2]
            # the folder of a run has what this run put there
            assert (result["whose"]["user"], result["whose"]["there"]) == (user.user_id, [f"of-{user.user_id}"])
        assert len({result["whose"]["run"] for result in results[:8]}) == 8
        assert {tuple(result["failures"]) for result in results[8:]} == {("UNAVAILABLE", "PERMISSION_DENIED", "NOT_FOUND")}
        GATES[held[1]].set()
        assert (await crew.ended(users[0], held[0]))[-1]["type"] == "agent_completed"

    async def test_agent_registry_health_monitoring(self, services: Services) -> None:
        """Business value: an agent that hangs is noticed and ended with a number to ask support for; one that works hard is left alone."""
        await services.all(agents=crew_.AGENTS, tools=crew_.TOOLS, agents_per_user=MOST, agent_silent_s=1.0)
        crew = Crew(services)
        user, other = [await crew.services.user() for _ in range(2)]
        mark = crew_.gate()
        busy = (await crew.start(other, "crew-alive", inputs={"mark": mark})).run_id
        await crew_.came(mark)
        health_: Any = health_pb2_grpc.HealthStub(services.channel("dispatcher"))
        watched = health_.Watch(health_pb2.HealthCheckRequest(service="netra.agents"), timeout=60)
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        hung = (await crew.start(user, "crew-silent")).run_id
        # probes see it until it is ended
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        failed = (await crew.ended(user, hung))[-1]
        assert (failed["type"], failed["data"]["error"]["code"]) == ("agent_failed", "AGENT_FAILED")
        assert failed["data"]["error"]["details"]["cause"] == executions.NO_HEARTBEAT
        assert failed["data"]["error"]["support_code"]
        (told,) = await crew.process.executed(user)
        assert (told.outcome, told.stopped) == ("failed", executions.NO_HEARTBEAT)
        # the time that it may be silent for, by the clock that decides it
        assert told.duration_s > 1.0
        assert crew.process.of(user).statistics.silent == 1
        instance = crew.process.instance(other, busy)
        # it has taken no step for longer than the one that was ended, and nobody has asked it to stop
        assert (instance.current, instance.age_s > told.duration_s, instance.stopped) == ("active", True, "")
        contexts = [made(Somebody(user_id=ids.UserId(other.user_id))) for _ in range(MOST)]
        for context in contexts:
            crew.process.agents.create_agent_for_user(context, "crew-analyst", accepted=True)
        health = crew.process.agents.get_registry_health()
        assert (health.status, health.issues) == ("warning", (f"user {other.user_id}: {MOST + 1} agents: more than {MOST}",))
        GATES[mark].set()
        assert (await crew.ended(other, busy))[-1]["type"] == "agent_completed"
        assert crew.process.agents.cleanup_user_session(other.user_id) == MOST

    async def test_agent_execution_engine_coordination(self, crew: Crew) -> None:
        """Business value: what operators see in a process, what users see of a run and what is stored about it are the same."""
        user = await crew.services.user()
        (run_id, mark), (other, other_mark) = await crew.held(user), await crew.held(user)
        assert {one.run_id for one in crew.process.of(user).executing} == {run_id, other}
        for each in (run_id, other):
            assert (await crew.run(user, each)).state == pb.RUN_STATE_RUNNING
            assert crew.process.instance(user, each).current == "active"
        await crew.cancel(user, run_id)
        await crew.state(user, run_id, pb.RUN_STATE_CANCELLED)
        GATES[other_mark].set()
        await crew.state(user, other, pb.RUN_STATE_COMPLETED)
        history = {str(one.run_id): one for one in await crew.process.executed(user, 2)}
        assert (history[run_id].outcome, history[other].outcome) == ("cancelled", "completed")
        assert (history[other].agent_id, history[other].steps) == ("crew-waiting", 2)
        assert not GATES[mark].is_set()

    async def test_production_agent_workflow_patterns(self, crew: Crew) -> None:
        """Business value: the ways in which agents are put together in earnest: at once, by a decision, with help, with a substitute."""
        user = await crew.services.user()
        results = await asyncio.gather(
            crew.result(user, "crew-branching", inputs={"parts": [[100], [200]]}),
            crew.result(user, "crew-branching", inputs={"parts": [[8000], [4000], [400]]}),
            crew.result(user, "crew-recovering"),
            crew.result(user, "supervisor", request="Rivers carry boats. Boats carry people."),
        )
        assert (results[0]["branch"], results[0]["savings"]) == ("simple", 75)
        assert (results[1]["branch"], results[1]["savings"], results[1]["child"]) == ("thorough", 3100, "of-the-child")
        assert (results[2]["total"], len(results[2]["failures"])) == (40, 3)
        assert (results[3]["agent"], results[3]["statistics"]["words"]) == ("text-analyst", 6)
        # children share the execution of the agent that has them
        assert len(await crew.process.executed(user, 4)) == 4

    async def test_cross_service_agent_registry_synchronization(self, crew: Crew) -> None:
        """Business value: a new version is rolled out beside the old one, and each run ends in the version that it began in."""
        user = await crew.services.user()
        old, run = crew.process, await crew.held(user)
        newer = [replace(crew_.analyst, version="2.0.0"), crew_.waiting]
        await crew.services.dispatcher(agents=newer, tools=crew_.TOOLS)
        rolled = Crew(crew.services)
        assert (old.agents.get("crew-analyst").version, rolled.process.agents.get("crew-analyst").version) == ("1.2.0", "2.0.0")
        for asked, version in ((crew, "1.2.0"), (rolled, "2.0.0")):
            for _ in range(5):
                run_id = (await asked.start(user, "crew-analyst")).run_id
                events = await asked.ended(user, run_id)
                assert (events[0]["data"]["agent_version"], events[-1]["type"]) == (version, "agent_completed")
                assert (await asked.run(user, run_id)).agent_version == version
        # each executed where its version is, whoever was asked
        versions = [{one.agent_version for one in await process.executed(user, 5)} for process in (old, rolled.process)]
        assert versions == [{"1.2.0"}, {"2.0.0"}]
        GATES[run[1]].set()
        await crew.ended(user, run[0])

    async def test_agent_registry_performance_monitoring(self, crew: Crew) -> None:
        """Business value: how much work there is, of whom, how long it takes and how often it fails is known to the last run."""
        users = [await crew.services.user() for _ in range(3)]
        for times, user in enumerate(users, 1):
            for _ in range(times):
                await crew.ended(user, (await crew.start(user, "crew-analyst")).run_id)
            await crew.ended(user, (await crew.start(user, "crew-failing")).run_id)
        for times, user in enumerate(users, 1):
            told = await crew.process.executed(user, times + 1)
            statistics = crew.process.of(user).statistics
            assert statistics.over == {"completed": times, "failed": 1}
            assert (statistics.began, statistics.steps) == (times + 1, 4 * times + 1)
            assert statistics.success_rate == times / (times + 1)
            assert statistics.busy_s == pytest.approx(sum(one.duration_s for one in told))
            assert 0 < statistics.mean_s <= statistics.longest_s
        everybody = crew.process.executions.statistics
        assert (everybody.began, everybody.over, everybody.silent) == (9, {"completed": 6, "failed": 3}, 0)
        health = crew.process.agents.get_registry_health()
        assert (health.made, health.over) == (9, 9)

    async def test_agent_registry_thread_safety_validation(self, crew: Crew) -> None:
        """Business value: looking after a process from other threads never costs a user their agent."""
        user = await crew.services.user()
        run_id, mark = await crew.held(user)
        agents, contexts = crew.process.agents, [made() for _ in range(8)]

        def live(at: int) -> int:
            context, ended = contexts[at], 0
            for number in range(200):
                one = agents.create_agent_for_user(context, "crew-analyst", accepted=True)
                assert agents.get_user_agent(context.user_id, one.execution_id) is one
                agents.monitor_all_users()
                one.state("active")
                ended += one.end(("completed", "failed")[number % 2])
            return ended

        with ThreadPoolExecutor(max_workers=8) as threads:
            loop = asyncio.get_running_loop()
            ended = await asyncio.gather(*(loop.run_in_executor(threads, live, at) for at in range(8)))
        assert ended == [200] * 8
        health = agents.get_registry_health()
        assert (health.users, health.instances, health.made - health.over) == (1, 1, 1)
        assert crew.process.instance(user, run_id).current == "active"
        GATES[mark].set()
        assert (await crew.ended(user, run_id))[-1]["type"] == "agent_completed"


class TestAgentRegistryPerformanceBenchmarks:
    """Business value: the hundredth user costs what the first one did; `bench/agents.py` says how fast."""

    def test_agent_registry_scaling_characteristics(self) -> None:
        """Business value: what an agent costs does not depend on how many others there are, and it costs nothing once it is over."""
        agents = registry.AgentRegistry([*registry.built_in(), *crew_.AGENTS])
        executing = executions.Executions(agents)

        def of_users(many: int) -> tuple[float, int]:
            """Blocks of memory that one execution takes, and that all of them leave behind."""
            contexts = [made() for _ in range(many)]
            gc.collect()
            before = sys.getallocatedblocks()
            begun = [executing.begin(context, crew_.analyst, context.run_id) for context in contexts for _ in range(10)]
            assert executing.health().executing == agents.get_registry_health().instances == 10 * many
            assert [one.agents for one in agents.monitor_all_users()] == [10] * many
            each = (sys.getallocatedblocks() - before) / (10 * many)
            for one in begun:
                one.end("completed")
            return each, agents.get_registry_health().instances

        of_users(10)
        few, left = of_users(10)
        many, also_left = of_users(200)
        assert (left, also_left) == (0, 0)
        assert many < 1.5 * few
        assert executing.statistics.over == {"completed": 2200}
        assert agents.monitor_all_users() == []
