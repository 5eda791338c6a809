"""What the tiers of enforcement have in common: what is run, within which limits, what became of it, and what a machine can do; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from netra import errors
from netra.tool import Tier

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may take. Times are in seconds, sizes in bytes; `wall_s` is the least of the deadlines of tool, call and run."""

    wall_s: float
    cpu_s: float = 10.0
    memory: int = 512 * _MIB
    processes: int = 32
    open_files: int = 64
    file_size: int = 64 * _MIB
    disk: int = 256 * _MIB
    files: int = 4096
    output: int = 8 * _MIB


@dataclass(frozen=True, slots=True)
class Job:
    """One call, as a sandbox takes it.

    `code` is the text of a script or a Python program, or `argv` is a command; the other is empty. `arguments` is a JSON object in UTF-8:
    a script and a program find it as the variables of these names, a command on its standard input. `folder` is the call's own and
    empty, or holds the files it was given; it is the working directory and the only place that can be written. `environment` is all
    of the environment: the secrets that were granted to the tool among it. `owner` is whose call it is: what a tier keeps warm after
    a call serves this owner again and nobody else; after a call of nobody it is ended. `module` is one that the code is about to
    import, of those that calls may: where it is imported already, the call need not wait for that. `begins` is called when there is a
    place for it, right before it begins; what that raises stands against it.
    """

    folder: Path
    limits: Limits
    code: str = ""
    argv: tuple[str, ...] = ()
    arguments: bytes = b"{}"
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    owner: str = ""
    module: str = ""
    begins: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a call left. `result` is JSON in UTF-8; `output` is what it printed, whole, or cut at `limits.output` with `cut` true."""

    result: bytes
    output: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Availability:
    """What the start-up probe found of a tier. `facts` is told with every result: `enforcement` of events.

    `reason` says what failed, `remedy` what to do; both are empty when it is available.
    """

    tier: Tier
    backend: str
    available: bool
    facts: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    remedy: str = ""

    def enforcement(self) -> dict[str, object]:
        """How calls of this tier are contained."""
        return {"tier": self.tier, "backend": self.backend, **self.facts}

    def require(self) -> None:
        """Raises `SandboxUnavailable` when calls of this tier cannot be contained here."""
        if not self.available:
            raise errors.SandboxUnavailable(f"The tier {self.tier} is not available on this machine: {self.reason}", remedy=self.remedy)


class Sandbox(Protocol):
    """One tier. A process of a call is gone when `run` returns or raises, a cancel included."""

    async def start(self) -> None:
        """Make ready what calls share. Raises `SandboxUnavailable`."""
        ...

    async def run(self, job: Job) -> Ended:
        """Run to the end. Raises `ToolFailed` for what the code raised or left, `DeadlineExceeded`, `ResourceExhausted` naming the limit,
        `SecurityViolation` when it tried what is forbidden and that was seen, `SandboxUnavailable` when there is nothing to run it in.
        """
        ...

    async def probe(self) -> Availability:
        """Attack it: a positive control must pass, each attack must fail. Never raises."""
        ...

    async def close(self) -> None:
        """End what calls share, and every call."""
        ...
