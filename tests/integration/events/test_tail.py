"""Two replicas over one record and one Valkey, over real gRPC: live on either, bounded for who does not read, told when it is late."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import channel, streams
from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import announce, wiring
from services.events.settings import EventsSettings
from standalone import processes
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.events.conftest import event


class Replicas:
    """Two replicas of events, and what a gateway and a dispatcher do with them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.running: list[wiring.Service] = []
        self.stubs: list[events_pb2_grpc.EventsServiceAsyncStub] = []
        self.tokens: dict[str, Any] = {}
        self._contexts: context_pb2_grpc.ContextServiceAsyncStub

    async def start(self, **more: Any) -> Replicas:
        await self.services.auth()
        await self.services.context()
        for _ in range(2):
            made = await self.services.stack.enter_async_context(wiring.build(EventsSettings(**self.services.settings("events", **more))))
            self.services._started("events", made)
            self.running.append(made)
            self.stubs.append(events_pb2_grpc.EventsServiceStub(self.channel(len(self.running) - 1)))
        self._contexts = context_pb2_grpc.ContextServiceStub(self.services.channel("context"))
        self.tokens = {name: await self.services.service_token(name) for name in ("gateway", "dispatcher")}
        return self

    def channel(self, which: int) -> grpc.aio.Channel:
        """A channel as services open it: its windows are small."""
        opened = channel.connect(f"127.0.0.1:{self.running[which].port}")
        self.services.stack.push_async_callback(opened.close, None)
        return opened

    async def run(self, user: User, which: int) -> tuple[str, str]:
        """A run of the user whose record is open on a replica: its id and its context token."""
        run_id = ids.uuid7()
        wanted = context_pb2.OpenContextRequest(request_id=run_id, run_id=run_id, access_token=user.token, agent_context=b"{}")
        token = (await self._contexts.OpenContext(wanted, metadata=self.tokens["dispatcher"], wait_for_ready=True)).context_token
        opened = events_pb2.OpenRunRequest(run_id=run_id, epoch=1, context_token=token)
        await self.stubs[which].OpenRun(opened, metadata=self.tokens["dispatcher"], wait_for_ready=True)
        return run_id, token

    async def append(self, which: int, requests: list[events_pb2.AppendRequest]) -> list[events_pb2.AppendResponse]:
        async def sent() -> AsyncIterator[events_pb2.AppendRequest]:
            for request in requests:
                yield request

        return [answer async for answer in self.stubs[which].Append(sent(), metadata=self.tokens["dispatcher"], timeout=20)]

    def tail(self, which: int, *users: User) -> Any:
        """The tail of a gateway that follows these users, for as long as it is read."""

        async def joins() -> AsyncIterator[events_pb2.TailRequest]:
            for user in users:
                yield events_pb2.TailRequest(join=events_pb2.JoinUser(access_token=user.token))
            await asyncio.Event().wait()

        return self.stubs[which].Tail(joins(), metadata=self.tokens["gateway"], wait_for_ready=True)


def _appends(run_id: str, first: int, many: int, data: bytes = b"{}", each: int = 1) -> list[events_pb2.AppendRequest]:
    return [
        events_pb2.AppendRequest(
            append_id=seq, run_id=run_id, epoch=1, first_seq=seq, events=[event(data=data) for _ in range(each)]
        )
        for seq in range(first, first + many, each)
    ]  # fmt: skip


async def _joined(call: AsyncIterable[events_pb2.TailResponse]) -> events_pb2.TailPosition:
    async with asyncio.timeout(10):
        async for batch in call:
            for position in batch.positions:
                assert position.joined, position.reason
                return position
    raise AssertionError("the tail ended")


async def _cursors(call: Any, last: int) -> list[int]:
    seen: list[int] = []
    async with asyncio.timeout(20):
        async for batch in call:
            seen += [each.cursor for each in batch.events]
            if seen and seen[-1] >= last:
                return seen
    return seen


@pytest.fixture
async def replicas(services: Services) -> Replicas:
    """Both."""
    return await Replicas(services).start()


async def test_what_one_replica_records_is_seen_live_on_both(replicas: Replicas) -> None:
    user = await replicas.services.user()
    runs = [(await replicas.run(user, which))[0] for which in (0, 1)]
    calls = [replicas.tail(which, user) for which in (0, 1)]
    assert [(await _joined(call)).cursor for call in calls] == [0, 0]
    await asyncio.gather(*(replicas.append(which, _appends(run_id, 1, 50)) for which, run_id in enumerate(runs)))
    assert [await _cursors(call, 100) for call in calls] == [list(range(1, 101))] * 2
    for call in calls:
        call.cancel()


def _shown(run_id: str, text: str, after_seq: int, epoch: int = 1) -> events_pb2.AppendRequest:
    transient = events_pb2.Transient(type="agent_delta", data=b'{"text":"%b"}' % text.encode(), after_seq=after_seq)
    return events_pb2.AppendRequest(append_id=after_seq, run_id=run_id, epoch=epoch, transients=[transient])


