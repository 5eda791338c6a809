"""Keeps one process running: first start, readiness, restart after a pause, end."""

import asyncio
import contextlib
import signal
import time
from pathlib import Path

from standalone import child
from standalone.errors import StandaloneError, StartFailed
from standalone.progress import complain

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
STEADY = 10.0  # a process that lived this long starts with the shortest pause again
START_TIMEOUT = 60.0
ATTEMPTS_AT_START = 3
POLL = 0.05


class Changed:
    """Tells waiters that some keeper became ready or failed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.count = 0

    def announce(self) -> None:
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Keeper:
    """Keeps one server running from its first start until `stop`."""

    def __init__(self, server: child.Server, log: Path, changed: Changed) -> None:
        self.server = server
        self.ready = asyncio.Event()
        self.restarts = -1
        self.failure: Exception | None = None
        self._log = log
        self._changed = changed
        self._child: child.Child | None = None
        self._stopping = asyncio.Event()
        self._pause = FIRST_PAUSE

    @property
    def pid(self) -> int:
        return self._child.pid if self._child and self._child.returncode is None else 0

    @property
    def mark(self) -> str:
        return self.server.launch().mark

    async def run(self) -> None:
        """Start, wait for the end, start again; returns after `stop` or a start that never came up."""
        was_ready = False
        try:
            while not self._stopping.is_set() and self.failure is None:
                was_ready |= await self._one_life()
                if not was_ready and self.restarts + 1 >= ATTEMPTS_AT_START:
                    self._fail(self._never_ready())
        except (StandaloneError, OSError) as error:
            self._fail(error)

    async def _one_life(self) -> bool:
        """One process from start to end; tells whether it ever was ready."""
        if self.restarts >= 0:
            await self._sleep()
            if self._stopping.is_set():
                return False
        await self._prepare()
        born = time.monotonic()
        self._child = await child.Child.start(self.server.launch(), self._log)
        self.restarts += 1
        reached = await self._until_ready()
        code = await self._child.wait()
        self.ready.clear()
        await self._child.stop()  # whatever it left in its process group
        if not self._stopping.is_set():
            complain(f"{self.server.name} ended ({_meaning(code)}) and is restarted; see {self._log}")
        if time.monotonic() - born > STEADY:
            self._pause = FIRST_PAUSE
        return reached

    async def _prepare(self) -> None:
        """A restart may have to wait until the dead process's port is released."""
        for attempt in range(20):
            try:
                return await self.server.prepare()
            except StandaloneError:
                if self.restarts < 0 or attempt == 19:
                    raise
                await asyncio.sleep(0.1)

    async def _until_ready(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT
        child_now = self._child
        while child_now and child_now.returncode is None:
            if await self.server.healthy() and child_now.returncode is None:
                self.ready.set()
                self._changed.announce()
                return True
            if time.monotonic() > deadline and self.restarts == 0:
                self._fail(self._never_ready())
                child_now.kill()
                return False
            await asyncio.sleep(POLL)
        return False

    async def _sleep(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._pause)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def _never_ready(self) -> StartFailed:
        return StartFailed(
            f"{self.server.name} did not become ready. The end of its log:\n{child.tail(self._log)}",
            f"the whole log is {self._log}",
        )

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._changed.announce()

    def kill(self, number: signal.Signals) -> int:
        """Send a signal; `ready` is down until the next process is up."""
        pid = self.pid
        if self._child and pid:
            self.ready.clear()
            self._child.kill(number)
        return pid

    async def stop(self) -> None:
        self._stopping.set()
        self.ready.clear()
        if self._child:
            await self._child.stop()


def _meaning(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
