"""How a command is started in namespaces of its own, and how all of it is ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from netra import errors
from services.dispatcher.tools.sandbox import filters, groups, tiers, watch

REMEDY = (
    "Install bubblewrap, util-linux and libseccomp, and let processes make user namespaces: in a container this takes a seccomp profile "
    "that allows clone, unshare and mount, and an unmasked /proc; on the host, sysctls that do not forbid unprivileged user namespaces."
)
_HOME, _NOBODY = "/sandbox", "65534"
# where the launcher mounts the folder of the call: what lies there on this machine is out of sight for the launcher alone
_STAND = "/mnt"
# before anything else the guardian hears of the group whose leader this is; $1 is where, and is there as long as the owner is.
# Nothing is inherited for it: a shell cannot close a descriptor of two digits
_TELL = f'test -p "$1" && printf "{watch.GUARD.decode()}%0{watch.DIGITS}d" "$$" >>"$1" && shift && exec "$@"'
# the launcher is root in a namespace of its own, where it may mount; what bubblewrap starts is nobody in the next
_LAUNCH = f'mount -t tmpfs -o "$1" tmpfs {_STAND} && shift && exec "$@"'
_TEMPORARY = "/tmp"  # noqa: S108  # inside, where it is the call's own folder
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_FROM_ETC = ("alternatives", "ld.so.cache", "localtime", "ssl/certs", "mime.types")
_PASSWD, _GROUP = f"nobody:x:65534:65534:nobody:{_HOME}:/bin/sh\n".encode(), b"nogroup:x:65534:\n"
_MOST_GIVEN = 256
_PATIENCE_S = 0.1
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(slots=True, eq=False)
class Call:
    """A command that was started. `told` is where bubblewrap tells of it; `why` is set when it is ended for a reason.

    Bubblewrap reads its filter of system calls from `gate`, right before it goes on to what is foreign. If this process ends before it
    has written that, the filter is empty, which the kernel does not take: then nothing foreign ever begins.
    """

    process: subprocess.Popen[bytes]
    told: int
    gate: int
    filter: bytes
    # the first process of its namespace, by its number and held: with it everything ends; and its folder, there as long as it is held
    first: int = -1
    init: int = -1
    disk: int = -1
    ending: bool = False
    why: errors.NetraError | None = None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    cut: bool = False

    def born(self, pid: int) -> None:
        """Hold the first process of the namespace, and the folder."""
        self.first = pid
        with contextlib.suppress(ProcessLookupError):
            self.init = os.pidfd_open(pid)
        with contextlib.suppress(OSError):
            self.disk = os.open(f"/proc/{self.process.pid}/root{_STAND}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def begin(self) -> None:
        """Let it go on to what is foreign, unless it is to end."""
        if self.ending:
            self.kill()
        else:
            # less than a pipe holds, so it is written whole or not at all; nobody reads it if it was ended meanwhile
            with contextlib.suppress(BrokenPipeError):
                os.write(self.gate, self.filter)
        os.close(self.gate)
        self.gate = -1

    def kill(self, why: errors.NetraError | None = None) -> None:
        """End all of it: the first process of the namespace takes the others with it, and bubblewrap, which waits for it, ends then."""
        self.ending, self.why = True, self.why or why
        if self.init >= 0:
            self._kill_init()
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._kill_group)
        else:
            self._kill_group()

    def _kill_init(self) -> None:
        if self.init >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init, signal.SIGKILL)

    def _kill_group(self) -> None:
        # what is only being started is in the group yet, and what is in the namespace is not any more
        if self.process.returncode is None:
            groups.kill(self.process.pid)

    def close(self) -> None:
        """Let go of what was held for it. What still runs is killed."""
        if self.process.returncode is None:
            self._kill_init()
            groups.kill(self.process.pid)
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        for descriptor in (self.told, self.gate, self.init, self.disk):
            if descriptor >= 0:
                os.close(descriptor)
        self.told = self.gate = self.init = self.disk = -1


class Launcher:
    """What is needed to start commands. `readable` are folders beside the system's own that they can read."""

    def __init__(self, readable: tuple[Path, ...], *, own_user: bool) -> None:
        """Raises `SandboxUnavailable`."""
        wanted = ["bwrap", "unshare", "mount", "sh", "prlimit", *(["setpriv"] if own_user else [])]
        found = {name: shutil.which(name, path=_PATH) for name in wanted}
        if missing := [name for name, path in found.items() if path is None]:
            raise errors.SandboxUnavailable(f"These programs are not there: {', '.join(missing)}.", remedy=REMEDY)
        if not Path("/proc/thread-self/children").exists():
            raise errors.SandboxUnavailable("The kernel does not tell the children of a process.", remedy=REMEDY)
        try:
            self._filter = filters.compiled(sockets=True)
        except (OSError, RuntimeError) as error:
            raise errors.SandboxUnavailable(f"There is no filter of system calls: {error}", remedy=REMEDY) from error
        self._programs = {name: str(path) for name, path in found.items()}
        self._readable = readable

    @contextlib.contextmanager
    def started(self, job: tiers.Job, files: Mapping[str, bytes], uid: int | None, door: int) -> Iterator[Call]:
        """The command, with these files in its folder, as this user of the machine; it tells the guardian of itself through this door.

        Raises `ToolFailed` when it cannot be started.
        """
        if any("\0" in text for pair in job.environment.items() for text in pair) or not job.argv:
            raise errors.ToolFailed("A command has a name, and no variable holds a NUL.")
        with contextlib.ExitStack() as given:
            handed: list[int] = []

            def hand(content: bytes) -> str:
                handed.append(_sealed(content))
                given.callback(os.close, handed[-1])
                return str(handed[-1])

            (told, tells), (waits, gate) = os.pipe(), os.pipe()
            stdin = _sealed(job.arguments)
            handed += [tells, waits]
            for descriptor in (tells, waits, stdin):
                given.callback(os.close, descriptor)
            try:
                options = [*self._options(job, files, hand, waits), "--json-status-fd", str(tells)]
                listed = hand(b"".join(os.fsencode(option) + b"\0" for option in options))
                process = self._popen(job, [*self._prefix(job.limits, uid, door), "--args", listed, "--"], stdin, handed)
            except (OSError, ValueError) as error:
                os.close(told)
                os.close(gate)
                raise errors.ToolFailed(f"The command could not be started: {error}") from error
        call = Call(process, told, gate, self._filter)
        try:
            for descriptor in (told, *(stream.fileno() for stream in (process.stdout, process.stderr) if stream is not None)):
                os.set_blocking(descriptor, False)
            yield call
        finally:
            call.close()

    def _popen(self, job: tiers.Job, before: list[str], stdin: int, handed: list[int]) -> subprocess.Popen[bytes]:
        command = [*before, self._programs["prlimit"], *_inner_limits(job.limits), "--", *job.argv]
        # by vfork, and from the thread that lives as long as this process: bubblewrap ends with the thread that started it
        return subprocess.Popen(  # noqa: S603
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={"PATH": _PATH}, pass_fds=handed,
            start_new_session=True,
        )  # fmt: skip

    def _prefix(self, limits: tiers.Limits, uid: int | None, door: int) -> list[str]:
        """Up to bubblewrap: the news to the guardian, another user where this is root, a namespace in which the folder is mounted."""
        programs = self._programs
        telling = [programs["sh"], "-c", _TELL, "sh", f"/proc/{os.getpid()}/fd/{door}"]
        user = [] if uid is None else [programs["setpriv"], f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
        quota = f"size={limits.disk},nr_inodes={limits.files + 1},mode=0700,nosuid,nodev"
        namespace = [programs["unshare"], "--user", "--map-root-user", "--mount", "--propagation", "private"]
        return [*telling, *user, *namespace, programs["sh"], "-c", _LAUNCH, "sh", quota, programs["bwrap"]]

    def _options(self, job: tiers.Job, files: Mapping[str, bytes], hand: Callable[[bytes], str], waits: int) -> list[str]:
        """What bubblewrap is to do, in this order. It reads them from a descriptor: the command line of a process is no secret."""
        options = "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup --disable-userns".split()
        options += f"--uid {_NOBODY} --gid {_NOBODY} --hostname sandbox --die-with-parent --new-session --cap-drop ALL".split()
        options += ["--ro-bind", "/usr", "/usr"]
        for path in _SYSTEM:
            if os.path.islink(path):
                options += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                options += ["--ro-bind", path, path]
        for name in _FROM_ETC:
            options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for folder in self._readable:
            options += ["--ro-bind", str(folder), str(folder)]
        options += ["--ro-bind-data", hand(_PASSWD), "/etc/passwd", "--ro-bind-data", hand(_GROUP), "/etc/group"]
        # what --dev makes can be written but for this; what --remount-ro changes is this folder, not what is mounted in it
        options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        options += ["--bind", _STAND, _HOME, "--symlink", _HOME.strip("/"), _TEMPORARY]
        for name, content in files.items():
            options += ["--perms", "0644", "--file", hand(content), f"{_HOME}/{name}"]
        options += ["--remount-ro", "/", "--chdir", _HOME, "--seccomp", str(waits), "--clearenv"]
        variables = {"PATH": _PATH, "HOME": _HOME, "TMPDIR": _HOME, "LANG": "C.UTF-8", "TZ": "UTC", **job.environment}
        for name, value in variables.items():
            options += ["--setenv", name, value]
        return options


def given(job: tiers.Job) -> dict[str, bytes]:
    """The files of the call by their names in its folder; a link is none. Raises `ResourceExhausted`."""
    found, left, many = dict[str, bytes](), job.limits.disk, min(job.limits.files, _MOST_GIVEN)
    for path in sorted(job.folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        left, many = left - path.stat().st_size, many - 1
        if left < 0 or many < 0:
            raise errors.ResourceExhausted("The files that the command was given are too large or too many.", limit="disk")
        found[path.relative_to(job.folder).as_posix()] = path.read_bytes()
    return found


def _sealed(content: bytes) -> int:
    """A descriptor to read this from, once; nobody can change it."""
    handle = os.memfd_create("netra", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(handle, 0, os.SEEK_SET)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _inner_limits(limits: tiers.Limits) -> list[str]:
    """Set inside: from outside the limit of processes would keep bubblewrap from starting. These are by process; `usage` sees them all."""
    cpu_s = max(1, int(limits.cpu_s + 0.999))
    each = {"as": limits.memory, "nproc": limits.processes, "nofile": limits.open_files, "fsize": limits.file_size}
    each |= dict.fromkeys(("core", "memlock", "msgqueue", "rtprio"), 0)
    return [*(f"--{name}={most}:{most}" for name, most in each.items()), f"--cpu={cpu_s}:{cpu_s + 1}"]
