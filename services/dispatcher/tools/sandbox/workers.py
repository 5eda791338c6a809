"""The backend `worker` of the tier `trusted`: plain functions, in warm processes that can be killed and that no two users share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle, log, telemetry
from netra import errors
from services.dispatcher.tools.sandbox import guardian, warm

_log = log.get(__name__)
_MIB = 1024 * 1024
_started = telemetry.meter.create_counter("netra.tools.workers.started", description="Warm worker processes started.")
_ended = telemetry.meter.create_counter("netra.tools.workers.ended", description="Warm worker processes that are gone.")


class Workers:
    """Warm processes for plain functions.

    A process that has served a user serves that user alone: what a function leaves in memory (a cache, a login, an open file) must never
    be found by another. Some that have served nobody are kept ready beside the places, so that the first call of a user does not wait
    for a start: runs that are taken over begin with several such calls at once. When all places are taken, the process that is idle for
    the longest time gives way.
    """

    def __init__(
        self, places: int, guard: guardian.Guardian, *, preload: Sequence[str] = (), memory: int = 0, resident: int = 512 * _MIB,
        calls: int = 10_000, idle_s: float = 60.0, spares: int = 1,
    ) -> None:  # fmt: skip
        """`places`: calls at a time, and processes beside the `spares` that are kept ready. `preload`: modules that functions come from.

        `memory` (bytes of address space, 0 for any) is what a process may take at most. It is replaced when it has more than `resident`
        bytes in memory after a call, after so many `calls`, and when it was idle for `idle_s` seconds.
        """
        self._places, self._guard, self._idle_s = _Places(places), guard, idle_s
        self._preload = tuple(preload)
        self._setup = {"preload": self._preload, "memory": memory, "resident": resident, "calls": calls}
        self._all: set[warm.Worker] = set()
        self._idle: list[warm.Worker] = []
        self._spares, self._spares_wanted = list[warm.Worker](), spares
        self._expiry: asyncio.TimerHandle | None = None
        self._open = True
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("a worker process is not watched", exc_info=error))

    async def start(self) -> None:
        """Have processes ready for the first calls, when there are modules with functions to call."""
        if self._preload:
            self._refill()

    async def run(
        self, module: str, qualname: str, arguments: Mapping[str, Any], *, user: str, timeout_s: float, folder: Path,
        begins: Callable[[], None] = lambda: None,
    ) -> Any:  # fmt: skip
        """What `text` returns, as a value. To make values of megabytes holds up everybody: keep what is large as text."""
        return orjson.loads(await self.text(module, qualname, arguments, user=user, timeout_s=timeout_s, folder=folder, begins=begins))

    async def text(
        self, module: str, qualname: str, arguments: Mapping[str, Any], *, user: str, timeout_s: float, folder: Path,
        begins: Callable[[], None] = lambda: None,
    ) -> bytearray:  # fmt: skip
        """Call a plain function that can be imported, with its arguments by name, in a process that serves this user alone.

        `folder` is the call's own: the current directory, and where temporary files go. `timeout_s` includes the wait for a place;
        `begins` is called when there is one, right before the call, and what it raises stands against it.
        Returns what it returns, in JSON, at most 64 MiB. Raises the `NetraError` that the function raises (by its code), `ToolFailed`
        with the type of anything else that it raises, or with how its process ended; `DeadlineExceeded`, `ResourceExhausted` (memory),
        `Unavailable` when no process can be started. A deadline and a cancel kill the process and its group, and are raised when
        these are gone.
        """
        call, began = warm.Call(module, qualname, arguments, folder, timeout_s), time.monotonic()
        request = call.frame()
        if not self._open:
            raise errors.Unavailable("This process stops.")
        if not self._places.taken_now(user):
            await self._place(call, user)
        try:
            worker = self._chosen(user)
            try:
                begins()
                return await worker.call(call, request, began + timeout_s - time.monotonic())
            finally:
                self._back(worker)
        finally:
            self._places.give_back(user)

    async def close(self) -> None:
        """End every process, and with it its call."""
        self._open = False
        if self._expiry is not None:
            self._expiry.cancel()
        self._places.close()
        for worker in self._all:
            worker.kill(errors.Unavailable("This process stops."))
        for worker in tuple(self._all):
            await worker.end()
        await self._tasks.close()

    async def _place(self, call: warm.Call, user: str) -> None:
        try:
            async with asyncio.timeout(call.timeout_s):
                await self._places.take(user)
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"{call.function} was not called within {call.timeout_s:g} s: other calls took all worker processes."
            ) from None

    def _chosen(self, user: str) -> warm.Worker:
        for worker in reversed(self._idle):
            if worker.user == user and worker.alive:
                self._idle.remove(worker)
                return worker
        if len(self._idle) + self._places.taken > self._places.most and self._idle:
            self._drop(self._idle[0])
        worker = next((spare for spare in self._spares if spare.alive), None) or self._begun()
        worker.user = user
        if worker in self._spares:
            self._spares.remove(worker)
        # after this call was sent: the next one waits for nothing, this one for nobody
        asyncio.get_running_loop().call_soon(self._refill)
        return worker

    def _back(self, worker: warm.Worker) -> None:
        if self._open and worker.usable:
            worker.idle_since = time.monotonic()
            self._idle.append(worker)
            if self._expiry is None:
                self._expire()

    def _begun(self) -> warm.Worker:
        worker = warm.Worker(self._setup, self._guard, self._tasks, self._refill, self._over)
        self._all.add(worker)
        _started.add(1)
        return worker

    def _refill(self) -> None:
        # one after the other, and whoever is waited for before them: a start takes all of a core
        if len(self._spares) < self._spares_wanted and self._open and all(worker.ready for worker in self._all):
            try:
                self._spares.append(self._begun())
            except errors.Unavailable as error:
                _log.warning("no worker process is kept ready", reason=error.message)

    def _over(self, worker: warm.Worker) -> None:
        _ended.add(1)
        self._all.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._spares:
            self._spares.remove(worker)

    def _drop(self, worker: warm.Worker) -> None:
        self._idle.remove(worker)
        worker.kill(errors.Cancelled())

    def _expire(self) -> None:
        """End what is idle for long, and come back when the next one is."""
        self._expiry = None
        while self._idle and (left_s := self._idle[0].idle_since + self._idle_s - time.monotonic()) <= 0:
            self._drop(self._idle[0])
        if self._idle:
            self._expiry = asyncio.get_running_loop().call_later(max(left_s, 0.0), self._expire)


class _Places:
    """Calls that may run at a time. One user has never all of them; who has fewest is next."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._each = max(1, most - 1)
        self._by_user: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def taken(self) -> int:
        """Calls that run."""
        return self._by_user.total()

    def taken_now(self, user: str) -> bool:
        """Whether the user has got one without a wait."""
        if not self._may(user):
            return False
        self._by_user[user] += 1
        return True

    async def take(self, user: str) -> None:
        """Returns when the user has got one."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((user, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.give_back(user)
            raise
        finally:
            self._waiting = [waiting for waiting in self._waiting if waiting[1] is not granted]

    def give_back(self, user: str) -> None:
        """The call of this user has ended."""
        self._by_user[user] -= 1
        if not self._by_user[user]:
            del self._by_user[user]
        waiting = [(self._by_user[other], place) for place, (other, granted) in enumerate(self._waiting) if not granted.done()]
        for _taken, place in sorted(waiting):
            other, granted = self._waiting[place]
            if self._may(other):
                self._by_user[other] += 1
                granted.set_result(None)
                return

    def close(self) -> None:
        """Nobody gets one any more."""
        for _user, granted in self._waiting:
            if not granted.done():
                granted.set_exception(errors.Unavailable("This process stops."))

    def _may(self, user: str) -> bool:
        return self.taken < self.most and self._by_user[user] < self._each
