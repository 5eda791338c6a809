"""One child process: started on a leash, its output in a log file, stopped gently, then firmly."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from standalone import leash

LOG_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a child: its command, environment and what happens to it at the end."""

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    identity: str = leash.KEEP
    stop_signal: signal.Signals = signal.SIGTERM
    orphan_signal: signal.Signals = signal.SIGKILL
    grace: float = 10.0
    mark: str = field(default="")


class Server(Protocol):
    """Something the supervisor keeps running."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def waits_for(self) -> tuple[str, ...]: ...
    async def prepare(self) -> None:
        """Whatever must be on disk before the process starts; raises `StandaloneError`."""

    def launch(self) -> Launch: ...
    async def healthy(self) -> bool: ...


class Child:
    """A started process and its log."""

    def __init__(self, process: asyncio.subprocess.Process, launch: Launch) -> None:
        self._process = process
        self._launch = launch

    @classmethod
    async def start(cls, launch: Launch, log: Path) -> "Child":
        words = leash.command(os.getpid(), launch.orphan_signal, launch.identity, list(launch.command))
        rotate(log)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *words,
                env=dict(launch.environment),
                cwd=launch.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops in order
            )
        return cls(process, launch)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self) -> None:
        """Return when the process is gone, and what it left in its process group is killed."""
        if self._process.returncode is None:
            self.kill(self._launch.stop_signal)
            try:
                await asyncio.wait_for(self._process.wait(), self._launch.grace)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def rotate(log: Path) -> None:
    """Keep one older log once a file has grown large."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".1.log"))


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for a message about a start that failed."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""
