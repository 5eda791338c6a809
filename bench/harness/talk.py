"""A client on a WebSocket that starts runs and times them; the same for the gateway and for what is measured beside it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import websockets

from netra import ids

ENDS = frozenset({"agent_completed", "agent_failed", "agent_timed_out", "agent_cancelled"})
_PATIENCE_S = 60.0


class Broken(Exception):
    """What came was not what had to come."""


@dataclass(slots=True)
class Run:
    """What a client saw of a run. Times are of `time.perf_counter`."""

    request_id: str
    asked_at: float
    run_id: str = ""
    thread_id: str = ""
    acked_at: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    ended_at: float = 0.0

    @property
    def ms(self) -> float:
        """From asking to the last event."""
        return (self.ended_at - self.asked_at) * 1000

    @property
    def end(self) -> dict[str, Any]:
        """The last event."""
        return self.events[-1]

    def completed(self, kinds: Sequence[str] = ()) -> None:
        """Raises `Broken` unless it came to its result, with every event in its place; of these kinds, where they are told."""
        told = [event["type"] for event in self.events]
        seqs = [event["seq"] for event in self.events]
        if told[-1] != "agent_completed" or seqs != list(range(1, len(seqs) + 1)) or (kinds and told != list(kinds)):
            raise Broken(f"{told}: {self.end['data']}")


class Talk:
    """One user on one socket, with one run at a time."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket

    async def start(self, agent: str, request: str, *, thread_id: str = "", **inputs: object) -> Run:
        """Ask for a run, in a new thread unless one is given. Events may come before the answer."""
        run = Run(ids.uuid7(), time.perf_counter())
        frame = {"type": "START_AGENT", "id": run.request_id, "payload": {"agent": agent, "user_request": request, "inputs": inputs}}
        await self._say({**frame, "thread_id": thread_id} if thread_id else frame)
        return run

    async def cancel(self, run: Run) -> None:
        """Ask it to stop."""
        await self._say({"type": "CANCEL", "id": ids.uuid7(), "payload": {"run_id": run.run_id}})

    async def _say(self, frame: dict[str, Any]) -> None:
        await self._socket.send(orjson.dumps(frame), text=True)

    async def until(self, run: Run, *kinds: str, many: int = 1) -> Run:
        """Returns when so many events of these kinds have come, and the answer to the start. Raises `Broken` when it ended without."""
        wanted = many if kinds else 0
        async with asyncio.timeout(_PATIENCE_S):
            while wanted > 0 or not run.run_id:
                frame = orjson.loads(await self._socket.recv())
                if frame["type"] == "error":
                    raise Broken(str(frame))
                if frame["type"] == "ack" and frame["id"] == run.request_id:
                    run.run_id, run.thread_id = frame["data"]["run_id"], frame["data"]["thread_id"]
                    run.acked_at = time.perf_counter()
                elif frame.get("request_id") == run.request_id:
                    wanted -= self._took(run, frame, kinds)
        return run

    def _took(self, run: Run, event: dict[str, Any], kinds: Sequence[str]) -> bool:
        run.events.append(event)
        if event["type"] in ENDS:
            run.ended_at = time.perf_counter()
            if event["type"] not in kinds:
                raise Broken(f"{event['type']}: {event['data']}")
        return event["type"] in kinds

    async def run(self, agent: str, request: str, **inputs: object) -> Run:
        """One run, up to its end."""
        return await self.until(await self.start(agent, request, **inputs), *ENDS)


@contextlib.asynccontextmanager
async def sockets(port: int, tokens: Sequence[str]) -> AsyncIterator[list[Talk]]:
    """One for each token, open for the time of the block."""
    async with contextlib.AsyncExitStack() as opened:
        found = []
        for token in tokens:
            protocols: Any = ["netra.v1", f"bearer.{token}"]
            connecting = websockets.connect(
                f"ws://127.0.0.1:{port}/ws", subprotocols=protocols, compression=None, max_size=None, ping_interval=None, proxy=None
            )
            found.append(Talk(await opened.enter_async_context(connecting)))
        yield found


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
