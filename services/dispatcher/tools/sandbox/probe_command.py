"""What the tier `command` must withstand before it is called available: a positive control, then attacks."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from netra import errors
from services.dispatcher.tools.sandbox import tiers

# what it says is what got through; $1 is a file, $2 a process, $3 a socket outside
_ATTACKS = r"""
cat "$1" >/dev/null 2>&1 && echo "it read a file outside"
(echo x >"$1.new") 2>/dev/null && echo "it wrote a file outside"
(echo x >/usr/netra-probe) 2>/dev/null && echo "it wrote to the system"
(echo x >/dev/shm/netra-probe) 2>/dev/null && echo "it wrote to memory that is a disk"
(echo x >/netra-probe) 2>/dev/null && echo "it wrote to the root folder"
ln -s "$1" link && cat link >/dev/null 2>&1 && echo "it read through a link"
ls "/proc/$2" >/dev/null 2>&1 && echo "it saw a process outside"
kill -0 "$2" 2>/dev/null && echo "it signalled a process outside"
test -e "$3" && echo "it saw a socket outside"
unshare --user true 2>/dev/null && echo "it made a namespace"
mount -t tmpfs tmpfs /sandbox 2>/dev/null && echo "it mounted"
grep -q '^Seccomp:.2$' /proc/self/status || echo "no filter of system calls"
grep -q '^NoNewPrivs:.1$' /proc/self/status || echo "it can gain privileges"
grep '^Cap' /proc/self/status | grep -qv '0000000000000000$' && echo "it has capabilities"
test "$(id -u)" = 65534 || echo "it is not nobody"
test "$(grep -c . /proc/net/dev)" -le 3 || echo "it has a network"
grep -q '^Max processes  *32 ' /proc/self/limits || echo "it has no limit of processes"
env | grep -q NETRA && echo "it has the environment of the platform"
i=0; while test $i -lt 100; do (: >"f$i") 2>/dev/null || break; i=$((i+1)); done; test $i -lt 100 || echo "it made files without a limit"
head -c 4000000 /dev/zero >big 2>/dev/null && echo "it filled the disk"
true
"""
_LIMITS = tiers.Limits(
    wall_s=10.0, cpu_s=5.0, memory=128 * 1024 * 1024, processes=32, file_size=8 * 1024 * 1024, disk=2 * 1024 * 1024, files=50, output=65536
)
_REMEDY = "This machine does not hold a command. Report it, and leave the tier switched off."
_SAID = b'{"text":"hello"}'


async def probe(sandbox: tiers.Sandbox, backend: str) -> tiers.Availability:
    """Never raises."""
    with tempfile.TemporaryDirectory(prefix="netra-probe-") as name, socket.socket(socket.AF_UNIX) as server:
        outside = Path(name)
        folder, secret = _set(outside, server)
        argv = ("sh", "-c", _ATTACKS, "sh", str(secret), str(os.getpid()), str(outside / "socket"))
        try:
            ended = await sandbox.run(tiers.Job(folder, _LIMITS, argv=("cat",), arguments=_SAID))
            if ended.result != _SAID:
                return tiers.Availability("command", backend, False, reason="a harmless command did not work", remedy=_REMEDY)
            ended = await sandbox.run(tiers.Job(folder, _LIMITS, argv=argv))
        except errors.NetraError as error:
            remedy = error.details.get("remedy", _REMEDY)
            return tiers.Availability("command", backend, False, reason=error.message, remedy=remedy)
    if ended.result != b'""':
        escaped = ended.result.decode(errors="replace").strip('"').replace("\\n", "; ").strip("; ")
        return tiers.Availability("command", backend, False, reason=f"a command got through: {escaped}", remedy=_REMEDY)
    return tiers.Availability("command", backend, True)


def _set(outside: Path, server: socket.socket) -> tuple[Path, Path]:
    """The folder of the call, and a file that all may read but for the sandbox; a socket beside it."""
    outside.chmod(0o755)
    (folder := outside / "folder").mkdir()
    (secret := outside / "secret").write_text("x", encoding="ascii")
    server.bind(str(outside / "socket"))
    return folder, secret
