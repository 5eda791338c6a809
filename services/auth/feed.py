"""What every process must know to decide by itself, as a snapshot and then changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from chassis import log, trust
from netra import errors
from netra.auth.v1 import auth_pb2
from services.auth import keys, policy, revocations

_log = log.get(__name__)
HEARTBEAT_S = 5.0
_BACKLOG = 256
_PER_MESSAGE = 20_000


class Watcher:
    """One follower. One that does not keep up is ended, and starts again from a snapshot."""

    def __init__(self, snapshot: list[auth_pb2.WatchTrustResponse], heartbeat_s: float = HEARTBEAT_S) -> None:
        self._snapshot = snapshot
        self._heartbeat_s = heartbeat_s
        self._waiting: asyncio.Queue[auth_pb2.WatchTrustResponse | None] = asyncio.Queue(_BACKLOG)

    def offer(self, update: auth_pb2.WatchTrustResponse) -> None:
        """Pass on a change."""
        try:
            self._waiting.put_nowait(update)
        except asyncio.QueueFull:
            _log.warning("a follower does not keep up and is ended")
            self.end()

    def end(self) -> None:
        """End the stream."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def updates(self) -> AsyncIterator[auth_pb2.WatchTrustResponse]:
        """The snapshot, then every change, and something at least every few seconds."""
        for part in self._snapshot:
            yield part
        while (update := await self._next()) is not None:
            yield update

    async def _next(self) -> auth_pb2.WatchTrustResponse | None:
        try:
            return await asyncio.wait_for(self._waiting.get(), self._heartbeat_s)
        except TimeoutError:
            return auth_pb2.WatchTrustResponse()


class Feed:
    """Reads what changed, believes it itself, and passes it on to its followers."""

    def __init__(self, own: trust.Trust, published: keys.Keys, withdrawn: revocations.Revocations, max_watchers: int) -> None:
        self._own, self._published, self._withdrawn = own, published, withdrawn
        self._max_watchers = max_watchers
        self._watchers: set[Watcher] = set()
        self._keys: list[auth_pb2.Key] = []
        self._policy = auth_pb2.Policy()
        self._reading = asyncio.Lock()
        self._closed = False

    async def refresh(self) -> None:
        """Tell what changed in the database since the last time."""
        async with self._reading:
            update = auth_pb2.WatchTrustResponse(revocations=await self._withdrawn.poll())
            self._add_keys(update, await self._published.load())
            self._add_policy(update, policy.current())
            await self._tell(update)

    async def withdraw(self, revocation: revocations.Revocation) -> None:
        """Tell at once about a session that ended here."""
        await self._tell(auth_pb2.WatchTrustResponse(revocations=self._withdrawn.add([revocation])))

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Follow. Raises `RateLimited` when too many do already, `Unavailable` when this process is ending."""
        if self._closed:
            raise errors.Unavailable("This process is ending. Connect again.")
        if len(self._watchers) >= self._max_watchers:
            raise errors.RateLimited("Too many processes follow keys and revocations here.", retry_after_ms=1000)
        watcher = Watcher(self.snapshot())
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def keys(self) -> list[auth_pb2.Key]:
        """The published keys."""
        return list(self._keys)

    def snapshot(self) -> list[auth_pb2.WatchTrustResponse]:
        """Everything known. More than one message only where revocations would not fit in one."""
        withdrawn = self._withdrawn.recent()
        first = auth_pb2.WatchTrustResponse(keys=self._keys, policy=self._policy, revocations=withdrawn[:_PER_MESSAGE])
        rest = range(_PER_MESSAGE, len(withdrawn), _PER_MESSAGE)
        return [first, *(auth_pb2.WatchTrustResponse(revocations=withdrawn[start : start + _PER_MESSAGE]) for start in rest)]

    def close(self) -> None:
        """End all streams and accept no more."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end()

    def _add_keys(self, update: auth_pb2.WatchTrustResponse, now: list[auth_pb2.Key]) -> None:
        if now != self._keys:
            self._keys = now
            update.keys.extend(now)

    def _add_policy(self, update: auth_pb2.WatchTrustResponse, now: auth_pb2.Policy) -> None:
        if now != self._policy:
            self._policy = now
            update.policy.CopyFrom(now)

    async def _tell(self, update: auth_pb2.WatchTrustResponse) -> None:
        if update.ByteSize():
            for watcher in self._watchers:
                watcher.offer(update)
        await self._own.apply(update)
