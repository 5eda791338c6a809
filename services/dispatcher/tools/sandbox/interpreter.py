"""python -m services.dispatcher.tools.sandbox.interpreter: forks the hosts of the Monty interpreter that `script` runs scripts in.

The template has imported what a host needs, and forks; it never reads what a host is asked, so no host finds another's in its memory.
A host puts walls around itself, starts one interpreter inside them, a process of its own, and answers the calls of one owner.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import orjson
import pydantic_monty
from opentelemetry import context

from services.dispatcher.tools.sandbox import descriptors, filters, walls

_MIB = 1024 * 1024
_LENGTH = struct.Struct("<I")
# an order to the template: one small object, and the socket of the host beside it
_MOST_ORDER = 4096
# more at a time would be memory that is mapped and given back for each call
_READ = 64 * 1024
_SCRIPT, _HOME = "script.py", "/sandbox"
# what a host and an interpreter map before they run anything, with room for the threads of both
_MAPPED = 768 * _MIB
# a script has few reasons to ask its host for something: a file it was given, a variable
_MOST_ASKED = 10_000
_TELLING_BYTES = 2048
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38
_MOST_PROCESSES = 64  # threads among them
_ALWAYS = {
    resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0,
}  # fmt: skip
# what Landlock can forbid of files, by the version of its interface; from `_SCOPED` on signals to outside, too
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_BITS, _SCOPED = {1: 13, 2: 14, 3: 15, 5: 16}, 6
# a host cannot read modules any more when the interpreter's client imports these: for values of their kinds, and for each call
_NEEDED_LATER = "decimal fractions datetime zoneinfo collections re pathlib uuid dataclasses types traceback linecache".split()
_LOADED_FROM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", os.devnull)
_WRITES = frozenset(
    "Path.write_text Path.write_bytes Path.append_text Path.append_bytes Path.mkdir Path.unlink Path.rmdir Path.rename".split()
)


class _Files(pydantic_monty.OSAccess):
    """The files a script was given and its environment, in memory; nothing can be written, so nothing can be filled."""

    def __call__(self, *, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_async: bool, **more: Any) -> Any:
        if name in _WRITES or (name == "open" and set("wax+") & set(str([*args[1:2], kwargs.get("mode", "r")][0]))):
            raise PermissionError("Permission denied: the files of a script can only be read")
        return super().__call__(name=name, args=args, kwargs=kwargs, is_async=is_async, **more)


class _Printed:
    """What a script prints, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._left, self._parts, self.cut = most, list[str](), False

    def __call__(self, _stream: str, text: str) -> None:
        data = text.encode(errors="replace")
        if len(data) > self._left:
            self.cut, data = True, data[: self._left]
            text = data.decode(errors="ignore")
        self._left -= len(data)
        if text:
            self._parts.append(text)

    def text(self) -> str:
        return "".join(self._parts)