async def _told(call: Any, last: int | str) -> list[int | str]:
    """Cursors of events, and what is shown, up to something."""
    seen: list[int | str] = []
    async with asyncio.timeout(20):
        async for batch in call:
            seen += [each.cursor for each in batch.events] + [json.loads(each.frame)["data"]["text"] for each in batch.transients]
            if last in seen:
                return seen
    return seen


async def test_what_one_replica_shows_is_seen_on_both_and_of_the_owner_only(replicas: Replicas) -> None:
    user, other = await replicas.services.user(), await replicas.services.user()
    run_id, token = await replicas.run(user, 0)
    calls = [replicas.tail(which, user) for which in (0, 1)]
    theirs = replicas.tail(1, other)
    for call in (*calls, theirs):
        await _joined(call)
    # in the order of the stream, though nothing of it waits for the commits
    await replicas.append(0, [*_appends(run_id, 1, 1), _shown(run_id, "a", 1), _shown(run_id, "b", 1)])
    assert [await _told(call, "b") for call in calls] == [[1, "a", "b"]] * 2
    again = events_pb2.OpenRunRequest(run_id=run_id, epoch=2, context_token=token)
    await replicas.stubs[0].OpenRun(again, metadata=replicas.tokens["dispatcher"])
    assert [answer.error_code for answer in await replicas.append(0, [_shown(run_id, "old", 1)])] == ["FENCED"]
    end = _appends(run_id, 2, 1)[0]
    end.epoch, end.end = 2, True
    await replicas.append(0, [_shown(run_id, "held", 2, epoch=2), end, _shown(run_id, "after the end", 2, epoch=2)])
    another, _ = await replicas.run(user, 0)
    await replicas.append(0, _appends(another, 1, 1))
    assert [await _told(call, 3) for call in calls] == [[2, 3]] * 2
    stranger, _ = await replicas.run(other, 1)
    await replicas.append(1, _appends(stranger, 1, 1))
    assert await _told(theirs, 1) == [1]
    for call in (*calls, theirs):
        call.cancel()


async def test_who_reads_nothing_is_sent_little_and_misses_nothing(replicas: Replicas) -> None:
    user = await replicas.services.user()
    run_id, _ = await replicas.run(user, 0)
    call = replicas.tail(0, user)
    await _joined(call)
    await replicas.append(0, _appends(run_id, 1, 4000, b'{"a":"%s"}' % (b"x" * 1000), 50))
    live = replicas.running[0].live._topics[user.user_id]
    # the events are here; what of them was given to the transport
    async with asyncio.timeout(10):
        while live.last < 4000:  # noqa: ASYNC110 - another loop's work, which says nothing
            await asyncio.sleep(0.01)
    (follower,) = live.listeners
    assert follower.sent_to * 1400 < 1024 * 1024  # type: ignore[attr-defined]
    assert await _cursors(call, 4000) == list(range(1, 4001))
    call.cancel()


async def test_valkey_away_is_told_in_health_and_in_the_tail_and_costs_no_event(services: Services) -> None:
    replicas = await Replicas(services).start(valkey_url="redis://127.0.0.1:1/0", events_poll_s=0.1)
    health: Any = health_pb2_grpc.HealthStub(replicas.channel(1))
    user = await services.user()
    run_id, _ = await replicas.run(user, 0)
    call = replicas.tail(1, user)
    await _joined(call)
    await replicas.append(0, _appends(run_id, 1, 20))
    assert await _cursors(call, 20) == list(range(1, 21))
    async with asyncio.timeout(5):
        assert (await anext(aiter(call))).degraded
    asked = [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", "netra.live")]
    assert asked == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    call.cancel()


async def test_old_announcements_are_dropped(stores: Standalone, database: str) -> None:
    dsn = EventsSettings(valkey_url=processes.without_user(stores.valkey_admin_url), secrets_dir=stores.secrets / "events")
    valkey = streams.Streams(dsn.valkey_dsn("events"), "events", database)
    await valkey.append([(announce.PARTITIONS[0], {"a": number}) for number in range(3)], keep=10)
    await valkey.trim(announce.PARTITIONS, older_than_s=60)
    start = dict.fromkeys(announce.PARTITIONS, "0-0")
    assert len(await valkey.read(start, block_ms=1)) == 3
    async with asyncio.timeout(10):
        while await valkey.read(start, block_ms=1):
            # older than this very second
            await valkey.trim(announce.PARTITIONS, older_than_s=0)
    await valkey.close()


async def test_a_run_is_taken_over_however_large_the_results_of_its_steps_are(replicas: Replicas) -> None:
    run_id, token = await replicas.run(await replicas.services.user(), 0)
    large = b'"%s"' % (b"x" * 250 * 1024)
    steps = [events_pb2.Step(key=f"{number}", result=large) for number in range(17)]
    appends = [
        events_pb2.AppendRequest(append_id=number, run_id=run_id, epoch=1, first_seq=1, steps=[step]) for number, step in enumerate(steps)
    ]
    assert [answer.error_code for answer in await replicas.append(0, appends)] == [""] * 17
    request = events_pb2.OpenRunRequest(run_id=run_id, epoch=2, context_token=token)
    opened = await replicas.stubs[1].OpenRun(request, metadata=replicas.tokens["dispatcher"], timeout=10)
    assert (opened.next_seq, opened.ended, len(opened.steps)) == (1, False, 0)
