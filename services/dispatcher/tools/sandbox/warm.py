"""One warm worker process, as the dispatcher has it: given one call at a time, killed with its whole group, seen to be gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle, log
from netra import errors
from services.dispatcher.tools.sandbox import frames, groups, guardian

_log = log.get(__name__)
_MODULE = "services.dispatcher.tools.sandbox.worker"
_NOWHERE = Path("/")
_OUTPUT_BYTES = 64 * 1024
_MAX_SAID_BYTES = 2048
_MAX_LEFT = 64


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a plain function: where it is found, what it is given, where it works, how long it may."""

    module: str
    function: str
    arguments: Mapping[str, Any]
    folder: Path
    timeout_s: float

    def frame(self) -> bytes:
        """As a worker reads it. Raises `InvalidPayload` when the arguments are no JSON, `TooLarge`."""
        asked = {"module": self.module, "function": self.function, "arguments": self.arguments, "folder": str(self.folder)}
        try:
            text = orjson.dumps(asked)
        except TypeError as error:
            raise errors.InvalidPayload(f"{self.function}: its arguments cannot be written as JSON: {error}", field="arguments") from None
        if len(text) > frames.MAX_BYTES:
            raise errors.TooLarge(f"{self.function}: arguments may have at most {frames.MAX_BYTES} bytes", field="arguments")
        return frames.frame(frames.CALL, text)

    def overdue(self) -> errors.DeadlineExceeded:
        """What is raised when the time is over."""
        return errors.DeadlineExceeded(f"{self.function} did not finish within {self.timeout_s:g} s.")


