"""One attack on a sandbox, as data; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ESCAPED = "ESCAPED"
ALLOWED = "ALLOWED"

Family = Literal[
    "files", "workspaces", "memory of others", "environment", "proc", "signals", "ptrace", "tcp", "udp", "dns", "sockets", "fork",
    "threads", "memory", "cpu", "disk", "inodes", "output", "descriptors", "namespaces", "io_uring", "kernel", "execution", "links",
    "leftovers", "daemons",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Attack:
    """What foreign code tries. The facts of the `stage.Stage` are its variables.

    `code` is Python source that prints `ESCAPED` as a line of its own when it got what it wanted, and must not be able to print it
    otherwise; what else it does or raises is no matter. Its control is one of two, or both: `control` is its allowed twin, which
    prints `ALLOWED` in the same sandbox; with `outside` the same code, run without any sandbox by the same user, prints `ESCAPED`.
    """

    name: str
    family: Family
    code: str
    control: str = ""
    outside: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for an attack without a control: it would say nothing when it fails."""
        if not self.control and not self.outside:
            raise ValueError(f"the attack {self.name} has no control")


def says(output: str, mark: str) -> bool:
    """Whether the mark is a line of what was printed."""
    return mark in output.splitlines()
