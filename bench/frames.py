"""What does a frame cost the gateway? CPU per delivered frame, beside a bare `websockets` server that sends the same bytes.

python bench/frames.py [rounds] [events per user and round]

The gateway takes events from a tail over gRPC and gives them to its sockets: one per user (fan-out 1), or ten. The bare server has
as many sockets and calls `send` for each frame. Both are processes of their own on uvloop, and take turns.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
import websockets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, gateway, report

GOALS = {1: 2.0, 10: 1.3}
ROUNDS, EVENTS, SOCKETS = 6, 160, 40
# so many events of each user are on their way at once: what comes faster would be fed from the record
AHEAD = 16
FRAME = json.dumps({"type": "tool_executing", "cursor": 1, "data": {"parameters": "x" * 320}}).encode()


async def _bare() -> None:
    """The peer: sends frames to all its sockets when told to."""
    open_: list[websockets.asyncio.server.ServerConnection] = []

    async def keep(connection: Any) -> None:
        open_.append(connection)
        await connection.wait_closed()

    async def send(word: str) -> None:
        for _ in range(int(word) if word.isdigit() else 0):
            for connection in open_:
                await connection.send(FRAME, text=True)

    async with websockets.serve(keep, "127.0.0.1", 0, compression=None, subprotocols=["netra.v1"], ping_interval=None) as server:  # type: ignore[list-item]
        await child.answer({"port": next(iter(server.sockets)).getsockname()[1]}, send)


async def _delivered(place: gateway.Place, users: list[str], sockets: list[gateway.Socket], events: int) -> float:
    """CPU of the gateway per frame, in microseconds."""
    before, size = place.gateway.ask(), _size()
    for done in range(0, events, AHEAD):
        wanted = [one.received + AHEAD * size for one in sockets]
        for _ in range(AHEAD):
            place.emit(users, FRAME)
        await asyncio.gather(*(one.reached(due) for one, due in zip(sockets, wanted, strict=True)))
        assert done + AHEAD <= events
    return (place.gateway.ask() - before) / (events * len(sockets)) * 1e6


async def _sent(peer: child.Child, sockets: list[gateway.Socket], events: int) -> float:
    before = peer.ask()
    wanted = [one.received + events * _size() for one in sockets]
    waiting = asyncio.gather(*(one.reached(due) for one, due in zip(sockets, wanted, strict=True)))
    after = await asyncio.to_thread(peer.ask, str(events))
    await waiting
    return (after - before) / (events * len(sockets)) * 1e6


def _size() -> int:
    return len(FRAME) + 4


async def _measured(rounds: int, events: int) -> dict[str, list[float]]:
    peer = child.Child(__file__, "--bare")
    bare = [await gateway.Socket.open(peer.told["port"], greeted=False) for _ in range(SOCKETS)]
    async with gateway.place(__file__) as place:
        ways: dict[str, Callable[[], Awaitable[float]]] = {"bare": functools.partial(_sent, peer, bare, events)}
        mine: list[gateway.Socket] = []
        for fan in GOALS:
            users = [place.user() for _ in range(SOCKETS // fan)]
            sockets = [await gateway.Socket.open(place.gateway.told["port"], token) for _, token in users for _ in range(fan)]
            ways[f"fan-out {fan}"] = functools.partial(_delivered, place, [user_id for user_id, _ in users], sockets, events)
            mine += sockets
        found = await report.in_turn(ways, rounds)
        for one in (*bare, *mine):
            one.close()
    peer.close()
    return found


def main(rounds: int = ROUNDS, events: int = EVENTS) -> int:
    """Returns the exit code: 1 when a frame costs more than the goal."""
    found = uvloop.run(_measured(rounds, events))
    report.table(("server", "cpu_us_per_frame_median", "lowest", "highest"), ((name, *report.spread(each)) for name, each in found.items()))
    ratios = {fan: round(report.ratio(found[f"fan-out {fan}"], found["bare"]), 3) for fan in GOALS}
    good = all(ratios[fan] <= goal for fan, goal in GOALS.items())
    return report.verdict(
        "frames",
        good,
        ", ".join(f"<= {goal} x at {fan}" for fan, goal in GOALS.items()),
        ", ".join(f"{ratio} x at {fan}" for fan, ratio in ratios.items()),
        rounds=rounds,
        frames_per_round=events * SOCKETS,
    )


if __name__ == "__main__":
    if "--gateway" in sys.argv:
        gateway.serve(sys.argv[-1])
    elif "--bare" in sys.argv:
        uvloop.run(_bare())
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
