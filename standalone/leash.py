"""Ties a child's life to its launcher's, takes root away from it, then becomes the command.

Run as a script by an isolated interpreter (`python -I -S leash.py PARENT SIGNAL IDENTITY COMMAND...`),
so it imports nothing of ours. A separate step rather than `preexec_fn`: the launcher has threads,
and only vfork + exec is safe from a process with threads.
"""

import ctypes
import os
import sys

NOBODY = 65534
KEEP, NAMESPACE, DROP = "keep", "namespace", "drop"
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000


def command(parent: int, signal: int, identity: str, words: list[str]) -> list[str]:
    """The command line that runs `words` on a leash."""
    return [sys.executable, "-I", "-S", __file__, str(parent), str(int(signal)), identity, *words]


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _enter_namespace(libc: ctypes.CDLL) -> None:
    """Be nobody towards the program and stay root towards the files: works under a 0700 home."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are refused here")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")


def _drop() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def main(arguments: list[str]) -> None:
    parent, signal, identity, *words = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if identity == NAMESPACE:
        _enter_namespace(libc)
    elif identity == DROP:
        _drop()
    if sys.platform == "linux":  # after the change of identity, which clears the setting
        libc.prctl(_PR_SET_PDEATHSIG, int(signal), 0, 0, 0)
    if os.getppid() != int(parent):  # the launcher died before the signal was armed
        sys.exit(70)
    os.execv(words[0], words)  # noqa: S606 - the launcher's own command; execvp would import, which nobody may not


if __name__ == "__main__":
    main(sys.argv[1:])
