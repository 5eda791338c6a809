"""What a process does to itself before it runs foreign code: limits, another user, Landlock, seccomp; imports a neighbour alone."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services.dispatcher.tools.sandbox import seccomp

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 22, 24, 38, 47
_FILTER, _CLEAR_ALL, _LAST_CAPABILITY, _WORD = 2, 4, 63, 0xFFFFFFFF
# the same numbers on every architecture
_CLOSE_RANGE, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 436, 444, 445, 446

# what Landlock can forbid of files, and from which version of its interface on
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14
_BITS_BY_ABI = {1: 13, 2: 14, 3: 15, 5: 16}
_OF_A_FILE = _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _READ_FILE | _READ_DIR
# no links, no pipes, sockets and devices: what a call leaves is read by who made its folder, and must be files and folders
_FOLDER = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
_BIND_AND_CONNECT, _SOCKETS_AND_SIGNALS = 0b11, 0b11

_VERSION_3_OF_THIS_PROCESS, _NONE = struct.pack("=Ii", 0x20080522, 0), bytes(24)

_libc = ctypes.CDLL(None, use_errno=True)
# looked up before it is called: what is, touches more memory, and each call would do it anew
_capset = _libc.capset


# for what returns in two processes: it keeps the interpreter's lock
_forking = ctypes.PyDLL(None, use_errno=True)


def fork() -> int:
    """As `os.fork` for a process of one thread, but for what modules have registered to be done around it. Raises `OSError`.

    What the library does there for threads that such a process has not got touches a hundred pages of memory, each of which is then copied.
    """
    return checked(_forking.fork(), "fork")


def checked(outcome: int, what: str) -> int:
    """The outcome of a call of the C library. Raises `OSError` when it says that it failed."""
    if outcome < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return outcome


def syscall(what: str, number: int, *arguments: object) -> int:
    """Call the kernel. Raises `OSError` naming `what`."""
    return checked(_libc.syscall(ctypes.c_long(number), *arguments), what)


def prctl(what: str, option: int, *arguments: int) -> None:
    """Raises `OSError` naming `what`."""
    four = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    checked(_libc.prctl(option, *four), what)


@functools.cache
def landlock_abi() -> int:
    """The version of the kernel's Landlock; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


@dataclass(frozen=True, slots=True)
class Reach:
    """The files that may be touched, as open descriptors (`O_PATH`): all else is out of reach.

    Below `folders` and in `files` all may be read; `devices` may be written as well.
    """

    folders: tuple[int, ...] = ()
    files: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()


