"""Tools from their declaration to their result, over real services."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from netra import errors, ids
from netra.agent import Turn, agent
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.tool import ToolContext, from_object, tool
from services.dispatcher.tools import demo
from tests.fixtures.dispatchers import House, house
from tests.fixtures.policies import Administrator
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs, types

GATES: dict[str, asyncio.Event] = {}
CAME: dict[str, asyncio.Semaphore] = {}
STOPPED: list[str] = []


class MockAnalysisTool:
    """Analyses what was spent; always with the same result."""

    name = "mock_analysis"

    async def arun(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Analyses."""
        return {
            "total_cost": 15420.50,
            "optimization_opportunities": [{"type": "instance_sizing", "potential_savings": 2500.00}],
            "cost_breakdown": {"compute": 8500.00, "storage": 3200.00, "network": 3720.50},
            "asked": kwargs,
        }


@tool(tags=("sums",), category="figures", idempotent=True)
async def add_up(numbers: list[float]) -> float:
    """Adds up numbers.

    Args:
        numbers: What is added up.
    """
    return sum(numbers)


@tool(name="admin.look", min_role="admin")
async def admin_look() -> str:
    """Looks at what is everybody's."""
    return "all"


@agent("adding")
async def adding(turn: Turn) -> list[object]:
    """Calls what it knows by name."""
    return [await turn.tool("add_up", numbers=[1, 2.5]), (await turn.tool("mock_analysis", period="month"))["total_cost"]]


@tool(name="place.write", timeout_s=30)
async def place_write(context: ToolContext, text: str) -> dict[str, Any]:
    """Writes to the folder of the run, and tells for whom and what is there."""
    (context.workspace / text).write_text(text)
    there = sorted(path.name for path in context.workspace.iterdir() if path.is_file())
    return {"user": context.context.user_id, "run": context.context.run_id, "there": there}


@tool(name="place.hang", timeout_s=60)
async def place_hang(context: ToolContext, mark: str) -> str:
    """Waits until it is let go; keeps who came and who was stopped."""
    context.progress(0.1)
    CAME[mark].release()
    try:
        await GATES[mark].wait()
    except asyncio.CancelledError:
        STOPPED.append(mark)
        raise
    return "done"


