"""The backend `process` of the tier `trusted`: the operator's own module, in a process that can be killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from chassis import lifecycle, log
from netra import errors
from services.dispatcher.tools.sandbox import groups, guardian

_log = log.get(__name__)
_MAX_ANSWER_BYTES = 65 * 1024 * 1024
_MAX_SAID_BYTES = 2048


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
            groups.kill(self._process.pid)

    async def talk(self, request: bytes) -> _Answer:
        """Start it with the request, and return what it left once its group is gone."""
        # files rather than pipes: nobody has to read along, and what it leaves running cannot hold its end open
        with contextlib.ExitStack() as stack:
            asked, answered, said = (stack.enter_context(tempfile.TemporaryFile(dir=self._cwd)) for _ in range(3))
            asked.write(request)
            asked.seek(0)
            guard = guardian.current.get()
            self._process = process = self._started(guard, asked, answered, said)
            if self._unwanted:
                self.kill()
            try:
                exit_code = await groups.exit_code(process)
                await groups.gone(process.pid)
            finally:
                if guard is not None:
                    guard.release(process.pid)
            answered.seek(0)
            said.seek(max(said.seek(0, os.SEEK_END) - _MAX_SAID_BYTES, 0))
            return _Answer(answered.read(_MAX_ANSWER_BYTES + 1), said.read().decode(errors="replace"), exit_code)

    def _started(
        self, guard: guardian.Guardian | None, asked: IO[bytes], answered: IO[bytes], said: IO[bytes]
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        process = groups.start(
            self._module, cwd=self._cwd, variables=groups.clean_environment(self._cwd), stdin=asked, stdout=answered, stderr=said,
            door=None if guard is None else guard.door(),
        )  # fmt: skip
        if guard is not None:
            guard.guard(process.pid)
        return process


def _result(module: str, answer: _Answer) -> Any:
    if answer.said:
        _log.warning("a worker process said something", module=module, exit_code=answer.exit_code, said=answer.said)
    if len(answer.text) > _MAX_ANSWER_BYTES:
        raise errors.ToolFailed(f"The tool's process answered with more than {_MAX_ANSWER_BYTES} bytes.")
    said = _object(answer.text)
    if isinstance(problem := said.get("error"), dict):
        raise _error(problem)
    if answer.exit_code != 0:
        raise errors.ToolFailed(f"The tool's process {groups.ending(answer.exit_code)}.", exit_code=answer.exit_code)
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
