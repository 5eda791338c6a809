"""The tier `python`: CPython forked fresh for each call from a clean zygote: Landlock, seccomp, limits, and namespaces where they work."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from chassis import lifecycle, log
from netra import errors
from services.dispatcher.tools.sandbox import folders, keeper, probe_python
from services.dispatcher.tools.sandbox.tiers import Availability, Ended, Job, Limits

_log = log.get(__name__)
_REMEDY = (
    "Use Linux 5.13 or later with Landlock and seccomp, install libseccomp, and run as a normal user, or as root that may make "
    "namespaces: the users that calls run as must be able to read Python's folders."
)
_SAID_CHARS = 2000
# how far apart the users are that calls of the two zygotes run as
_UIDS = 5_000
_LIMITS = frozenset(field.name for field in dataclasses.fields(Limits))


class Python:
    """See `tiers.Sandbox`.

    Jobs are Python programs: the result is what the variable `result` holds at the end, else the value of the last expression.
    """

    def __init__(
        self,
        root: Path,
        *,
        modules: Sequence[str] = (),
        read: Sequence[Path] = (),
        concurrency: int = 16,
        heartbeat_s: float = 2.0,
        first_uid: int = 200_000,
        namespaces: bool | None = None,
    ) -> None:
        """Calls have their folders below `root`, run up to `concurrency` at once, and all end when this process stands still for
        `heartbeat_s`. They may import `modules` (dotted names; a package with all in it) and read what lies in `read`, beside Python's own
        library and the packages of this environment. Where this process is root they run as users from `first_uid` on, one each.
        `namespaces`: None uses them where the machine lets, False never; with True there is no tier without them.
        """
        self._folders = root.absolute()
        self._plan = {
            "folders": str(self._folders), "modules": list(modules), "read": [str(path) for path in read], "heartbeat_s": heartbeat_s,
        }  # fmt: skip
        self._first_uid = first_uid
        self._kinds = (True, False) if namespaces is None else (namespaces,)
        self._slots, self._starting = asyncio.Semaphore(concurrency), asyncio.Lock()
        self._tasks = lifecycle.Tasks(on_failure=_logged)
        # the modules that are imported before they are asked for, in a zygote of their own: a fork of all that takes longer
        self._preload = [name for name in modules if name != "netra"]
        self._keepers: dict[bool, keeper.Keeper] = {}
        self._facts: dict[str, object] = {}
        self._closed = False

    async def start(self) -> None:
        """Start the zygotes. Raises `SandboxUnavailable`."""
        await self._alive(loaded=False)
        await self._alive(loaded=True)

    async def run(self, job: Job) -> Ended:
        """See `tiers.Sandbox.run`. Raises `ValueError` for a folder that lies elsewhere, `OSError` for one that is not there."""
        if not job.folder.is_relative_to(self._folders):
            raise ValueError(f"the folder {job.folder} does not lie below {self._folders}")
        until = time.monotonic() + job.limits.wall_s
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(job.limits.wall_s):
                    await stack.enter_async_context(self._slots)
                    zygote = await self._alive(loaded=job.module in self._preload)
            except TimeoutError:
                raise _late(job) from None
            files = stack.enter_context(_Files(job))
            job.begins()
            return await self._called(zygote, job, files, until)

    async def probe(self) -> Availability:
        """See `tiers.Sandbox.probe`."""
        try:
            await self.start()
            with tempfile.TemporaryDirectory(prefix="probe-", dir=self._folders) as place:
                reason = await probe_python.attacked(self.run, Path(place))
        except (errors.NetraError, OSError) as error:
            reason = getattr(error, "message", "") or str(error)
        backend = "namespaces" if self._facts.get("namespaces") else "landlock"
        return Availability("python", backend, not reason, dict(self._facts), reason, _REMEDY if reason else "")

    async def close(self) -> None:
        """End the zygote and every call."""
        self._closed = True
        async with self._starting:
            for zygote in self._keepers.values():
                await zygote.close()
        await self._tasks.close()

    async def _alive(self, *, loaded: bool) -> keeper.Keeper:
        """A zygote, or one with modules, started when there is none. Raises `SandboxUnavailable`."""
        loaded &= bool(self._preload)
        if (zygote := self._keepers.get(loaded)) is not None and zygote.alive:
            return zygote
        async with self._starting:
            if self._closed:
                raise errors.SandboxUnavailable("The python tier is closed.", remedy="Call it while the process serves.")
            if (zygote := self._keepers.get(loaded)) is None or not zygote.alive:
                if zygote is not None:
                    _log.error("a zygote of the python tier ended; another is started")
                    await zygote.close()
                zygote = await (self._loaded() if loaded else self._started([], 0))
            return zygote

    async def _started(self, preload: Sequence[str], uids: int) -> keeper.Keeper:
        reason = ""
        for apart in self._kinds:
            plan = {**self._plan, "namespaces": apart, "preload": preload, "first_uid": self._first_uid + uids}
            started = keeper.Keeper(plan, self._tasks)
            try:
                said = await started.start()
            except (keeper.Failed, OSError) as error:
                reason = str(error)
                _log.info("a zygote of the python tier did not start", namespaces=apart, preload=preload, reason=reason)
                continue
            # once namespaces were there, a later zygote is not let run without
            self._kinds = (apart,)
            self._facts = {"namespaces": apart, "own_uid": os.getuid() == 0, "disk_quota": apart, "seccomp": True, **said}
            self._keepers[bool(preload)] = started
            return started
        raise errors.SandboxUnavailable(f"The python tier is not available on this machine: {reason}.", remedy=_REMEDY)

    async def _loaded(self) -> keeper.Keeper:
        """One with modules; where they cannot be imported beforehand, calls do that themselves from now on."""
        # first one that fails for no fault of a module: what it finds out about the machine holds for this one, too
        plain = self._keepers.get(False) or await self._started([], 0)
        try:
            return await self._started(self._preload, _UIDS)
        except errors.SandboxUnavailable as error:
            _log.warning("modules of tools are not imported beforehand", modules=self._preload, reason=error.message)
            self._preload = []
            return plain

    async def _called(self, zygote: keeper.Keeper, job: Job, files: _Files, until: float) -> Ended:
        limits = {name: getattr(job.limits, name) for name in _LIMITS} | {"wall_s": until - time.monotonic()}
        try:
            call = zygote.begin(files.handles, limits, str(job.folder))
        except OSError as error:
            # it does not read what it is told, or has just gone: nothing has run
            zygote.give_up()
            raise errors.Unavailable(f"The process that runs Python code is not there: {error.strerror}. Try again.") from None
        try:
            said = await _ended(call, until)
            ended = files.ended(said)
            if call.disk >= 0:
                await self._brought(call.disk, job.folder)
            return ended
        finally:
            call.close()

    async def _brought(self, disk: int, folder: Path) -> None:
        """Bring what a call left on its disk to its folder. A cancel is raised afterwards."""
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=disk)
        try:
            if os.listdir(top) or os.listdir(folder):
                bringing = self._tasks.spawn(asyncio.to_thread(folders.mirror, top, str(folder)), name="files of a call")
                if stopped := await _settled(bringing):
                    raise stopped
                bringing.result()
        finally:
            os.close(top)


async def _settled(work: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for it, be it that this task is cancelled meanwhile; returns that cancel."""
    stopped: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as cancel:
            stopped = cancel
    return stopped


