"""Clients: each follows its user over any gateway, is thrown off, comes back with its cursor, and keeps a book."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import websockets

from netra import ids
from tests.prove.record import book, place

_PATIENCE_S = 15.0


async def follow(
    where: place.Place, user: place.Person, seen: book.Seen, stop: asyncio.Event, chance: random.Random, stays_s: float | None
) -> None:
    """Follow until told to stop and nothing is owed any more; `stays_s` is how long a connection is kept, None for as long as it holds."""
    while not stop.is_set():
        with contextlib.suppress(OSError, websockets.WebSocketException, TimeoutError):
            async with _connected(where, user, seen.last, chance) as socket:
                await _listen(socket, user, seen, stop, stays_s and chance.uniform(0, stays_s * 2))
        seen.reconnects += 1
        await asyncio.sleep(chance.uniform(0, 0.2))


def _connected(where: place.Place, user: place.Person, after: int, chance: random.Random) -> websockets.connect:
    port = chance.choice(where.fronts).port
    protocols = ["netra.v1", f"bearer.{user.token}", f"resume.{after}"]
    return websockets.connect(
        f"ws://127.0.0.1:{port}/ws", subprotocols=protocols, open_timeout=_PATIENCE_S, ping_interval=5, ping_timeout=5, max_size=None,  # type: ignore[arg-type]
        close_timeout=1, proxy=None,
    )  # fmt: skip


async def _listen(
    socket: websockets.ClientConnection, user: place.Person, seen: book.Seen, stop: asyncio.Event, stays_s: float | None
) -> None:
    loop = asyncio.get_running_loop()
    until = None if stays_s is None else loop.time() + stays_s
    while not stop.is_set() and (until is None or loop.time() < until):
        try:
            async with asyncio.timeout(1.0):
                frame = json.loads(await socket.recv())
        except TimeoutError:
            continue
        if "seq" in frame:
            seen.take(frame)
        elif frame["type"] == "auth_expiring":
            await socket.send(json.dumps({"type": "AUTH", "id": str(ids.uuid7()), "payload": {"access_token": user.token}}))
        elif frame["type"] in ("resync", "history_truncated"):
            seen.wrong.append(frame["type"])


async def stall(where: place.Place, user: place.Person, stop: asyncio.Event, chance: random.Random) -> None:
    """Connect and read nothing; again when thrown off."""
    while not stop.is_set():
        with contextlib.suppress(OSError, websockets.WebSocketException, TimeoutError):
            async with _connected(where, user, 0, chance) as socket:
                socket.transport.pause_reading()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(20):
                        await stop.wait()
                socket.transport.abort()
        await asyncio.sleep(chance.uniform(0.2, 1.0))


async def start_runs(where: place.Place, user: place.Person, found: book.Book, stop: asyncio.Event, chance: random.Random) -> None:
    """START_AGENT again and again; what is accepted must end."""
    while not stop.is_set():
        with contextlib.suppress(OSError, websockets.WebSocketException, TimeoutError):
            async with _connected(where, user, 0, chance) as socket, asyncio.timeout(_PATIENCE_S):
                payload = {"agent": "text-analyst", "user_request": "Rivers carry water."}
                await socket.send(json.dumps({"type": "START_AGENT", "id": str(ids.uuid7()), "payload": payload}))
                while (frame := json.loads(await socket.recv()))["type"] not in ("ack", "error"):
                    pass
                if frame["type"] == "ack":
                    found.accepted_runs.setdefault(user.user_id, []).append(frame["data"]["run_id"])
        await asyncio.sleep(chance.uniform(0.5, 2.0))
