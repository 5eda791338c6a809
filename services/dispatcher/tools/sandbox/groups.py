"""Process groups whose leader lives no longer than this process: started without a copy of it, ended, seen to be gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from chassis import environment, log

_log = log.get(__name__)
_ROOT = Path(__file__).resolve().parents[4]
# after its leader is gone a group ends within milliseconds, but for a member that hangs in the kernel
_LOOK_S, _LOOKS = 0.002, 5000
_POLL_S = 0.02
Stream = int | IO[bytes]


def start(
    module: str, *, cwd: Path, variables: Mapping[str, str], stdin: Stream, stdout: Stream, stderr: Stream, door: int | None,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Run a module of ours as the leader of a new process group. `door` is where its guardian hears of it. Raises `OSError`."""
    doors = () if door is None else (door,)
    # vfork, which runs no handlers: the loop's own way is to fork, and gRPC's threads in the copy crash it before it becomes the worker
    return subprocess.Popen(  # noqa: S603
        # -P: what lies in the working directory is data, never a module to import
        [sys.executable, "-P", "-m", "services.dispatcher.tools.sandbox.child", str(os.getpid()), module, *map(str, doors)],
        cwd=cwd, env=variables, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True, pass_fds=doors,
    )  # fmt: skip


def clean_environment(folder: Path) -> dict[str, str]:
    """Nothing of the dispatcher's own: no secrets, no addresses. What is temporary goes to the folder."""
    path = environment.get_environment().get("PATH", os.defpath) or os.defpath
    return {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(_ROOT)}


async def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Returns when the process has ended; negative for a signal."""
    if process.returncode is not None:
        return process.returncode
    try:
        handle = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # elsewhere than on Linux; no descriptor left
        while process.poll() is None:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        return process.wait()
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.wait()


async def gone(group: int) -> None:
    """Kill what a process left of its group, and return when that is gone too."""
    for _ in range(_LOOKS):
        # in a thread: where there are thousands of processes, a look at all of them would hold up everybody
        if not kill(group) or not await asyncio.to_thread(_lives, group):
            return
        await asyncio.sleep(_LOOK_S)
    _log.error("a process group did not end after SIGKILL", group=group)


def kill(group: int) -> bool:
    """Whether there was anybody to kill, be it a process that has ended and is still listed."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _lives(group: int) -> bool:
    """Whether a member of the group has not ended: those that have stay listed until init reaps them, which may be never."""
    return any(name.isdigit() and _in_group(int(name), group) for name in os.listdir("/proc"))


def _in_group(pid: int, group: int) -> bool:
    try:
        # a call of the kernel for each process of the machine, and a file for the few of the group alone: files take ten times as long
        if os.getpgid(pid) != group:
            return False
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:  # it ended meanwhile
        return False
    return state not in "ZX"


def ending(code: int) -> str:
    """How a process ended, for a sentence."""
    if code >= 0:
        return f"ended with exit code {code} and without an answer"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    more = "; when nobody stopped it, it took more memory than there is" if -code == signal.SIGKILL else ""
    return f"was killed by {name} before it answered{more}"
