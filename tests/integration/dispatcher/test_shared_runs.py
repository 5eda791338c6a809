"""Runs in a thread that several users share: each is its starter's own, all of the thread see it, its owner can cancel it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any

import grpc
import pytest

from netra import errors, ids
from netra.agent import Turn, agent
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.events.v1 import events_pb2
from netra.tool import tool
from tests.fixtures import sharing
from tests.fixtures.accounts import refused
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types

STARTED: dict[str, asyncio.Event] = {}
RELEASED: dict[str, asyncio.Event] = {}


@tool(timeout_s=60)
async def wait_here(mark: str) -> None:
    """Waits for the test."""
    STARTED[mark].set()
    await RELEASED[mark].wait()


@agent("waiting")
async def waiting(turn: Turn) -> str:
    """Waits for the test, then answers."""
    await turn.tool("wait_here", mark=turn.inputs["mark"])
    return "done"


class Shared(Runs):
    """Runs of several users in one thread."""

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self.sharing = sharing.Sharing(services.channel("context"))
        self.thread_id = ""
        self.owner: User
        self.writer: User
        self.reader: User
        self.stranger: User

    async def begin(self) -> str:
        """A first run of the owner, whose thread is then shared; returns the run."""
        self.owner, self.writer, self.reader, self.stranger = [await self.services.user() for _ in range(4)]
        first = await self.start(self.owner, "text-analyst", "Rivers carry boats.")
        self.thread_id = first.thread_id
        await self.ended(self.owner, first.run_id)
        await self.sharing.grant(self.owner, self.thread_id, self.writer)
        await self.sharing.grant(self.owner, self.thread_id, self.reader, sharing.READ)
        return first.run_id

    async def token(self, user: User) -> str:
        """What the user may do with the thread."""
        return await self.sharing.token(user, self.thread_id)

    async def hanging(self, user: User, **more: Any) -> tuple[str, str]:
        """A run that waits, and its mark."""
        mark = ids.uuid7()
        STARTED[mark], RELEASED[mark] = asyncio.Event(), asyncio.Event()
        started = await self.start(user, "waiting", "Wait.", inputs={"mark": mark}, thread_id=self.thread_id, **more)
        return started.run_id, mark

    async def listed(self, user: User, token: str = "", **more: Any) -> list[pb.Run]:
        """Runs, newest first."""
        request = pb.ListRunsRequest(grant_token=token, **more)
        return list((await self.dispatcher.ListRuns(request, metadata=user.bearer, timeout=20)).runs)

    async def got(self, user: User, run_id: str, token: str = "") -> pb.Run:
        """One run."""
        request = pb.GetRunRequest(run_id=run_id, grant_token=token)
        return (await self.dispatcher.GetRun(request, metadata=user.bearer, timeout=20)).run

    async def is_over(self, user: User, run_id: str, state: int) -> None:
        """Returns when a run is in its final state: the row follows the terminal event."""
        async with asyncio.timeout(20):
            while True:
                if (await self.got(user, run_id)).state == state:
                    return
                await asyncio.sleep(0.01)

    async def cancel(self, user: User, run_id: str, token: str = "") -> pb.CancelRunResponse:
        """Ask a run to stop."""
        request = pb.CancelRunRequest(run_id=run_id, grant_token=token)
        return await self.dispatcher.CancelRun(request, metadata=user.bearer, timeout=20)

    async def followed(self, user: User, token: str, ends: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The events of the thread's runs, until all of these have ended."""
        found: dict[str, list[dict[str, Any]]] = {}
        call = self.events.FollowThread(events_pb2.FollowThreadRequest(grant_token=token), metadata=user.bearer)
        async with asyncio.timeout(60):
            async for answer in call:
                for event in answer.events:
                    found.setdefault(event.run_id, []).append(json.loads(event.frame))
                if all(run_id in found and found[run_id][-1]["type"].startswith("agent_c") for run_id in ends):
                    break
        call.cancel()
        return found


async def _codes(*calls: Awaitable[Any]) -> list[str]:
    return [(await refused(call)).code for call in calls]


