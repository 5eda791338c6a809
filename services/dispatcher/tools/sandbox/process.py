"""The backend `process` of the tier `trusted`: the operator's own module, in a process that can be killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from chassis import environment, lifecycle, log
from netra import errors

_log = log.get(__name__)
_ROOT = Path(__file__).resolve().parents[4]
_MAX_ANSWER_BYTES = 65 * 1024 * 1024
_MAX_SAID_BYTES = 2048
# after its leader is gone a group ends within milliseconds, but for a member that hangs in the kernel
_LOOK_S, _LOOKS = 0.002, 5000
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a process left behind. The exit code is negative for a signal."""

    text: bytes
    said: str
    exit_code: int


async def run(module: str, request: Mapping[str, Any], *, cwd: Path) -> Any:
    """Run `python -m module` with the request as JSON on its standard input; returns the `result` of its answer.

    It answers with one JSON object on standard output: `{"result": ...}` or `{"error": {"code", "message", "details"}}`.
    Raises the error it answers with, `ToolFailed` when it ends otherwise. A cancel is raised after the process group is gone.
    """
    worker, tasks = _Worker(module, cwd), lifecycle.Tasks(on_failure=lambda _error: None)
    talking = tasks.spawn(worker.talk(orjson.dumps(request)), name=f"process {module}")
    stopped: asyncio.CancelledError | None = None
    while not talking.done():
        try:
            await asyncio.wait({talking})
        except asyncio.CancelledError as cancel:
            worker.kill()
            stopped = cancel
    if stopped is not None:
        raise stopped
    return _result(module, talking.result())


class _Worker:
    """One process and its group. It is never left: who does not want it any more kills it, and it ends by itself."""

    def __init__(self, module: str, cwd: Path) -> None:
        self._module, self._cwd = module, cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._unwanted = False

    def kill(self) -> None:
        """End it, and everything it started in its group."""
        self._unwanted = True
        if self._process is not None:
            _kill(self._process.pid)

    async def talk(self, request: bytes) -> _Answer:
        """Start it with the request, and return what it left once its group is gone."""
        # files rather than pipes: nobody has to read along, and what it leaves running cannot hold its end open
        with contextlib.ExitStack() as stack:
            asked, answered, said = (stack.enter_context(tempfile.TemporaryFile(dir=self._cwd)) for _ in range(3))
            asked.write(request)
            asked.seek(0)
            self._process = process = self._started(asked, answered, said)
            if self._unwanted:
                self.kill()
            exit_code = await _exit_code(process)
            await _gone(process.pid)
            answered.seek(0)
            said.seek(max(said.seek(0, os.SEEK_END) - _MAX_SAID_BYTES, 0))
            return _Answer(answered.read(_MAX_ANSWER_BYTES + 1), said.read().decode(errors="replace"), exit_code)

    def _started(self, asked: IO[bytes], answered: IO[bytes], said: IO[bytes]) -> subprocess.Popen[bytes]:
        # vfork, which runs no handlers: the loop's own way is to fork, and gRPC's threads in the copy crash it before it becomes the worker
        return subprocess.Popen(  # noqa: S603
            # -P: what lies in the working directory is data, never a module to import
            [sys.executable, "-P", "-m", "services.dispatcher.tools.sandbox.child", str(os.getpid()), self._module],
            cwd=self._cwd, env=_environment(self._cwd), stdin=asked, stdout=answered, stderr=said, start_new_session=True,
        )  # fmt: skip


async def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Returns when the process has ended."""
    if not hasattr(os, "pidfd_open"):  # elsewhere than on Linux
        while process.poll() is None:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        return process.wait()
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    handle = os.pidfd_open(process.pid)
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.wait()


def _environment(cwd: Path) -> dict[str, str]:
    """Nothing of the dispatcher's own: no secrets, no addresses."""
    path = environment.get_environment().get("PATH", os.defpath) or os.defpath
    return {"PATH": path, "HOME": str(cwd), "TMPDIR": str(cwd), "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(_ROOT)}


async def _gone(group: int) -> None:
    """Kill what the process left of its group, and return when that is gone too."""
    for _ in range(_LOOKS):
        if not _kill(group) or not _lives(group):
            return
        await asyncio.sleep(_LOOK_S)
    _log.error("a process group did not end after SIGKILL", group=group)


def _kill(group: int) -> bool:
    """Whether there was anybody to kill, be it a process that has ended and is still listed."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _lives(group: int) -> bool:
    """Whether a member of the group has not ended: those that have stay listed until init reaps them, which may be never."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _parent, its_group = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _result(module: str, answer: _Answer) -> Any:
    if answer.said:
        _log.warning("a worker process said something", module=module, exit_code=answer.exit_code, said=answer.said)
    if len(answer.text) > _MAX_ANSWER_BYTES:
        raise errors.ToolFailed(f"The tool's process answered with more than {_MAX_ANSWER_BYTES} bytes.")
    said = _object(answer.text)
    if isinstance(problem := said.get("error"), dict):
        raise _error(problem)
    if answer.exit_code != 0:
        raise errors.ToolFailed(f"The tool's process {_ending(answer.exit_code)}.", exit_code=answer.exit_code)
    if "result" not in said:
        raise errors.ToolFailed("The tool's process ended without an answer.")
    return said["result"]


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _error(problem: Mapping[str, Any]) -> errors.NetraError:
    error = errors.by_code(str(problem.get("code", "")))(str(problem.get("message", "")))
    error.details = {str(name): str(value) for name, value in (problem.get("details") or {}).items()}
    return error


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and without an answer"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
    more = "; when nobody stopped it, it took more memory than there is" if -exit_code == signal.SIGKILL else ""
    return f"was killed by {name} before it answered{more}"
