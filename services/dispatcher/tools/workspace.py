"""Files of a run: its folder, and its user's artifacts in and out of it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Protocol

from chassis import log
from netra import errors, ids
from netra.tool import Artifact

_log = log.get(__name__)
_LOCK = ".lock"
_CALLS = ".calls"


class Artifacts(Protocol):
    """Where the files of users are kept. The token is that of the execution context they are read and made in."""

    async def fetch(self, token: str, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact to a file. Raises `NotFound`."""
        ...

    async def keep(self, token: str, request_id: str, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact, once per request id. Raises `TooLarge`, `InvalidPayload`."""
        ...


class Workspaces:
    """What the runs of this process share: a folder that is locked while the process lives, and slots for processes of their tools."""

    def __init__(self, root: Path, artifacts: Artifacts, processes: int) -> None:
        """Raises `OSError` when the root cannot be made or is open to others."""
        root = root.absolute()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _private(root)
        with _locked(root):
            _sweep(root)
            self._mine = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
            self._held = _locked(self._mine)
        self.artifacts, self.slots = artifacts, asyncio.Semaphore(processes)

    @property
    def folder(self) -> Path:
        """Below which all of them lie."""
        return self._mine

    def of(self, run_id: ids.RunId, token: Callable[[], Awaitable[str]]) -> Workspace:
        """The workspace of a run; `token` tells its context token as it is now, or gets it one."""
        return Workspace(self._mine / run_id, self, token)

    def close(self) -> None:
        """Remove them all. Waits for who starts just now and sweeps: what vanishes under its hands would end its start."""
        with contextlib.suppress(FileNotFoundError), _locked(self._mine.parent):
            _remove(self._mine)
        self._held.close()


class Workspace:
    """What the tool calls of one run share: its folder and its user's artifacts."""

    def __init__(self, folder: Path, shared: Workspaces, token: Callable[[], Awaitable[str]]) -> None:
        self._folder, self._shared, self._token = folder, shared, token
        self.slots = shared.slots
        self._made = False

    @property
    def folder(self) -> Path:
        """The run's folder, made when first asked for."""
        if not self._made:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._made = True
        return self._folder

    def of_call(self, name: str) -> Path:
        """A folder of one call, below the run's; made when first asked for."""
        made = self.folder / _CALLS / name
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
        return made

    async def fetch(self, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact of the user to a file. Raises `NotFound`."""
        return await self._shared.artifacts.fetch(await self._token(), artifact_id, to)

    async def keep(self, origin: str, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact of the user, once per run, origin and name. Raises `TooLarge`, `InvalidPayload`."""
        request_id = hashlib.sha256("\n".join([self._folder.name, origin, name]).encode()).hexdigest()
        return await self._shared.artifacts.keep(await self._token(), request_id, name, media_type, content)

    async def remove(self) -> None:
        """Remove the run's folder."""
        if self._made:
            await asyncio.to_thread(_remove, self._folder)


class NoArtifacts:
    """Before there is a way to the files of users."""

    async def fetch(self, token: str, artifact_id: str, to: Path) -> Artifact:
        """Raises `Unavailable`."""
        raise errors.Unavailable("The files of users cannot be reached yet.")

    async def keep(self, token: str, request_id: str, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Raises `Unavailable`."""
        raise errors.Unavailable("The files of users cannot be reached yet.")


async def removed(folder: Path) -> None:
    """Remove a folder; most are empty, and gone at once."""
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError:
        await asyncio.to_thread(_remove, folder)


def _private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user alone (mode 0700): set NETRA_WORK_DIR to another, or `chmod 700` it")


def _locked(folder: Path, *, wait: bool = True) -> IO[bytes]:
    """The lock of a folder. The system lets go of it when the process dies. Raises `BlockingIOError` when another has it."""
    file = open(folder / _LOCK, "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


def _sweep(root: Path) -> None:
    """Remove what dead processes left."""
    for left in (entry for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink()):
        try:
            with _locked(left, wait=False):
                _remove(left)
        except BlockingIOError:
            continue


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("a folder of runs could not be removed; the next start tries again", folder=str(folder))