async def _outcome(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.fixture
async def shared(services: Services) -> Shared:
    """All services, and a thread with an owner, a writer, a reader and a stranger."""
    await services.all(agents=[waiting], tools=[wait_here])
    made = Shared(services)
    made.first = await made.begin()  # type: ignore[attr-defined]
    return made


async def test_owner_and_grantee_run_in_one_thread_and_all_of_it_see_both(shared: Shared) -> None:
    first: str = shared.first  # type: ignore[attr-defined]
    started = await shared.start(shared.writer, "text-analyst", "Boats carry people.", thread_id=shared.thread_id)
    own = await shared.ended(shared.writer, started.run_id)
    assert types(own)[-1] == "agent_completed"
    tokens = {user.user_id: await shared.token(user) for user in (shared.owner, shared.writer, shared.reader)}
    for user in (shared.owner, shared.writer, shared.reader):
        token = tokens[user.user_id]
        found = await shared.listed(user, token)
        assert [(run.run_id, run.user_id) for run in found] == [
            (started.run_id, shared.writer.user_id),
            (first, shared.owner.user_id),
        ]
        assert [run.run_id for run in await shared.listed(user, token, page_size=1)] == [started.run_id]
        assert [run.run_id for run in await shared.listed(user, token, state=pb.RUN_STATE_FAILED)] == []
        assert len((await shared.got(user, started.run_id, token)).stages) > 3
        events = await shared.followed(user, token, [first, started.run_id])
        assert [event["seq"] for event in events[started.run_id]] == [event["seq"] for event in own]
        assert events[started.run_id] == [{name: value for name, value in event.items() if name != "cursor"} for event in own]
        assert all("cursor" not in event for event in events[first])
    # what is mine without a token is mine alone
    assert [run.run_id for run in await shared.listed(shared.owner)] == [first]
    assert [run.run_id for run in await shared.listed(shared.writer, thread_id=shared.thread_id)] == [started.run_id]
    assert [run.run_id for run in await shared.listed(shared.reader, thread_id=shared.thread_id)] == []
    for user, last in ((shared.writer, len(own)), (shared.reader, 0)):
        page = await shared.events.ListEvents(events_pb2.ListEventsRequest(), metadata=user.bearer, timeout=20)
        assert (page.last, len(page.events)) == (last, last)
    assert [role for role, _ in await shared.sharing.said(shared.reader, shared.thread_id)] == ["user", "assistant"] * 2


async def test_what_is_not_granted_does_not_exist(shared: Shared) -> None:
    run_id, stranger = shared.first, shared.stranger  # type: ignore[attr-defined]
    elsewhere = await shared.start(shared.owner, "text-analyst", "Elsewhere.")
    token, theirs = await shared.token(shared.reader), await shared.token(shared.owner)
    not_mine = "UNAUTHENTICATED"
    assert await _codes(shared.got(stranger, run_id), shared.got(stranger, run_id, token), shared.listed(stranger, theirs)) == [
        "NOT_FOUND", not_mine, not_mine,
    ]  # fmt: skip
    for found in (elsewhere.run_id, ids.uuid7()):
        assert await _codes(shared.got(shared.reader, found, token), shared.got(shared.reader, found)) == ["NOT_FOUND"] * 2
    assert await _codes(shared.listed(shared.reader, token, thread_id=elsewhere.thread_id), shared.token(stranger)) == [
        "INVALID_PAYLOAD", "NOT_FOUND",
    ]  # fmt: skip
    page = events_pb2.ListThreadEventsRequest(grant_token=token, run_id=elsewhere.run_id)
    assert await _codes(shared.events.ListThreadEvents(page, metadata=shared.reader.bearer, timeout=20)) == ["NOT_FOUND"]
    page = events_pb2.ListThreadEventsRequest(grant_token=token, run_id=run_id, page_size=2)
    listed = await shared.events.ListThreadEvents(page, metadata=shared.reader.bearer, timeout=20)
    assert ([event.seq for event in listed.events], listed.next_after_seq, listed.last_seq > 2) == ([1, 2], 2, True)
    wanted: dict[str, Any] = {"agent": "text-analyst", "thread_id": shared.thread_id}
    assert await _codes(shared.start(shared.reader, **wanted), shared.start(stranger, **wanted)) == ["PERMISSION_DENIED", "NOT_FOUND"]


async def test_only_the_owner_of_the_thread_cancels_a_run_of_another(shared: Shared) -> None:
    run_id, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    tokens = {user.user_id: await shared.token(user) for user in (shared.owner, shared.writer, shared.reader)}
    elsewhere = await shared.start(shared.owner, "text-analyst", "Elsewhere.")
    other = await shared.sharing.token(shared.owner, elsewhere.thread_id)
    assert await _codes(
        shared.cancel(shared.owner, run_id),
        shared.cancel(shared.owner, run_id, other),
        shared.cancel(shared.reader, run_id, tokens[shared.reader.user_id]),
        shared.cancel(shared.writer, run_id, tokens[shared.writer.user_id]),
        shared.cancel(shared.stranger, run_id, tokens[shared.owner.user_id]),
        shared.cancel(shared.reader, run_id),
    ) == ["NOT_FOUND", "NOT_FOUND", "PERMISSION_DENIED", "PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND"]
    assert (await shared.got(shared.writer, run_id)).state == pb.RUN_STATE_RUNNING
    await shared.cancel(shared.owner, run_id, tokens[shared.owner.user_id])
    assert types(await shared.ended(shared.writer, run_id))[-1] == "agent_cancelled"
    # their own runs as ever
    mine, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    await shared.cancel(shared.writer, mine)
    assert types(await shared.ended(shared.writer, mine))[-1] == "agent_cancelled"


async def test_a_thread_is_busy_with_anybodys_run_and_only_those_of_the_thread_are_told(shared: Shared) -> None:
    run_id, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    before = await shared.sharing.said(shared.owner, shared.thread_id)
    wanted: dict[str, Any] = {"agent": "text-analyst", "thread_id": shared.thread_id, "on_busy": pb.ON_BUSY_REJECT}
    request_id = ids.uuid7()
    assert await _codes(
        shared.start(shared.owner, request_id=request_id, **wanted), shared.start(shared.stranger, **wanted),
        shared.start(shared.reader, **wanted), shared.start(shared.writer, **wanted),
    ) == ["BUSY", "NOT_FOUND", "PERMISSION_DENIED", "BUSY"]  # fmt: skip
    # whoever is refused leaves nothing in the thread
    assert await shared.sharing.said(shared.owner, shared.thread_id) == before
    waiting_run = await shared.start(shared.owner, "text-analyst", "Later.", thread_id=shared.thread_id)
    assert (await shared.got(shared.owner, waiting_run.run_id)).state == pb.RUN_STATE_QUEUED
    RELEASED[mark].set()
    await shared.ended(shared.writer, run_id)
    await shared.ended(shared.owner, waiting_run.run_id)
    await shared.is_over(shared.writer, run_id, pb.RUN_STATE_COMPLETED)
    await shared.is_over(shared.owner, waiting_run.run_id, pb.RUN_STATE_COMPLETED)
    runs = {run.run_id: run for run in await shared.listed(shared.owner, await shared.token(shared.owner))}
    ended, began = runs[run_id].ended_at, runs[waiting_run.run_id].started_at
    assert ended.ToNanoseconds() > 0 < began.ToNanoseconds()
    # the same request again, now that it is free
    again = await shared.start(shared.owner, request_id=request_id, **wanted)
    assert types(await shared.ended(shared.owner, again.run_id))[-1] == "agent_completed"


async def test_a_start_that_was_refused_holds_up_no_erasure(shared: Shared) -> None:
    run_id, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    wanted: dict[str, Any] = {"agent": "text-analyst", "thread_id": shared.thread_id, "on_busy": pb.ON_BUSY_REJECT}
    request_id = ids.uuid7()
    for _ in range(2):
        assert await _codes(shared.start(shared.owner, request_id=request_id, **wanted)) == ["BUSY"]
    RELEASED[mark].set()
    await shared.ended(shared.writer, run_id)
    contexts = shared.sharing.stub
    erase = context_pb2.EraseThreadRequest(request_id=ids.uuid7(), thread_id=shared.thread_id)
    async with asyncio.timeout(20):
        # that of the run is closed after its last event
        while (code := await _outcome(contexts.EraseThread(erase, metadata=shared.owner.bearer))) == "FAILED_PRECONDITION":
            pass
    assert code == "OK"


async def test_a_withdrawn_grant_ends_the_answer_of_a_run_and_nothing_else_of_it(shared: Shared) -> None:
    run_id, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    await shared.sharing.withdraw(shared.owner, shared.thread_id, shared.writer)
    RELEASED[mark].set()
    end = (await shared.ended(shared.writer, run_id))[-1]
    assert (end["type"], end["data"]["error"]["code"]) == ("agent_failed", errors.NotFound.code)
    wanted: dict[str, Any] = {"agent": "text-analyst", "thread_id": shared.thread_id}
    assert await _codes(shared.token(shared.writer), shared.start(shared.writer, **wanted)) == ["NOT_FOUND"] * 2
    # it was theirs and stays theirs; the owner sees it in the thread
    await shared.is_over(shared.writer, run_id, pb.RUN_STATE_FAILED)
    assert (await shared.got(shared.owner, run_id, await shared.token(shared.owner))).user_id == shared.writer.user_id
    roles = [role for role, _ in await shared.sharing.said(shared.owner, shared.thread_id)]
    assert roles == ["user", "assistant", "user"]


async def test_a_thread_that_is_deleted_or_erased_leaves_each_their_own_record(shared: Shared) -> None:
    first: str = shared.first  # type: ignore[attr-defined]
    run_id, mark = await shared.hanging(shared.writer)
    async with asyncio.timeout(20):
        await STARTED[mark].wait()
    contexts = shared.sharing.stub
    erase = context_pb2.EraseThreadRequest(request_id=ids.uuid7(), thread_id=shared.thread_id)
    assert await _codes(contexts.EraseThread(erase, metadata=shared.owner.bearer, timeout=20)) == ["FAILED_PRECONDITION"]
    delete = context_pb2.DeleteThreadRequest(request_id=ids.uuid7(), thread_id=shared.thread_id)
    assert await _codes(contexts.DeleteThread(delete, metadata=shared.writer.bearer, timeout=20)) == ["PERMISSION_DENIED"]
    await contexts.DeleteThread(delete, metadata=shared.owner.bearer, timeout=20)
    wanted: dict[str, Any] = {"agent": "text-analyst", "thread_id": shared.thread_id}
    assert await _codes(shared.token(shared.writer), shared.start(shared.writer, **wanted)) == ["NOT_FOUND"] * 2
    # for those it was granted to it is withdrawn
    RELEASED[mark].set()
    end = (await shared.ended(shared.writer, run_id))[-1]
    assert (end["type"], end["data"]["error"]["code"]) == ("agent_failed", errors.NotFound.code)
    async with asyncio.timeout(20):
        # its context is closed after its last event
        while (await _outcome(contexts.EraseThread(erase, metadata=shared.owner.bearer))) == "FAILED_PRECONDITION":
            pass
    events = events_pb2.EraseEventsRequest(request_id="e1", thread_id=shared.thread_id)
    assert (await shared.events.EraseEvents(events, metadata=shared.owner.bearer, timeout=20)).runs == 1
    assert {json.dumps(event["data"]) for event in await shared.ended(shared.owner, first)} == {'{"erased": true}'}
    assert {"erased": True} not in [event["data"] for event in await shared.ended(shared.writer, run_id)]
    assert (await shared.events.EraseEvents(events, metadata=shared.writer.bearer, timeout=20)).runs == 1
    assert {json.dumps(event["data"]) for event in await shared.ended(shared.writer, run_id)} == {'{"erased": true}'}
