"""The one tail: joins in each user's name, survives a broken stream, keeps every socket in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from chassis import identity, replicas
from gateway import delivery, pump, subscriptions, upstreams
from netra import errors, ids
from netra.events.v1 import events_pb2
from tests.fixtures import ready


def _principal(credential: str = "t1", user: str = "01890a5d-ac96-774b-bcce-b302099a8057", lives_s: float = 600) -> identity.Principal:
    user_id = ids.UserId(user)
    return identity.Principal(user_id, ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + lives_s, credential)


@dataclass(eq=False)
class _Sink:
    principal: identity.Principal
    delivery: delivery.Delivery
    resyncs: list[tuple[str, int]] = field(default_factory=list)

    def resync(self, epoch: str, cursor: int) -> None:
        self.resyncs.append((epoch, cursor))


class _Call:
    """One Tail call under the test's control."""

    def __init__(self, requests: AsyncIterator[events_pb2.TailRequest]) -> None:
        self.requests = requests
        self.answers: asyncio.Queue[events_pb2.TailResponse | None] = asyncio.Queue()

    async def asked(self) -> events_pb2.TailRequest:
        return await asyncio.wait_for(anext(self.requests), 2)

    def position(self, cursor: int, epoch: str = "e1") -> None:
        position = events_pb2.TailPosition(user_id=_principal().user_id, cursor=cursor, oldest=1, epoch=epoch, joined=True)
        self.answers.put_nowait(events_pb2.TailResponse(positions=[position]))

    def dismissed(self, join_id: str = "", user_id: str = _principal().user_id) -> None:
        position = events_pb2.TailPosition(user_id=user_id, joined=False, reason="The session has ended.", join_id=join_id)
        self.answers.put_nowait(events_pb2.TailResponse(positions=[position]))

    def events(self, *cursors: int) -> None:
        user_id = _principal().user_id
        events = [events_pb2.Event(cursor=one, seq=one, run_id="r", user_id=user_id, frame=b"%d" % one) for one in cursors]
        self.answers.put_nowait(events_pb2.TailResponse(events=events))

    def cancel(self) -> None:
        self.answers.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[events_pb2.TailResponse]:
        while (answer := await self.answers.get()) is not None:
            yield answer


