"""Pages of the record: in turn, a few at a time, from whichever replica answers."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest

from chassis import identity, replicas
from gateway import delivery, record
from netra import errors, ids
from netra.events.v1 import events_pb2


def _who() -> identity.Principal:
    return identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")


class _Replica:
    """One replica of events; a call waits until it is let go."""

    def __init__(self, away_for: float = 0, *epochs: str) -> None:
        self.away_for, self.waiting, self.most = away_for, 0, 0
        self.epochs = list(epochs or ("e1",))
        self.go = asyncio.Event()
        self.asked: list[int] = []

    async def ListEvents(self, request: events_pb2.ListEventsRequest, metadata: Any, timeout: float) -> events_pb2.ListEventsResponse:
        self.asked.append(request.after)
        if len(self.asked) <= self.away_for:
            raise errors.Unavailable
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await self.go.wait()
        self.waiting -= 1
        events = [events_pb2.Event(cursor=request.after + 1, frame=b"{}")]
        return events_pb2.ListEventsResponse(events=events, last=request.after + 1, oldest=1, epoch=self._epoch())

    def _epoch(self) -> str:
        return self.epochs.pop(0) if len(self.epochs) > 1 else self.epochs[0]


def _reader(**each: _Replica) -> record.Record:
    known = replicas.Replicas(",".join(f"{name}:1" for name in each))
    return record.Record(replicas.Each(known, lambda target: each[target.removesuffix(":1")]))  # type: ignore[arg-type, return-value]


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_user_reads_one_page_at_a_time_and_all_of_them_a_few() -> None:
    one, mine = _Replica(), _who()
    reader = _reader(a=one)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for after in range(5):
            group.create_task(reader.page(mine, after, 10))
        await _settled()
        assert one.waiting == 1
        for after in range(100, 130):
            group.create_task(reader.page(_who(), after, 10))
        await _settled()
        assert one.waiting == 8
        one.go.set()
    assert one.most == 8
    # in the order in which they came
    assert [after for after in one.asked if after < 100] == list(range(5))
    assert [after for after in one.asked if after >= 100] == list(range(100, 130))


async def test_nobody_waits_for_a_place_of_somebody_who_gave_up() -> None:
    one, mine = _Replica(), _who()
    reader = _reader(a=one)
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(reader.page(who, 0, 1)) for who in (mine, mine, _who())]
            await _settled()
            for task in reading:
                task.cancel()
        one.go.set()
        assert (await reader.page(mine, 0, 1)).last == 1


async def test_a_page_comes_from_the_replica_that_answers() -> None:
    away, there = _Replica(away_for=math.inf), _Replica()
    there.go.set()
    reader = _reader(a=away, b=there)
    for after in range(20):
        assert (await reader.page(_who(), after, 1)).last == after + 1
    assert len(there.asked) == 20
    assert len(away.asked) <= 1


async def test_a_socket_is_fed_through_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_RETRY_S", 0.01)
    monkeypatch.setattr(record, "_LONGEST_S", 0.02)
    one, mine, owed = _Replica(away_for=3), _who(), delivery.Delivery(0, 1, 10, 1000)
    one.go.set()
    async with asyncio.timeout(5):
        await _reader(a=one).feed(owed, "e1", lambda: mine, 10)
    assert (owed.last, owed.behind, one.asked) == (1, False, [0, 0, 0, 0])


async def test_a_page_of_another_record_is_not_put_after_cursors_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_RETRY_S", 0.01)
    one, mine, owed = _Replica(0, "e2", "e2", "e1"), _who(), delivery.Delivery(4, 5, 10, 1000)
    one.go.set()
    async with asyncio.timeout(5):
        await _reader(a=one).feed(owed, "e1", lambda: mine, 10)
    assert (owed.last, one.asked) == (5, [4, 4, 4])


async def test_a_replica_that_is_silent_holds_up_nobody_of_another_and_is_probed_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, there = _Replica(), _Replica()
    there.go.set()
    now = [0.0]
    known = replicas.Replicas("a:1,b:1", lambda: now[0])
    each: Any = replicas.Each(known, lambda target: {"a:1": silent, "b:1": there}[target])
    reader = record.Record(each)
    of_silent, of_there = ([who for who in (_who() for _ in range(200)) if known.first(who.user_id) == one] for one in ("a:1", "b:1"))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        stuck = [group.create_task(reader.page(who, 0, 1)) for who in of_silent[:20]]
        await _settled()
        assert silent.waiting == 8
        for who in of_there[:20]:
            assert (await reader.page(who, 0, 1)).last == 1
        known.away("a:1")
        # who waits for the silent one is told of another once there is room
        for task in stuck[:8]:
            task.cancel()
        await asyncio.wait(stuck)
        assert [len(silent.asked), sum(task.cancelled() for task in stuck)] == [8, 8]
        # after a while one asks whether it is back; the others do not wait for that
        now[0] += 1.5
        asking = [group.create_task(reader.page(who, 0, 1)) for who in of_silent[20:40]]
        await _settled()
        assert (len(silent.asked), sum(task.done() for task in asking)) == (9, 19)
        silent.go.set()


async def test_a_socket_that_is_closed_is_fed_no_more() -> None:
    owed = delivery.Delivery(0, 1, 10, 1000)
    owed.end()
    async with asyncio.timeout(1):
        await _reader(a=_Replica()).feed(owed, "e1", _who, 10)
