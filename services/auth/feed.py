"""What every process must know to decide by itself, as a snapshot and then changes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from chassis import lifecycle, log, trust
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
                async with asyncio.timeout(self._heartbeat_s):
                    return await self._waiting.get()
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
        # what a look fails with goes to whoever waits for it
        self._looks = lifecycle.Tasks(on_failure=lambda _error: None)
        self._own, self._published, self._policies, self._withdrawn = own, published, policies, withdrawn
        self._max_watchers, self._wake_others = max_watchers, wake_others
        self._watchers: set[Watcher] = set()
        self._keys: list[auth_pb2.Key] = []
        self._policy = auth_pb2.Policy()
        self._reading = asyncio.Lock()
        self._read_at = -math.inf
        self._closed = False

    async def refresh(self) -> None:
        """Tell what changed in the database since the last time. It is told even when the caller does not wait for it."""
        await asyncio.shield(self._looks.spawn(self._refresh(), "auth-look"))

    async def _refresh(self) -> None:
        async with self._reading:
            began = time.monotonic()
            found, keys_now, policy_now = await self._withdrawn.look(), await self._published.load(), await self._policies.load()
            # from here on nothing is waited for: what counts as told has been told to everybody
            update = auth_pb2.WatchTrustResponse(revocations=self._withdrawn.take(found))
            self._add_keys(update, keys_now)
            self._add_policy(update, policy_now)
            silent, self._read_at = not self.current, began
            await self._tell(update, even_nothing=silent)

    async def withdraw(self, withdrawn: Iterable[revocations.Revocation]) -> None:
        """Tell at once about what ended here."""
        await self._tell(auth_pb2.WatchTrustResponse(revocations=self._withdrawn.add(withdrawn)))

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
        whole = auth_pb2.WatchTrustResponse(keys=self._keys, policy=self._policy, revocations=self._withdrawn.recent())
        return _parts(whole)

    async def stop(self) -> None:
        """Break off what is being looked at."""
        await self._looks.close()

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
            for part in _parts(update):
                for watcher in self._watchers:
                    watcher.offer(part)
        if update.ByteSize():
            # who looked for itself finds the same once more, and is quiet
            self._wake_others()
        # last: it believes before it waits
        await self._own.apply(update)


def _parts(whole: auth_pb2.WatchTrustResponse) -> list[auth_pb2.WatchTrustResponse]:
    """The same in messages that are not too large; more than one only where revocations would not fit in one."""
    withdrawn, first = list(whole.revocations), auth_pb2.WatchTrustResponse()
    first.CopyFrom(whole)
    del first.revocations[_PER_MESSAGE:]
    rest = range(_PER_MESSAGE, len(withdrawn), _PER_MESSAGE)
    return [first, *(auth_pb2.WatchTrustResponse(revocations=withdrawn[start : start + _PER_MESSAGE]) for start in rest)]
