"""The process that calls of the tier `python` are forked from: it has read no request, and watches over what it forked.

`python -m services.dispatcher.tools.sandbox.zygote CONTROL`: the number of a socket, on which `Python` says what to do, one JSON object
per message; files come beside them. It imports nothing of ours but its neighbours, which do neither.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from services.dispatcher.tools.sandbox import descriptors, folders, imports, namespaces, program, walls

# where the system's own libraries are, and what they read when they are loaded
_SYSTEM = (
    "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf",
    "/usr/share/zoneinfo", "/etc/mime.types",
)  # fmt: skip
# how often what the kernel does not watch is looked at; how long the owner may take to kill what is over its time
_LOOK_S, _GRACE_S = 0.1, 0.2
_NO_ROOM = b'{"message": "The files that it was given take more than it may.", "limit": "disk"}'
_MAX_PLAN, _MAX_MESSAGE, _STACK = 1 << 18, 16384, 2 << 20
# how many children wait for a call at most, and at least: what the zygote changes in its memory it copies once for all it forks in a row
_SPARES, _FEW = 4, 2
# what a child that waits holds
_DOOR, _RULES = 100, 101


@dataclass(slots=True)
class _Call:
    """A child that runs one call. Times are of the monotonic clock."""

    number: int
    pid: int
    handle: int
    slot: int
    until: float
    limits: Mapping[str, float]
    folder: str
    why: str = ""

    def kill(self, why: str) -> None:
        """End it for good; the first reason counts."""
        self.why = self.why or why
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Spare:
    """A child that has made ready for a call, any call, and waits for it behind a door of its own."""

    pid: int
    door: socket.socket


class Zygote:
    """Forks on request; kills what is over its time, what is not wanted any more, and everything when its owner falls silent.

    It forks ahead: a child serves one call, as ever, but need not be made when that comes.
    """

    def __init__(self, control: socket.socket, plan: Mapping[str, Any], last: bytes) -> None:
        self._control, self._plan, self._last = control, plan, last
        self._root, self._apart = os.getuid() == 0, bool(plan["namespaces"])
        self._poll = select.epoll()
        # by what stands for them
        self._calls: dict[int, _Call] = {}
        self._spares: dict[int, _Spare] = {}
        self._heard, self._unsent = time.monotonic(), deque[tuple[bytes, list[int]]]()
        self._reach = walls.Reach(*walls.opened([*_SYSTEM, *plan["read"]]), walls.opened(namespaces.DEVICES)[1])

    def confine(self) -> None:
        """Let this process touch no more files than its calls may, all of their folders, and what it takes to watch over them.

        Raises `OSError`. Where there are namespaces there is nothing else, and mounts have to be made.
        """
        (proc,), _ = walls.opened(["/proc"])
        place = os.open(self._plan["folders"], os.O_PATH | os.O_CLOEXEC)
        rules = walls.rules(walls.Reach((*self._reach.folders, proc), self._reach.files, self._reach.devices))
        walls.confine(rules, place)
        for handle in (proc, place, rules):
            os.close(handle)

    def serve(self) -> None:
        """Until the owner is gone."""
        self._poll.register(self._control, select.EPOLLIN)
        while True:
            self._prepare()
            for handle, _ in self._poll.poll(self._pause()):
                if handle in self._calls:
                    self._ended(self._calls[handle])
                elif handle in self._spares:
                    self._wasted(handle)
                elif not self._told():
                    self._kill_all("owner")
                    return
            self._watch()

    def _pause(self) -> float:
        now = time.monotonic()
        waits = [call.until - now for call in self._calls.values() if not call.why]
        if waits and not self._apart:
            waits.append(_LOOK_S)
        if self._unsent:
            waits.append(0.01)
        return max(0.001, min([*waits, self._heard + self._plan["heartbeat_s"] - now if self._calls else 3600.0]))

    def _told(self) -> bool:
        """Read one message; whether there was one."""
        text, handles = b"", list[int]()
        with contextlib.suppress(ConnectionError):
            text, handles = descriptors.received(self._control, _MAX_MESSAGE, 8)
        self._heard = time.monotonic()
        if not text:
            return False
        message = json.loads(text)
        if "run" in message:
            self._run(message, handles)
        else:
            self._say({"alive": True})
        return True

    def _say(self, message: Mapping[str, Any], handles: Sequence[int] = ()) -> None:
        self._unsent.append((json.dumps(message).encode(), [os.dup(handle) for handle in handles]))
        self._send()

    def _send(self) -> None:
        """What the socket takes just now: an owner that does not read must not keep this process from watching."""
        while self._unsent:
            text, handles = self._unsent[0]
            try:
                socket.send_fds(self._control, [text], handles, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                pass  # it is gone; that is seen on reading
            self._unsent.popleft()
            for handle in handles:
                os.close(handle)

    def _watch(self) -> None:
        now = time.monotonic()
        self._send()
        if self._calls and now - self._heard > self._plan["heartbeat_s"]:
            self._kill_all("heartbeat")
        for call in self._calls.values():
            if not call.why and now > call.until:
                call.kill("wall_s")
            elif not call.why and not self._apart and (limit := _excess(call)):
                call.kill(limit)

    def _kill_all(self, why: str) -> None:
        for call in self._calls.values():
            call.kill(why)

    def _run(self, message: Mapping[str, Any], handles: list[int]) -> None:
        slot = min(set(range(len(self._calls) + 1)) - {call.slot for call in self._calls.values()})
        limits, folder = message["limits"], message["folder"]
        uid, disk = self._plan["first_uid"] + slot if self._root else None, -1
        try:
            if self._apart:
                disk = namespaces.disk(int(limits["disk"]), int(limits["files"]), os.getuid() if uid is None else uid)
                handles.append(disk)
            order = json.dumps({"uid": uid, "limits": limits, "folder": folder}).encode()
            handle, pid = self._taken(order, handles)
        except OSError as error:
            self._say({"ended": message["run"], "why": "start", "said": str(error)})
        else:
            self._begun(message, _Call(message["run"], pid, handle, slot, 0.0, limits, folder), disk)
        for handle in handles:
            os.close(handle)

    def _taken(self, order: bytes, handles: Sequence[int]) -> tuple[int, int]:
        """Give the call to a child: what stands for it, and its number. Raises `OSError` when there can be none."""
        while True:
            if not self._spares:
                self._fork()
            handle, spare = self._spares.popitem()
            with spare.door, contextlib.suppress(ConnectionError):
                socket.send_fds(spare.door, [order], handles)
                return handle, spare.pid
            # it was killed while it waited
            self._buried(handle, spare.pid)

    def _prepare(self) -> None:
        """Have a child ready for the next call. Not while words wait for the owner: beside them lies what is a call's own."""
        if len(self._spares) >= _FEW or self._unsent:
            return
        with contextlib.suppress(OSError):  # the call will say so
            while len(self._spares) < _SPARES:
                self._fork()

    def _fork(self) -> None:
        itself, (mine, theirs) = os.getpid(), socket.socketpair()
        with theirs:
            # what the operator's modules want done in a child is done; of the library's that is to draw other random numbers (`_ready`)
            if (pid := os.fork() if self._plan["preload"] else walls.fork()) == 0:
                self._become(itself, theirs)
            # should this fail, the zygote ends, and its children with it: better than one that nobody watches
            handle = os.pidfd_open(pid)
        self._spares[handle] = _Spare(pid, mine)
        self._poll.register(handle, select.EPOLLIN)

    def _wasted(self, handle: int) -> None:
        spare = self._spares.pop(handle)
        spare.door.close()
        self._buried(handle, spare.pid)

    def _buried(self, handle: int, pid: int) -> tuple[int, resource.struct_rusage]:
        """How a child ended, and what it took."""
        _, status, usage = os.wait4(pid, 0)
        self._poll.unregister(handle)
        os.close(handle)
        return os.waitstatus_to_exitcode(status), usage

    def _begun(self, message: Mapping[str, Any], call: _Call, disk: int) -> None:
        call.until = time.monotonic() + message["limits"]["wall_s"] + _GRACE_S
        self._calls[call.handle] = call
        self._say({"begun": call.number}, [call.handle] if disk < 0 else [call.handle, disk])

    def _ended(self, call: _Call) -> None:
        del self._calls[call.handle]
        status, usage = self._buried(call.handle, call.pid)
        spent = {"cpu_s": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}
        self._say({"ended": call.number, "status": status, "why": call.why, **spent})

    def _become(self, zygote: int, door: socket.socket) -> NoReturn:
        """The rest of a child's life."""
        failed: BaseException | None = None
        try:
            door = self._ready(zygote, door)
        except BaseException as error:
            failed = error  # whose call it is is told
        handles = list[int]()
        try:
            order, handles = descriptors.received(door, _MAX_MESSAGE, 5)
            if not order:
                os._exit(0)
            if failed is not None:
                raise failed
            asked = json.loads(order)
            self._raise(zygote, asked, handles)
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            said = b"E" + _NO_ROOM if full else b"W" + json.dumps({"message": f"{type(error).__name__}: {error}"}).encode()
            for place in handles[1:2]:
                os.write(place, said)
            os._exit(0 if full else os.EX_SOFTWARE)
        try:
            program.main(int(asked["limits"]["output"]))
        finally:
            # not even what was registered to be done at the end: it is the zygote's, or foreign
            os._exit(0)

    def _ready(self, zygote: int, door: socket.socket) -> socket.socket:
        """Do what is the same for all calls; hold nothing then but the door, and what is going to be the wall around files."""
        walls.die_with_parent(zygote)
        if self._apart:
            namespaces.own_mounts(self._plan["folders"])
        # far from the places that they are in
        for place, handle in ((_DOOR, door.detach()), (_RULES, walls.rules(self._reach))):
            os.dup2(handle, place)
        walls.close_range(program.REQUEST, _DOOR - 1)
        walls.close_range(_RULES + 1)
        random.seed()
        program.ready()
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, _DOOR)

    def _raise(self, zygote: int, order: Mapping[str, Any], handles: list[int]) -> None:
        """Raise the walls around this process. Raises `OSError`, when none of the code may run."""
        request, result, output, given, *disk = handles
        limits, uid = order["limits"], order["uid"]
        if [request, result] != [program.REQUEST, program.RESULT]:
            raise OSError(errno.EBADF, "this process holds more than it should")
        if disk:
            namespaces.place(disk[0], order["folder"])
            there = os.open(order["folder"], os.O_RDONLY | os.O_DIRECTORY)
            if os.listdir(given):
                folders.copy(given, there, os.getuid() if uid is None else uid)
            given = there
        elif uid is not None:
            folders.give(given, uid)
        os.fchdir(given)
        if self._apart and uid is None:
            namespaces.alone()
        walls.become(uid)
        walls.die_with_parent(zygote)
        os.umask(0o077)
        walls.confine(_RULES, given)
        for place in (program.OUTPUT, program.OUTPUT + 1):
            os.dup2(output, place)
        walls.close_range(program.RESULT + 1)
        walls.limit(limits, count_threads=self._apart or uid is not None)
        walls.load(self._last)