class _Interpreter:
    """One interpreter, a process, with a fresh session ready for the next call."""

    def __init__(self, binary: str) -> None:
        self._pool = pydantic_monty.Monty(binary_path=binary, min_processes=1, max_processes=1)
        self._pool.__enter__()
        self._limits: tuple[int, float] = (256 * _MIB, 10.0)
        self._session = self._opened()
        self.pid, self._own_pid = self._session.worker_pid or 0, os.getpid()
        self._narrowed: dict[tuple[int, int], int] = {}

    def _opened(self) -> pydantic_monty.MontySession:
        memory, cpu_s = self._limits
        limits = pydantic_monty.ResourceLimits(max_memory=memory, max_feed_duration_secs=cpu_s, max_suspensions=_MOST_ASKED)
        return self._pool.checkout(script_name=_SCRIPT, limits=limits, os_policy={"sleep_system_max": math.inf}).__enter__()

    def renew(self) -> None:
        """A fresh session: nothing of the one before is left."""
        self._session.__exit__(None, None, None)
        self._session = self._opened()

    def run(self, request: Mapping[str, Any], printed: _Printed) -> bytes:
        """The result as JSON. Raises what Monty raises, `TypeError` for a result that is not JSON."""
        wanted = (int(request["memory"]), float(request["cpu_s"]))
        if wanted != self._limits:
            self._limits = wanted
            self.renew()
        self._narrow(*wanted)
        files = [pydantic_monty.MemoryFile(f"{_HOME}/{name}", content) for name, content in request["files"].items()]
        access = _Files(files, environ=request["environment"], root_dir=_HOME) if files or request["environment"] else None
        code = request["code"]
        value = self._session.feed_run(code, inputs=request["arguments"], print_callback=printed, os=access, cwd=_HOME)
        if "result" in code:
            try:
                value = self._session.feed_run("result")
            except pydantic_monty.MontyRuntimeError as error:
                if not isinstance(error.exception(), NameError):  # the word is there, the variable is not
                    raise
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)

    def _narrow(self, memory: int, cpu_s: float) -> None:
        """The kernel's limits behind the interpreter's own, which counts what it asks for and looks at the clock now and then."""
        for pid in (self._own_pid, self.pid):
            used = time.clock_gettime((~pid << 3) | 2)  # the processor time of that process
            for limit, most in ((resource.RLIMIT_AS, _MAPPED + 2 * memory), (resource.RLIMIT_CPU, math.ceil(used + cpu_s) + 1)):
                if self._narrowed.get((pid, limit)) != most:
                    resource.prlimit(pid, limit, (most, resource.RLIM_INFINITY))
                    self._narrowed[pid, limit] = most


class _Host:
    """Answers one owner's calls, one after another, as long as there is somebody to ask."""

    def __init__(self, control: socket.socket, interpreter: _Interpreter) -> None:
        self._control, self._interpreter = control, interpreter

    def serve(self, facts: Mapping[str, object]) -> None:
        """Until the other end is closed."""
        self._control.sendall(_framed({"interpreter": self._interpreter.pid, "facts": facts}))
        while (frame := self._frame()) is not None:
            if not self._answer(frame):
                return  # after a limit nothing is promised about the interpreter
            self._interpreter.renew()

    def _answer(self, frame: bytes) -> bool:
        """Whether there can be another call."""
        printed, result, problem = _Printed(0), b"", None
        try:
            request = _request(frame)
            printed = _Printed(int(request["output"]))
            result = self._interpreter.run(request, printed)
            if len(result) > int(request["output"]):
                result, problem = b"", {"limit": "output"}
        except Exception as error:
            problem = _problem(error)
        self._control.sendall(_framed({"problem": problem, "output": printed.text(), "cut": printed.cut}, result))
        return problem is None or "error" in problem

    def _frame(self) -> bytes | None:
        """What is asked next; the next comes after the answer to this."""
        data = self._control.recv(_READ)
        while data and (len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]):
            part = self._control.recv(_READ)
            if not part:
                return None
            data += part
        return data[_LENGTH.size :] or None


def _framed(head: Mapping[str, Any], result: bytes = b"") -> bytes:
    text = orjson.dumps(head)
    return b"".join((_LENGTH.pack(_LENGTH.size + len(text) + len(result)), _LENGTH.pack(len(text)), text, result))


def _request(frame: bytes) -> dict[str, Any]:
    """The head is an object; behind it are the files, whose sizes it tells."""
    (length,) = _LENGTH.unpack_from(frame)
    at = _LENGTH.size + length
    request: dict[str, Any] = orjson.loads(frame[_LENGTH.size : at])
    for name, size in request["files"].items():
        request["files"][name] = frame[at : at + size]
        at += size
    return request