class _Stub:
    """The replicas of events; what is asked of any of them ends up here."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[_Call] = asyncio.Queue()
        self.asked: list[str] = []

    def each(self, *targets: str) -> upstreams.Events:
        return replicas.Each(replicas.Replicas(",".join(targets or ("a:1",))), self._of)  # type: ignore[arg-type]

    def _of(self, target: str) -> _Stub:
        self.asked.append(target)
        return self

    def Tail(self, requests: AsyncIterator[events_pb2.TailRequest]) -> _Call:
        call = _Call(requests)
        self.calls.put_nowait(call)
        return call

    async def call(self) -> _Call:
        return await asyncio.wait_for(self.calls.get(), 3)


@contextlib.asynccontextmanager
async def _running() -> AsyncIterator[tuple[pump.Pump, _Call, asyncio.TaskGroup]]:
    """A pump that runs, its one call to the record, and a group for what waits."""
    stub = _Stub()
    tail = pump.Pump(stub.each(), "gateway")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tail.run())
        yield tail, await stub.call(), group
        running.cancel()


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def _attached(tail: pump.Pump, call: _Call, who: identity.Principal, cursor: int) -> tuple[pump.Feed, _Sink]:
    async with asyncio.TaskGroup() as group:
        following = group.create_task(tail.follow(who))
        assert (await call.asked()).join.access_token == who.token
        call.position(cursor)
    feed = following.result()
    sink = _Sink(who, delivery.Delivery(feed.cursor, feed.cursor, 100, 10_000))
    tail.attach(feed, sink)
    return feed, sink


def _read(sink: _Sink) -> list[int]:
    found = []
    while (frame := sink.delivery.take()) is not None:
        found.append(int(*ready.payloads(frame.wire)))
    return found


@pytest.mark.asyncio
async def test_events_reach_the_sockets_of_their_user() -> None:
    async with _running() as (tail, call, _):
        feed, sink = await _attached(tail, call, _principal(), 7)
        call.events(8, 9)
        await _settled()
        assert (_read(sink), feed.cursor) == ([8, 9], 9)
        tail.detach(sink)
        assert (await call.asked()).leave.user_id == sink.principal.user_id


@pytest.mark.asyncio
async def test_a_broken_stream_is_opened_again_and_the_gap_is_noticed() -> None:
    stub = _Stub()
    tail = pump.Pump(stub.each(), "gateway")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tail.run())
        call = await stub.call()
        _, sink = await _attached(tail, call, _principal(), 7)
        call.cancel()
        second = await stub.call()
        assert (await second.asked()).join.access_token == "t1"
        second.position(9)
        await _settled()
        assert (sink.delivery.behind, sink.delivery.tail) == (True, 9)
        running.cancel()


@pytest.mark.asyncio
async def test_a_token_that_ends_makes_room_for_another_of_the_same_user() -> None:
    async with _running() as (tail, call, _):
        feed, first = await _attached(tail, call, _principal("t1", lives_s=900), 0)
        await tail.follow(_principal("t2"))  # joined already: no question asked
        call.dismissed()
        # nothing is known of which token it was about
        again = (await call.asked()).join
        assert again.access_token == first.principal.token
        call.dismissed(again.join_id)
        assert (await call.asked()).join.access_token == "t2"
        call.position(0)
        await _settled()
        assert feed.joined


@pytest.mark.asyncio
async def test_a_refused_token_is_an_answer() -> None:
    async with _running() as (tail, call, group):
        refused = group.create_task(_expect_unauthenticated(tail))
        call.dismissed((await call.asked()).join.join_id)
        await refused


async def _expect_unauthenticated(tail: pump.Pump) -> None:
    with pytest.raises(errors.Unauthenticated):
        await tail.follow(_principal())


async def test_the_end_of_an_earlier_session_is_no_answer_to_the_next_one() -> None:
    async with _running() as (tail, call, group):
        _, sink = await _attached(tail, call, _principal("t1"), 7)
        tail.detach(sink)
        assert (await call.asked()).WhichOneof("action") == "leave"
        following = group.create_task(tail.follow(_principal("t2")))
        assert (await call.asked()).join.access_token == "t2"
        call.dismissed()
        await _settled()
        assert not following.done()
        call.position(9)
        assert (await following).cursor == 9


async def test_the_end_of_an_earlier_session_does_not_stop_the_events_of_the_next_one() -> None:
    async with _running() as (tail, call, _):
        _, sink = await _attached(tail, call, _principal("t2"), 7)
        call.dismissed()
        async with asyncio.timeout(0.5):  # at once
            assert (await call.asked()).join.access_token == "t2"
        call.position(7)
        call.events(8)
        await _settled()
        assert _read(sink) == [8]


async def test_who_is_not_followed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "_MEND_S", 0.02)
    async with _running() as (tail, call, group):
        following = group.create_task(tail.follow(_principal("t1")))
        for _ in range(3):  # a replica that cannot reach its database says nothing
            assert (await call.asked()).join.access_token == "t1"
        call.position(7)
        assert (await following).cursor == 7


async def test_a_token_that_was_renewed_vouches_at_once() -> None:
    async with _running() as (tail, call, _):
        _, sink = await _attached(tail, call, _principal("t1"), 7)
        sink.principal = _principal("t2", lives_s=1200)
        tail.renewed(sink.principal.user_id)
        assert (await call.asked()).join.access_token == "t2"


@pytest.mark.asyncio
async def test_an_earlier_refusal_is_no_answer() -> None:
    async with _running() as (tail, call, group):
        feed, _ = await _attached(tail, call, _principal("t1", lives_s=60), 0)
        feed.joined, feed.refused["t2"] = False, time.time() - 60
        following = group.create_task(tail.follow(_principal("t2")))
        assert (await call.asked()).join.access_token == "t2"
        await _settled()
        assert not following.done()
        call.position(0)
        assert (await following).joined


@pytest.mark.asyncio
async def test_no_answer_is_unavailable_and_a_word_about_nobody_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "_PATIENCE_S", 0.1)
    async with _running() as (tail, call, _):
        call.dismissed(user_id="")
        with pytest.raises(errors.Unavailable):
            await tail.follow(_principal())


@pytest.mark.asyncio
async def test_another_generation_of_the_record_is_told() -> None:
    async with _running() as (tail, call, _):
        _, sink = await _attached(tail, call, _principal(), 7)
        call.position(3, epoch="e2")
        await _settled()
        assert sink.resyncs == [("e2", 3)]


def _transient(after_cursor: int, frame: bytes, user_id: str = "") -> events_pb2.TransientEvent:
    return events_pb2.TransientEvent(
        user_id=user_id or _principal().user_id, run_id="r", type="agent_delta", frame=frame, after_seq=1, after_cursor=after_cursor
    )


async def test_a_transient_comes_in_its_place_or_not_at_all() -> None:
    async with _running() as (tail, call, _):
        _, sink = await _attached(tail, call, _principal(), 0)
        call.events(1, 2)
        shown = [_transient(1, b"100"), _transient(2, b"200"), _transient(2, b"9", ids.uuid7()), _transient(3, b"300")]
        call.answers.put_nowait(events_pb2.TailResponse(transients=shown))
        call.events(3)
        await _settled()
        # the first one's sum is in event 2 already
        assert _read(sink) == [1, 2, 200, 3]
        call.answers.put_nowait(events_pb2.TailResponse(transients=[_transient(3, b"301")]))
        call.events(4)
        await _settled()
        assert (_read(sink), sink.delivery.sent) == ([301, 4], 4)


async def test_a_replica_that_is_silent_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SILENCE_S", 0.2)
    stub = _Stub()
    tail = pump.Pump(stub.each("a:1", "b:2"), "gateway")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tail.run())
        call = await stub.call()
        _, sink = await _attached(tail, call, _principal(), 7)
        second = await stub.call()
        assert sorted(stub.asked) == ["a:1", "b:2"]
        assert not tail.connected
        assert (await second.asked()).join.access_token == "t1"
        second.position(9)
        await _settled()
        assert (tail.connected, sink.delivery.tail) == (True, 9)
        running.cancel()


async def test_empty_batches_keep_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    silence_s, batches = 2.0, (False, False, True, True, False, False, True, False, False, True)
    monkeypatch.setattr(replicas, "SILENCE_S", silence_s)
    stub = _Stub()
    tail = pump.Pump(stub.each("a:1", "b:2"), "gateway")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tail.run())
        call = await stub.call()
        for late in batches:
            # the time itself is what is tested here: more than one silence in all, and far less between two
            await asyncio.sleep(silence_s * 1.25 / len(batches))
            call.answers.put_nowait(events_pb2.TailResponse(degraded=late))
            await _settled()
            assert (tail.connected, tail.live) == (True, not late)
        assert len(stub.asked) == 1
        running.cancel()


async def test_who_is_not_followed_is_not_woken_by_others() -> None:
    stub = _Stub()
    tail = pump.Pump(stub.each(), "gateway")
    other = _principal("t2", "01890a5d-ac96-774b-bcce-b302099a8058")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(tail.run())
        call = await stub.call()
        waiting = group.create_task(tail.follow(other))
        await call.asked()
        await _attached(tail, call, _principal(), 7)
        assert not waiting.done()
        position = events_pb2.TailPosition(user_id=other.user_id, cursor=1, oldest=1, epoch="e1", joined=True)
        call.answers.put_nowait(events_pb2.TailResponse(positions=[position]))
        assert (await waiting).cursor == 1
        running.cancel()


async def test_what_is_skipped_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "_TICK_S", 0.05)
    async with _running() as (tail, call, _):
        _, sink = await _attached(tail, call, _principal(), 0)
        sink.delivery.filter.add(subscriptions.Subscription("s", run_id="another"))
        told = asyncio.Event()
        sink.delivery.woken = told.set
        call.events(1, 2)
        async with asyncio.timeout(2):
            await told.wait()
        frame = sink.delivery.take()
        assert frame is not None
        assert (frame.type, frame.cursor) == ("position", 2)
