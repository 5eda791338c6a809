"""As whom the stores run: PostgreSQL refuses root, and a container may refuse user namespaces."""

import functools
import os
import signal
import subprocess
from pathlib import Path

from standalone import leash
from standalone.errors import StandaloneError


@functools.cache
def of_stores() -> str:
    """`keep` for a normal user; for root a user namespace, else the uid of nobody."""
    if os.geteuid() != 0:
        return leash.KEEP
    return leash.NAMESPACE if _works(leash.NAMESPACE, ["/bin/true"]) else leash.DROP


def _works(identity: str, words: list[str]) -> bool:
    command = leash.command(os.getpid(), signal.SIGKILL, identity, words)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def require_runnable(identity: str, program: Path, home: Path) -> None:
    """Give `home` to the store; raise if nobody could not reach it or the program (a parent with mode 0700)."""
    own(home, identity)
    if identity != leash.DROP:
        return
    home.parent.chmod(0o711)  # to pass through, not to look: what is inside stays closed
    if not _works(identity, [str(program), "--version"]) or not _works(identity, ["/bin/sh", "-c", 'test -w "$0"', str(home)]):
        raise StandaloneError(
            f"as root without user namespaces the stores run as nobody, who cannot reach {program} or {home}",
            "run as a normal user, or move the checkout out of a folder with mode 0700",
        )


def own(path: Path, identity: str) -> None:
    """Give `path` to whom it will be used by; changes nothing if it already is theirs."""
    if os.geteuid() != 0 or not path.exists():
        return
    wanted = leash.NOBODY if identity == leash.DROP else 0
    if path.stat().st_uid == wanted:
        return
    for entry in (*path.rglob("*"), path):  # the folder last: its owner says whether all is done
        os.chown(entry, wanted, wanted, follow_symlinks=False)
