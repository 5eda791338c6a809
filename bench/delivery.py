"""What does batching gain on the way to the gateway? CPU of the server per event, beside one event per message.

python bench/delivery.py [rounds] [events per round]

One server, a process of its own, sends the same live events through the queue of the service: as many per message as wait, or one.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, report
from chassis import lifecycle
from netra import ids
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import fanout, feed, log, servicer

GOAL = 10.0
# what one entry of Valkey holds at most, and what comes at once
ENTRY, AT_ONCE = 32, 256
ROUNDS, EVENTS = 6, 20_000
FRAME = json.dumps({"type": "tool_executing", "cursor": 1, "data": {"parameters": "x" * 320}}).encode()
WINDOWS = (("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0))


class Both(events_pb2_grpc.EventsServiceServicer):
    """Tail sends batches, Subscribe one event per message; both whenever `offer` has something."""

    def __init__(self) -> None:
        self._tasks = lifecycle.Tasks()
        self._topics: dict[str, fanout.Topic] = {}
        # CPU that went into what is to be sent
        self.made_s = 0.0

    def _stream(self, way: str) -> feed.Stream:
        topic = self._topics[way] = fanout.Topic(ids.uuid7())
        topic.last = 0
        unused: Any = None
        stream = feed.Stream(unused, unused, self._tasks)
        stream.follow(topic, 0)
        return stream

    async def Tail(self, requests: Any, context: Any) -> AsyncIterator[events_pb2.TailResponse]:
        stream = self._stream("batches")
        yield events_pb2.TailResponse()
        async for events in stream.batches():
            answer = events_pb2.TailResponse()
            servicer.fill(answer.events, events)
            yield answer

    async def Subscribe(self, request: Any, context: Any) -> AsyncIterator[events_pb2.SubscribeResponse]:
        stream = self._stream("single")
        yield events_pb2.SubscribeResponse()
        async for events in stream.batches():
            for event in events:
                one = events_pb2.SubscribeResponse()
                servicer.fill(one.events, [event])
                yield one

    async def offer(self, way: str, many: int) -> None:
        """So many events, as they come from Valkey: some at a time."""
        topic = self._topics[way]
        (follower,) = topic.listeners
        before, first = time.process_time(), topic.last + 1
        made = [
            log.Recorded(topic.user_id, cursor, topic.user_id, cursor, topic.user_id, "tool_executing", FRAME)
            for cursor in range(first, first + many)
        ]
        self.made_s += time.process_time() - before
        for start in range(0, many, AT_ONCE):
            for at in range(start, min(start + AT_ONCE, many), ENTRY):
                topic.offer(made[at : at + ENTRY])
            while follower.queued:  # type: ignore[attr-defined]  # noqa: ASYNC110 - the queue tells nobody
                await asyncio.sleep(0.005)


def _both() -> Both:
    # the other methods are not called
    return Both()  # type: ignore[abstract]


async def _serve() -> None:
    both, server = _both(), grpc.aio.server(options=WINDOWS)
    events_pb2_grpc.add_EventsServiceServicer_to_server(both, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def offer(word: str) -> None:
        way, _, many = word.partition(" ")
        if many:
            await both.offer(way, int(many))

    await child.answer({"port": port}, offer, apart=lambda: both.made_s)
    await server.stop(None)


async def _taken(call: Any, many: int) -> None:
    while many > 0:
        many -= len((await call.read()).events)


async def _sent(server: child.Child, name: str, call: Any, events: int) -> float:
    """Microseconds of the server's CPU per event."""
    before = await asyncio.to_thread(server.ask)
    await asyncio.gather(asyncio.to_thread(server.ask, f"{name} {events}"), _taken(call, events))
    return (await asyncio.to_thread(server.ask) - before) / events * 1e6


async def _measured(rounds: int, events: int) -> dict[str, list[float]]:
    server = await asyncio.to_thread(child.Child, __file__, "--serve")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.told['port']}", options=WINDOWS) as channel:
        stub: Any = events_pb2_grpc.EventsServiceStub(channel)
        calls = {"batches": stub.Tail(), "single": stub.Subscribe(events_pb2.SubscribeRequest())}
        for call in calls.values():
            await call.read()
        ways = {name: functools.partial(_sent, server, name, call, events) for name, call in calls.items()}
        found = await report.in_turn(ways, rounds)
        for call in calls.values():
            call.cancel()
    await asyncio.to_thread(server.close)
    return found


def main(rounds: int = ROUNDS, events: int = EVENTS) -> int:
    """Returns the exit code: 1 when batches gain less than the goal."""
    found = uvloop.run(_measured(rounds, events))
    report.table(("way", "cpu_us_per_event_median", "lowest", "highest"), ((name, *report.spread(each)) for name, each in found.items()))
    ratio = report.ratio(found["single"], found["batches"])
    return report.verdict("delivery", ratio >= GOAL, f">= {GOAL:g} x", f"{ratio:.2f} x", rounds=rounds, events=events)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        uvloop.run(_serve())
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
