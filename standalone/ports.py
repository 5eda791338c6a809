"""Which ports are free, and who holds those that are not."""

import contextlib
import itertools
import random
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from standalone.errors import PortInUse

LISTEN = "0A"
# below those that the system gives to connections that go out: one of these must not take a port between its choice and its use
_LOWEST, _HIGHEST = 10_000, 32_000
# processes that look at the same time begin in different places
_first = random.SystemRandom().randrange(_LOWEST, _HIGHEST)
_candidates = itertools.cycle([*range(_first, _HIGHEST), *range(_LOWEST, _first)])


def free(names: Iterable[str]) -> dict[str, int]:
    """A free loopback port for each name; this process gives none twice."""
    return {name: next(filter(is_free, itertools.islice(_candidates, _HIGHEST - _LOWEST))) for name in names}


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _inodes(port: int) -> set[str]:
    """Socket inodes that listen on the port; empty where /proc does not exist."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    found.add(words[9])
    return found


def command_line(pid: int) -> str:
    """The command line of a process, or nothing if it is gone or hidden."""
    if sys.platform != "linux":
        words = ["ps", "-o", "command=", "-p", str(pid)]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()


def holder(port: int) -> str:
    """`pid 12 (python -m x)` for the process that listens on the port, or an honest "unknown"."""
    wanted = {f"socket:[{inode}]" for inode in _inodes(port)}
    for folder in Path("/proc").glob("[0-9]*/fd") if wanted else ():
        with contextlib.suppress(OSError):
            if any(str(link.readlink()) in wanted for link in folder.iterdir()):
                pid = int(folder.parent.name)
                return f"pid {pid} ({command_line(pid)[:120]})"
    return "an unknown process (another user's, or another namespace's)"


def require_free(name: str, port: int) -> None:
    """Raise `PortInUse`, naming the holder, if something listens on the port of `name`."""
    if not is_free(port):
        raise PortInUse(
            f"port {port} of {name} is held by {holder(port)}",
            f"end that process, or choose another port: NETRA_{name.upper()}_PORT=<port>",
        )
