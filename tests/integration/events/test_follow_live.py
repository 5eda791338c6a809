"""Threads are followed over gRPC at one replica while others record, also when Valkey loses everything or is away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
import redis.asyncio as redis

from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2
from tests.fixtures import sharing
from tests.fixtures.accounts import refused
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.events.conftest import event
from tests.integration.events.test_tail import Replicas


class Threads(Replicas):
    """A thread of an owner that is granted to another."""

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self.thread_id = ""
        self.owner: User
        self.grantee: User

    async def begin(self, **more: Any) -> None:
        """Start everything; a first, empty run makes the thread."""
        await self.start(**more)
        self.owner, self.grantee = await self.services.user(), await self.services.user()
        await self.open(self.owner, 0)
        self.sharing = sharing.Sharing(self.services.channel("context"))
        await self.sharing.grant(self.owner, self.thread_id, self.grantee)

    async def open(self, user: User, which: int) -> str:
        """A run of a user in the thread, whose record is open on a replica."""
        contexts: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(self.services.channel("context"))
        run_id = ids.uuid7()
        wanted = context_pb2.OpenContextRequest(
            request_id=run_id, run_id=run_id, access_token=user.token, agent_context=b"{}", thread_id=self.thread_id
        )
        answer = await contexts.OpenContext(wanted, metadata=self.tokens["dispatcher"], wait_for_ready=True, timeout=30)
        self.thread_id = answer.context.thread_id
        opened = events_pb2.OpenRunRequest(run_id=run_id, epoch=1, context_token=answer.context_token)
        await self.stubs[which].OpenRun(opened, metadata=self.tokens["dispatcher"], wait_for_ready=True, timeout=30)
        return run_id

    async def recorded(self, run_id: str, which: int, first: int, last: int) -> None:
        """Some events of a run, at one of the replicas."""
        for seq in range(first, last + 1):
            append = events_pb2.AppendRequest(append_id=seq, run_id=run_id, epoch=1, first_seq=seq, events=[event()])
            assert [answer.error_code for answer in await self.append(which, [append])] == [""]

    async def follow(self, user: User, which: int, **more: Any) -> Any:
        """A stream of the thread."""
        token = await self.sharing.token(user, self.thread_id)
        request = events_pb2.FollowThreadRequest(grant_token=token, **more)
        return self.stubs[which].FollowThread(request, metadata=user.bearer)


async def _seen(call: Any, seen: dict[str, list[int]], wanted: dict[str, int]) -> dict[str, list[int]]:
    """Run by run what comes, up to these seqs."""
    async with asyncio.timeout(60):
        while any(seen.get(run_id, [0])[-1] < seq for run_id, seq in wanted.items()):
            answer = await call.read()
            assert answer is not grpc.aio.EOF
            for each in answer.events:
                frame = json.loads(each.frame)
                assert (each.cursor, "cursor" in frame, frame["seq"]) == (0, False, each.seq)
                seen.setdefault(each.run_id, []).append(each.seq)
    return seen


@pytest.fixture
async def threads(services: Services) -> Threads:
    """Two replicas and a shared thread."""
    made = Threads(services)
    await made.begin()
    return made


async def test_what_is_recorded_at_any_replica_is_seen_at_every_other_through_a_loss_of_valkey(
    threads: Threads, stores: Standalone, database: str
) -> None:
    mine, theirs = await threads.open(threads.grantee, 0), await threads.open(threads.owner, 1)
    calls = [await threads.follow(threads.grantee, 0), await threads.follow(threads.owner, 1)]
    seen: list[dict[str, list[int]]] = [{}, {}]

    async def wiped() -> None:
        valkey = redis.Redis.from_url(stores.valkey_admin_url)
        keys = [key async for key in valkey.scan_iter(match=f"*{database}*")]
        assert keys
        await valkey.delete(*keys)
        await valkey.aclose()

    async with asyncio.TaskGroup() as group:
        group.create_task(threads.recorded(mine, 0, 1, 30))
        group.create_task(threads.recorded(theirs, 1, 1, 30))
        for call, found in zip(calls, seen, strict=True):
            await _seen(call, found, {mine: 5})
        await wiped()
        for call, found in zip(calls, seen, strict=True):
            group.create_task(_seen(call, found, {mine: 30, theirs: 30}))
    assert seen == [{run_id: list(range(1, 31)) for run_id in (mine, theirs)}] * 2
    again = await threads.follow(threads.grantee, 1, positions=[events_pb2.RunPosition(run_id=mine, seq=12)], after_run_id=mine)
    assert (await _seen(again, {}, {mine: 30, theirs: 30}))[mine] == list(range(13, 31))
    for call in (*calls, again):
        call.cancel()
    page = await threads.stubs[0].ListEvents(events_pb2.ListEventsRequest(), metadata=threads.grantee.bearer, timeout=20)
    assert (page.last, page.oldest, {each.run_id for each in page.events}) == (30, 1, {mine})


async def test_without_valkey_the_record_is_polled(services: Services) -> None:
    threads = Threads(services)
    await threads.begin(valkey_url="redis://127.0.0.1:1/0", events_poll_s=0.1)
    run_id = await threads.open(threads.owner, 1)
    call = await threads.follow(threads.grantee, 0)
    assert (await call.read()).caught_up
    await threads.recorded(run_id, 1, 1, 5)
    assert await _seen(call, {}, {run_id: 5}) == {run_id: [1, 2, 3, 4, 5]}
    call.cancel()


async def test_a_grant_is_of_one_user_and_of_one_thread(threads: Threads) -> None:
    run_id = await threads.open(threads.owner, 0)
    await threads.recorded(run_id, 0, 1, 1)
    stranger = await threads.services.user()
    token = await threads.sharing.token(threads.grantee, threads.thread_id)

    def asked(user: User, **more: Any) -> Any:
        return threads.stubs[0].FollowThread(events_pb2.FollowThreadRequest(**more), metadata=user.bearer, timeout=20).read()

    assert (await refused(asked(stranger, grant_token=token))).code == "UNAUTHENTICATED"
    assert (await refused(asked(stranger))).code == "UNAUTHENTICATED"
    assert (await refused(threads.sharing.token(stranger, threads.thread_id))).code == "NOT_FOUND"
    wrong: list[dict[str, Any]] = [
        {"after_run_id": "x"}, {"positions": [events_pb2.RunPosition(run_id=run_id, seq=-1)]},
        {"positions": [events_pb2.RunPosition(run_id="x", seq=1)]},
        {"positions": [events_pb2.RunPosition(run_id=ids.uuid7(), seq=1) for _ in range(1001)]},
    ]  # fmt: skip
    assert {(await refused(asked(threads.grantee, grant_token=token, **more))).code for more in wrong} == {
        "INVALID_PAYLOAD",
        "FRAME_TOO_LARGE",
    }
    both = events_pb2.EraseEventsRequest(request_id="e1", user_id=stranger.user_id, thread_id=threads.thread_id)
    assert (await refused(threads.stubs[0].EraseEvents(both, metadata=threads.grantee.bearer, timeout=20))).code == "INVALID_PAYLOAD"
    # what is withdrawn gives no further token
    await threads.sharing.withdraw(threads.owner, threads.thread_id, threads.grantee)
    assert (await refused(threads.sharing.token(threads.grantee, threads.thread_id))).code == "NOT_FOUND"