async def _ended(call: keeper.Call, until: float) -> dict[str, Any]:
    """What the zygote says of the call at its end; it is killed when the time is over. A cancel is raised after it is gone."""
    try:
        await asyncio.wait({call.ended}, timeout=max(0.0, until - time.monotonic()))
    except asyncio.CancelledError:
        call.kill()
        await _settled(call.ended)
        raise
    late = not call.ended.done()
    if late:
        call.kill()
        if stopped := await _settled(call.ended):
            raise stopped
    said = call.ended.result()
    return {**said, "why": "wall_s"} if late else said


class _Files:
    """What a call reads and writes, in files without names: nobody has to read along, and what runs cannot hold their end open."""

    def __init__(self, job: Job) -> None:
        self._job, self._most = job, job.limits.output
        self.handles: list[int] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__, None, None, None)
            request, result, output = (self._made(name) for name in ("request", "result", "output"))
            asked = orjson.dumps({"code": self._job.code, "environment": dict(self._job.environment)})
            _write(request, asked + b"\n" + self._job.arguments)
            os.lseek(request, 0, os.SEEK_SET)
            fcntl.fcntl(request, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            for file in (result, output):
                os.ftruncate(file, self._most + 1)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self.handles.append(os.open(self._job.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        for handle in self.handles:
            os.close(handle)
        self.handles.clear()

    def _made(self, name: str) -> int:
        self.handles.append(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        return self.handles[-1]

    def ended(self, said: dict[str, Any]) -> Ended:
        """What a call that has ended left. Raises what `tiers.Sandbox.run` does."""
        written = os.lseek(self.handles[2], 0, os.SEEK_CUR)
        output = os.pread(self.handles[2], min(written, self._most), 0).decode(errors="replace")
        answer = os.pread(self.handles[1], min(os.lseek(self.handles[1], 0, os.SEEK_CUR), self._most + 1), 0) or b"-"
        # foreign code could say so, too: it would only deny itself its own result
        if answer[:1] == b"W" and said.get("status") == os.EX_SOFTWARE:
            raise errors.SandboxUnavailable(
                f"The walls around a call could not be raised: {_said(answer[1:]).get('message')}", remedy=_REMEDY
            )
        # what is killed has not ended, whatever it wrote before
        error: errors.NetraError | None = None
        if said.get("status") != 0:
            error = _killed(self._job, said)
        elif answer[:1] == b"E":
            error = _problem(answer[1:])
        elif answer[:1] != b"R" or not _is_json(answer[1:]):
            error = errors.ToolFailed("It ended without a result.")
        if error is not None:
            if output:
                error.details["output"] = output[-_SAID_CHARS:]
            raise error
        return Ended(answer[1:], output, written > self._most)


def _killed(job: Job, said: dict[str, Any]) -> errors.NetraError:
    """The error for a call that did not end by itself."""
    why, status = said.get("why", ""), int(said.get("status", 0))
    if "lost" in said:
        return errors.ToolFailed("It was stopped: the process that runs Python code ended. It is started again.")
    if why == "start":
        return errors.SandboxUnavailable(f"No process could be started: {said.get('said')}", remedy="Free memory and processes.")
    if status == -signal.SIGSYS:
        return errors.SecurityViolation("The code called the kernel in a way that only attacks do. It was killed.")
    if why == "wall_s":
        return _late(job)
    if why == "heartbeat":
        return errors.ToolFailed("It was stopped: who watches over it stood still for too long.")
    if why in _LIMITS:
        return _exhausted(why)
    if status == -signal.SIGXCPU or said.get("cpu_s", 0.0) >= job.limits.cpu_s:
        return _exhausted("cpu_s")
    if status >= 0:
        return errors.ToolFailed(f"It ended with exit code {status} and without a result.")
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    more = "; when nobody stopped it, there was not enough memory" if -status == signal.SIGKILL else ""
    return errors.ToolFailed(f"It was killed by {name} before it ended{more}.")


def _problem(answer: bytes) -> errors.NetraError:
    """The error that a program answered with: it is foreign, and may have written what it likes."""
    said = _said(answer)
    message = str(said.get("message") or "It ended without a result.")[: 2 * _SAID_CHARS]
    limit = str(said.get("limit", ""))
    error = _exhausted(limit, message) if limit in _LIMITS else errors.ToolFailed(message)
    for name, key in (("type", "kind"), ("traceback", "traceback")):
        if text := str(said.get(key, ""))[: 2 * _SAID_CHARS]:
            error.details[name] = text
    return error


def _said(answer: bytes) -> dict[str, Any]:
    said = orjson.loads(answer) if _is_json(answer) else {}
    return said if isinstance(said, dict) else {}


def _exhausted(limit: str, message: str = "") -> errors.ResourceExhausted:
    return errors.ResourceExhausted(message or f"The code took more than it may: {limit}.", limit=limit)


def _late(job: Job) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(f"It did not end within {job.limits.wall_s:g} s.")


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _write(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _logged(error: BaseException) -> None:
    _log.error("a task of the python tier failed", exc_info=error)