def _excess(call: _Call) -> str:
    """Which limit a running call is over, of those that the kernel does not watch here."""
    with contextlib.suppress(OSError):
        if len(os.listdir(f"/proc/{call.pid}/task")) > call.limits["processes"]:
            return "processes"
    size, files = folders.taken(call.folder, int(call.limits["files"]))
    if files > call.limits["files"]:
        return "files"
    return "disk" if size + folders.removed_and_open(call.pid) > call.limits["disk"] else ""


def _prepared(control: socket.socket, plan: dict[str, Any]) -> Zygote:
    """The zygote, behind its own walls. Raises `OSError`, `RuntimeError`, `ImportError`."""
    walls.die_with_parent(plan["owner"])
    if not walls.landlock_abi():
        raise OSError(errno.ENOSYS, "this kernel has no Landlock, or it is switched off")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        # when memory runs out, calls go, not the process that runs everybody's agents
        file.write("1000")
    os.umask(0o022)
    imports.make_ready()
    plan["read"] = [*plan["read"], *imports.grant(plan["modules"]), *imports.narrow()]
    threading.stack_size(_STACK)
    root, apart = os.getuid() == 0, bool(plan["namespaces"])
    first, last = walls.zygote_filter(owner_of_others=not root and not apart), walls.last_filter()
    if apart:
        if (inner := namespaces.enter(user=not root)) > 0:
            control.close()
            # once more: the kernel forgets it for who comes to be another user, in a new namespace or not
            walls.die_with_parent(plan["owner"])
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
        walls.die_with_parent(0)
    # of this process, and opened before /proc is out of reach
    statm, tasks = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC), os.open("/proc/self/task", os.O_RDONLY | os.O_CLOEXEC)
    if apart:
        namespaces.only([*_SYSTEM, *plan["read"]], plan["folders"])
    zygote = Zygote(control, plan, last)
    if plan["preload"]:
        if not apart:
            zygote.confine()
        _preloaded(plan["preload"], tasks)
    program.prepare()
    walls.measure(statm)
    nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)  # what calls read, too
    for handle in (statm, tasks, nothing):
        os.close(handle)
    walls.never_more_capable()
    walls.load(first)
    return zygote


def _preloaded(modules: Sequence[str], tasks: int) -> None:
    """Import what calls are about to import. Raises `RuntimeError` when that cannot be forked, or what the modules raise.

    They find what calls find: no secrets, no addresses, no files but Python's. What they hold from now on, every call may read.
    """
    for name in modules:
        importlib.import_module(name)
    if len(os.listdir(tasks)) > 1:
        raise RuntimeError("a module starts threads when it is imported")


def main(number: int) -> None:
    """Serve the owner at the other end of the socket."""
    control = socket.socket(fileno=number)
    plan = json.loads(control.recv(_MAX_PLAN))
    try:
        zygote = _prepared(control, plan)
    except Exception as error:  # a module's, too
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    itself = os.pidfd_open(os.getpid())
    socket.send_fds(control, [json.dumps({"ready": {"landlock": walls.landlock_abi()}}).encode()], [itself])
    os.close(itself)
    gc.collect()
    # so that children do not copy what they only count
    gc.freeze()
    zygote.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