@tool(name="place.large", timeout_s=60)
async def place_large(size: int) -> Any:
    """Returns something of this size."""
    return {"rows": ["x" * 1000] * (size // 1000)}


@tool(name="place.odd", timeout_s=60)
async def place_odd(what: str) -> dict[str, int]:
    """Returns something else than it declares."""
    return {"lie": "no number", "unwritable": {1}, "fine": {"n": 1}}[what]  # type: ignore[return-value]


@tool(name="place.plain", timeout_s=60)
async def place_plain(value: Any) -> Any:
    """Returns what it is given."""
    return value


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[House]:
    """A process with the tools above, and nothing outside of it."""
    tools = [place_write, place_hang, place_large, place_odd, place_plain, admin_look, *demo.BUILT_IN]
    async with house(tmp_path, tools) as made:
        yield made


def gate(name: str) -> str:
    """What calls of one test wait at."""
    GATES[name], CAME[name] = asyncio.Event(), asyncio.Semaphore(0)
    return name


@pytest.mark.real_services
class TestUnifiedToolDispatcherComprehensive:
    """The lives of tools."""

    async def test_tool_registration_and_discovery_mechanisms(self, services: Services) -> None:
        analysis = from_object(MockAnalysisTool(), tags=("sums",))
        await services.all(agents=[adding], tools=[add_up, analysis, admin_look])
        runs, user, boss = Runs(services), await services.user(), await services.user(role="admin", tier="business")
        operator = (await Administrator(services).signed_in()).bearer
        # from outside, beside what functions, objects and entry points declare
        far = pb.Tool(name="far.away", version="1.0.0", description="Elsewhere.", input_schema=b'{"type":"object"}', tags=["sums"])
        await runs.dispatcher.RegisterTool(pb.RegisterToolRequest(tool=far), metadata=operator, timeout=20)
        found = await runs.dispatcher.ListTools(pb.ListToolsRequest(tag="sums"), metadata=user.bearer, timeout=20)
        assert [(one.name, one.enforcement) for one in found.tools] == [
            ("add_up", "trusted"), ("far.away", "remote"), ("mock_analysis", "trusted"),
        ]  # fmt: skip
        schema = json.loads(found.tools[0].input_schema)
        assert schema["properties"]["numbers"]["description"] == "What is added up."
        # what is found can be called, by the user themselves and by an agent
        arguments = json.dumps({"period": "day"}).encode()
        asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="mock_analysis", arguments=arguments)
        answer = await runs.dispatcher.ExecuteTool(asked, metadata=user.bearer, timeout=20)
        assert json.loads(answer.result) | {"total_cost": 15420.50, "asked": {"period": "day"}} == json.loads(answer.result)
        events = await runs.ended(user, (await runs.start(user, "adding")).run_id)
        assert events[-1]["data"]["result"] == [3.5, 15420.50]
        # what may not be called is not found
        for who, wanted in ((user, []), (boss, ["admin.look"])):
            shown = await runs.dispatcher.ListTools(pb.ListToolsRequest(text="admin.look"), metadata=who.bearer, timeout=20)
            assert [one.name for one in shown.tools] == wanted

    async def test_multi_user_tool_execution_isolation_and_security(self, place: House) -> None:
        people = [place.person() for _ in range(20)]

        async def one(number: int) -> dict[str, Any]:
            async with place.open(people[number], strategy="isolated" if number % 2 else "default") as tools:
                first, second = [(await tools.execute("place.write", {"text": f"{number}-{part}"})).unwrap() for part in "ab"]
                # an isolated call shares its folder with no other one, be it of the same user
                assert first["there"] == [f"{number}-a"]
                assert second["there"] == ([f"{number}-b"] if number % 2 else [f"{number}-a", f"{number}-b"])
                return dict(second)

        found = await asyncio.gather(*(one(number) for number in range(20)))
        assert [one["user"] for one in found] == [who.context.user_id for who in people]
        assert [len(who.heard.events) for who in people] == [4] * 20
        assert not any(who.files.folder.exists() for who in people)

    async def test_tool_execution_lifecycle_with_websocket_events(self, place: House) -> None:
        who, mark = place.person(), gate("lifecycle")
        async with place.open(who) as tools, asyncio.TaskGroup() as group:
            call = group.create_task(tools.execute("place.hang", {"mark": mark}))
            await CAME[mark].acquire()
            assert who.heard.types() == ["tool_executing", "tool_progress"]
            assert tools.busy
            GATES[mark].set()
            outcome = await call
            assert not tools.busy
        assert who.heard.types() == ["tool_executing", "tool_progress", "tool_completed"]
        assert (outcome.status, outcome.attempts, dict(outcome.enforcement)) == ("success", 1, {"tier": "trusted", "backend": "asyncio"})
        assert outcome.execution_time_ms > 0

    async def test_websocket_integration_real_time_status_updates(self, place: House) -> None:
        """What is shown of a call comes while it is under way, and nothing after its end."""
        kept: list[ToolContext] = []

        @tool(name="place.progress")
        async def progress(context: ToolContext) -> None:
            """Shows how far it is, faster than anybody can look."""
            kept.append(context)
            for step in range(101):
                context.progress(step / 100, f"{step} of 100")
            for wrong in (-0.1, 1.1, float("nan")):
                with pytest.raises(ValueError, match="from 0 to 1"):
                    context.progress(wrong)

        place.dispatchers.tools.register(progress)
        who = place.person()
        async with place.open(who) as tools:
            assert (await tools.execute("place.progress", {})).status == "success"
            kept[0].progress(1)
        shown = [event["progress"] for event in who.heard.events if event["type"] == "tool_progress"]
        assert (shown[0], shown[-1]) == (0.0, 100.0)
        assert len(shown) < 20
        assert who.heard.types()[-1] == "tool_completed"

    async def test_error_handling_and_recovery_during_tool_execution(self, place: House) -> None:
        who = place.person()
        cases: Sequence[tuple[str, dict[str, Any], str]] = [
            ("place.none", {}, "NOT_FOUND"), ("place.odd", {"what": "lie"}, "TOOL_FAILED"), ("place.odd", {"what": "none"}, "TOOL_FAILED"),
            ("place.odd", {}, "INVALID_PAYLOAD"), ("place.odd", {"what": "fine", "more": 1}, "INVALID_PAYLOAD"),
            ("place.plain", {"value": float("nan")}, "INVALID_PAYLOAD"), ("place.plain", {"value": "x" * 300_000}, "FRAME_TOO_LARGE"),
            ("place.plain", {"value": {1, 2}}, "INVALID_PAYLOAD"), ("admin.look", {}, "PERMISSION_DENIED"),
        ]  # fmt: skip
        async with place.open(who) as tools:
            for name, arguments, code in cases:
                outcome = await tools.execute(name, arguments)
                assert (outcome.error and outcome.error.code, outcome.result) == (code, None), name
                with pytest.raises(errors.NetraError):
                    outcome.unwrap()
            # none of it is in the way of what comes next
            assert (await tools.execute("place.odd", {"what": "fine"})).unwrap() == {"n": 1}
        who.heard.pairs()

    async def test_tool_execution_timeout_and_cancellation_scenarios(self, place: House) -> None:
        who, mark = place.person(), gate("stopped")
        async with place.open(who) as tools:
            assert (await tools.execute("place.hang", {"mark": mark}, timeout_s=0.02)).status == "timeout"
            assert STOPPED.count(mark) == 1
            call = asyncio.get_running_loop().create_task(tools.execute("place.hang", {"mark": mark}))
            for _ in range(2):
                await CAME[mark].acquire()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            # told after it has gone, as confirmed
            assert STOPPED.count(mark) == 2
            assert [(one.confirmed, one.tool_call_id) for one in tools.stopped] == [(True, who.heard.events[-1]["id"])]
            assert who.heard.events[-1]["status"] == "cancelled"
        who.heard.pairs()

    async def test_concurrent_tool_execution_patterns_and_resource_management(self, place: House) -> None:
        who, mark = place.person(), gate("many")
        async with place.open(who) as tools, asyncio.TaskGroup() as group:
            calls = [group.create_task(tools.execute("place.hang", {"mark": mark})) for _ in range(30)]
            for _ in calls:
                await CAME[mark].acquire()
            assert (place.dispatchers.running, place.dispatchers.live_of(who.context.user_id)) == (30, 1)
            GATES[mark].set()
            await asyncio.gather(*calls)
            assert tools.metrics().tools_executed == tools.metrics().successful_executions == 30
            assert place.dispatchers.running == 0
        who.heard.pairs()

    async def test_tool_execution_context_and_user_session_management(self, place: House) -> None:
        """Two contexts of one user are two: each has its own folder, events and end."""
        one = place.person()
        other = place.person(of=one.context.user_id)
        async with place.open(other) as theirs:
            async with place.open(one) as mine:
                first = (await mine.execute("place.write", {"text": "a"})).unwrap()
                second = (await theirs.execute("place.write", {"text": "b"})).unwrap()
            with pytest.raises(errors.FailedPrecondition):
                await mine.execute("place.write", {"text": "c"})
            third = (await theirs.execute("place.write", {"text": "d"})).unwrap()
        assert (first["user"], first["run"]) == (one.context.user_id, one.context.run_id)
        assert (second["user"], second["run"]) == (one.context.user_id, other.context.run_id)
        assert (first["there"], second["there"], third["there"]) == (["a"], ["b"], ["b", "d"])

    async def test_cross_service_tool_dispatch_coordination(self, services: Services) -> None:
        """A call by RPC: permitted by auth, in a context of context, in the record of events, and answered once per request."""
        await services.all(tools=[place_plain, place_large])
        runs, user = Runs(services), await services.user()
        asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="place.plain", arguments=b'{"value":[1,"a"]}')
        answers = [await runs.dispatcher.ExecuteTool(asked, metadata=user.bearer, wait_for_ready=True, timeout=20) for _ in range(2)]
        assert answers[0] == answers[1]
        assert (json.loads(answers[0].result), answers[0].attempts, answers[0].answered_by) == ([1, "a"], 1, "")
        events = await runs.ended(user, answers[0].run_id)
        assert types(events) == ["tool_executing", "tool_completed"]
        assert {event["user_id"] for event in events} == {user.user_id}
        # what is large is an artifact of the user, in the service of files
        asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="place.large", arguments=b'{"size":400000}')
        large = await runs.dispatcher.ExecuteTool(asked, metadata=user.bearer, timeout=20)
        assert (large.status, large.result, large.result_ref.bytes > 256 * 1024) == ("success", b"", True)
        assert large.preview.startswith('{"rows":["xxx')

    async def test_tool_execution_monitoring_and_performance_tracking(self, place: House) -> None:
        who = place.person()
        async with place.open(who) as tools:
            before = tools.metrics()
            assert (before.tools_executed, before.last_execution_time) == (0, None)
            for number in range(200):
                await tools.execute("place.plain" if number % 4 else "place.none", {"value": number})
            after = tools.metrics()
        assert (after.tools_executed, after.successful_executions, after.failed_executions) == (200, 150, 50)
        assert after.websocket_events_sent == len(who.heard.events) == 400
        told = sum(event["outcome"].execution_time_ms for event in who.heard.events if event["type"] == "tool_completed")
        assert after.total_execution_time_ms == pytest.approx(told, abs=0.01)
        assert (after.dispatcher_id, after.user_id) == (before.dispatcher_id, who.context.user_id)

    async def test_business_critical_tool_workflows_for_agent_execution(self, place: House) -> None:
        """The demo triple has exactly its fields, and what it is worth can be told."""
        who = place.person()
        async with place.open(who) as tools:
            found = (await tools.execute("demo_analysis", {"anything": [1]})).unwrap()
            advised = (await tools.execute("demo_optimization", {"analysis": found})).unwrap()
            done = (await tools.execute("demo_action", {"recommendations": advised["recommendations"]})).unwrap()
        assert set(found) == {"total_cost", "optimization_opportunities", "cost_breakdown"}
        assert (found["total_cost"], sum(found["cost_breakdown"].values())) == (15420.50, 15420.50)
        # cost savings, automation, insights
        assert sum(one["potential_savings"] for one in found["optimization_opportunities"]) == advised["total_savings"] > 0
        assert all(action["automated"] for action in done["actions"])
        assert done["changed"] is False

    async def test_tool_execution_security_and_authorization_validation(self, place: House) -> None:
        who, reader = place.person(), place.person("readonly")
        async with place.open(who) as tools, place.open(reader) as none:
            assert (await none.execute("place.plain", {"value": 1})).status == "denied"
            assert none.discover().tools == []
            assert "admin.look" not in [found.spec.name for found in tools.discover().tools]
            # what is refused is counted, told and on record, and costs nothing
            assert (none.metrics().permission_denials, none.metrics().failed_executions) == (1, 1)
            assert place.counted.asked == []
        assert await place.recorded() == ["tool place.plain: permission_denied, tools:execute"]

    async def test_tool_execution_result_handling_and_serialization(self, place: House) -> None:
        who = place.person()
        values: list[Any] = [
            None,
            True,
            0,
            -1.5,
            "",
            "ü\u2028\U0001f600",
            [],
            {},
            {"a": [1, {"b": None}]},
            "x" * 200_000,
            2**63,
            {"__proto__": {}},
        ]
        async with place.open(who) as tools:
            for value in values:
                assert (await tools.execute("place.plain", {"value": value})).unwrap() == value
            # what is larger than an event bears needs a place to be kept: without one it is an error, and not cut
            large = await tools.execute("place.large", {"size": 400_000})
            assert (large.error and large.error.code, large.result) == ("UNAVAILABLE", None)

    async def test_integration_with_execution_engine_and_agent_registry(self, services: Services) -> None:
        """An agent's calls are made by a dispatcher of its run, which is gone with it."""
        await services.all(agents=[adding], tools=[add_up, from_object(MockAnalysisTool())])
        runs, user = Runs(services), await services.user()
        events = await runs.ended(user, (await runs.start(user, "adding")).run_id)
        assert [event["data"]["tool_name"] for event in events if event["type"] == "tool_completed"] == ["add_up", "mock_analysis"]
        assert events[-1]["data"]["usage"]["tools"] == 2
