"""What came of the attacks on one tier, by one user, and of ending its calls."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Endings:
    """Calls that run for ever, ended from outside.

    `late_ms`: how long after its deadline a call still had a process in the process table. `left_to_init`: processes that had ended then
    and were listed as long as init let them. `unseen`: calls of which no process was seen while they ran, so that nothing was measured.
    `killed`: calls that ended as they must when one of their processes was killed; `wrong`: those that did not, and why.
    """

    late_ms: list[float] = field(default_factory=list)
    unseen: int = 0
    left_to_init: int = 0
    killed: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """Only with `controls_failed` empty do the other figures mean anything. `refused`: nobody is given a tier that is not available."""

    tier: str
    user: int
    way: str = ""
    available: bool = False
    probed: bool = False
    refused: bool = False
    enforcement: dict[str, object] = field(default_factory=dict)
    attacks: int = 0
    families: int = 0
    escaped: list[str] = field(default_factory=list)
    controls_failed: list[str] = field(default_factory=list)
    survivors: int = 0
    untouched: bool = True
    reason: str = ""
    endings: Endings = field(default_factory=Endings)

    @property
    def passed(self) -> bool:
        """Whether every attack failed, and every control did not."""
        held = not self.escaped and not self.controls_failed and not self.survivors and self.untouched
        return held and (self.available or (self.refused and not self.attacks))
