"""The hosts of the Monty interpreter as the dispatcher sees them: started, asked, told that it lives, and killed for good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from chassis import environment
from netra import errors
from services.dispatcher.tools.sandbox import descriptors

_ROOT = Path(__file__).resolve().parents[4]
_MODULE = "services.dispatcher.tools.sandbox.interpreter"
REMEDY = "Install what requirements/runtime.txt lists for this Python, pydantic-monty among it, and libseccomp, and use Linux 5.3 or newer."
_LENGTH = struct.Struct("<I")
_ENVELOPE = 64 * 1024
# a byte that is printed is at most six in JSON, and the result comes beside it
_WIDEST = 7
# more at a time would be memory that is mapped and given back for each call
_READ = 64 * 1024
_START_S = 20.0


class Host:
    """One host and its interpreter: two processes, one call at a time."""

    def __init__(self, control: socket.socket, group: int, handles: list[int], uid: int | None, facts: Mapping[str, object]) -> None:
        self._control, self._handles = control, handles
        self.group, self.uid, self.facts, self.runs = group, uid, facts, 0
        self._idle: asyncio.TimerHandle | None = None
        self._left, self._gone = len(handles), asyncio.Event()
        for handle in handles:
            asyncio.get_running_loop().add_reader(handle, self._one_gone, handle)

    async def ask(self, request: Mapping[str, Any], files: Iterable[bytes], most: int) -> tuple[dict[str, Any], bytes]:
        """The head of its answer, and the result. Raises `ToolFailed` when it ends or says what cannot be."""
        text = orjson.dumps(request)
        frame = b"".join((_LENGTH.pack(len(text)), text, *files))
        try:
            await asyncio.get_running_loop().sock_sendall(self._control, _LENGTH.pack(len(frame)) + frame)
            return await _answer(self._control, _WIDEST * most + _ENVELOPE)
        except OSError as error:
            raise errors.ToolFailed("The interpreter of the script ended without an answer.") from error

    def lives(self) -> bool:
        """Whether neither of the two has ended."""
        return bool(self._handles) and self._left == len(self._handles) and not select.select(self._handles, [], [], 0)[0]

    def wait(self, seconds: float, then: Callable[[], object]) -> None:
        """Do that unless it is asked to `rest` its waiting before."""
        self._idle = asyncio.get_running_loop().call_later(seconds, then)

    def rest(self) -> None:
        """It need not be ended for its idleness."""
        if self._idle is not None:
            self._idle.cancel()

    def kill(self) -> None:
        """The interpreter first: what runs foreign code is gone before its parent."""
        self.rest()
        for handle in reversed(self._handles):  # none, when it is gone and closed
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    async def gone(self) -> None:
        """Return when neither is there any more."""
        await self._gone.wait()

    def _one_gone(self, handle: int) -> None:
        asyncio.get_running_loop().remove_reader(handle)
        self._left -= 1
        if not self._left:
            self._gone.set()

    def close(self) -> None:
        """Let go of what was held for it. It must be gone."""
        self._control.close()
        while self._handles:
            os.close(self._handles.pop())


class Template:
    """The process that hosts are forked from. It is started from nothing that the dispatcher has: no descriptors, no environment."""

    def __init__(self, binary: Path) -> None:
        """Raises `SandboxUnavailable`."""
        if not binary.is_file():
            raise errors.SandboxUnavailable(f"The interpreter {binary} is not there.", remedy=REMEDY)
        if not hasattr(os, "pidfd_open"):
            raise errors.SandboxUnavailable("Processes cannot be held by descriptors here.", remedy=REMEDY)
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        path = environment.get_environment().get("PATH", os.defpath) or os.defpath
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", _MODULE, str(binary)],
                cwd="/", stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True,
                env={"PATH": path, "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        self._one_at_a_time = asyncio.Lock()
        self.ended = False

    async def host(self, uid: int | None) -> Host:
        """A new host that is ready. Raises `SandboxUnavailable`."""
        control, theirs = socket.socketpair()
        control.setblocking(False)
        handles: list[int] = []
        try:
            async with asyncio.timeout(_START_S):
                with theirs:
                    group, handle = await self._forked({"uid": uid}, theirs)
                handles.append(handle)
                head, _nothing = await _answer(control, _ENVELOPE)
                if "interpreter" not in head:
                    raise OSError(str(head.get("problem")))
                handles.append(os.pidfd_open(int(head["interpreter"])))
        except BaseException as error:
            for handle in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.close(handle)
            control.close()
            if isinstance(error, OSError | KeyError | TimeoutError | errors.ToolFailed):
                raise errors.SandboxUnavailable(f"A host of scripts did not start: {error}", remedy=REMEDY) from error
            raise
        return Host(control, group, handles, uid, head["facts"])

    async def _forked(self, order: Mapping[str, Any], control: socket.socket) -> tuple[int, int]:
        """The number of the new process, which leads a group of its own, and its descriptor."""
        async with self._one_at_a_time:
            try:
                socket.send_fds(self._orders, [orjson.dumps(order)], [control.fileno()])
                await _readable(self._orders.fileno())
                text, handles = descriptors.received(self._orders, 64, 1)
                return int(text), handles[0]
            except BaseException as error:
                # what it answers from now on would be for somebody else
                self.close()
                if isinstance(error, ValueError | IndexError):
                    raise OSError("the template has ended") from error
                raise

    def close(self) -> None:
        """End it. Its hosts live on."""
        self.ended = True
        self._orders.close()
        self._process.kill()
        self._process.wait()


async def _answer(control: socket.socket, most: int) -> tuple[dict[str, Any], bytes]:
    """One frame: its head and what comes behind it. Raises `OSError` at the end, `ToolFailed` for what is no answer."""
    loop, data = asyncio.get_running_loop(), bytearray()
    wanted = _LENGTH.size
    while len(data) < wanted:
        part = await loop.sock_recv(control, _READ)
        if not part:
            raise OSError("it ended")
        data += part
        if wanted == _LENGTH.size and len(data) >= wanted:
            wanted += _LENGTH.unpack_from(data)[0]
            if wanted > most:
                raise errors.ToolFailed("The interpreter of the script answered with more than it may.")
    try:
        (length,) = _LENGTH.unpack_from(data, _LENGTH.size)
        at = 2 * _LENGTH.size + length
        head = orjson.loads(data[2 * _LENGTH.size : at])
        if not isinstance(head, dict) or len(data) != wanted:
            raise ValueError("no answer")
    except (ValueError, struct.error) as error:
        raise errors.ToolFailed("The interpreter of the script said what is no answer.") from error
    return head, bytes(data[at:])


async def _readable(descriptor: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
