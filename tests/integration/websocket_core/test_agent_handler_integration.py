"""A frame from a socket becomes an execution of an agent and comes back as events: whole, of one user, through errors and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from chassis import status
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from tests.fixtures import agents as crew_
from tests.fixtures import business, sockets, web
from tests.fixtures.agents import MEET, Crew, canaries, of, socket_of, until
from tests.fixtures.sockets import CRITICAL, Socket, contiguous, in_legal_order
from tests.fixtures.stack import ROOT, System
from tests.fixtures.storage import Services
from tests.fixtures.users import NewUser, User
from tests.integration.conftest import types

pytestmark = pytest.mark.real_services
SAMPLE = ROOT / "standalone" / "sample" / "usage.csv"
# who executes the run first, then what it needs
KILLED = ("dispatcher", "events", "context", "auth", "gateway")


@pytest.fixture
async def crew(services: Services, tmp_path: Path) -> Crew:
    """All services with their edge, and agents of all kinds."""
    await services.all(agents=crew_.AGENTS, tools=crew_.TOOLS, work_dir=tmp_path / "work")
    await services.gateway()
    return Crew(services)


async def _uploaded(crew: Crew, user: User) -> str:
    url = f"http://127.0.0.1:{crew.services.ports['gateway']}"
    async with web.client(base_url=url, headers={"Authorization": f"Bearer {user.token}"}, trust_env=False, timeout=20) as client:
        answer = await client.post("/v1/artifacts", params={"name": "usage.csv"}, content=SAMPLE.read_bytes())
    assert answer.status_code == 201, answer.text
    return str(answer.json()["artifact_id"])


class TestAgentHandlerIntegration:
    """Business value: whoever asks over a socket gets their answer, sees how it comes about, and gets nothing of anybody else's."""

    async def test_complete_agent_execution_flow(self, crew: Crew) -> None:
        """Business value: a question and a usage log go in; all critical events, the answer, its files and the conversation come out."""
        user = await crew.services.user()
        artifact_id = await _uploaded(crew, user)
        async with socket_of(crew.services, user) as socket:
            started = await socket.run("Where does the money go?", agent="supervisor", inputs={"artifact_id": artifact_id})
            run_id, thread_id = started["run_id"], started["thread_id"]
            events = [event for event in await socket.ended(run_id) if "seq" in event]
        first = {kind: types(events).index(kind) for kind in CRITICAL}
        assert sorted(CRITICAL, key=first.__getitem__) == CRITICAL
        assert {(event["user_id"], event["thread_id"], event["run_id"]) for event in events} == {(user.user_id, thread_id, run_id)}
        business.assert_business_value_delivered(events, "cost_savings", "automation", "insights", "user_experience")
        # what the socket showed is what was recorded, and what was answered is in the conversation
        assert events == await crew.ended(user, run_id)
        run = await crew.state(user, run_id, pb.RUN_STATE_COMPLETED)
        assert (run.thread_id, run.agent, run.user_id) == (thread_id, "supervisor", user.user_id)
        result = events[-1]["data"]["result"]
        assert await crew.said(user, thread_id) == [("user", "Where does the money go?"), ("assistant", result["message"])]
        for kept in (result["chart"], result["report"]):
            request = context_pb2.GetArtifactRequest(artifact_id=kept["artifact_id"])
            assert b"".join([part.data async for part in crew.context.GetArtifact(request, metadata=user.bearer)])
        # and a run without one of these would not pass
        worthless = copy.deepcopy(events)
        worthless[-1]["data"]["result"] |= {"combined_monthly_saving": 0, "actions": [], "total_cost": 0}
        for category, given in (
            ("cost_savings", worthless), ("automation", worthless), ("insights", worthless),
            ("user_experience", [event for event in events if event["type"] != "agent_thinking"]),
        ):  # fmt: skip
            with pytest.raises(AssertionError):
                business.assert_business_value_delivered(given, category)

    async def test_multi_user_concurrent_execution(self, crew: Crew) -> None:
        """Business value: many work at the same moment, and each of them works alone."""
        users = [await crew.services.user() for _ in range(6)]
        # nobody goes on before all of them execute
        MEET[mark := ids.uuid7()] = asyncio.Barrier(len(users))

        async def execute(user: User, socket: Socket) -> list[dict[str, Any]]:
            started = await socket.run(agent="crew-meeting", inputs={"mark": mark, "canary": f"of-{user.user_id}"})
            await socket.ended(started["run_id"])
            return socket.events

        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(socket_of(crew.services, user)) for user in users]
            found = await asyncio.gather(*map(execute, users, opened))
        for user, events in zip(users, found, strict=True):
            in_legal_order(events)
            contiguous(events)
            assert events[-1]["data"]["result"] == {
                "message": "All were there.", "canary": f"of-{user.user_id}", "user": user.user_id,
            }  # fmt: skip
            # everything that came over this socket is this user's
            assert {event["user_id"] for event in events} == {user.user_id}
            assert canaries(events, users) == [user.user_id]
            assert len({event["run_id"] for event in events}) == 1
        for user, events in zip(users, found, strict=True):
            listed = await crew.dispatcher.ListRuns(pb.ListRunsRequest(), metadata=user.bearer, timeout=20)
            assert [run.run_id for run in listed.runs] == [events[0]["run_id"]]

    async def test_supervisor_isolation_concurrent_users(self, crew: Crew) -> None:
        """Business value: each request has a supervisor of its own; what one is told, no other one knows."""
        users = [await crew.services.user() for _ in range(5)]
        texts = [f"Rivers carry of-{user.user_id} boats." for user in users]
        started = [
            await crew.start(user, "", text, inputs={"pace_s": 2, "canary": f"of-{user.user_id}"})
            for user, text in zip(users, texts, strict=True)
        ]
        # an instance for each request, in the engine of its user, with the context of its user
        await until(lambda: all(crew.process.agents.user_agents(user.user_id) for user in users))
        made = [crew.process.instance(user, run.run_id) for user, run in zip(users, started, strict=True)]
        assert len({id(one) for one in made} | {id(one.context) for one in made}) == 2 * len(users)
        for user, run, instance in zip(users, started, made, strict=True):
            assert (instance.spec.name, instance.user_id, instance.context.run_id) == ("supervisor", user.user_id, run.run_id)
            assert [one.execution_id for one in crew.process.of(user).executing] == [instance.execution_id]
        for at, (user, run) in enumerate(zip(users, started, strict=True)):
            events = await crew.ended(user, run.run_id)
            assert (events[-1]["type"], events[-1]["data"]["result"]["agent"]) == ("agent_completed", "text-analyst")
            assert canaries(events, users) == [user.user_id]
            assert (await crew.said(user, run.thread_id))[0] == ("user", texts[at])
        # a supervisor that ends takes nothing of the others' with it, and leaves nothing
        await crew.process.empty()
        assert [len(await crew.process.executed(user)) for user in users] == [1] * len(users)

    async def test_agent_workflow_with_tool_notifications(self, crew: Crew) -> None:
        """Business value: a user sees each tool that works for them begin and end, also one that fails; nobody else sees it."""
        user, other = await crew.services.user(), await crew.services.user()
        async with socket_of(crew.services, user) as socket, socket_of(crew.services, other) as foreign:
            run_id = (await socket.run("How much?", agent="crew-recovering"))["run_id"]
            events = [event for event in await socket.ended(run_id) if "seq" in event]
            await foreign.ask("PING")
            assert [frame["type"] for frame in foreign.frames] == ["connected", "pong"]
        in_legal_order(events)
        contiguous(events)
        begun = [data["tool_name"] for data in of(events, "tool_executing")]
        over = {data["tool_name"]: data for data in of(events, "tool_completed")}
        assert begun[-1] == "crew.figures"
        assert {"crew.broken", "crew.figures"} <= set(begun) == set(over)
        assert (over["crew.figures"]["status"], over["crew.figures"]["result"]["total"]) == ("success", 40.0)
        assert (over["crew.broken"]["status"], over["crew.broken"]["error"]["code"]) == ("error", "UNAVAILABLE")
        assert events[-1]["data"]["result"]["failures"] == ["UNAVAILABLE", "PERMISSION_DENIED", "NOT_FOUND"]

    async def test_error_propagation_across_boundaries(self, crew: Crew) -> None:
        """Business value: what went wrong deep inside comes out as what it is, under one number to ask for, and tells no secrets."""
        user, stranger = await crew.services.user(), await crew.services.user()
        thread_id = (await crew.start(stranger, "crew-analyst")).thread_id
        number = ids.CorrelationId.new()
        # refused in context, two services behind the edge: over gRPC it is the class that was raised there
        wanted = pb.StartRunRequest(request_id=ids.uuid7(), agent="crew-analyst", user_request="Mine?", thread_id=thread_id)
        told = await _raised(crew.dispatcher.StartRun(wanted, metadata=(*user.bearer, ("x-correlation-id", number)), timeout=20))
        assert type(status.from_rpc(told)) is errors.NotFound
        assert _info(told)["correlation_id"] == number
        # and over the socket, and HTTP, its code with the same words
        async with socket_of(crew.services, user) as socket:
            frame = await socket.ask("START_AGENT", {"agent": "crew-analyst", "user_request": "Mine?"}, thread_id=thread_id)
        url = f"http://127.0.0.1:{crew.services.ports['gateway']}"
        async with web.client(base_url=url, trust_env=False, timeout=20) as client:
            body = {"agent": "crew-analyst", "user_request": "Mine?", "thread_id": thread_id}
            headers = {"Authorization": f"Bearer {user.token}", "X-Correlation-Id": number}
            answer = await client.post("/v1/runs", json=body, headers=headers)
        problem = answer.json()
        assert (frame["type"], frame["code"], answer.status_code, problem["code"]) == ("error", "NOT_FOUND", 404, "NOT_FOUND")
        assert frame["message"] == problem["detail"] == told.details()
        assert problem["correlation_id"] == number
        # a frame has a number of its own
        assert ids.CorrelationId(frame["correlation_id"]) != number
        # what an agent raises is nobody's business but the log's: its user gets a number
        failing = await crew.start(user, "crew-failing")
        events = await crew.ended(user, failing.run_id)
        error = events[-1]["data"]["error"]
        assert (events[-1]["type"], error["code"], bool(error["support_code"])) == ("agent_failed", "AGENT_FAILED", True)
        assert "a secret detail" not in json.dumps(events)
        # one that is raised by a tool is caught by the agent as what it was
        assert (await crew.result(user, "crew-recovering"))["failures"][0] == "UNAVAILABLE"

    async def test_database_state_persistence(self, system: System, new_user: NewUser) -> None:
        """Business value: whatever dies while a run is under way, what the user was told stays true, and the run comes to its end."""
        user = await asyncio.to_thread(new_user)
        async with sockets.opened(system, user) as socket:
            started = await socket.run("Rivers carry boats.", inputs={"pace_s": 4})
            run_id, thread_id = started["run_id"], started["thread_id"]
            before = [await socket.until(type="agent_started", run_id=run_id)]
            before += [await socket.until(type="agent_thinking", run_id=run_id)]
        for name in KILLED:
            await asyncio.to_thread(system.kill, name)
            await asyncio.to_thread(system.restarted, name)
        async with sockets.opened(system, user, "resume.0") as socket:
            events = [event for event in await socket.ended(run_id) if "seq" in event]
        contiguous(events)
        in_legal_order(events)
        assert events[-1]["type"] == "agent_completed", events[-1]
        assert [event for event in events if event["event_id"] in {one["event_id"] for one in before}] == before
        assert [data["tool_name"] for data in of(events, "tool_executing")] == ["text_statistics", "text_keywords"]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['dispatcher']}") as to_dispatcher,
            grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['context']}") as to_context,
        ):
            dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(to_dispatcher)
            context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to_context)
            async with asyncio.timeout(30):
                while True:
                    request = pb.GetRunRequest(run_id=run_id)
                    run = (await dispatcher.GetRun(request, metadata=user.bearer, wait_for_ready=True)).run
                    if run.state == pb.RUN_STATE_COMPLETED:
                        break
                    await asyncio.sleep(0.05)
            listing = context_pb2.ListMessagesRequest(thread_id=thread_id)
            said = (await context.ListMessages(listing, metadata=user.bearer, wait_for_ready=True)).messages
        assert [(one.role, one.content) for one in said] == [
            ("user", "Rivers carry boats."), ("assistant", events[-1]["data"]["result"]["message"]),
        ]  # fmt: skip


async def _raised(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def _info(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """What the error says of itself beside its code."""
    rich, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()  # type: ignore[arg-type]
    assert rich is not None
    assert any(detail.Unpack(info) for detail in rich.details)
    return dict(info.metadata)
