"""The folder `.netra`: where everything lives, who holds it, and what is running out of it."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from standalone import ports
from standalone.errors import AlreadyRunning

ROOT = Path(__file__).resolve().parent.parent
STALE_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths under one `.netra`; several can exist side by side (tests use temporary ones)."""

    path: Path
    secrets_name: str = "secrets"

    @property
    def secrets(self) -> Path:
        return self.path / self.secrets_name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    def make(self) -> None:
        """Create the folders, readable by their owner alone."""
        for folder in (self.path, self.secrets, self.logs, self.traces):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def state(self) -> dict[str, Any]:
        """What the running launcher wrote, or nothing."""
        try:
            found = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def as_running(self) -> "Folder":
        """The same folder with the secrets that the running launcher uses."""
        secrets = self.state().get("secrets")
        return Folder(self.path, Path(secrets).name) if secrets else self

    def write_state(self, state: dict[str, Any]) -> None:
        write_private(self.state_file, json.dumps(state, indent=2) + "\n")

    def holder(self) -> int | None:
        """The pid of the launcher that holds this folder, if one does."""
        try:
            with self.lock_file.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except OSError:
            return _pid(self.lock_file)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=False)


def default() -> Folder:
    return Folder(ROOT / ".netra")


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; nobody but its owner can read it at any moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def _pid(path: Path) -> int:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


@contextlib.contextmanager
def held(folder: Folder) -> Any:
    """Hold the folder's one lock; the kernel releases it however the launcher ends."""
    folder.make()
    with folder.lock_file.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _already_running(folder) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _already_running(folder: Folder) -> AlreadyRunning:
    pid = _pid(folder.lock_file)
    gateway = folder.state().get("urls", {}).get("gateway", "")
    where = f", serving {gateway}" if gateway else ""
    return AlreadyRunning(
        f"{folder.path} is in use by pid {pid} ({ports.command_line(pid) or 'unknown'}){where}",
        f"use the running one, or stop it with Ctrl-C or: kill {pid}",
    )


def sweep(folder: Folder) -> list[str]:
    """End what an earlier launcher left behind where the kernel does not do it for us.

    Called with the lock held, so nothing recorded in the old state can have an owner. A pid is
    touched only if its command line still is the recorded one.
    """
    ended = []
    for name, entry in folder.state().get("processes", {}).items():
        pid, mark = int(entry.get("pid", 0)), str(entry.get("mark", ""))
        if pid > 1 and mark and mark in ports.command_line(pid):
            end_orphan(pid, signal.SIGTERM)
            ended.append(name)
    folder.state_file.unlink(missing_ok=True)
    return ended


def end_orphan(pid: int, gently: signal.Signals) -> None:
    """Ask a process to end, insist after a while, and return when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, gently)
        deadline = time.monotonic() + STALE_WAIT
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
