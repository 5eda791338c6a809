"""Follows a thread through a gateway: the events of all its runs, whoever started them, each once and in order."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Protocol

from netra import errors
from netra.api import TERMINAL

_METHOD = "netra.events.v1.EventsService/FollowThread"
# of so many runs, and of all that go on, it is told how far they were seen
_MOST = 500
# a frame has room for no more of them
_ROOM = 750
_PAUSE_S = 0.25


class Gateway(Protocol):
    """Gives grant tokens."""

    async def grant_token(self, thread_id: str) -> str: ...


class Connection(Protocol):
    """Calls streaming RPCs."""

    @property
    def api(self) -> Gateway: ...
    @property
    def patience_s(self) -> float: ...

    def stream(self, method: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]: ...


class Place:
    """How far a thread was seen."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._over: set[str] = set()
        self._after = ""

    def request(self, token: str) -> dict[str, Any]:
        """What asks for the rest."""
        if (more := len(self._seen) - _MOST) > 0:
            # no more comes of what ended; a run that goes on keeps its place however old it is
            for run_id in sorted(self._over)[:more]:
                self._over.discard(run_id)
                del self._seen[run_id]
                self._after = max(self._after, run_id)
        for run_id in sorted(self._seen)[: max(len(self._seen) - _ROOM, 0)]:
            del self._seen[run_id]
            self._after = max(self._after, run_id)
        positions = [{"run_id": run_id, "seq": seq} for run_id, seq in self._seen.items()]
        return {"grant_token": token, "positions": positions, "after_run_id": self._after}

    def take(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of an answer that were not seen before; first `history_truncated` for runs of which some are gone."""
        found = []
        for gone in answer["truncated"]:
            self._seen[gone["run_id"]] = int(gone["seq"])
            found.append({"type": "history_truncated", "run_id": gone["run_id"], "seq": int(gone["seq"])})
        for event in answer["events"]:
            seq = int(event["seq"])
            if seq > self._seen.get(event["run_id"], 0):
                self._seen[event["run_id"]] = seq
                if event["type"] in TERMINAL:
                    self._over.add(event["run_id"])
                found.append(json.loads(base64.b64decode(event["frame"])))
        return found


async def follow(connection: Connection, thread_id: str, *, live: bool = True) -> AsyncIterator[dict[str, Any]]:
    """Events, through every reconnection; without `live` up to now. Raises `NotFound` when the thread is not shared (any more)."""
    place, heard_at = Place(), time.monotonic()
    while True:
        heard = False
        try:
            request = place.request(await connection.api.grant_token(thread_id))
            async with contextlib.aclosing(connection.stream(_METHOD, request)) as answers:
                async for answer in answers:
                    heard, heard_at = True, time.monotonic()
                    for event in place.take(answer):
                        yield event
                    # what whoever reads took is no silence of the gateway's
                    heard_at = time.monotonic()
                    if answer["caught_up"] and not live:
                        return
        except errors.Unauthenticated:
            # the access token that it was opened with has ended; when there is no fresh one, the next time says so
            if not heard:
                raise
        except errors.Unavailable:
            if time.monotonic() - heard_at > connection.patience_s:
                raise
            heard = False
        if not heard:
            if time.monotonic() - heard_at > connection.patience_s:
                raise errors.Unavailable("Nothing came of the thread.")
            await asyncio.sleep(_PAUSE_S)
