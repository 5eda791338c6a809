"""Clients of the proof: each user has one socket that is kept open, starts runs, and answers what runs ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

from netra import ids
from tests.prove import people
from tests.prove.runs import judge

_PATIENCE_S, _AGAIN_S, _LOOK_S = 15.0, 0.1, 0.02
# what asks for a socket that is not there, or breaks one that is
BROKEN = (OSError, websockets.WebSocketException, TimeoutError)


@dataclass(slots=True)
class Follower:
    """What one user saw, over all of their sockets: the events in the order in which they came."""

    person: people.Person
    frames: list[judge.Frame] = field(default_factory=list)
    by_run: dict[str, list[judge.Frame]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, judge.Frame] = field(default_factory=dict)
    # when a socket was lost, and what went wrong beside
    lost_at: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, port: int) -> None:
        """Keep a socket open until it is over; a lost one is opened again where it was lost."""
        while not self.over.is_set():
            try:
                async with self._opened(port) as socket:
                    await self._listen(socket)
            except BROKEN:
                # one that was never open is not lost
                if self.joined.is_set():
                    self.lost_at.append(time.time())
                    self.joined.clear()
                await asyncio.sleep(_AGAIN_S)

    def _opened(self, port: int) -> websockets.connect:
        last = self.frames[-1]["cursor"] if self.frames else 0
        protocols: Any = ["netra.v1", f"bearer.{self.person.token}", f"resume.{last}"]
        url = f"ws://127.0.0.1:{port}/ws"
        return websockets.connect(
            url, subprotocols=protocols, open_timeout=_PATIENCE_S, ping_timeout=60, max_size=None, close_timeout=1, proxy=None
        )

    async def _listen(self, socket: websockets.ClientConnection) -> None:
        async with asyncio.TaskGroup() as group:
            reading, waiting = group.create_task(self._read(socket)), group.create_task(self.over.wait())
            await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()
            waiting.cancel()
        if not self.over.is_set():
            raise ConnectionError("the socket is lost")

    async def _read(self, socket: websockets.ClientConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await self._take(socket, json.loads(await socket.recv()))

    async def _take(self, socket: websockets.ClientConnection, frame: dict[str, Any]) -> None:
        if "seq" in frame:
            self.frames.append(frame)
            self.by_run[frame["run_id"] or ""].append(frame)
            if frame["type"] in judge.ENDS:
                self.ended[frame["run_id"]] = frame
        elif frame["type"] == "connected":
            self.joined.set()
        elif frame["type"] == "auth_expiring":
            payload = {"access_token": self.person.token}
            await socket.send(json.dumps({"type": "AUTH", "id": str(ids.uuid7()), "payload": payload}))
        elif frame["type"] in ("resync", "history_truncated"):
            self.wrong.append(frame["type"])


@dataclass(slots=True)
class Desk:
    """Starts runs over HTTP; each start is asked again under its own key until it is answered."""

    http: httpx.AsyncClient
    # answers that say: not now
    passing: list[str] = field(default_factory=list)
    # answers that say: never
    refused: list[str] = field(default_factory=list)
    unreachable: int = 0

    async def start(self, who: people.Person, agent: str, inputs: dict[str, Any]) -> str:
        """The id of the run; empty when it was refused for good."""
        body = {"agent": agent, "user_request": f"{inputs.get('mark', agent)} is to be done.", "inputs": inputs}
        key = str(ids.uuid7())
        while True:
            try:
                headers = {"Authorization": f"Bearer {who.token}", "Idempotency-Key": key}
                answer = await self.http.post("/v1/runs", json=body, headers=headers)
            except httpx.HTTPError:
                self.unreachable += 1
                await asyncio.sleep(_AGAIN_S)
                continue
            if answer.status_code == 202:
                return str(answer.json()["run_id"])
            said = _said(answer)
            if not said["retryable"]:
                self.refused.append(f"{answer.status_code} {said['code']}: {said['detail']}")
                return ""
            self.passing.append(said["code"])
            await asyncio.sleep((said["retry_after_ms"] or 1000 * _AGAIN_S) / 1000)


def _said(answer: httpx.Response) -> dict[str, Any]:
    """What a refusal says. That of a server which is just ending has no form: 503 is to be asked again, as everywhere."""
    if answer.headers.get("content-type") == "application/problem+json":
        return dict(answer.json())
    code = f"{answer.status_code} {answer.text[:100]!r}"
    return {"code": code, "retryable": answer.status_code == 503, "retry_after_ms": None, "detail": "without a form"}


async def until(what: Callable[[], object], within_s: float) -> bool:
    """Whether something came true in time; another process decides."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while True:
                if what():
                    return True
                await asyncio.sleep(_LOOK_S)
    return False
