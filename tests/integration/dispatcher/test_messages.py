"""Runs that wait for people, and processes that come and go meanwhile: over all services, as users see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from chassis import postgres
from netra import ids
from netra.agent import AgentSpec, Turn, agent
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2
from services.dispatcher import wiring
from services.dispatcher.settings import DispatcherSettings
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types

BEGAN: dict[str, asyncio.Event] = {}
RELEASED: dict[str, asyncio.Event] = {}
# what ends the agent that nothing else ends
HEARD = asyncio.Event()


@agent("listener")
async def listener(turn: Turn) -> dict[str, object]:
    """Repeats two messages."""
    heard = [await turn.wait_for_message(), await turn.wait_for_message()]
    return {"message": " ".join(one.text for one in heard), "by": [one.user_id for one in heard]}


@agent("asker")
async def asker(turn: Turn) -> dict[str, object]:
    """Asks first."""
    decision = await turn.approve("Go on?")
    return {"message": decision.decision, "comment": decision.comment}


@agent("stubborn", deadline_s=300)
async def stubborn(turn: Turn) -> None:
    """Does not heed that it is to end."""
    await turn.think("Never.")
    while not HEARD.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await HEARD.wait()


@agent("keeper", deadline_s=300)
async def keeper(turn: Turn) -> dict[str, object]:
    """Thinks, is held by the test, and thinks again."""
    await turn.think("Before.")
    mark = str(turn.inputs["mark"])
    BEGAN[mark].set()
    await RELEASED[mark].wait()
    await turn.think("After.")
    return {"message": "Done."}


@pytest.fixture
async def runs(services: Services) -> Runs:
    """All services, with the agents above."""
    await services.all(agents=[listener, asker, keeper])
    return Runs(services)


def _mark() -> str:
    mark = ids.uuid7()
    BEGAN[mark], RELEASED[mark] = asyncio.Event(), asyncio.Event()
    return mark


async def _send(runs: Runs, user: User, run_id: str, message: str, request_id: str = "") -> dispatcher_pb2.SendMessageResponse:
    request = dispatcher_pb2.SendMessageRequest(request_id=request_id or ids.uuid7(), run_id=run_id, message=message)
    return await runs.dispatcher.SendMessage(request, metadata=user.bearer, timeout=20)


async def _until(runs: Runs, user: User, run_id: str, state: dispatcher_pb2.RunState.ValueType) -> dispatcher_pb2.Run:
    async with asyncio.timeout(20):
        while True:
            answer = await runs.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer)
            if answer.run.state == state:
                return answer.run
            await asyncio.sleep(0.02)


async def _said(services: Services, user: User, thread_id: str) -> list[tuple[str, str]]:
    stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    page = await stub.ListMessages(context_pb2.ListMessagesRequest(thread_id=thread_id), metadata=user.bearer)
    return [(message.role, message.content) for message in page.messages]


async def test_a_run_goes_on_by_what_its_user_says_to_it(runs: Runs, services: Services) -> None:
    user = await services.user()
    started = await runs.start(user, "listener")
    await _until(runs, user, started.run_id, dispatcher_pb2.RUN_STATE_SUSPENDED)
    first = await _send(runs, user, started.run_id, "One.", "m1")
    assert (await _send(runs, user, started.run_id, "One.", "m1")).message_id == first.message_id
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _send(runs, user, started.run_id, "Another one.", "m1")
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    await _send(runs, user, started.run_id, "Two.", "m2")
    events = await runs.ended(user, started.run_id)
    assert events[-1]["data"]["result"] == {"message": "One. Two.", "by": [user.user_id, user.user_id]}
    assert await _said(services, user, started.thread_id) == [
        ("user", "Some text."), ("user", "One."), ("user", "Two."), ("assistant", "One. Two."),
    ]  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _send(runs, user, started.run_id, "Three.", "m3")
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_message_to_the_thread_is_brought_to_the_run_that_waits_for_one(runs: Runs, services: Services) -> None:
    user = await services.user()
    started = await runs.start(user, "listener")
    await _until(runs, user, started.run_id, dispatcher_pb2.RUN_STATE_SUSPENDED)
    sent = [await runs.start(user, "text-analyst", "One.", thread_id=started.thread_id, deliver=True, request_id="m1") for _ in range(2)]
    assert {(one.run_id, one.delivered, one.message_id) for one in sent} == {(started.run_id, True, sent[0].message_id)}
    await runs.until(user, started.run_id, "agent_suspended", times=2)
    await _until(runs, user, started.run_id, dispatcher_pb2.RUN_STATE_SUSPENDED)
    # who does not want that waits behind it
    behind = await runs.start(user, "text-analyst", "Else.", thread_id=started.thread_id)
    assert not behind.delivered
    assert (await runs.start(user, "text-analyst", "Two.", thread_id=started.thread_id, deliver=True)).delivered
    assert (await runs.ended(user, started.run_id))[-1]["data"]["result"]["message"] == "One. Two."
    assert types(await runs.ended(user, behind.run_id))[-1] == "agent_completed"
    # nothing waits any more: it is a run of its own
    assert not (await runs.start(user, "text-analyst", "Three.", thread_id=started.thread_id, deliver=True)).delivered


@pytest.mark.multi_user
async def test_strangers_say_nothing_and_decide_nothing(runs: Runs, services: Services) -> None:
    user, stranger = await services.user(), await services.user()
    listening, asking = await runs.start(user, "listener"), await runs.start(user, "asker")
    (approval,) = await _pending(runs, user, asking.run_id)
    assert await _pending(runs, stranger, asking.run_id, at_once=True) == []
    calls: list[Any] = [
        _send(runs, stranger, listening.run_id, "Hello."),
        _resolve(runs, stranger, approval.approval_id),
        runs.dispatcher.GetApproval(approvals_pb2.GetApprovalRequest(approval_id=approval.approval_id), metadata=stranger.bearer),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    await _resolve(runs, user, approval.approval_id, "Yes.")
    assert (await runs.ended(user, asking.run_id))[-1]["data"]["result"] == {"message": "approve", "comment": "Yes."}


async def _pending(runs: Runs, user: User, run_id: str, *, at_once: bool = False) -> list[Any]:
    request = approvals_pb2.ListApprovalsRequest(run_id=run_id, state=approvals_pb2.APPROVAL_STATE_PENDING)
    async with asyncio.timeout(20):
        while True:
            found = list((await runs.dispatcher.ListApprovals(request, metadata=user.bearer)).approvals)
            if found or at_once:
                return found
            await asyncio.sleep(0.02)


async def _resolve(runs: Runs, user: User, approval_id: str, comment: str = "") -> Any:
    request = approvals_pb2.ResolveApprovalRequest(approval_id=approval_id, decision=approvals_pb2.DECISION_APPROVE, comment=comment)
    return await runs.dispatcher.ResolveApproval(request, metadata=user.bearer, timeout=20)


@pytest.mark.parametrize("state", ["running", "suspended"])
async def test_who_rolls_back_hides_what_the_earlier_run_said(runs: Runs, services: Services, state: str) -> None:
    user, mark = await services.user(), _mark()
    started = await runs.start(user, "keeper" if state == "running" else "listener", "First.", inputs={"mark": mark})
    if state == "running":
        await BEGAN[mark].wait()
    else:
        await _until(runs, user, started.run_id, dispatcher_pb2.RUN_STATE_SUSPENDED)
    last = await runs.start(user, "text-analyst", "Again.", thread_id=started.thread_id, on_busy=dispatcher_pb2.ON_BUSY_ROLLBACK)
    assert types(await runs.ended(user, started.run_id))[-1] == "agent_cancelled"
    assert types(await runs.ended(user, last.run_id))[-1] == "agent_completed"
    said = await _said(services, user, started.thread_id)
    assert [content for role, content in said if role == "user"] == ["Again."]


async def test_who_interrupts_is_next_and_hides_nothing(runs: Runs, services: Services) -> None:
    user, mark = await services.user(), _mark()
    started = await runs.start(user, "keeper", "First.", inputs={"mark": mark})
    await BEGAN[mark].wait()
    last = await runs.start(user, "text-analyst", "Again.", thread_id=started.thread_id, on_busy=dispatcher_pb2.ON_BUSY_INTERRUPT)
    assert types(await runs.ended(user, started.run_id))[-1] == "agent_cancelled"
    assert types(await runs.ended(user, last.run_id))[-1] == "agent_completed"
    said = await _said(services, user, started.thread_id)
    assert [content for role, content in said if role == "user"] == ["First.", "Again."]


@contextlib.asynccontextmanager
async def _dispatcher(services: Services, *agents: AgentSpec, **more: Any) -> AsyncIterator[Runs]:
    """A dispatcher for the time of the block."""
    settings = DispatcherSettings(**services.settings("dispatcher", **more))
    async with wiring.build(settings, agents=agents) as started:
        services.ports["dispatcher"] = started.port
        services.trusts.append(started.trust)
        await started.trust.awaited()
        yield Runs(services)


async def test_a_process_that_stops_as_planned_hands_its_runs_over_and_that_is_no_takeover(
    services: Services, stores: Standalone, database: str
) -> None:
    await services.auth()
    await services.context()
    await services.events()
    user, mark = await services.user(), _mark()
    # far longer than the test: what is handed over is taken at once
    async with _dispatcher(services, keeper, lease_s=120.0) as runs:
        started = await runs.start(user, "keeper", inputs={"mark": mark})
        await runs.until(user, started.run_id, "agent_thinking")
    RELEASED[mark].set()
    async with _dispatcher(services, keeper, lease_s=120.0) as runs:
        events = await runs.ended(user, started.run_id)
    assert [event["data"]["reasoning"] for event in events if event["type"] == "agent_thinking"] == ["Before.", "After."]
    assert types(events)[-1] == "agent_completed"
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        row = await admin.row("SELECT takeovers, epoch FROM dispatcher.runs WHERE run_id = $1", started.run_id)
    assert row is not None
    assert tuple(row) == (0, 2)


async def test_an_agent_that_does_not_heed_its_end_keeps_no_other_run_from_being_handed_over(
    services: Services, stores: Standalone, database: str
) -> None:
    await services.auth()
    await services.context()
    await services.events()
    user, mark = await services.user(), _mark()
    async with _dispatcher(services, keeper, stubborn, lease_s=120.0) as runs:
        started = await runs.start(user, "keeper", inputs={"mark": mark})
        await runs.until(user, started.run_id, "agent_thinking")
        deaf = await runs.start(user, "stubborn", inputs={"mark": _mark()})
        await runs.until(user, deaf.run_id, "agent_thinking")
    RELEASED[mark].set()
    async with _dispatcher(services, keeper, lease_s=120.0) as runs:
        assert types(await runs.ended(user, started.run_id))[-1] == "agent_completed"
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        owners = await admin.fetch("SELECT takeovers, lease_owner FROM dispatcher.runs ORDER BY created_at")
    assert [tuple(row) for row in owners] == [(0, None), (0, None)]
    HEARD.set()


async def test_a_version_that_nobody_has_any_more_fails_its_runs_by_name(services: Services) -> None:
    await services.auth()
    await services.context()
    await services.events()
    user = await services.user()
    later = AgentSpec("listener", "2.0.0", "Other.", listener.function, 60.0, "basic_agents")
    async with _dispatcher(services, listener, version_missing_s=2.0) as runs:
        started = await runs.start(user, "listener")
        await _until(runs, user, started.run_id, dispatcher_pb2.RUN_STATE_SUSPENDED)
    async with _dispatcher(services, later, version_missing_s=2.0) as runs:
        await _send(runs, user, started.run_id, "Is anybody here?")
        events = await runs.ended(user, started.run_id)
    error = events[-1]["data"]["error"]
    assert events[-1]["type"] == "agent_failed"
    assert "No dispatcher has had agent listener in version 1.0.0" in error["message"]
