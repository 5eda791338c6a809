"""The dispatcher's end of the zygote: starts it, tells it what to fork, hears what became of it, and sees to it that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle, log
from services.dispatcher.tools.sandbox import descriptors

_log = log.get(__name__)
_ROOT = Path(__file__).resolve().parents[4]
_MAX_MESSAGE, _START_S, _PINGS = 16384, 30.0, 4
# one that is stopped or hangs is given up after this many times the time within which it has to hear from us
_PATIENCE = 2.0


class Failed(Exception):
    """The zygote did not start: why."""


class Call:
    """One process of the zygote's. `ended` is done when it is gone: what the zygote said of it, or `lost`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.disk = -1
        self._handle, self._unwanted = -1, False

    def kill(self) -> None:
        """End it now, or as soon as it begins."""
        self._unwanted = True
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def begun(self, handles: list[int]) -> None:
        """It runs; the first descriptor stands for it, the second, if any, for the disk of its folder."""
        self._handle, self.disk = [*handles, -1][:2]
        if self._unwanted:
            self.kill()

    async def gone(self) -> None:
        """Kill it, and return when it has ended: for when nobody else tells."""
        self.kill()
        await _ended(self._handle)

    def close(self) -> None:
        """Let go of what stands for it."""
        for handle in (self._handle, self.disk):
            if handle >= 0:
                os.close(handle)
        self._handle = self.disk = -1


class Keeper:
    """One zygote, from its start to its end. `alive` is false from the moment that it is not."""

    def __init__(self, plan: Mapping[str, Any], tasks: lifecycle.Tasks) -> None:
        self._plan, self._tasks = {**plan, "owner": os.getpid()}, tasks
        self._calls: dict[int, Call] = {}
        self._burials: list[asyncio.Task[None]] = []
        self._count, self._heard, self._handle = 0, 0.0, -1
        self._first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.alive = False

    async def start(self) -> dict[str, Any]:
        """Start it; returns what it says of itself. Raises `Failed`."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            self._process = self._started(theirs.fileno())
        try:
            asyncio.get_running_loop().add_reader(self._control.fileno(), self._hear)
            self._control.send(orjson.dumps(self._plan))
            async with asyncio.timeout(_START_S):
                said = await self._first
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise Failed(f"it did not start within {_START_S:g} s") from None
            raise
        if "ready" not in said:
            await self.close()
            raise Failed(str(said.get("failed", "it ended at its start")))
        self.alive, self._heard = True, time.monotonic()
        self._tasks.spawn(self._beat(), name="heartbeat of the python tier")
        ready: dict[str, Any] = said["ready"]
        return ready

    def begin(self, handles: Sequence[int], limits: Mapping[str, float], folder: str) -> Call:
        """Have a process forked that reads its request by itself. Raises `OSError` when the zygote is gone or does not listen."""
        self._count += 1
        call = Call(self._count)
        said = orjson.dumps({"run": call.number, "limits": limits, "folder": folder})
        socket.send_fds(self._control, [said], handles)
        self._calls[call.number] = call
        return call

    async def close(self) -> None:
        """End it and all of its processes; returns when they are gone and those who wait for a call know it."""
        self.give_up()
        await asyncio.to_thread(self._process.wait)
        if self._burials:
            await asyncio.wait(self._burials)
        await _ended(self._handle)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _started(self, control: int) -> subprocess.Popen[bytes]:
        # vfork, which runs no handlers: gRPC's threads would crash a copy of this process before it becomes another
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "services.dispatcher.tools.sandbox.zygote", str(control)],
            # few arenas: each takes 64 MiB of address space, which is what is limited
            env={"PYTHONPATH": str(_ROOT), "LANG": "C.UTF-8", "TZ": "UTC", "MALLOC_ARENA_MAX": "2", "PYTHONNOUSERSITE": "1"},
            cwd="/", pass_fds=(control,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    async def _beat(self) -> None:
        """Tell it that this process lives and does not stand still, and see that it does not either."""
        heartbeat_s = float(self._plan["heartbeat_s"])
        while self.alive:
            with contextlib.suppress(BlockingIOError, OSError):
                self._control.send(b'{"ping":1}')
            before = time.monotonic()
            await asyncio.sleep(heartbeat_s / _PINGS)
            now = time.monotonic()
            # not when it was this process that stood still
            if now - before < heartbeat_s and now - self._heard > _PATIENCE * heartbeat_s and self.alive:
                _log.error("the zygote of the python tier does not answer; it is killed")
                self.give_up()

    def _hear(self) -> None:
        while True:
            try:
                text, handles = descriptors.received(self._control, _MAX_MESSAGE, 4)
            except BlockingIOError:
                return
            except OSError:
                text, handles = b"", []
            if not text:
                self.give_up()
                return
            self._heard = time.monotonic()
            self._told(orjson.loads(text), handles)

    def _told(self, said: dict[str, Any], handles: list[int]) -> None:
        if "begun" in said:
            self._calls[said["begun"]].begun(handles)
        elif "ended" in said:
            _settle(self._calls.pop(said["ended"]).ended, said)
        elif "alive" not in said:
            # the process that forks: where it has namespaces, it is not the one that was started here
            self._handle = handles[0] if handles else -1
            _settle(self._first, said)

    def give_up(self) -> None:
        """It is gone, or as good as gone: it is killed, and what it runs with it."""
        self.alive = False
        self._process.kill()
        if self._control.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
        _settle(self._first, {})
        if self._calls:
            self._burials.append(self._tasks.spawn(self._bury(list(self._calls.values())), name="the end of lost calls"))
            self._calls.clear()

    async def _bury(self, calls: Sequence[Call]) -> None:
        await asyncio.gather(*(call.gone() for call in calls))
        # those that have ended are listed until the one that forked them has, too
        await _ended(self._handle)
        for call in calls:
            _settle(call.ended, {"lost": True})


async def _ended(handle: int) -> None:
    """Returns when the process that this stands for has ended, at once where there is none. One at a time may wait for a handle."""
    if handle < 0:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)


def _settle(future: asyncio.Future[dict[str, Any]], said: dict[str, Any]) -> None:
    if not future.done():
        future.set_result(said)
