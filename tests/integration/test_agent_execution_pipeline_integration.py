"""The pipeline of an agent's execution: what is stored of it, for whom, in which session, and what an error leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chassis import postgres
from netra import errors, ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context import UserExecutionContext
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher.settings import DispatcherSettings
from standalone import prepare
from tests.fixtures import agents as crew_
from tests.fixtures.agents import EFFECTS, GATES, MEET, Crew, canaries, of
from tests.fixtures.sockets import contiguous
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import types

pytestmark = pytest.mark.real_services


class Pipeline(Crew):
    """All services, and the database below them."""

    def __init__(self, services: Services, admin_url: str) -> None:
        super().__init__(services)
        self._admin_url = admin_url

    async def rows(self, query: str, *arguments: object) -> Sequence[postgres.Row]:
        """What the superuser sees."""
        async with postgres.connection(self._admin_url) as admin:
            return await admin.fetch(query, *arguments)

    async def login(self, user: User) -> User:
        """Another session of a user."""
        stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self.services.channel("auth"))
        grant = auth_pb2.PasswordGrant(email=user.email, password=user.password)
        tokens = (await stub.IssueToken(auth_pb2.IssueTokenRequest(password=grant))).tokens
        return User(user.user_id, user.email, user.password, tokens.access_token, tokens.refresh_token)

    async def end_others(self, user: User) -> None:
        """End the user's other sessions with all that was begun in them."""
        stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self.services.channel("auth"))
        request = auth_pb2.ChangePasswordRequest(current_password=user.password, new_password="another good password", cancel_runs=True)
        await stub.ChangePassword(request, metadata=user.bearer)


@pytest.fixture
async def pipeline(services: Services, stores: Standalone, database: str, tmp_path: Path) -> Pipeline:
    """All services, with agents of all kinds."""
    await services.all(agents=crew_.AGENTS, tools=crew_.TOOLS, work_dir=tmp_path / "work")
    return Pipeline(services, prepare.on_database(stores.postgres_admin_url, database))