def _problem(error: Exception) -> dict[str, Any]:
    """What went wrong, as the tier tells it: a limit, the end of the interpreter, or an error with its line, from 1; 0 is nowhere."""
    if isinstance(error, MemoryError):
        return {"limit": "memory"}
    if isinstance(error, pydantic_monty.MontyCrashedError):
        return {"crashed": str(error)[:_TELLING_BYTES]}
    if not isinstance(error, pydantic_monty.MontySyntaxError | pydantic_monty.MontyRuntimeError):
        return {"error": type(error).__name__, "message": str(error)[:_TELLING_BYTES], "line": 0}
    inner, frames = error.exception(), error.traceback()
    if isinstance(inner, MemoryError):
        return {"limit": "memory"}
    if isinstance(inner, TimeoutError) and not frames:  # one that a script raises has a place
        return {"limit": "cpu_s"}
    return {"error": type(inner).__name__, "message": str(inner)[:_TELLING_BYTES], "line": frames[-1].line if frames else 0}


def _confined(binary: int, uid: int | None, program: bytes) -> dict[str, object]:
    """Put the walls around this process that the interpreter is started in; returns what they are. Raises `OSError`.

    Nothing can be read but what the interpreter is loaded from, nothing written, nothing started but the interpreter, no socket made.
    """
    for limit, most in _ALWAYS.items():
        resource.setrlimit(limit, (most, most))
    if uid is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (_MOST_PROCESSES, _MOST_PROCESSES))
    walls.become(uid)
    # as it was before the change of user: the interpreter is opened through /proc/self
    walls.prctl("dumpable", _PR_SET_DUMPABLE, 1)
    abi = walls.landlock_abi()
    if abi:
        _landlock(abi, binary)
    walls.load(program)
    return {"landlock": abi, "own_user": uid is not None}


def _landlock(abi: int, binary: int) -> None:
    handled = (1 << max(bits for since, bits in _BITS.items() if since <= abi)) - 1
    attributes = struct.pack("=QQQ", handled, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = walls.syscall("landlock_create_ruleset", 444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    folders, files = walls.opened(_LOADED_FROM)
    allowed = [(binary, _EXECUTE | _READ_FILE), *((folder, _EXECUTE | _READ_FILE | _READ_DIR) for folder in folders)]
    for handle, access in (*allowed, *((file, _READ_FILE) for file in files)):
        walls.syscall("landlock_add_rule", 445, rules, ctypes.c_int(1), struct.pack("=Qi", access, handle), ctypes.c_uint32(0))
    walls.prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    walls.syscall("landlock_restrict_self", 446, rules, ctypes.c_uint32(0))
    for handle in (rules, *folders, *files):
        os.close(handle)


def _host(control: socket.socket, order: Mapping[str, Any], binary: int, program: bytes) -> NoReturn:
    """What a fork becomes."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
        try:
            facts = _confined(binary, order["uid"], program)
            interpreter = _Interpreter(f"/proc/self/fd/{binary}")
        except BaseException as error:
            control.sendall(_framed({"problem": f"{type(error).__name__}: {error}"}))
            raise
        _Host(control, interpreter).serve(facts)
    finally:
        os.killpg(0, signal.SIGKILL)
        os._exit(os.EX_SOFTWARE)


def main(path: str) -> None:
    """Fork a host of the interpreter at this path for each order, until whoever orders is gone."""
    orders = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    for name in _NEEDED_LATER:
        importlib.import_module(name)
    context.get_current()  # the same: it loads what it needs when it is used
    binary = os.open(path, os.O_PATH)
    os.set_inheritable(binary, True)
    program = filters.compiled(sockets=False, signals=walls.landlock_abi() >= _SCOPED)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a host ended, or an interpreter that it left
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    walls.prctl("child subreaper", _PR_SET_CHILD_SUBREAPER, 1)
    walls.never_more_capable()
    while True:
        text, handles = descriptors.received(orders, _MOST_ORDER, 1)
        if not text:
            return
        control = socket.socket(fileno=handles[0])
        waits, gate = os.pipe()
        if (pid := os.fork()) == 0:
            orders.close()
            os.close(gate)
            os.read(waits, 1)  # it is there until it is held
            os.close(waits)
            _host(control, orjson.loads(text), binary, program)
        handle = os.pidfd_open(pid)
        socket.send_fds(orders, [str(pid).encode()], [handle])
        control.close()
        for descriptor in (waits, gate, handle):
            os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
