"""The guardian of the tools' processes: a process of its own that ends them when this one has died, was stopped, or is held up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from contextvars import ContextVar

from chassis import lifecycle, log, telemetry
from netra import errors
from services.dispatcher.tools.sandbox import groups, watch

_log = log.get(__name__)
_BEATS = 8
_lapses = telemetry.meter.create_counter("netra.tools.lapses", description="Times that this process was silent for too long for its tools.")


class Guardian:
    """Ends process groups whose owner is this process.

    While the event loop runs, it tells the guardian several times in `heartbeat_s` that it does. When that was longer ago (the process is
    stopped, or something blocks the loop), or when this process has died, the guardian kills every group: nothing that a tool has in
    memory or in C code can keep it from that. Whatever is started goes through `door`, or is told of by `guard` before it gets work.
    """

    def __init__(self, heartbeat_s: float) -> None:
        """`heartbeat_s`: the lease minus one second. What runs here has ended before another process may take it over."""
        self._heartbeat_s = heartbeat_s
        # in the order of their notes, as the guardian has them
        self._groups: dict[int, None] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._door = -1
        self._beat: asyncio.TimerHandle | None = None
        self._beaten_at = time.monotonic()
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("the guardian of tools is not watched", exc_info=error))

    def door(self) -> int:
        """The descriptor through which a process that is being started tells of itself (`child`). Starts the guardian when there is none.

        Raises `Unavailable` when it cannot be started: nothing runs without it.
        """
        if self._process is None:
            try:
                self._start()
            except OSError as error:
                raise errors.Unavailable(f"The guardian of the tools' processes could not be started: {error.strerror}.") from None
        # what was silent for long and comes back must be heard before what it starts
        self._alive()
        return self._door

    def guard(self, group: int) -> None:
        """End this process group with the owner: after those that were told of before, so that who leaves one of them for it is ended."""
        self._groups[group] = None
        self._tell(watch.GUARD, group)

    def release(self, group: int) -> None:
        """This process group is gone."""
        self._groups.pop(group, None)
        self._tell(watch.RELEASE, group)

    def guards(self, group: int) -> bool:
        """Whether this process group has not been ended by the guardian, or for want of one."""
        return group in self._groups

    async def close(self) -> None:
        """End every group that is left, and the guardian."""
        self._rest()
        process, self._process = self._process, None
        if process is not None:
            # it hears that the last writer is gone
            os.close(self._door)
            await groups.exit_code(process)
        await self._tasks.close()

    def _start(self) -> None:
        asked, door = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", watch.__file__, str(self._heartbeat_s)],
                cwd="/", env={}, stdin=asked, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            os.close(door)
            raise
        finally:
            os.close(asked)
        # a guardian that hangs must not hold up this process
        os.set_blocking(door, False)
        self._door, self._beaten_at = door, time.monotonic()
        self._tasks.spawn(self._watched(self._process, door), name="guardian of tools")
        self._beats()

    async def _watched(self, process: subprocess.Popen[bytes], door: int) -> None:
        code = await groups.exit_code(process)
        if self._process is not process:
            return
        # without it nothing may run; the next that is started gets a new one
        _log.error("the guardian of tools has ended; what it guarded is ended too", exit_code=code, groups=len(self._groups))
        self._process = None
        os.close(door)
        self._rest()
        self._end()

    def _end(self) -> None:
        for group in self._groups:
            groups.kill(group)
        self._groups.clear()

    def _rest(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _beats(self) -> None:
        self._beat = asyncio.get_running_loop().call_later(self._heartbeat_s / _BEATS, self._beats)
        self._alive()

    def _alive(self) -> None:
        now = time.monotonic()
        silent_s, self._beaten_at = now - self._beaten_at, now
        self._tell(watch.BEAT, int(now * 1e9))
        if silent_s > self._heartbeat_s and self._groups:
            _lapses.add(1)
            _log.error("this process was stopped or held up; processes of tools were ended", seconds=round(silent_s, 3))
            # the guardian has done so, unless it was stopped as well
            self._end()

    def _tell(self, kind: bytes, number: int) -> None:
        if self._process is not None:
            # full or broken: the guardian hangs, or has ended and its end is about to be seen
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._door, watch.note(kind, number))


# who guards the processes that are started from here; nobody does in a test of one part
current: ContextVar[Guardian | None] = ContextVar("guardian", default=None)
