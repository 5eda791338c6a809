"""The filter of system calls for what may start programs: commands in their namespaces, and the hosts of the script interpreter."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable
from typing import Any

from services.dispatcher.tools.sandbox import seccomp

# what only an attack calls: the process is killed, and that is seen
_DEADLY = """
ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount
fspick mount_setattr open_tree_attr unshare setns bpf perf_event_open userfaultfd init_module finit_module delete_module kexec_load
kexec_file_load reboot swapon swapoff acct iopl ioperm open_by_handle_at name_to_handle_at quotactl quotactl_fd settimeofday
clock_settime clock_adjtime adjtimex sethostname setdomainname vhangup lookup_dcookie nfsservctl uselib modify_ldt
""".split()
# what ordinary programs try, and live without
_REFUSED = """
keyctl add_key request_key syslog personality fanotify_init fanotify_mark mbind migrate_pages move_pages set_mempolicy
set_mempolicy_home_node process_madvise process_mrelease mq_open msgget semget shmget mknod mknodat
""".split()
# new enough that every program does without: `clone3` hides its flags from a filter, and the C library falls back to `clone`; what is in
# a memfd is memory that nobody counts
_UNKNOWN = "io_uring_setup io_uring_enter io_uring_register clone3 memfd_create memfd_secret map_shadow_stack lsm_set_self_attr".split()
_NAMESPACES = (0x00000080, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_WORD = 0xFFFFFFFF
_AF_UNIX = 1


def compiled(*, sockets: bool, signals: bool = True) -> bytes:
    """The filter, for `walls.load` or `bwrap --seccomp`. Raises `OSError` or `RuntimeError` where seccomp is not to be had.

    `sockets`: sockets of the family unix can be made; no others ever can. `signals`: signals can be sent, as far as other walls let them.
    """
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    _all(rules, seccomp.KILL_PROCESS, _DEADLY)
    _all(rules, seccomp.ERRNO(errno.EPERM), _REFUSED)
    _all(rules, seccomp.ERRNO(errno.ENOSYS), _UNKNOWN)
    if not signals:
        _all(rules, seccomp.ERRNO(errno.EPERM), "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal".split())
    for flag in _NAMESPACES:
        rules.add_rule(seccomp.KILL_PROCESS, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    for request in (_TIOCSTI, _TIOCLINUX):  # typing into the terminal of whoever started this
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, _WORD, request))
    if sockets:
        rules.add_rule(seccomp.ERRNO(errno.EAFNOSUPPORT), "socket", seccomp.Arg(0, seccomp.NE, _AF_UNIX))
    else:
        _all(rules, seccomp.ERRNO(errno.EPERM), "socket connect bind listen accept accept4".split())
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _all(rules: Any, action: int, names: Iterable[str]) -> None:
    for name in names:
        if _known(name):
            rules.add_rule(action, name)


def _known(name: str) -> bool:
    """Whether this architecture has the call and the library knows it."""
    try:
        return int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)) >= 0
    except (OSError, ValueError):
        return False
