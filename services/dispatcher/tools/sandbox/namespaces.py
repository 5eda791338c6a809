"""A place where there is nothing but what calls may see: own mounts, processes, network and users; for who may make one."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from services.dispatcher.tools.sandbox import seccomp, walls

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 1 << 18, 2
_NOSUID, _NODEV = 2, 4
# numbers that are the same on every architecture
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 429, 430, 431, 432, 442
_SET_STRING, _CREATE, _EMPTY_PATH, _AT_FDCWD = 1, 6, 4, -100
_AT_RECURSIVE = 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)
_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def enter(*, user: bool) -> int:
    """Leave the host's namespaces, and fork: what `os.fork` returns. The child goes on as the first process of its own namespace.

    `user`: with a namespace of users, for who is not root. Raises `OSError` where the machine does not let one.
    """
    uid, gid = os.getuid(), os.getgid()
    kinds = _NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS | _NEW_NET
    walls.checked(_libc.unshare(kinds | (_NEW_USER if user else 0)), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    return os.fork()


def only(read: Iterable[str], folders: str) -> None:
    """Make a new root of what may be read, a few devices, and an empty place where the folders of calls lie. Raises `OSError`."""
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    # any folder does: it is hidden by the new root, which takes its place
    base = "/tmp"  # noqa: S108
    links = {path: os.readlink(path) for path in _LINKS if os.path.islink(path)}
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in _outermost([*read, *DEVICES]) if path not in links]
    _mount("tmpfs", base, "tmpfs", _NOSUID, "size=1m,mode=0755")
    for path, handle in sources:
        _bind(handle, base + path, device=path in DEVICES)
    for path, target in links.items():
        os.symlink(target, base + path)
    os.makedirs(base + folders, exist_ok=True)
    os.chdir(base)
    # the old root comes to lie over the new one, and is then taken away
    walls.syscall("pivot_root", seccomp.resolve_syscall(seccomp.Arch.NATIVE, "pivot_root"), b".", b".")
    walls.checked(_libc.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _attributes("/", _ATTR_RDONLY | _ATTR_NODEV | _ATTR_NOSUID, 0)


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths that there are and that lie in none of the others."""
    found: list[str] = []
    for path in sorted(set(paths)):
        if os.path.exists(path) and not any(path == other or path.startswith(other.rstrip("/") + "/") for other in found):
            found.append(path)
    return found


def _bind(handle: int, target: str, *, device: bool) -> None:
    source = f"/proc/self/fd/{handle}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC, 0o644))
    _mount(source, target, None, _BIND | (0 if device else _RECURSIVE))
    os.close(handle)
    _attributes(target, _ATTR_NOSUID | (0 if device else _ATTR_RDONLY | _ATTR_NODEV), _AT_RECURSIVE)


def _attributes(target: str, attributes: int, flags: int) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    where = (ctypes.c_int(_AT_FDCWD), target.encode(), ctypes.c_uint(flags))
    walls.syscall("mount_setattr", _MOUNT_SETATTR, *where, wanted, ctypes.c_size_t(len(wanted)))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else text.encode() for text in (source, kind, data))
    walls.checked(_libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def disk(size: int, files: int, uid: int) -> int:
    """An empty file system in memory that holds so many bytes and files and belongs to the user: a descriptor. Raises `OSError`."""
    making = walls.syscall("fsopen", _FSOPEN, b"tmpfs", ctypes.c_uint(1))
    try:
        options = {"size": size, "nr_inodes": files + 1, "uid": uid, "gid": uid, "mode": "0700"}
        for name, value in options.items():
            walls.syscall(f"fsconfig {name}", _FSCONFIG, making, _SET_STRING, name.encode(), str(value).encode(), 0)
        walls.syscall("fsconfig", _FSCONFIG, making, _CREATE, None, None, 0)
        attributes = _ATTR_NOSUID | _ATTR_NODEV
        return walls.syscall("fsmount", _FSMOUNT, making, ctypes.c_uint(1), ctypes.c_uint(attributes))
    finally:
        os.close(making)


def own_mounts(folders: str) -> None:
    """Give this process mounts of its own, in which there is nothing where the folders of calls lie. Raises `OSError`."""
    walls.checked(_libc.unshare(_NEW_MOUNTS), "unshare")
    # over the place that all share: the name of one call's folder is nothing that another should see
    _mount("tmpfs", folders, "tmpfs", _NOSUID | _NODEV, "size=64k,nr_inodes=64,mode=0755")


def place(disk_: int, folder: str) -> None:
    """Let the folder be the disk, in mounts of its own. Raises `OSError`."""
    os.makedirs(folder, exist_ok=True)
    walls.syscall("move_mount", _MOVE_MOUNT, disk_, b"", _AT_FDCWD, folder.encode(), ctypes.c_uint(_EMPTY_PATH))


def alone() -> None:
    """Be in a namespace of users of its own, in which nobody is anybody: threads are counted for this process alone. Raises `OSError`."""
    walls.checked(_libc.unshare(_NEW_USER), "unshare")