def opened(paths: Iterable[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The folders and the files among the paths, opened; those that are not there are left out."""
    folders, files = [], []
    for path in paths:
        if os.path.isdir(path):
            folders.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
        elif os.path.exists(path):
            files.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
    return tuple(folders), tuple(files)


def rules(reach: Reach) -> int:
    """The wall around what is in reach, for `confine`: a descriptor. Raises `OSError`."""
    handled, attributes = _landlock()
    made = syscall("landlock_create_ruleset", _LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    _allow(made, reach.folders, _READ)
    _allow(made, reach.files, _READ_FILE)
    _allow(made, reach.devices, _OF_A_FILE & handled)
    return made


def confine(rules: int, folder: int) -> None:
    """Let this process touch only what these `rules` have in reach, and change only what lies below the folder, for good. Raises `OSError`.

    Nobody outside can be traced, and, where the kernel can forbid that, signalled or reached over abstract sockets or TCP.
    """
    _allow(rules, (folder,), _FOLDER & _landlock()[0])
    prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    syscall("landlock_restrict_self", _LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0))


@functools.cache
def _landlock() -> tuple[int, bytes]:
    """What of files this kernel can forbid, and what a wall forbids."""
    abi = landlock_abi()
    handled = (1 << max(bits for since, bits in _BITS_BY_ABI.items() if since <= abi)) - 1
    return handled, struct.pack("=QQQ", handled, _BIND_AND_CONNECT, _SOCKETS_AND_SIGNALS)[: 8 if abi < 4 else 16 if abi < 6 else 24]


def _allow(rules: int, handles: Iterable[int], access: int) -> None:
    for handle in handles:
        rule = struct.pack("=Qi", access, handle)
        syscall("landlock_add_rule", _LANDLOCK_ADD, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))


def close_range(first: int, last: int = _WORD) -> None:
    """Close every descriptor from the first to the last. Raises `OSError`."""
    syscall("close_range", _CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; to be called after the last change of user. Raises `OSError`, also when it has ended already."""
    prctl("pdeathsig", _PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, "the parent has ended")


def never_more_capable() -> None:
    """Whatever this process and its children start gets no capability; what they have stays. Raises `OSError`."""
    prctl("ambient capabilities", _PR_CAP_AMBIENT, _CLEAR_ALL)
    for capability in range(_LAST_CAPABILITY):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0 and ctypes.get_errno() == errno.EINVAL:
            return  # the last that this kernel knows was the one before


def become(uid: int | None) -> None:
    """Be another user and group, and in no further group (None: stay), and give up every capability, for good. Raises `OSError`."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    checked(_capset(_VERSION_3_OF_THIS_PROCESS, _NONE), "capset")


def limit(limits: Mapping[str, float], *, count_threads: bool) -> None:
    """Set the limits of this process by the names of `tiers.Limits`; memory is what it may take beyond what it has now. Raises `OSError`.

    `count_threads` is for a user who has no other processes: the kernel counts by user.
    """
    cpu_s = max(1, int(limits["cpu_s"] + 0.999))
    memory = _own_size + int(limits["memory"])
    _set(resource.RLIMIT_AS, memory, memory + _KEPT_BACK)
    # the first says so, and may be ignored; the second cannot be
    _set(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _set(resource.RLIMIT_FSIZE, int(limits["file_size"]))
    _set(resource.RLIMIT_NOFILE, int(limits["open_files"]))
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_RTPRIO):
        _set(nothing, 0)
    if count_threads:
        _set(resource.RLIMIT_NPROC, int(limits["processes"]))


def _set(what: int, most: int, hard: int | None = None) -> None:
    """Both limits, or the hard one higher; never above what there is already."""
    before = resource.getrlimit(what)[1]
    hard = most if hard is None else hard
    hard = hard if before == resource.RLIM_INFINITY else min(hard, before)
    resource.setrlimit(what, (min(most, hard), hard))


# how much address space the zygote has, and how much more there is for a program that has used up its own
_own_size, _KEPT_BACK = 0, 8 << 20


def measure(statm: int) -> None:
    """Note how much address space this process has: its children, which cannot read that any more, add to it. Raises `OSError`.

    `statm` is its `/proc/self/statm`, opened when that was still there.
    """
    global _own_size
    _own_size = int(os.pread(statm, 64, 0).split()[0]) * resource.getpagesize()


# ---- seccomp: what is not named here does not exist (ENOSYS)

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range dup dup2 dup3 pipe pipe2 flock
fsync fdatasync sync_file_range fadvise64 fallocate ftruncate truncate sendfile copy_file_range poll ppoll select pselect6
epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime
creat stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat umask statfs fstatfs
mmap mprotect munmap mremap madvise brk msync membarrier
set_robust_list get_robust_list set_tid_address rseq futex futex_waitv sched_yield sched_getaffinity gettid exit exit_group arch_prctl
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall pause alarm
setitimer getitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete nanosleep clock_nanosleep signalfd signalfd4
getpid getppid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid getrlimit setrlimit getrusage
times sysinfo uname clock_gettime clock_getres gettimeofday time getrandom capget getcpu wait4 waitid
recvfrom recvmsg shutdown getsockname getpeername getsockopt
""".split()

# what ordinary libraries try, and live without
REFUSED = """
vfork execve execveat socket connect bind listen accept accept4 setsockopt kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
symlink symlinkat mknod mknodat chown lchown fchownat setuid setgid setreuid setregid setfsuid setfsgid setsid setpgid setpriority
ioprio_set sched_setaffinity sched_setscheduler sched_setparam sched_setattr personality shmget shmat semget msgget mq_open
memfd_create inotify_init inotify_init1 inotify_add_watch fanotify_init
""".split()

# what only an attack calls: the process is killed, and that is seen
DEADLY = """
ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp pivot_root chroot open_tree fspick mount_setattr setns bpf perf_event_open
userfaultfd keyctl add_key request_key init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct iopl
ioperm open_by_handle_at quotactl settimeofday clock_settime sethostname setdomainname syslog vhangup
""".split()

# what the zygote and its children need until the code begins, and the code may not: the two kinds again
UNTIL_THEN_REFUSED = """
fork sendmsg pidfd_open pidfd_send_signal fchown setresuid setresgid setgroups capset
landlock_create_ruleset landlock_add_rule landlock_restrict_self
""".split()
UNTIL_THEN_DEADLY = "unshare mount umount2 move_mount fsopen fsconfig fsmount".split()

OF_FILES_BY_OWNER = "chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat".split()
EXTENDED = """
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
""".split()

_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080
_AF_UNIX, _STREAM, _TYPE_MASK = 1, 1, 0xF
# what a descriptor is set to: never who gets signals for it
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1033, 1034)
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_PRCTL = (3, 15, 16, 0x53564D41)
_PRCTL_UNTIL_THEN = (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS)
_AS_A_TREE = 2


def zygote_filter(*, owner_of_others: bool) -> bytes:
    """The filter of system calls of the zygote, for `load`: what foreign code may, and what it takes to prepare for it.

    Raises `OSError` or `RuntimeError` where seccomp is not to be had. `owner_of_others`: there are files in reach that are not the
    call's and belong to its user, as for a normal user without namespaces. Landlock does not guard the modes and times of files:
    calls that set them do nothing then, and say that they did.
    """
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    # before its third version Landlock did not know that truncating is writing
    truncate = [] if landlock_abi() >= 3 else ["truncate"]
    _all(rules, seccomp.ALLOW, {*ALLOWED, *UNTIL_THEN_REFUSED, *UNTIL_THEN_DEADLY} - set(truncate))
    _all(rules, seccomp.ERRNO(errno.EPERM), [*REFUSED, *truncate])
    _all(rules, seccomp.ERRNO(errno.ENOTSUP), EXTENDED)
    _all(rules, seccomp.KILL_PROCESS, DEADLY)
    _all(rules, seccomp.ERRNO(0) if owner_of_others else seccomp.ALLOW, OF_FILES_BY_OWNER)
    _conditional(rules)
    return _exported(rules)


def last_filter() -> bytes:
    """What foreign code may not any more, for `load` on top of the zygote's: to load a small one takes a tenth of the time."""
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    _all(rules, seccomp.ERRNO(errno.EPERM), UNTIL_THEN_REFUSED)
    _all(rules, seccomp.KILL_PROCESS, UNTIL_THEN_DEADLY)
    # a thread, and nothing else: whatever a call starts is the one process that is killed
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    for option in _PRCTL_UNTIL_THEN:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "prctl", seccomp.Arg(0, seccomp.MASKED_EQ, _WORD, option))
    return _exported(rules)


