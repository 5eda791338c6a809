"""One tier, attacked by one user, and its calls ended: `python -m tests.prove.sandbox.suite TIER [options]`; prints one line of JSON.

TIER is script, python, command or trusted (whose worker processes are no walls: only the endings are looked at). `--nobody` gives up root
before anything else, as far as it was there; `--without-namespaces` is for `python`; `--each-family` makes one attack of each, and
`--no-attacks` none; `--endings=N` lets N calls come to their deadline, and kills processes of others; `--forge=escape` and
`--forge=control` add an attack that succeeds, or whose control fails: the proof has to notice.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from tests.prove.sandbox import command_suite, nobody, python_suite, script_suite, trial, trusted_suite
from tests.prove.sandbox.attack import ALLOWED, ESCAPED, Attack
from tests.prove.sandbox.report import Report

FORGED = {
    "escape": Attack("forged", "files", f"print({ESCAPED!r})", control=f"print({ALLOWED!r})"),
    "control": Attack("forged", "files", "0", control="0"),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to do."""

    tier: str
    nobody: bool = False
    namespaces: bool = True
    each_family: bool = False
    attacks: bool = True
    endings: int = 0
    forge: str = ""

    def arguments(self) -> list[str]:
        """The same, for the command line."""
        given = {
            "--nobody": self.nobody,
            "--without-namespaces": not self.namespaces,
            "--each-family": self.each_family,
            "--no-attacks": not self.attacks,
        }
        return [self.tier, *(name for name, on in given.items() if on), f"--endings={self.endings}", f"--forge={self.forge}"]


def read(arguments: Sequence[str]) -> Wanted:
    """What the command line asks for. Raises `ValueError`."""
    tier, *options = arguments or [""]
    wanted = Wanted(tier)
    for option in options:
        name, _, value = option.partition("=")
        match name:
            case "--nobody":
                wanted = replace(wanted, nobody=True)
            case "--without-namespaces":
                wanted = replace(wanted, namespaces=False)
            case "--each-family":
                wanted = replace(wanted, each_family=True)
            case "--no-attacks":
                wanted = replace(wanted, attacks=False)
            case "--endings":
                wanted = replace(wanted, endings=int(value))
            case "--forge" if not value or value in FORGED:
                wanted = replace(wanted, forge=value)
            case _:
                raise ValueError(f"what is {option}?")
    if tier not in ("script", "python", "command", "trusted"):
        raise ValueError(f"there is no tier {tier}")
    return wanted


async def attacked(wanted: Wanted) -> Report:
    """Attack it, as the user that this process is."""
    suites = {"script": script_suite, "python": python_suite, "command": command_suite, "trusted": trusted_suite}
    suite = suites[wanted.tier]
    attacks: list[Attack] = list(suite.ATTACKS) if wanted.attacks else []
    if wanted.each_family:
        attacks = trial.one_of_each(attacks)
    if wanted.forge and attacks:
        attacks.append(FORGED[wanted.forge])
    if wanted.tier == "python":
        return await python_suite.attacked(attacks, wanted.endings, namespaces=None if wanted.namespaces else False)
    report: Report = await suite.attacked(attacks, wanted.endings)
    return report


def main(arguments: Sequence[str]) -> int:
    """0 when the tier held."""
    wanted = read(arguments)
    if wanted.nobody:
        nobody.become()
    elif not wanted.namespaces and os.getuid() == 0:
        nobody.readable()  # users other than root have to read Python, and nothing brings it to them
    report = asyncio.run(attacked(wanted))
    print(json.dumps({**asdict(report), "passed": report.passed}))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
