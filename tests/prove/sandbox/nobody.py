"""A process that is root becomes a normal user for whom Python and this checkout can be read, wherever they lie."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_NEW_MOUNTS, _BIND, _RECURSIVE, _PRIVATE, _PR_SET_DUMPABLE = 0x20000, 0x1000, 0x4000, 1 << 18, 4
_ROOT = Path(__file__).resolve().parents[3]
_libc = ctypes.CDLL(None, use_errno=True)


def become(uid: int = 65534) -> None:
    """For good. Where this is no root, nothing is done. Raises `OSError`."""
    if os.getuid() != 0:
        return
    readable()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # as a normal user's own process is: its memory and its part of /proc are its own
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def readable() -> None:
    """Let everybody whom this process, which is root's, becomes or starts read Python and this checkout. Raises `OSError`."""
    paths = [Path(sys.base_prefix), Path(sys.prefix), _ROOT]
    hidden = {ancestor for path in paths if (ancestor := _closed(path)) is not None}
    if hidden:
        _checked(_libc.unshare(_NEW_MOUNTS))
        _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    handles = {path: os.open(path, os.O_PATH) for path in paths}
    for closed in hidden:
        _mount("tmpfs", str(closed), "tmpfs", 0, "mode=0755")
        for path in paths:
            if path.is_relative_to(closed):
                path.mkdir(parents=True, exist_ok=True)
                _mount(f"/proc/self/fd/{handles[path]}", str(path), None, _BIND | _RECURSIVE)


def _closed(path: Path) -> Path | None:
    """The outermost folder on the way that others may not pass."""
    return next((folder for folder in [*reversed(path.parents), path] if not folder.stat().st_mode & 0o001), None)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else text.encode() for text in (source, kind, data))
    _checked(_libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), data_))


def _checked(outcome: int) -> None:
    if outcome < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