def _exported(rules: Any) -> bytes:
    rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, _AS_A_TREE)
    # calls by the numbers of another architecture: by default only the thread would die
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    with open(os.memfd_create("seccomp", os.MFD_CLOEXEC), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def load(program: bytes) -> None:
    """Let the filter decide over every call of the kernel from now on, for good. Raises `OSError`."""
    instructions = ctypes.create_string_buffer(program, len(program))
    prog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.c_char_p(prog), ctypes.c_ulong(0), ctypes.c_ulong(0)), "seccomp")


def _all(rules: Any, action: int, names: Iterable[str]) -> None:
    for name in names:
        if _known(name):
            rules.add_rule(action, name)


def _known(name: str) -> bool:
    """Whether this architecture has the call, and the library knows it: what it does not know is ENOSYS anyhow."""
    try:
        return int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)) >= 0
    except (OSError, ValueError):
        return False


def _conditional(rules: Any) -> None:
    """Calls that are allowed with some arguments only."""
    arg, equal, masked = seccomp.Arg, seccomp.EQ, seccomp.MASKED_EQ
    rules.add_rule(seccomp.ALLOW, "clone", arg(0, masked, _CLONE_NEW, 0))
    # opening for reading must not truncate: early versions of Landlock take that for reading
    for name, position in (("open", 1), ("openat", 2)):
        if _known(name):
            for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                mask = os.O_ACCMODE | (os.O_TRUNC if mode == os.O_RDONLY else 0)
                rules.add_rule(seccomp.ALLOW, name, arg(position, masked, mask, mode))
    for name, position, values in (
        ("fcntl", 1, _FCNTL),
        ("ioctl", 1, _IOCTL),
        ("prctl", 0, (*_PRCTL, *_PRCTL_UNTIL_THEN)),
        ("prlimit64", 0, (0,)),
    ):
        for value in values:
            rules.add_rule(seccomp.ALLOW, name, arg(position, masked, _WORD, value))
    # the two ends of a stream to oneself, as asyncio has one, and nowhere else
    stream = (arg(0, masked, _WORD, _AF_UNIX), arg(1, masked, _TYPE_MASK, _STREAM))
    rules.add_rule(seccomp.ALLOW, "socketpair", *stream)
    rules.add_rule(seccomp.ALLOW, "sendto", arg(4, equal, 0))
