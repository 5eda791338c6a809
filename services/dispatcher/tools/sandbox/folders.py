"""The folder of a call: its files brought in and out, given to a user, counted. The standard library only: it is loaded in the zygote."""

from __future__ import annotations

import contextlib
import os
import shutil

_CHUNK = 1 << 24
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_LIST = _READ | os.O_DIRECTORY


def give(folder: int, uid: int) -> None:
    """Give an open folder and what is in it to a user. Raises `OSError`, also for a symbolic link in it."""
    for _, _, names, here in os.fwalk(dir_fd=folder):
        os.chown(here, uid, uid)
        for name in names:
            file = os.open(name, _READ | os.O_NONBLOCK, dir_fd=here)
            os.chown(file, uid, uid)
            os.close(file)


def copy(source: int, to: int, uid: int) -> None:
    """Copy what is in one open folder to another, for a user, with its times: what is unchanged afterwards need not be brought back.

    Raises `OSError`, also for a symbolic link.
    """
    for entry in os.scandir(source):
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(entry.name, 0o700, dir_fd=to)
            inner, made = os.open(entry.name, _LIST, dir_fd=source), os.open(entry.name, _LIST, dir_fd=to)
            copy(inner, made, uid)
        else:
            inner = os.open(entry.name, _READ | os.O_NONBLOCK, dir_fd=source)
            made = os.open(entry.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=to)
            while os.sendfile(made, inner, None, _CHUNK):
                pass
            times = os.fstat(inner)
            os.utime(made, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.chown(made, uid, uid)
        os.close(made)
        os.close(inner)


def mirror(source: int, folder: str) -> None:
    """Make a folder what an open one is: its files and folders, and nothing else. Raises `OSError`."""
    there = {entry.name: entry for entry in os.scandir(source)}
    for entry in os.scandir(folder):
        new = there.get(entry.name)
        if new is None or new.is_dir(follow_symlinks=False) != entry.is_dir(follow_symlinks=False):
            _removed(entry)
    for name, entry in there.items():
        path = os.path.join(folder, name)
        if entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            inner = os.open(name, _LIST, dir_fd=source)
            try:
                mirror(inner, path)
            finally:
                os.close(inner)
        elif entry.is_file(follow_symlinks=False):
            _brought(source, entry, path)


def _removed(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
    else:
        os.unlink(entry.path)


def _brought(source: int, entry: os.DirEntry[str], path: str) -> None:
    now = entry.stat(follow_symlinks=False)
    with contextlib.suppress(FileNotFoundError):
        before = os.stat(path, follow_symlinks=False)
        if (before.st_size, before.st_mtime_ns) == (now.st_size, now.st_mtime_ns):
            return
    with open(os.open(entry.name, _READ | os.O_NONBLOCK, dir_fd=source), "rb") as read, open(path, "wb") as made:
        shutil.copyfileobj(read, made, 1 << 20)


def taken(folder: str, most_files: int) -> tuple[int, int]:
    """Bytes and entries of a folder; it stops counting when these are more than so many. What vanishes meanwhile is left out."""
    size, count, left = 0, 0, [folder]
    while left and count <= most_files:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
    return size, count


def removed_and_open(pid: int) -> int:
    """Bytes of the files that a process has removed and holds open, beside those that it was given."""
    size = 0
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                file = os.stat(f"/proc/{pid}/fd/{number}")
                size += file.st_blocks * 512 if file.st_nlink == 0 and int(number) > _GIVEN else 0
    return size


# the descriptors up to this one are a call's request, result and output, which are bounded anyhow
_GIVEN = 4
