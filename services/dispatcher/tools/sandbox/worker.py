"""What a warm worker process runs: plain functions of the operator, one call at a time, until nobody asks any more."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import orjson

from netra import errors
from services.dispatcher.tools.sandbox import frames

_PR_SET_CHILD_SUBREAPER = 36
_NOWHERE = "/"


class Worker:
    """The calls of one process. `setup`: `calls` and `resident` (bytes) after which it wants to be replaced."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._left, self._resident = int(setup["calls"]), int(setup["resident"])
        self._functions: dict[tuple[str, str], Any] = {}
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC) if sys.platform == "linux" else None

    def answer(self, request: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Kind and text of the answer."""
        self._left -= 1
        kind, text = self._answer(request)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # not in a folder that is about to be removed
        os.chdir(_NOWHERE)
        last = not _alone() or self._left <= 0 or self._large()
        return frames.LAST[kind] if last else kind, text

    def _answer(self, request: Mapping[str, Any]) -> tuple[bytes, bytes]:
        try:
            _settle(request["folder"])
            return _told(self._function(request["module"], request["function"])(**request["arguments"]))
        except errors.NetraError as error:
            problem = {"code": error.code, "message": error.message, "details": error.details, "retry_after_ms": error.retry_after_ms}
            return frames.PROBLEM, orjson.dumps(problem)
        except MemoryError:
            return frames.PROBLEM, orjson.dumps({"limit": "memory"})
        except BaseException as error:
            # where, not what: its words may quote an argument, and so a secret
            where = traceback.format_tb(error.__traceback__)[1:]
            return frames.PROBLEM, orjson.dumps({"raised": type(error).__name__, "where": where})

    def _function(self, module: str, name: str) -> Any:
        if (known := self._functions.get((module, name))) is None:
            found = attrgetter(name)(importlib.import_module(module))
            # a declared tool stands where its function was
            known = self._functions[module, name] = getattr(found, "function", found)
        return known

    def _large(self) -> bool:
        if self._statm is None:
            return False
        return int(os.pread(self._statm, 64, 0).split()[1]) * resource.getpagesize() > self._resident


def _told(value: object) -> tuple[bytes, bytes]:
    try:
        text = orjson.dumps(value)
    except TypeError as error:
        return frames.PROBLEM, orjson.dumps({"unwritten": str(error)})
    if len(text) > frames.MAX_BYTES:
        return frames.PROBLEM, orjson.dumps({"size": len(text)})
    return frames.RESULT, text


def _settle(folder: str) -> None:
    """What the call makes without saying where is made in its folder."""
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)  # noqa: TID251 - for what the function starts
    tempfile.tempdir = None


def _alone() -> bool:
    """Whether the call left no process behind. What it left is ended, be it in a session of its own."""
    alone = True
    while True:
        try:
            ended, _status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                alone = False
                for child in _children():
                    os.kill(child, signal.SIGKILL)
                os.waitpid(-1, 0)
        except ChildProcessError:
            return alone


def _children() -> list[int]:
    return [int(child) for listed in Path("/proc/self/task").glob("*/children") for child in listed.read_text(encoding="ascii").split()]


def _tied() -> None:
    """What the calls start and leave becomes a child of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def _loaded(setup: Mapping[str, Any]) -> None:
    for module in setup["preload"]:
        try:
            importlib.import_module(module)
        except BaseException:
            # the calls that need it say so
            traceback.print_exc()
    if setup["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))


def _frame(stream: IO[bytes]) -> Any:
    """The value of the next frame. Raises `EOFError` when nobody asks any more."""
    if len(head := stream.read(frames.HEAD_BYTES)) < frames.HEAD_BYTES:
        raise EOFError
    size, _kind = frames.head(head)
    if len(text := stream.read(size)) < size:
        raise EOFError
    return orjson.loads(text)


def main() -> None:
    """Answer what comes on standard input, there: functions get none, and what they print goes elsewhere."""
    channel = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _tied()
    with open(channel, "rb") as asked, open(os.dup(channel), "wb") as answers:
        try:
            setup = _frame(asked)
            _loaded(setup)
            worker = Worker(setup)
            answers.write(frames.frame(frames.READY))
            answers.flush()
            while True:
                answers.write(frames.frame(*worker.answer(_frame(asked))))
                answers.flush()
        except (EOFError, OSError):
            # at once: threads that a call left are not waited for
            os._exit(0)


if __name__ == "__main__":
    main()
