"""What every process must know to decide by itself, as a snapshot and then changes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from chassis import log, trust
from netra import errors
from netra.auth.v1 import auth_pb2
from services.auth import keys, policy, revocations

_log = log.get(__name__)
HEARTBEAT_S = 5.0
_BACKLOG = 256
_PER_MESSAGE = 20_000
# after this, what the database knows may be more than what is told here
_CURRENT_S = 10.0


class Watcher:
    """One follower. One that does not keep up is ended, and starts again from a snapshot."""

    def __init__(
        self, snapshot: list[auth_pb2.WatchTrustResponse], heartbeat_s: float = HEARTBEAT_S, current: Callable[[], bool] = lambda: True
    ) -> None:  # fmt: skip
        self._snapshot = snapshot
        self._heartbeat_s, self._current = heartbeat_s, current
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
        """The snapshot, then every change, and something at least every few seconds while the database can be asked."""
        for part in self._snapshot:
            yield part
        while (update := await self._next()) is not None:
            yield update

    async def _next(self) -> auth_pb2.WatchTrustResponse | None:
        while True:
            try:
                return await asyncio.wait_for(self._waiting.get(), self._heartbeat_s)
            except TimeoutError:
                # silence where nobody knows whether anything changed: followers become careful
                if self._current():
                    return auth_pb2.WatchTrustResponse()


class Feed:
    """Reads what changed, believes it itself, and passes it on to its followers."""

    def __init__(
        self, own: trust.Trust, published: keys.Keys, policies: policy.Policies, withdrawn: revocations.Revocations, max_watchers: int,
        wake_others: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._own, self._published, self._policies, self._withdrawn = own, published, policies, withdrawn
        self._max_watchers, self._wake_others = max_watchers, wake_others
        self._watchers: set[Watcher] = set()
        self._keys: list[auth_pb2.Key] = []
        self._policy = auth_pb2.Policy()
        self._reading = asyncio.Lock()
        self._read_at = -math.inf
        self._closed = False

    async def refresh(self) -> None:
        """Tell what changed in the database since the last time."""
        async with self._reading:
            began = time.monotonic()
            update = auth_pb2.WatchTrustResponse(revocations=await self._withdrawn.poll())
            self._add_keys(update, await self._published.load())
            self._add_policy(update, await self._policies.load())
            silent, self._read_at = not self.current, began
            await self._tell(update, even_nothing=silent)

    async def withdraw(self, withdrawn: Iterable[revocations.Revocation]) -> None:
        """Tell at once about what ended here."""
        new = self._withdrawn.add(withdrawn)
        for start in range(0, len(new), _PER_MESSAGE):
            await self._tell(auth_pb2.WatchTrustResponse(revocations=new[start : start + _PER_MESSAGE]))

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Follow. Raises `RateLimited` when too many do already, `Unavailable` when this process is ending or cannot know."""
        if self._closed:
            raise errors.Unavailable("This process is ending. Connect again.")
        if not self.current:
            raise errors.Unavailable("The database cannot be asked just now what was withdrawn. Connect again.")
        if len(self._watchers) >= self._max_watchers:
            raise errors.RateLimited("Too many processes follow keys and revocations here.", retry_after_ms=1000)
        watcher = Watcher(self.snapshot(), current=lambda: self.current)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    @property
    def current(self) -> bool:
        """Whether what other replicas did was looked at lately."""
        return time.monotonic() - self._read_at < _CURRENT_S

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

    async def _tell(self, update: auth_pb2.WatchTrustResponse, *, even_nothing: bool = False) -> None:
        # after a silence all are told at once that it is over: tools wait for that, and not for long
        if update.ByteSize() or even_nothing:
            for watcher in self._watchers:
                watcher.offer(update)
        if update.ByteSize():
            # who looked for itself finds the same once more, and is quiet
            self._wake_others()
        await self._own.apply(update)
