"""Runs from acceptance to end, over real services."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, json_format

from chassis import postgres
from netra import errors, ids
from netra.agent import Turn, agent
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import kinds_pb2
from netra.tool import tool
from services.dispatcher import kinds
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.integration.conftest import Runs, types

STARTED: dict[str, asyncio.Event] = {}
RELEASED: dict[str, asyncio.Event] = {}
GONE: list[str] = []


@tool(timeout_s=30)
async def hang(mark: str) -> None:
    """Waits until it is stopped."""
    STARTED[mark].set()
    try:
        await asyncio.Event().wait()
    finally:
        GONE.append(mark)


@tool(timeout_s=0.2)
async def slow() -> None:
    """Takes longer than it may."""
    await asyncio.Event().wait()


@tool()
async def broken() -> int:
    """Raises."""
    raise RuntimeError("secret detail")


@tool()
async def liar() -> int:
    """Returns something else than it declares."""
    return "text"  # type: ignore[return-value]


@agent("hanging")
async def hanging(turn: Turn) -> None:
    """Calls a tool that hangs."""
    await turn.tool("hang", mark=turn.inputs["mark"])


@agent("tolerant")
async def tolerant(turn: Turn) -> dict[str, object]:
    """Calls tools that fail, and goes on."""
    seen = {}
    for name in ("slow", "broken", "liar", "missing"):
        try:
            await turn.tool(name)
        except errors.NetraError as error:
            seen[name] = error.code
    return {"message": "done", "seen": seen}


@agent("failing")
async def failing(turn: Turn) -> None:
    """Raises."""
    raise ValueError("secret detail")


@agent("silent")
async def silent(turn: Turn) -> str:
    """Calls nothing."""
    return "nothing"


@tool(timeout_s=0.1)
async def deaf(mark: str) -> None:
    """Swallows every cancellation until the test lets it go."""
    while not RELEASED[mark].is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await RELEASED[mark].wait()


@tool()
async def quitter() -> None:
    """Cancels itself."""
    raise asyncio.CancelledError


@agent("leaver")
async def leaver(turn: Turn) -> None:
    """Cancels itself."""
    raise asyncio.CancelledError


@agent("thoughtful")
async def thoughtful(turn: Turn) -> str:
    """Thinks faster than anybody can write."""
    for number in range(2500):
        await turn.think(f"Thought {number}.")
    return "done"


@agent("boastful")
async def boastful(turn: Turn) -> dict[str, str]:
    """Returns more than anything may have."""
    return {"message": "short", "rest": "x" * 64 * 1024 * 1024}


@agent("pushy")
async def pushy(turn: Turn) -> str:
    """Hands a tool more than it may take."""
    try:
        await turn.tool("text_statistics", text="x" * 5_000_000)
    except errors.TooLarge as error:
        return error.code
    return "taken"


AGENTS = [hanging, tolerant, failing, silent, thoughtful, boastful, pushy, leaver]
TOOLS = [hang, slow, broken, liar, deaf, quitter]


@pytest.fixture
async def running(services: Services) -> Runs:
    """All services, with the agents and tools above."""
    await services.all(agents=AGENTS, tools=TOOLS)
    return Runs(services)


async def test_a_run_tells_everything_in_legal_order(running: Runs) -> None:
    user = await running.services.user()
    started = await running.start(user, "text-analyst", "A text about rivers. Rivers flow.")
    events = await running.ended(user, started.run_id)
    assert types(events) == [
        "agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed", "agent_thinking",
        "tool_executing", "tool_completed", "message_created", "agent_completed",
    ]  # fmt: skip
    assert [event["seq"] for event in events] == list(range(1, 11))
    assert [event["cursor"] for event in events] == list(range(1, 11))
    assert {event["user_id"] for event in events} == {user.user_id}
    assert {event["thread_id"] for event in events} == {started.thread_id}
    assert len({event["correlation_id"] for event in events}) == 1
    assert [event["timestamp"] for event in events] == sorted(event["timestamp"] for event in events)
    assert events[-1]["data"]["result"]["statistics"]["words"] == 6
    run = await _state(running, user, started.run_id, dispatcher_pb2.RUN_STATE_COMPLETED)
    assert run.HasField("ended_at")


async def _state(running: Runs, user: Any, run_id: str, wanted: int) -> dispatcher_pb2.Run:
    # the row follows the terminal event
    async with asyncio.timeout(10):
        while True:
            request = dispatcher_pb2.GetRunRequest(run_id=run_id)
            run = (await running.dispatcher.GetRun(request, metadata=user.bearer)).run
            if run.state == wanted:
                return run
            await asyncio.sleep(0.01)


async def test_the_data_of_every_event_has_the_fields_of_the_contract(running: Runs) -> None:
    user = await running.services.user()
    events = []
    for name in ("", "tolerant", "failing"):
        events += await running.ended(user, (await running.start(user, name)).run_id)
    for event in events:
        message = getattr(kinds_pb2, "".join(word.title() for word in event["type"].split("_")))()
        json_format.ParseDict(event["data"], message)
        kinds.check(event["type"], event["data"])


async def test_an_agent_that_calls_nothing_fakes_nothing(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "silent")).run_id)
    assert [kind for kind in types(events) if kind != "message_created"] == ["agent_started", "agent_completed"]


async def test_a_cancel_is_told_after_the_tool_has_gone(running: Runs) -> None:
    user, mark = await running.services.user(), ids.uuid7()
    STARTED[mark] = asyncio.Event()
    started = await running.start(user, "hanging", inputs={"mark": mark})
    await asyncio.wait_for(STARTED[mark].wait(), 10)
    assert mark not in GONE
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=started.run_id), metadata=user.bearer)
    events = await running.ended(user, started.run_id)
    assert mark in GONE
    assert types(events)[-3:] == ["tool_executing", "tool_completed", "agent_cancelled"]
    assert events[-2]["data"]["status"] == "cancelled"
    stopped = events[-1]["data"]["tools_stopped"]
    assert [(call["tool_call_id"], call["confirmed"]) for call in stopped] == [(events[-2]["data"]["tool_call_id"], True)]
    await _state(running, user, started.run_id, dispatcher_pb2.RUN_STATE_CANCELLED)


async def test_a_run_that_waits_can_be_cancelled_before_it_starts(running: Runs) -> None:
    user, mark = await running.services.user(), ids.uuid7()
    STARTED[mark] = asyncio.Event()
    first = await running.start(user, "hanging", inputs={"mark": mark})
    await asyncio.wait_for(STARTED[mark].wait(), 10)
    second = await running.start(user, "silent", thread_id=first.thread_id)
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=second.run_id), metadata=user.bearer)
    assert types(await running.ended(user, second.run_id)) == ["agent_cancelled"]
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=first.run_id), metadata=user.bearer)
    await running.ended(user, first.run_id)


async def test_runs_of_one_thread_follow_each_other(running: Runs) -> None:
    user = await running.services.user()
    first = await running.start(user)
    others = [await running.start(user, thread_id=first.thread_id) for _ in range(4)]
    for started in others:
        await running.ended(user, started.run_id)
    request = dispatcher_pb2.ListRunsRequest(thread_id=first.thread_id)
    found = list((await running.dispatcher.ListRuns(request, metadata=user.bearer)).runs)
    assert [run.run_id for run in reversed(found)] == [started.run_id for started in [first, *others]]
    times = [run.started_at.ToNanoseconds() for run in reversed(found)]
    assert times == sorted(times)


async def test_reject_refuses_a_busy_thread(running: Runs) -> None:
    user, mark = await running.services.user(), ids.uuid7()
    STARTED[mark] = asyncio.Event()
    first = await running.start(user, "hanging", inputs={"mark": mark})
    await asyncio.wait_for(STARTED[mark].wait(), 10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.start(user, thread_id=first.thread_id, on_busy=dispatcher_pb2.ON_BUSY_REJECT)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=first.run_id), metadata=user.bearer)
    await running.ended(user, first.run_id)


async def test_a_deadline_ends_the_run(running: Runs) -> None:
    user, mark = await running.services.user(), ids.uuid7()
    STARTED[mark] = asyncio.Event()
    deadline = duration_pb2.Duration(nanos=300_000_000)
    started = await running.start(user, "hanging", inputs={"mark": mark}, deadline=deadline)
    events = await running.ended(user, started.run_id)
    assert types(events)[-2:] == ["tool_completed", "agent_timed_out"]
    assert mark in GONE
    await _state(running, user, started.run_id, dispatcher_pb2.RUN_STATE_TIMED_OUT)


async def test_failures_of_tools_are_told_in_pairs_and_reach_the_agent(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "tolerant")).run_id)
    assert events[-1]["data"]["result"]["seen"] == {
        "slow": "DEADLINE_EXCEEDED", "broken": "TOOL_FAILED", "liar": "TOOL_FAILED", "missing": "NOT_FOUND",
    }  # fmt: skip
    executing = [event["data"]["tool_call_id"] for event in events if event["type"] == "tool_executing"]
    completed = [event["data"]["tool_call_id"] for event in events if event["type"] == "tool_completed"]
    assert executing == completed
    assert len(set(executing)) == 4
    statuses = [event["data"]["status"] for event in events if event["type"] == "tool_completed"]
    assert statuses == ["timeout", "error", "error", "error"]
    assert "secret detail" not in json.dumps(events)


async def test_an_agent_that_raises_ends_as_failed_without_its_words(running: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "failing")).run_id)
    assert types(events)[-1] == "agent_failed"
    assert events[-1]["data"]["error"]["code"] == "AGENT_FAILED"
    support_code = events[-1]["data"]["error"]["support_code"]
    assert support_code in events[-1]["data"]["message"]
    assert "secret detail" not in json.dumps(events)
    # whoever looks for the fault finds where it was; an agent may have quoted what it was given
    written = capsys.readouterr().out
    assert all(part in written for part in (support_code, "ValueError", "test_runs.py"))
    assert "secret detail" not in written.replace('raise ValueError("secret detail")', "")


async def test_an_agent_that_cancels_itself_has_failed(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "leaver")).run_id)
    assert (types(events)[-1], events[-1]["data"]["error"]["code"]) == ("agent_failed", "AGENT_FAILED")


async def test_the_same_request_starts_one_run(running: Runs) -> None:
    user, request_id = await running.services.user(), ids.uuid7()
    answers = await asyncio.gather(*(running.start(user, request_id=request_id) for _ in range(8)))
    assert len({answer.run_id for answer in answers}) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.start(user, request="Something else.", request_id=request_id)
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    await running.ended(user, answers[0].run_id)


async def test_the_same_request_id_of_two_users_starts_two_runs(running: Runs) -> None:
    one, two, request_id = await running.services.user(), await running.services.user(), ids.uuid7()
    first, second = await running.start(one, request_id=request_id), await running.start(two, request_id=request_id)
    assert first.run_id != second.run_id


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"request": "  "}, "user_request"),
        ({"request": "x" * 70_000}, "user_request"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "has space"}, "request_id"),
        ({"thread_id": "nonsense"}, "thread_id"),
        ({"inputs": [1]}, "inputs"),
        ({"deadline": duration_pb2.Duration(seconds=-1)}, "deadline"),
        ({"deadline": duration_pb2.Duration(seconds=100_000)}, "deadline"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_field(running: Runs, more: dict[str, Any], field: str) -> None:
    user = await running.services.user()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.start(user, **more)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")


async def test_a_foreign_thread_does_not_exist(running: Runs) -> None:
    owner, stranger = await running.services.user(), await running.services.user()
    thread_id = (await running.start(owner)).thread_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.start(stranger, thread_id=thread_id)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_foreign_run_does_not_exist(running: Runs) -> None:
    owner, stranger = await running.services.user(), await running.services.user()
    run_id = (await running.start(owner)).run_id
    calls: list[tuple[Any, Any]] = [
        (running.dispatcher.GetRun, dispatcher_pb2.GetRunRequest(run_id=run_id)),
        (running.dispatcher.CancelRun, dispatcher_pb2.CancelRunRequest(run_id=run_id)),
    ]
    for call, request in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=stranger.bearer)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert types(await running.ended(owner, run_id))[-1] == "agent_completed"


async def test_a_readonly_user_may_look_but_not_start(running: Runs) -> None:
    user = await running.services.user(role="readonly")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.start(user)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "runs:write" in (caught.value.details() or "")
    await running.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=user.bearer)


async def test_runs_are_paged_newest_first(running: Runs) -> None:
    user = await running.services.user()
    started = [(await running.start(user)).run_id for _ in range(5)]
    seen, token = [], ""
    while True:
        request = dispatcher_pb2.ListRunsRequest(page_size=2, page_token=token)
        page = await running.dispatcher.ListRuns(request, metadata=user.bearer)
        seen += [run.run_id for run in page.runs]
        if not (token := page.next_page_token):
            break
    assert seen == sorted(started, reverse=True)


async def test_an_agent_that_runs_ahead_of_its_record_loses_nothing(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "thoughtful")).run_id)
    thoughts = [event["data"]["reasoning"] for event in events if event["type"] == "agent_thinking"]
    assert thoughts == [f"Thought {number}." for number in range(2500)]
    assert types(events)[-1] == "agent_completed"


@pytest.mark.parametrize(("name", "end"), [("boastful", "agent_failed"), ("pushy", "agent_completed")])
async def test_what_is_too_large_harms_no_other_run(running: Runs, name: str, end: str) -> None:
    user = await running.services.user()
    large = await running.start(user, name)
    small = await running.start(user)
    assert types(await running.ended(user, small.run_id))[-1] == "agent_completed"
    events = await running.ended(user, large.run_id)
    assert types(events)[-1] == end
    if name == "pushy":
        assert events[-1]["data"]["result"] == "FRAME_TOO_LARGE"


async def test_a_refused_start_leaves_nothing_behind(running: Runs) -> None:
    user, mark = await running.services.user(), ids.uuid7()
    STARTED[mark] = asyncio.Event()
    first = await running.start(user, "hanging", inputs={"mark": mark})
    await asyncio.wait_for(STARTED[mark].wait(), 10)
    with pytest.raises(grpc.aio.AioRpcError):
        await running.start(user, thread_id=first.thread_id, on_busy=dispatcher_pb2.ON_BUSY_REJECT)
    context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(running.services.channel("context"))
    messages = await context.ListMessages(context_pb2.ListMessagesRequest(thread_id=first.thread_id), metadata=user.bearer)
    assert len(messages.messages) == 1
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=first.run_id), metadata=user.bearer)
    await running.ended(user, first.run_id)


class TestWaiting:
    """A run that waits for long keeps an identity."""

    async def _waiting(self, services: Services, every_s: float) -> tuple[Runs, Any, str, str]:
        """A run that hangs, and one that waits for it on the same thread."""
        await services.all(agents=AGENTS, tools=TOOLS, tokens_s=every_s)
        running, mark = Runs(services), ids.uuid7()
        user = await services.user()
        STARTED[mark] = asyncio.Event()
        first = await running.start(user, "hanging", inputs={"mark": mark})
        await asyncio.wait_for(STARTED[mark].wait(), 10)
        second = await running.start(user, "silent", thread_id=first.thread_id)
        return running, user, first.run_id, second.run_id

    async def _age(self, stores: Standalone, database: str, run_id: str, minutes: int) -> str:
        """Make the token of a run older; returns the token."""
        query = "UPDATE dispatcher.runs SET token_renewed_at = now() - make_interval(mins => $2) WHERE run_id = $1 RETURNING context_token"
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            return str(await admin.value(query, run_id, minutes))

    async def test_its_token_is_renewed(self, services: Services, stores: Standalone, database: str) -> None:
        _, _, _, run_id = await self._waiting(services, 0.05)
        token = await self._age(stores, database, run_id, 30)
        query = "SELECT context_token FROM dispatcher.runs WHERE run_id = $1"
        async with asyncio.timeout(10), postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            while await admin.value(query, run_id) == token:  # noqa: ASYNC110 - another process changes it
                await asyncio.sleep(0.02)

    async def test_one_whose_token_ran_out_ends_all_the_same(self, services: Services, stores: Standalone, database: str) -> None:
        running, user, first, second = await self._waiting(services, 3600)
        await self._age(stores, database, second, 120)
        await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=first), metadata=user.bearer)
        await _state(running, user, second, dispatcher_pb2.RUN_STATE_FAILED)

    async def test_one_that_an_owner_left_at_its_end_is_not_begun_by_the_next(
        self, services: Services, stores: Standalone, database: str
    ) -> None:
        running, user, _, second = await self._waiting(services, 3600)
        query = "UPDATE dispatcher.runs SET state = 'finishing', epoch = 1, lease_until = now() WHERE run_id = $1"
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            await admin.execute(query, second)
        (event,) = await running.ended(user, second)
        assert (event["type"], event["data"]["error"]["code"]) == ("agent_failed", "OWNER_LOST")
        await _state(running, user, second, dispatcher_pb2.RUN_STATE_FAILED)


class TestExecuteTool:
    """An interactive call is a run of kind tool."""

    async def _call(self, running: Runs, user: Any, name: str, arguments: dict[str, Any], request_id: str = "") -> Any:
        request = dispatcher_pb2.ExecuteToolRequest(
            request_id=request_id or ids.uuid7(), tool_name=name, arguments=json.dumps(arguments).encode()
        )
        return await running.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=20)

    async def test_it_returns_the_result_and_is_in_the_record(self, running: Runs) -> None:
        user = await running.services.user()
        answer = await self._call(running, user, "text_statistics", {"text": "One two."})
        assert answer.status == "success"
        assert json.loads(answer.result)["words"] == 2
        events = await running.ended(user, answer.run_id)
        assert types(events) == ["tool_executing", "tool_completed"]
        assert events[0]["data"]["tool_call_id"] == answer.tool_call_id

    async def test_the_same_request_executes_once(self, running: Runs) -> None:
        user, request_id = await running.services.user(), ids.uuid7()
        first = await self._call(running, user, "text_statistics", {"text": "One."}, request_id)
        again = await self._call(running, user, "text_statistics", {"text": "One."}, request_id)
        assert (again.run_id, again.tool_call_id, again.result) == (first.run_id, first.tool_call_id, first.result)

    async def test_a_failure_is_an_outcome(self, running: Runs) -> None:
        answer = await self._call(running, await running.services.user(), "slow", {})
        assert (answer.status, answer.error.code) == ("timeout", "DEADLINE_EXCEEDED")

    async def test_a_cancel_stops_it(self, running: Runs) -> None:
        user, mark = await running.services.user(), ids.uuid7()
        STARTED[mark] = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            calling = group.create_task(self._call(running, user, "hang", {"mark": mark}))
            await asyncio.wait_for(STARTED[mark].wait(), 10)
            run = (await running.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=user.bearer)).runs[0]
            await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=run.run_id), metadata=user.bearer)
        assert (calling.result().status, mark in GONE) == ("cancelled", True)
        assert [event["data"]["status"] for event in await running.ended(user, run.run_id)] == ["executing", "cancelled"]
        await _state(running, user, run.run_id, dispatcher_pb2.RUN_STATE_CANCELLED)

    async def test_a_tool_that_does_not_stop_is_told_as_timed_out_everywhere(self, running: Runs) -> None:
        user, mark = await running.services.user(), ids.uuid7()
        RELEASED[mark] = asyncio.Event()
        answer = await self._call(running, user, "deaf", {"mark": mark})
        RELEASED[mark].set()
        events = await running.ended(user, answer.run_id)
        assert (answer.status, events[-1]["data"]["status"]) == ("timeout", "timeout")
        assert "whether it did is not known" in answer.error.message

    async def test_a_tool_that_cancels_itself_has_failed(self, running: Runs) -> None:
        answer = await self._call(running, await running.services.user(), "quitter", {})
        assert (answer.status, answer.error.code) == ("error", "TOOL_FAILED")

    async def test_an_answer_that_was_lost_is_said_to_be(self, running: Runs, stores: Standalone, database: str) -> None:
        user, request_id = await running.services.user(), ids.uuid7()
        answer = await self._call(running, user, "text_statistics", {"text": "One."}, request_id)
        # its row is final by then
        await running.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=answer.run_id), metadata=user.bearer)
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            await admin.execute("UPDATE dispatcher.runs SET outcome = NULL WHERE run_id = $1", answer.run_id)
        again = await self._call(running, user, "text_statistics", {"text": "One."}, request_id)
        assert (again.run_id, again.status, again.error.code) == (answer.run_id, "unknown", "OWNER_LOST")

    async def test_a_wrong_argument_is_not_repeated_in_the_error(self, running: Runs) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._call(running, await running.services.user(), "text_statistics", {"text": {"password": "hunter2" * 2000}})
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "arguments", "code"),
        [
            ("missing", {}, grpc.StatusCode.NOT_FOUND),
            ("text_statistics", {}, grpc.StatusCode.INVALID_ARGUMENT),
            ("text_statistics", {"text": "x", "limit": 1}, grpc.StatusCode.INVALID_ARGUMENT),
        ],
    )
    async def test_what_cannot_run_is_refused(self, running: Runs, name: str, arguments: dict[str, Any], code: grpc.StatusCode) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._call(running, await running.services.user(), name, arguments)
        assert caught.value.code() == code