class TestAgentExecutionPipelineIntegration:
    """Business value: what an agent did for a user is kept, is theirs, and is whole: also when something went wrong on the way."""

    async def test_agent_execution_with_database_persistence(self, pipeline: Pipeline) -> None:
        """Business value: an answer that was given is there tomorrow, from every process, with all that led to it."""
        user = await pipeline.services.user()
        started = await pipeline.start(user, "crew-analyst", "How much?", inputs={"numbers": [8.0]})
        events = await pipeline.ended(user, started.run_id)
        await pipeline.state(user, started.run_id, pb.RUN_STATE_COMPLETED)
        (row,) = await pipeline.rows(
            "SELECT user_id, thread_id, agent, agent_version, state, correlation_id, started_at, ended_at FROM dispatcher.runs"
            " WHERE run_id = $1", started.run_id,
        )  # fmt: skip
        assert (str(row["user_id"]), str(row["thread_id"]), row["state"]) == (user.user_id, started.thread_id, "completed")
        assert (row["agent"], row["agent_version"], row["correlation_id"]) == ("crew-analyst", "1.2.0", events[0]["correlation_id"])
        assert row["started_at"] < row["ended_at"]
        stored = await pipeline.rows("SELECT seq, type, user_id FROM events.events WHERE run_id = $1 ORDER BY seq", started.run_id)
        assert [(one["seq"], one["type"]) for one in stored] == list(enumerate(types(events), 1))
        assert {str(one["user_id"]) for one in stored} == {user.user_id}
        (head,) = await pipeline.rows("SELECT count(*) AS steps FROM events.steps WHERE run_id = $1", started.run_id)
        assert head["steps"] >= 4
        # another process knows the same
        await pipeline.services.dispatcher(agents=crew_.AGENTS, tools=crew_.TOOLS)
        other = Crew(pipeline.services)
        assert await other.run(user, started.run_id) == await pipeline.run(user, started.run_id)
        assert await other.ended(user, started.run_id) == events
        assert await pipeline.said(user, started.thread_id) == [("user", "How much?"), ("assistant", "Up to 2 could be saved.")]

    async def test_concurrent_agent_executions_with_user_isolation(self, pipeline: Pipeline) -> None:
        """Business value: however many users work at once, each row that is stored has one owner, and only they can read it."""
        users, mark = [await pipeline.services.user() for _ in range(5)], ids.uuid7()
        MEET[mark] = asyncio.Barrier(len(users) * 3)

        async def execute(user: User) -> list[dict[str, Any]]:
            inputs = {"mark": mark, "canary": f"of-{user.user_id}"}
            run_id = (await pipeline.start(user, "crew-meeting", inputs=inputs)).run_id
            return await pipeline.ended(user, run_id)

        # all fifteen execute at the same time
        found = await asyncio.gather(*(execute(user) for user in users for _ in range(3)))
        for at, events in enumerate(found):
            assert canaries(events, users) == [users[at // 3].user_id]
        settings = DispatcherSettings(**pipeline.services.settings("dispatcher"))
        pool = await postgres.open_pool(settings.postgres_dsn("netra_dispatcher", "postgres"), "test")
        pipeline.services.stack.push_async_callback(pool.close)
        for at, user in enumerate(users):
            async with pool.transaction(user.user_id) as transaction:
                rows = await transaction.fetch("SELECT run_id, user_id FROM dispatcher.runs")
            mine = {event["run_id"] for events in found[at * 3 : at * 3 + 3] for event in events}
            assert {str(row["run_id"]) for row in rows} == mine
            assert {str(row["user_id"]) for row in rows} == {user.user_id}
            listed = await pipeline.dispatcher.ListRuns(pb.ListRunsRequest(), metadata=user.bearer, timeout=20)
            assert {run.run_id for run in listed.runs} == mine
        async with pool.transaction() as transaction:
            assert await transaction.value("SELECT count(*) FROM dispatcher.runs") == 0

    async def test_agent_execution_error_handling_with_rollback(self, pipeline: Pipeline) -> None:
        """Business value: a failure leaves no half answer; what a user takes back leaves the conversation, but not the record."""
        user = await pipeline.services.user()
        failing = await pipeline.start(user, "crew-failing", "This fails.", inputs={"mark": (noted := crew_.gate())})
        failed = await pipeline.ended(user, failing.run_id)
        assert failed[-1]["type"] == "agent_failed"
        await pipeline.state(user, failing.run_id, pb.RUN_STATE_FAILED)
        assert await pipeline.said(user, failing.thread_id) == [("user", "This fails.")]
        # what was done outside stays done, once, and the record says so
        assert EFFECTS[noted] == [f"before the failure {user.user_id}"]
        assert of(failed, "tool_completed")[0]["result"] == 1
        wrong, mark = await pipeline.held(user, request="Never mind.", thread_id=failing.thread_id)
        right = await pipeline.start(
            user, "crew-analyst", "This instead.", thread_id=failing.thread_id, on_busy=pb.ON_BUSY_ROLLBACK, inputs={"numbers": [4.0]}
        )
        assert (await pipeline.ended(user, wrong))[-1]["type"] == "agent_cancelled"
        assert (await pipeline.ended(user, right.run_id))[-1]["type"] == "agent_completed"
        assert not GATES[mark].is_set()
        assert await pipeline.said(user, failing.thread_id) == [
            ("user", "This fails."), ("user", "This instead."), ("assistant", "Up to 1 could be saved."),
        ]  # fmt: skip
        (created, *_) = of(await pipeline.ended(user, wrong), "message_created")
        assert created["content"] == "Never mind."
        outcomes = [one.outcome for one in await pipeline.process.executed(user, 3)]
        assert outcomes == ["failed", "cancelled", "completed"]

    async def test_session_isolation_enforcement(self, pipeline: Pipeline) -> None:
        """Business value: whoever loses a device ends what was begun with it, and nothing that they do elsewhere."""
        user = await pipeline.services.user()
        lost = await pipeline.login(user)
        (mine, my_mark), (theirs, their_mark) = await pipeline.held(user), await pipeline.held(lost)
        contexts = await pipeline.contexts(user)
        assert contexts[mine].session_id != contexts[theirs].session_id
        assert {contexts[mine].user_id, contexts[theirs].user_id} == {user.user_id}
        assert pipeline.process.instance(user, theirs).context.session_id == contexts[theirs].session_id
        await pipeline.end_others(user)
        ended = (await pipeline.ended(user, theirs))[-1]
        assert (ended["type"], ended["data"]["by"]) == ("agent_cancelled", "security")
        assert (pipeline.process.instance(user, mine).current, GATES[their_mark].is_set()) == ("active", False)
        GATES[my_mark].set()
        assert (await pipeline.ended(user, mine))[-1]["type"] == "agent_completed"
        assert {one.run_id: one.outcome for one in await pipeline.process.executed(user, 2)} == {mine: "completed", theirs: "cancelled"}

    async def test_execution_context_state_transitions(self, pipeline: Pipeline) -> None:
        """Business value: at every moment it is known where a request is, and it never is where it cannot be."""
        user, mark = await pipeline.services.user(), crew_.gate()
        run_id = (await pipeline.start(user, "crew-interview", inputs={"mark": mark})).run_id
        await pipeline.state(user, run_id, pb.RUN_STATE_SUSPENDED)
        await pipeline.process.empty()
        await pipeline.send(user, run_id, "Go on.")
        events = await pipeline.ended(user, run_id)
        await pipeline.state(user, run_id, pb.RUN_STATE_COMPLETED)
        # its states are in the record, and so survive every process
        kinds = [kind for kind in types(events) if kind.startswith("agent_") and kind != "agent_thinking"]
        assert kinds == ["agent_started", "agent_suspended", "agent_resumed", "agent_completed"]
        contiguous(events)
        transitions = [[state for state, _ in one.transitions] for one in await pipeline.process.executed(user, 2)]
        assert transitions == [["created", "active", "suspended"], ["created", "active", "completed"]]
        held, gate = await pipeline.held(user)
        instance = pipeline.process.instance(user, held)
        for state, illegal in (("active", "created"), ("suspended", "completed"), ("active", "active")):
            if instance.current != state:
                instance.state(state)
            with pytest.raises(errors.FailedPrecondition):
                instance.state(illegal)
            assert instance.current == state
        GATES[gate].set()
        assert (await pipeline.ended(user, held))[-1]["type"] == "agent_completed"
        await pipeline.process.empty()
        # an end is an end
        for state in ("active", "suspended", "failed", "cancelled", "timed_out", "completed"):
            with pytest.raises(errors.FailedPrecondition):
                instance.state(state)
        assert instance.current == "completed"
        context = (await pipeline.contexts(user))[held]
        with pytest.raises(AttributeError):
            setattr(context, "run_id", run_id)  # noqa: B010 - it cannot be written otherwise
        assert UserExecutionContext.from_proto(context.to_proto()) == context
        assert json.loads(json.dumps(context.to_dict()))["run_id"] == held
