"""ExecutionEngine and UserExecutionEngine over real services: agents from their first event to their last, and what is kept of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import duration_pb2

from netra import errors, ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from tests.fixtures import agents as crew_
from tests.fixtures.agents import EFFECTS, GATES, MEET, Crew, canaries, of, socket_of, until
from tests.fixtures.sockets import CRITICAL, contiguous, in_legal_order
from tests.fixtures.stack import ROOT
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import types

pytestmark = pytest.mark.real_services
SAMPLE = ROOT / "standalone" / "sample" / "usage.csv"


@pytest.fixture
async def crew(services: Services, tmp_path: Path) -> Crew:
    """All services, with agents of all kinds."""
    await services.all(agents=crew_.AGENTS, tools=crew_.TOOLS, work_dir=tmp_path / "work")
    return Crew(services)


def _pairs(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each call of a tool: how it began and how it ended."""
    ends = {data["tool_call_id"]: data for data in of(events, "tool_completed")}
    return ((data, ends[data["tool_call_id"]]) for data in of(events, "tool_executing"))


class TestExecutionEngineComprehensiveRealServices:
    """Business value: agents do what they were asked for, visibly, for whoever asked, and to an end that can be relied on."""

    async def test_agent_execution_lifecycle_with_websocket_events(self, crew: Crew) -> None:
        """Business value: from request to answer a user sees every step, in order, without a hole, as it happens."""
        user = await crew.services.user()
        await crew.services.gateway()
        async with socket_of(crew.services, user) as socket:
            started = await socket.run("How much could be saved?", agent="crew-analyst", inputs={"numbers": [1000, 2000]})
            events = [event for event in await socket.ended(started["run_id"]) if "seq" in event]
        assert types(events) == [
            "agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed", "agent_thinking", "tool_executing",
            "tool_completed", "message_created", "agent_completed",
        ]  # fmt: skip
        in_legal_order(events)
        contiguous(events)
        assert {(event["user_id"], event["thread_id"]) for event in events} == {(user.user_id, started["thread_id"])}
        result = events[-1]["data"]["result"]
        assert (result["total"], result["savings"], result["request"]) == (3000, 750, "How much could be saved?")
        (told,) = await crew.process.executed(user)
        assert (told.outcome, told.agent_id, told.agent_version, told.steps) == ("completed", "crew-analyst", "1.2.0", 4)
        assert [state for state, _ in told.transitions] == ["created", "active", "completed"]
        await crew.state(user, started["run_id"], pb.RUN_STATE_COMPLETED)

    async def test_multi_user_agent_execution_isolation(self, crew: Crew) -> None:
        """Business value: users whose agents execute side by side share a machine and nothing else."""
        users = [await crew.services.user() for _ in range(6)]
        mark = ids.uuid7()
        MEET[mark] = asyncio.Barrier(len(users))

        async def execute(user: User) -> list[dict[str, Any]]:
            inputs = {"mark": mark, "canary": f"of-{user.user_id}"}
            together = await crew.ended(user, (await crew.start(user, "crew-meeting", inputs=inputs)).run_id)
            alone = await crew.ended(user, (await crew.start(user, "crew-analyst", inputs=inputs)).run_id)
            return together + alone

        for user, events in zip(users, await asyncio.gather(*(execute(user) for user in users)), strict=True):
            assert canaries(events, users) == [user.user_id]
            assert {event["user_id"] for event in events} == {user.user_id}
            assert events[-1]["data"]["result"]["whose"]["user"] == user.user_id
            history = await crew.process.executed(user, 2)
            assert {one.user_id for one in history} == {user.user_id}
            assert {one.run_id for one in history} == {event["run_id"] for event in events}
        engines = [crew.process.of(user) for user in users]
        assert [engine.statistics.began for engine in engines] == [2] * len(users)
        run_id, mark = await crew.held(users[0])
        with pytest.raises(errors.PermissionDenied):
            engines[1].add(crew.process.instance(users[0], run_id))
        GATES[mark].set()
        await crew.ended(users[0], run_id)

    async def test_tool_dispatch_integration_and_coordination(self, crew: Crew) -> None:
        """Business value: an agent's tools are called as it says, at once or in turn, and each call's end is told with its own begin."""
        user = await crew.services.user()
        parts = [[number * 1000.0] * 2 for number in range(1, 6)]
        branching = await crew.ended(user, (await crew.start(user, "crew-branching", inputs={"parts": parts})).run_id)
        calls = list(_pairs(branching))
        assert [begun["tool_name"] for begun, _ in calls] == ["crew.figures"] * 6 + ["crew.whose"]
        for part in parts:
            (over,) = (end for begun, end in calls if begun["parameters"] == {"numbers": part})
            assert (over["status"], over["result"]) == ("success", {"total": sum(part), "savings": sum(part) / 4})
        assert len({begun["tool_call_id"] for begun, _ in calls}) == 7
        # what the child called, it called in its own name and in this run
        names = [event["data"]["agent_name"] for event in branching if event["type"] == "tool_executing"]
        assert names == ["crew-branching"] * 5 + ["crew-analyst"] * 2
        recovering = await crew.ended(user, (await crew.start(user, "crew-recovering")).run_id)
        failed = [end["error"]["code"] for _, end in _pairs(recovering) if "error" in end]
        assert failed == recovering[-1]["data"]["result"]["failures"] == ["UNAVAILABLE", "PERMISSION_DENIED", "NOT_FOUND"]
        assert (branching[-1]["data"]["usage"]["tools"], recovering[-1]["data"]["usage"]["tools"]) == (7, 4)

    async def test_agent_execution_context_management_and_session_preservation(self, crew: Crew) -> None:
        """Business value: a conversation goes on where it was, in the user's own session, and each request has a frame of its own."""
        user = await crew.services.user()
        first = await crew.start(user, "crew-analyst", "The first question.")
        await crew.ended(user, first.run_id)
        others, whose = [], []
        for at in (2, 3):
            others.append(await crew.start(user, "crew-analyst", f"Question {at}.", thread_id=first.thread_id))
            whose.append((await crew.ended(user, others[-1].run_id))[-1]["data"]["result"]["whose"])
        contexts = await crew.contexts(user, thread_id=first.thread_id)
        assert set(contexts) == {run.run_id for run in (first, *others)}
        assert {(each.user_id, each.thread_id) for each in contexts.values()} == {(user.user_id, first.thread_id)}
        assert len({each.session_id for each in contexts.values()}) == 1
        for name in ("context_id", "request_id", "correlation_id"):
            assert len({getattr(each, name) for each in contexts.values()}) == 3
        # a tool is called in the frame of its run
        assert [(each["run"], each["signed_in"]) for each in whose] == [(run.run_id, contexts[run.run_id].session_id) for run in others]
        said = await crew.said(user, first.thread_id)
        assert [content for role, content in said if role == "user"] == ["The first question.", "Question 2.", "Question 3."]
        assert [role for role, _ in said] == ["user", "assistant"] * 3
        history = await crew.process.executed(user, 3)
        assert [one.request_id for one in history] == [contexts[run.run_id].request_id for run in (first, *others)]

        async def closed() -> None:
            while True:
                if not await crew.contexts(user, open=True):
                    return
                await asyncio.sleep(0.01)

        # what was opened for a run is closed with it
        await asyncio.wait_for(closed(), 30)

    async def test_agent_execution_error_handling_and_recovery(self, crew: Crew) -> None:
        """Business value: a failure is told to the user with a number for support and without a secret, and the next request works."""
        user = await crew.services.user()
        failing = await crew.start(user, "crew-failing")
        failed = await crew.ended(user, failing.run_id)
        in_legal_order(failed)
        error = failed[-1]["data"]["error"]
        assert (failed[-1]["type"], error["code"]) == ("agent_failed", "AGENT_FAILED")
        assert error["support_code"] in failed[-1]["data"]["message"]
        assert "secret" not in json.dumps(failed)
        await crew.state(user, failing.run_id, pb.RUN_STATE_FAILED)
        again = await crew.start(user, "crew-recovering", thread_id=failing.thread_id)
        result = (await crew.ended(user, again.run_id))[-1]["data"]["result"]
        assert (result["total"], result["message"]) == (40, "With older figures.")
        assert [one.outcome for one in await crew.process.executed(user, 2)] == ["failed", "completed"]
        health = crew.process.of(user).health()
        assert (health.status, health.executing, health.success_rate) == ("healthy", 0, 0.5)

    async def test_agent_execution_timeout_and_cancellation(self, crew: Crew) -> None:
        """Business value: work that takes too long, or is no longer wanted, ends with all that was done for it."""
        user = await crew.services.user()
        late = crew_.gate()
        slow = (await crew.start(user, "crew-slow", inputs={"mark": late})).run_id
        events = await crew.ended(user, slow)
        assert types(events)[-2:] == ["tool_completed", "agent_timed_out"]
        assert events[-1]["data"]["error"]["code"] == "DEADLINE_EXCEEDED"
        given = crew_.gate()
        asked = await crew.start(user, "crew-waiting", inputs={"mark": given}, deadline=duration_pb2.Duration(nanos=300_000_000))
        assert (await crew.ended(user, asked.run_id))[-1]["type"] == "agent_timed_out"
        run_id, mark = await crew.held(user)
        await crew.cancel(user, run_id)
        events = await crew.ended(user, run_id)
        assert types(events)[-2:] == ["tool_completed", "agent_cancelled"]
        call, (stopped,) = events[-2]["data"], events[-1]["data"]["tools_stopped"]
        assert (call["status"], stopped["tool_call_id"], stopped["confirmed"]) == ("cancelled", call["tool_call_id"], True)
        # a second word changes nothing
        await crew.cancel(user, run_id)
        await crew.state(user, run_id, pb.RUN_STATE_CANCELLED)
        assert [one.outcome for one in await crew.process.executed(user, 3)] == ["timed_out", "timed_out", "cancelled"]
        assert not any(GATES[each].is_set() for each in (late, given, mark))

    async def test_cross_service_agent_execution_coordination(self, crew: Crew) -> None:
        """Business value: whatever service is asked about a request tells of the same user, thread, run and correlation."""
        user = await crew.services.user()
        await crew.services.gateway()
        async with socket_of(crew.services, user) as socket:
            started = await socket.run(agent="crew-analyst")
            shown = [event for event in await socket.ended(started["run_id"]) if "seq" in event]
        recorded = await crew.ended(user, started["run_id"])
        assert [event["event_id"] for event in shown] == [event["event_id"] for event in recorded]
        run = await crew.state(user, started["run_id"], pb.RUN_STATE_COMPLETED)
        context = (await crew.contexts(user))[started["run_id"]]
        (executed,) = await crew.process.executed(user)
        assert {event["correlation_id"] for event in recorded} == {run.correlation_id}
        assert run.correlation_id == context.correlation_id == executed.correlation_id
        assert run.thread_id == context.thread_id == executed.thread_id == recorded[0]["thread_id"]
        assert {run.user_id, context.user_id, executed.user_id, recorded[0]["user_id"]} == {user.user_id}
        # the thread has what was told, under the same ids
        request = context_pb2.ListMessagesRequest(thread_id=run.thread_id)
        messages = (await crew.context.ListMessages(request, metadata=user.bearer, timeout=20)).messages
        told = [(data["message_id"], data["role"]) for data in of(recorded, "message_created")]
        assert [(message.message_id, message.role) for message in messages] == told
        assert [stage.name for stage in run.stages][:3] == ["message_received", "message_validated", "message_persisted"]

    async def test_agent_execution_performance_monitoring_and_resource_tracking(self, crew: Crew) -> None:
        """Business value: what each execution took is told with its result, and adds up."""
        user = await crew.services.user()
        usages = []
        for _ in range(3):
            events = await crew.ended(user, (await crew.start(user, "crew-analyst")).run_id)
            ended = events[-1]["data"]
            spent = [data["execution_time_ms"] for data in of(events, "tool_completed")]
            assert ended["execution_time_ms"] >= max(spent) >= 0
            usages.append((ended["usage"]["steps"], ended["usage"]["tools"]))
        assert usages == [(4, 2)] * 3
        run_id, mark = await crew.held(user)
        engine = crew.process.of(user)
        assert (engine.health().states, engine.statistics.began) == ({"active": 1}, 4)
        GATES[mark].set()
        await crew.ended(user, run_id)
        history = await crew.process.executed(user, 4)
        assert engine.statistics.steps == sum(one.steps for one in history) == 3 * 4 + 2
        assert engine.statistics.busy_s == pytest.approx(sum(one.duration_s for one in history))
        assert engine.statistics.longest_s == max(one.duration_s for one in history)
        assert [one.ended_at > one.created_at for one in history] == [True] * 4
        assert engine.health().states == {}
        await until(lambda: crew.process.dispatchers.live_of(user.user_id) == 0)

    async def test_business_critical_agent_execution_workflows(self, crew: Crew) -> None:
        """Business value: what the product is bought for: a usage log goes in, savings with actions, a chart and a report come out."""
        user, content = await crew.services.user(), SAMPLE.read_bytes()
        header = context_pb2.ArtifactHeader(request_id=ids.uuid7(), name="usage.csv", media_type="text/csv", size=len(content))
        parts = [context_pb2.PutArtifactRequest(header=header)]
        parts += [context_pb2.PutArtifactRequest(data=content[at : at + 65_536]) for at in range(0, len(content), 65_536)]
        artifact_id = (await crew.context.PutArtifact(iter(parts), metadata=user.bearer)).artifact.artifact_id
        run = await crew.start(user, "", "Where does the money go?", inputs={"artifact_id": artifact_id})
        events = await crew.ended(user, run.run_id)
        in_legal_order(events)
        assert set(CRITICAL) <= set(types(events))
        result = events[-1]["data"]["result"]
        assert result["agent"] == "spend-analyst"
        assert result["total_cost"] == pytest.approx(sum(row["cost"] for row in result["cost_breakdown"]["by_model"]))
        assert result["usage_profile"]["requests"] == content.count(b"\n") - 1
        savings = [one["monthly_saving"] for one in result["actions"]]
        assert (savings, savings[0] > 0) == (sorted(savings, reverse=True), True)
        for kept in (result["chart"], result["report"]):
            request = context_pb2.GetArtifactRequest(artifact_id=kept["artifact_id"])
            assert b"".join([part.data async for part in crew.context.GetArtifact(request, metadata=user.bearer)])
        agents = {event["data"]["agent_name"] for event in events if "agent_name" in event["data"]}
        assert {"supervisor", "spend-analyst", "triage", "data", "optimization", "actions", "reporting"} <= agents
        # all of them in the one execution
        (executed,) = await crew.process.executed(user)
        assert (executed.agent_id, executed.outcome) == ("supervisor", "completed")

    async def test_agent_state_management_during_complex_multistep_executions(self, crew: Crew) -> None:
        """Business value: an agent that waits for a person for days knows all it knew before, and does nothing a second time."""
        user, mark = await crew.services.user(), crew_.gate()
        run_id = (await crew.start(user, "crew-interview", inputs={"mark": mark})).run_id
        waiting = await crew.state(user, run_id, pb.RUN_STATE_SUSPENDED)
        assert waiting.waits_for == "message"
        await crew.process.empty()
        assert EFFECTS[mark] == [f"before the question {user.user_id}"]
        await crew.send(user, run_id, "Thirty days.")
        events = await crew.ended(user, run_id)
        in_legal_order(events)
        contiguous(events)
        kinds = types(events)
        assert [kind for kind in kinds if kind in ("agent_suspended", "agent_resumed")] == ["agent_suspended", "agent_resumed"]
        assert of(events, "agent_suspended")[0]["waits_for"] == of(events, "agent_resumed")[0]["reason"] == "message"
        # what was done before is told once, and was done once
        assert len(of(events, "tool_executing")) == len(of(events, "tool_completed")) == 4
        assert EFFECTS[mark] == [f"{when} {user.user_id}" for when in ("before the question", "after the answer")]
        assert events[-1]["data"]["result"] == {
            "message": "You said: Thirty days.", "noted": [1, 2], "totals": [1.0, 5.0], "by": user.user_id,
        }  # fmt: skip
        assert [one.outcome for one in await crew.process.executed(user, 2)] == ["suspended", "completed"]
        assert crew.process.of(user).statistics.success_rate == 1
