"""The code of one call, inside the walls: read, run, answered. The standard library only: it is loaded in the zygote."""

from __future__ import annotations

import ast
import builtins
import contextlib
import errno
import io
import json
import linecache
import os
import resource
import sys
import traceback
from types import CodeType, ModuleType
from typing import Any

FILE = "<tool>"
# the descriptors that a call is given
REQUEST, RESULT, OUTPUT = 3, 4, 1
_MAX_SAID_CHARS, _MAX_FRAMES = 2000, 8
_LIMIT_BY_ERRNO = {
    errno.EMFILE: "open_files",
    errno.EFBIG: "file_size",
    errno.ENOSPC: "disk",
    errno.EDQUOT: "disk",
    errno.ENOMEM: "memory",
}
_NOTHING = object()
_NOTHING_MUCH, _REHEARSALS = b'{"code":"1","environment":{}}\n{}', 16


class Stopped(Exception):
    """The program did not give a result."""

    def __init__(self, message: str, *, kind: str = "", limit: str = "", where: str = "") -> None:
        super().__init__(message)
        self.answer = {"message": message, "kind": kind, "limit": limit, "traceback": where}


def prepare() -> None:
    """Make what each call needs, in the process that they are forked from: they need not, and find it together in memory."""
    os.environ.clear()  # noqa: TID251
    for _ in range(_REHEARSALS):
        _rehearse()


def ready() -> None:
    """Go through what each call does: of the memory that a process shares it has its own before its call comes."""
    sys.stdin, sys.stdout, sys.stderr = _STDIN, _SAID, _SAID
    _rehearse()


def _rehearse() -> None:
    """Answer a request that does nothing, and leave no trace of it."""
    main = sys.modules["__main__"]
    _answer(_NOTHING_MUCH)
    sys.modules["__main__"] = main


def main(most: int) -> None:
    """Run the request and write its answer, of at most so many bytes: `R` and a result in JSON, or `E` and what went wrong.

    The request is one line of JSON with `code` and `environment`, and the arguments after it. To be called when all is `ready`.
    """
    _Bounded.most = most
    try:
        answer = b"R" + _answer(_all_of(REQUEST))
        if len(answer) > most:
            raise Stopped(f"Its result takes {len(answer) - 1} bytes as JSON; at most {most} are allowed.", limit="output")
    except BaseException as error:
        stopped = error if isinstance(error, Stopped) else _failed(error)
        _more_memory()
        answer = b"E" + json.dumps(stopped.answer, ensure_ascii=False).encode(errors="replace")
    with contextlib.suppress(OSError, ValueError):  # it closed it, or put something else there
        _SAID.flush()
    _write(RESULT, answer)


def _answer(asked: bytes) -> bytes:
    head, _, given = asked.partition(b"\n")
    request = json.loads(head)
    os.environ.update(request["environment"])  # noqa: TID251
    return _run(request["code"], json.loads(given))


def _more_memory() -> None:
    """The bit that was kept back, for saying that there was not enough."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)


def _run(code: str, arguments: dict[str, Any]) -> bytes:
    body, last = _compiled(code)
    # what looks a class up by its module finds it, not what runs here
    sys.modules["__main__"] = module = ModuleType("__main__")
    names = module.__dict__
    names |= {name: value for name, value in arguments.items() if name.isidentifier() and not name.startswith("__")}
    names |= {"__builtins__": builtins, "arguments": arguments}
    given = names.get("result", _NOTHING)
    value = _NOTHING
    try:
        exec(body, names)  # noqa: S102
        if last is not None:
            value = eval(last, names)  # noqa: S307
    except SystemExit as end:
        if end.code not in (None, 0):
            raise Stopped(f"It ended with exit code {_short(end.code)}.", kind="SystemExit") from None
    except BaseException as error:
        raise _failed(error) from None
    if names.get("result", _NOTHING) is not given:
        value = names["result"]
    if value is _NOTHING:
        raise Stopped("It left no result: set the variable `result`, or end with an expression.")
    return _json(value)


def _compiled(code: str) -> tuple[CodeType, CodeType | None]:
    """The statements, and the expression at their end."""
    linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
    try:
        tree = ast.parse(code, FILE)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        value = compile(ast.Expression(last.value), FILE, "eval", dont_inherit=True) if isinstance(last, ast.Expr) else None
        return compile(tree, FILE, "exec", dont_inherit=True), value
    except SyntaxError as error:
        line = f" in line {error.lineno}" if error.lineno else ""
        raise Stopped(f"SyntaxError{line}: {error.msg}", kind="SyntaxError", where=(error.text or "").strip()[:200]) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _failed(error) from None


def _failed(error: BaseException) -> Stopped:
    kind, said = type(error).__name__, _short(error)
    limit = "memory" if isinstance(error, MemoryError) else ""
    if isinstance(error, OSError):
        limit = _LIMIT_BY_ERRNO.get(error.errno or 0, "")
    if isinstance(error, RuntimeError) and said == "can't start new thread":
        limit = "processes"
    return Stopped(f"{kind}: {said}" if said else kind, kind=kind, limit=limit, where=_where(error))


def _where(error: BaseException) -> str:
    """The lines of the code that led there; those of libraries by their module only."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    lines = [f"line {frame.lineno}, in {frame.name}: {frame.line or ''}"[:300] for frame in frames]
    left_out = len(lines) - _MAX_FRAMES
    if left_out > 0:
        lines[_MAX_FRAMES // 2 : -_MAX_FRAMES // 2] = [f"... {left_out} more ..."]
    return "\n".join(lines)


def _short(value: object) -> str:
    try:
        text = str(value)
    except BaseException:  # it is the code's own
        return ""
    for folder in (sys.prefix, sys.base_prefix):
        text = text.replace(folder, "<python>")
    return text if len(text) <= _MAX_SAID_CHARS else text[:_MAX_SAID_CHARS] + "..."


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except MemoryError as error:
        raise _failed(error) from None
    except BaseException as error:  # methods of the code's own classes may run
        hint = "Give it as str, int, float, bool, None, list or dict with str keys."
        raise Stopped(f"Its result cannot be written as JSON: {_short(error)}. {hint}", kind=type(error).__name__) from None


class _Bounded(io.RawIOBase):
    """What is printed. Beyond the limit it goes nowhere, and the program goes on."""

    most = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return OUTPUT

    def write(self, data: Any, /) -> int:
        data = memoryview(data)
        # one byte more than is shown tells that there was more
        fits = data[: max(0, self.most + 1 - os.lseek(OUTPUT, 0, os.SEEK_CUR))]
        try:
            _write(OUTPUT, fits)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EFBIG):
                raise
        return len(data)


# what is read and printed to in each call
_STDIN, _SAID = io.StringIO(), io.TextIOWrapper(io.BufferedWriter(_Bounded(), 65536), "utf-8", "backslashreplace", line_buffering=True)


def _write(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _all_of(handle: int) -> bytes:
    parts = []
    while part := os.read(handle, 1 << 20):
        parts.append(part)
    return b"".join(parts)
