"""What is counted of messages, and what is told of the ends of runs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway import frames, stages, statistics
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2


def _frame(kind: str, alias: str = "") -> frames.Frame:
    return frames.Frame(kind, "f", "", {}, alias)


def test_each_message_counts_once_for_its_user_and_for_the_process() -> None:
    counted = statistics.Statistics()
    ann, bob = ids.UserId.new(), ids.UserId.new()
    for user, kinds in ((ann, ("START_AGENT", "CHAT", "CHAT", "PING")), (bob, ("USER_MESSAGE",))):
        for kind in kinds:
            counted.received(user, _frame(kind))
    before = time.time()
    counted.processed(ann, _frame("CHAT"))
    counted.processed(ann, _frame("CANCEL"))
    counted.refused(ann)
    mine = counted.of(ann)
    assert (mine.start_agent_requests, mine.user_messages, mine.chat_messages) == (1, 0, 2)
    assert (mine.messages_processed, mine.errors) == (1, 1)
    assert mine.last_processed_time is not None
    assert before <= mine.last_processed_time <= time.time()
    assert counted.of(bob).shown() | {"user_messages": 0} == statistics.Counts().shown()
    whole = counted.process
    assert (whole.start_agent_requests, whole.user_messages, whole.chat_messages, whole.messages_processed) == (1, 1, 2, 1)


def test_old_names_are_counted_by_name_however_they_are_written() -> None:
    counted, user = statistics.Statistics(), ids.UserId.new()
    for text in ("user_input", "USER_INPUT", "Heartbeat"):
        counted.received(user, frames.parse(f'{{"type":"{text}"}}', 1000))
    assert counted.of(user).shown()["deprecated"] == {"USER_INPUT": 2, "HEARTBEAT": 1}
    assert (counted.of(user).user_messages, counted.process.user_messages) == (2, 2)


def test_users_of_whom_nothing_comes_are_forgotten_first() -> None:
    counted = statistics.Statistics(remembered=2)
    first, second, third = (ids.UserId.new() for _ in range(3))
    for user in (first, second, first, third):
        counted.refused(user)
    assert [counted.of(user).errors for user in (first, second, third)] == [2, 0, 1]
    assert counted.process.errors == 4


async def test_the_ends_of_runs_are_told_once_and_in_batches() -> None:
    noted, told = stages.Stages(every_s=0), asyncio.Event()
    asked: list[dispatcher_pb2.RecordStagesRequest] = []

    async def record(request: dispatcher_pb2.RecordStagesRequest) -> None:
        asked.append(request)
        told.set()

    for number in range(1500):
        noted.note(f"run{number}")
    noted.note("run0")
    noted.note("")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(noted.run(record))
        while sum(len(one.notified) for one in asked) < 1500:
            told.clear()
            await told.wait()
        noted.note("late")
        told.clear()
        await told.wait()
        running.cancel()
    assert [len(one.notified) for one in asked] == [1000, 500, 1]
    assert [one.run_id for request in asked for one in request.notified] == [*(f"run{number}" for number in range(1500)), "late"]
    assert abs(asked[0].notified[0].at.ToNanoseconds() / 1e9 - time.time()) < 60


async def test_what_cannot_be_told_is_dropped_and_the_next_is_told() -> None:
    noted, asked = stages.Stages(), list[Any]()

    async def away(request: dispatcher_pb2.RecordStagesRequest) -> None:
        raise errors.Unavailable("away")

    async def record(request: dispatcher_pb2.RecordStagesRequest) -> None:
        asked.append([one.run_id for one in request.notified])

    noted.note("a")
    await noted.flush(away)
    noted.note("b")
    await noted.flush(record)
    assert asked == [["b"]]
    for number in range(20_000):
        noted.note(str(number))
    await noted.flush(record)
    assert sum(map(len, asked)) == 1 + 10_000
