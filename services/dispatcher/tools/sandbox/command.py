"""The tier `command`: a program of the system in namespaces of its own (bubblewrap), under a filter of system calls and limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle
from netra import errors
from services.dispatcher.tools.sandbox import bubblewrap, folders, groups, guardian, probe_command, tiers, usage

# ids that nobody has; a command has one of its own when the dispatcher is root
_UIDS = range(220_000, 230_000)
_TELLING_BYTES = 2048
_READ = 64 * 1024
_HEAVY = 64 * 1024
_LOOK_S = 0.05
_SIGNALLED = 128


class Command:
    """Starts each command cold. `readable` are folders beside the system's own that commands can read. At most `most` run at once.

    What runs ends with the process whose `watch` this is. `uids` are used when this is root, one for each command that runs.
    """

    def __init__(self, watch: guardian.Guardian, *, most: int = 8, readable: tuple[Path, ...] = (), uids: range = _UIDS) -> None:
        self._guardian, self._readable = watch, readable
        self._most, self._slots = most, asyncio.Semaphore(most)
        self._own_user = os.geteuid() == 0
        if len(uids) < most:
            raise ValueError("there must be a user of the machine for each command that runs")
        self._uids = list(uids)
        self._launcher: bubblewrap.Launcher | None = None
        self._why_not = "The tier command is not started."
        self._calls: set[bubblewrap.Call] = set()

    async def start(self) -> None:
        """Raises `SandboxUnavailable`."""
        try:
            self._launcher = bubblewrap.Launcher(self._readable, own_user=self._own_user)
        except errors.SandboxUnavailable as error:
            self._why_not = error.message
            raise

    async def run(self, job: tiers.Job) -> tiers.Ended:
        """See `tiers.Sandbox.run`."""
        self._ready()
        until = asyncio.get_running_loop().time() + job.limits.wall_s
        try:
            async with asyncio.timeout_at(until):
                files = await asyncio.to_thread(bubblewrap.given, job) if os.listdir(job.folder) else {}
                await self._slots.acquire()
        except TimeoutError as late:
            raise _late(job) from late
        uid: int | None = None
        try:
            launcher = self._ready()
            # there are more than there are slots
            uid = self._uids.pop(0) if self._own_user else None
            door = self._guardian.door()
            job.begins()
            with launcher.started(job, files, uid, door) as call:
                return await self._run(call, job, until)
        finally:
            if uid is not None:
                self._uids.append(uid)
            self._slots.release()

    async def probe(self) -> tiers.Availability:
        """See `tiers.Sandbox.probe`."""
        found = await probe_command.probe(self, "bubblewrap")
        # the folder of a call is a file system of its own, limited in bytes and in files
        facts = {"namespaces": True, "seccomp": True, "disk_quota": True, "own_user": self._own_user} if found.available else {}
        return dataclasses.replace(found, facts=facts)

    async def close(self) -> None:
        """End every command, and return when they are gone."""
        self._launcher = None
        for call in self._calls:
            call.kill(errors.Unavailable("This process stops."))
        for _ in range(self._most):
            await self._slots.acquire()
        for _ in range(self._most):
            self._slots.release()

    def _ready(self) -> bubblewrap.Launcher:
        if self._launcher is None:
            raise errors.SandboxUnavailable(self._why_not, remedy=bubblewrap.REMEDY)
        return self._launcher

    async def _run(self, call: bubblewrap.Call, job: tiers.Job, until: float) -> tiers.Ended:
        tasks = lifecycle.Tasks(on_failure=lambda _error: None)
        self._calls.add(call)
        late = asyncio.get_running_loop().call_at(until, lambda: call.kill(_late(job)))
        try:
            outcome = await _outcome(call, await self._ended(call, job.limits, tasks), job.limits)
            bringing = tasks.spawn(asyncio.to_thread(_bring, call.disk, job.folder), name="files of a command")
            if stopped := await _settled(bringing, call):
                raise stopped
            bringing.result()
            return outcome
        finally:
            late.cancel()
            self._calls.discard(call)

    async def _ended(self, call: bubblewrap.Call, limits: tiers.Limits, tasks: lifecycle.Tasks) -> int:
        """See `_to_its_end`; until then it ends with this process."""
        try:
            self._guardian.guard(call.process.pid)
            ended = tasks.spawn(_to_its_end(call, limits, lambda pid: self._begin(call, pid)), name="command")
            if stopped := await _settled(ended, call):
                raise stopped
            code: int = ended.result()
            if code < 0 and not self._guardian.guards(call.process.pid):
                call.why = call.why or _silent()
            return code
        finally:
            self._guardian.release(call.process.pid)
            if call.first >= 0:
                self._guardian.release(call.first)

    def _begin(self, call: bubblewrap.Call, pid: int) -> None:
        """The guardian knows the group that bubblewrap's child is about to leave, and the one that it makes, before anything foreign is."""
        call.born(pid)
        self._guardian.guard(pid)
        try:
            # ends it, if this process was silent for too long since the start: it may be another's by now
            self._guardian.door()
        except errors.Unavailable as error:
            call.kill(error)
        call.begin()


async def _settled(work: asyncio.Task[Any], call: bubblewrap.Call) -> asyncio.CancelledError | None:
    """Wait until it is done; returns the cancellation that came meanwhile, which ends the call."""
    stopped: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as cancel:
            call.kill()
            stopped = cancel
    return stopped