class Worker:
    """One process. `user` is whom it serves: nobody yet, or one for ever."""

    def __init__(
        self, setup: Mapping[str, Any], guard: guardian.Guardian, tasks: lifecycle.Tasks, on_ready: Callable[[], None],
        on_end: Callable[[Worker], None],
    ) -> None:  # fmt: skip
        """Start it. `on_ready` is called when it can work, `on_end` when it and its group are gone. Raises `Unavailable`."""
        self.user: str | None = None
        self.idle_since = 0.0
        self.last = False
        self._loop, self._guard, self._on_ready, self._on_end = asyncio.get_running_loop(), guard, on_ready, on_end
        self._incoming = frames.Incoming()
        self._answer: asyncio.Future[bytearray] | None = None
        self._name = ""
        self._why: errors.NetraError | None = None
        self._ready, self._gone = asyncio.Event(), asyncio.Event()
        self._said, self._said_bytes = b"", 0
        with contextlib.ExitStack() as stack:
            self._process = self._started(stack)
            guard.guard(self._process.pid)
            self._held = stack.pop_all()
        self._loop.add_reader(self._socket, self._read)
        self._loop.add_reader(self._output, self._listen)
        self._send(memoryview(frames.frame(frames.SETUP, orjson.dumps(setup))))
        tasks.spawn(self._lives(), name=f"worker {self._process.pid}")

    def _started(self, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        try:
            with contextlib.ExitStack() as theirs:
                self._socket, its = socket.socketpair()
                stack.enter_context(self._socket)
                theirs.enter_context(its)
                self._output, saying = os.pipe()
                stack.callback(os.close, self._output)
                theirs.callback(os.close, saying)
                self._socket.setblocking(False)
                os.set_blocking(self._output, False)
                return groups.start(
                    _MODULE, cwd=_NOWHERE, variables=groups.clean_environment(_NOWHERE), stdin=its.fileno(), stdout=saying, stderr=saying,
                    door=self._guard.door(),
                )  # fmt: skip
        except OSError as error:
            raise errors.Unavailable(f"A worker process could not be started: {error.strerror}.") from None

    @property
    def ready(self) -> bool:
        """Whether it has started, or ended meanwhile."""
        return self._ready.is_set()

    @property
    def usable(self) -> bool:
        """Whether it can be given another call, as far as is known."""
        return not self.last and self._why is None and not self._gone.is_set()

    @property
    def alive(self) -> bool:
        """Whether it can be given a call: looked up now, as its end may not have been heard of yet."""
        return self.usable and self._guard.guards(self._process.pid) and self._process.poll() is None

    async def call(self, call: Call, request: bytes, left_s: float) -> bytearray:
        """What the function returns, as JSON. Raises as `Workers.text` does; a cancel when the process is gone."""
        self._name = call.function
        answer: asyncio.Future[bytearray] = self._loop.create_future()
        self._answer = answer
        timer = self._loop.call_later(left_s, lambda: self.kill(call.overdue()))
        try:
            await self._ready.wait()
            if not self._gone.is_set():
                self._send(memoryview(request))
            return await answer
        except asyncio.CancelledError:
            self.kill(errors.Cancelled())
            if answer.done() and not answer.cancelled():
                answer.exception()  # nobody is left to be told
            raise
        finally:
            timer.cancel()
            self._answer = None
            if self.last or self._why is not None:
                await self.end()
            self._listen()
            self._tell()

    async def end(self) -> None:
        """Kill it; returns when its group is gone. A cancel is raised after that."""
        self.kill(errors.Cancelled())
        cancelled: asyncio.CancelledError | None = None
        while not self._gone.is_set():
            try:
                await self._gone.wait()
            except asyncio.CancelledError as cancel:
                cancelled = cancel
        if cancelled is not None:
            raise cancelled

    def kill(self, why: errors.NetraError) -> None:
        """Kill it and everything in its group; the call that it has ends with this error, once they are gone."""
        if self._why is None and not self._gone.is_set():
            self._why = why
            groups.kill(self._process.pid)

    async def _lives(self) -> None:
        code = await groups.exit_code(self._process)
        await groups.gone(self._process.pid)
        self._guard.release(self._process.pid)
        # what it answered and printed before it ended; no more than the system holds, should somebody still write
        for _ in range(_MAX_LEFT):
            self._read()
        self._listen()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._loop.remove_reader(self._output)
        self._held.close()
        self._gone.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._why or self._ended(code))
        self._ready.set()
        self._on_end(self)

    def _ended(self, code: int) -> errors.NetraError:
        how = groups.ending(code)
        if self._ready.is_set():
            return errors.ToolFailed(f"The worker process of {self._name} {how}.", tool=self._name, exit_code=code)
        return errors.Unavailable(f"A worker process could not be started: it {how}.")

    def _send(self, data: memoryview) -> None:
        self._loop.remove_writer(self._socket)
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:  # it has ended; how is about to be known
            return
        if sent < len(data):
            self._loop.add_writer(self._socket, self._send, data[sent:])

    def _read(self) -> None:
        try:
            size = self._socket.recv_into(self._incoming.space())
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._loop.remove_reader(self._socket)
            return
        try:
            for kind, text in self._incoming.filled(size):
                self._take(*frames.ends(kind), text)
        except (frames.Broken, orjson.JSONDecodeError) as error:
            self.kill(errors.ToolFailed(f"The worker process of {self._name} answered with something else than an answer: {error}"))

    def _take(self, kind: bytes, last: bool, text: bytearray) -> None:
        if kind == frames.READY:
            self._ready.set()
            self._on_ready()
        elif kind not in frames.LAST:
            raise frames.Broken(f"a frame of kind {kind!r}")
        else:
            self.last = last
            if self._answer is not None and not self._answer.done():
                if kind == frames.RESULT:
                    self._answer.set_result(text)
                else:
                    self._answer.set_exception(_error(self._name, orjson.loads(text)))

    def _listen(self) -> None:
        """Take what the function printed."""
        if self._gone.is_set():
            return
        try:
            said = os.read(self._output, _OUTPUT_BYTES)
        except BlockingIOError:
            return
        if not said:
            self._loop.remove_reader(self._output)
            return
        self._said_bytes += len(said)
        self._said = (self._said + said)[-_MAX_SAID_BYTES:]

    def _tell(self) -> None:
        if self._said:
            said = self._said.decode(errors="replace")
            _log.warning("a worker process said something", tool=self._name, bytes=self._said_bytes, said=said)
            self._said, self._said_bytes = b"", 0


def _error(name: str, problem: Mapping[str, Any]) -> errors.NetraError:
    if "code" in problem:
        error = errors.by_code(str(problem["code"]))(str(problem["message"]), retry_after_ms=problem["retry_after_ms"])
        error.details = {str(key): str(value) for key, value in problem["details"].items()}
        return error
    if "limit" in problem:
        return errors.ResourceExhausted(f"{name} took more memory than it may.", limit=problem["limit"])
    if "size" in problem:
        most = frames.MAX_BYTES
        return errors.ToolFailed(f"{name} returned {problem['size']} bytes; a result may have at most {most}.", limit=most)
    if "unwritten" in problem:
        return errors.ToolFailed(f"The result of {name} cannot be written as JSON: {problem['unwritten']}")
    _log.warning("a tool failed", tool=name, error=problem["raised"], where=problem["where"])
    return errors.ToolFailed(f"{name} failed with {problem['raised']}.", tool=name)