async def _to_its_end(call: bubblewrap.Call, limits: tiers.Limits, begin: Callable[[int], None]) -> int:
    """The exit code of the command, or -1 when bubblewrap never got to it; returns when nothing of it is left.

    `begin` lets it go on to what is foreign, once it is known which process is the first of the namespace.
    """
    stdout, stderr = call.process.stdout, call.process.stderr
    if stdout is None or stderr is None:
        raise ValueError("both are to be pipes")
    async with asyncio.TaskGroup() as parts:
        status = parts.create_task(_status(call, begin))
        parts.create_task(_gathered(stdout.fileno(), call.stdout, limits.output, lambda: call.kill(_too_much(limits))))
        parts.create_task(_gathered(stderr.fileno(), call.stderr, limits.output, lambda: setattr(call, "cut", True)))
        looked = parts.create_task(_looked(call, limits))
        handle = os.pidfd_open(call.process.pid)
        try:
            await _readable(handle)
        finally:
            os.close(handle)
        looked.cancel()
        # what holds the pipes open is in its group, or in the namespace, and ends now; it is still listed, so the group is its own
        groups.kill(call.process.pid)
        call.kill()
        call.process.wait()
        code = await status
        if call.init >= 0:
            await _readable(call.init)
    return code


async def _status(call: bubblewrap.Call, begin: Callable[[int], None]) -> int:
    """Hear from bubblewrap which process is the first of the namespace, and with what the command ended."""
    code, text = -1, b""
    while part := await _part(call.told):
        text += part
        *lines, text = text.split(b"\n")
        for line in lines:
            with contextlib.suppress(orjson.JSONDecodeError):
                fact = orjson.loads(line)
                code = int(fact.get("exit-code", code))
                if "child-pid" in fact and call.first < 0:
                    begin(int(fact["child-pid"]))
    return code


async def _looked(call: bubblewrap.Call, limits: tiers.Limits) -> None:
    """End it when all its processes together take more than one may."""
    while True:
        await asyncio.sleep(_LOOK_S)
        used = await asyncio.to_thread(usage.of, call.process.pid)
        if used.memory > limits.memory:
            call.kill(errors.ResourceExhausted(f"The command took more than {limits.memory} bytes of memory.", limit="memory"))
        elif used.cpu_s > limits.cpu_s:
            call.kill(_too_long(limits))


async def _gathered(descriptor: int, into: bytearray, most: int, too_much: Callable[[], None]) -> None:
    """Read to the end, and keep the beginning."""
    while part := await _part(descriptor):
        room = most - len(into)
        into += part[:room]
        if len(part) > room:
            too_much()


async def _part(descriptor: int) -> bytes:
    """What comes next; nothing at the end."""
    await _readable(descriptor)
    return os.read(descriptor, _READ)


async def _readable(descriptor: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def _outcome(call: bubblewrap.Call, code: int, limits: tiers.Limits) -> tiers.Ended:
    """What the command left. Raises what `tiers.Sandbox.run` tells, with the end of what it said as `output`."""
    said = call.stderr.decode(errors="replace")
    if call.why is not None:
        raise call.why
    if code < 0 or call.disk < 0:
        reason = said[-_TELLING_BYTES:].strip() or "no reason given"
        raise errors.SandboxUnavailable(f"The command was not started: {reason}", remedy=bubblewrap.REMEDY)
    if code:
        error = _failed(code, said, limits)
        error.details["output"] = (call.stdout[-_TELLING_BYTES:] + call.stderr[-_TELLING_BYTES:]).decode(errors="replace")
        raise error
    return tiers.Ended(await _as_json(bytes(call.stdout)), said, call.cut)


def _failed(code: int, said: str, limits: tiers.Limits) -> errors.NetraError:
    number = code - _SIGNALLED
    if number == signal.SIGSYS:
        return errors.SecurityViolation("The command called the system for what no command needs.", exit_code=code)
    if number == signal.SIGXCPU:
        return _too_long(limits)
    if number == signal.SIGXFSZ:
        return errors.ResourceExhausted(f"The command wrote a file of more than {limits.file_size} bytes.", limit="file_size")
    tail = said[-_TELLING_BYTES:].strip()
    return errors.ToolFailed(f"The command ended with exit code {code}{': ' if tail else '.'}{tail}", exit_code=code)


def _bring(disk: int, folder: Path) -> None:
    """Bring what the command left in its folder to the folder of the call. Raises `ToolFailed`."""
    if not os.listdir(disk) and not os.listdir(folder):
        return
    try:
        _open_all(disk)
        folders.mirror(disk, str(folder))
    except OSError as error:
        raise errors.ToolFailed(f"The files that the command left cannot be read: {error.strerror}") from error


def _open_all(folder: int) -> None:
    """Whatever modes a command gave its files, its owner may read them; nothing of it runs any more. Raises `OSError`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                os.chmod(entry.name, 0o600, dir_fd=folder)
            elif entry.is_dir(follow_symlinks=False):
                os.chmod(entry.name, 0o700, dir_fd=folder)
                inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    _open_all(inner)
                finally:
                    os.close(inner)


async def _as_json(text: bytes) -> bytes:
    """The text itself when it is JSON, else the text as a string of JSON."""
    if len(text) > _HEAVY:
        return await asyncio.to_thread(_parsed, text)
    return _parsed(text)


def _parsed(text: bytes) -> bytes:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return orjson.dumps(text.decode(errors="replace"))
    return text.strip()


def _too_much(limits: tiers.Limits) -> errors.NetraError:
    return errors.ResourceExhausted(f"The command printed more than {limits.output} bytes.", limit="output")


def _too_long(limits: tiers.Limits) -> errors.NetraError:
    return errors.ResourceExhausted(f"The command took more than {limits.cpu_s:g} s of processor time.", limit="cpu_s")


def _silent() -> errors.NetraError:
    return errors.Unavailable("The command was ended: the process that ran it was stopped or held up, or lost its guardian.")


def _late(job: tiers.Job) -> errors.NetraError:
    return errors.DeadlineExceeded(f"The command did not finish within {job.limits.wall_s:g} s.")
