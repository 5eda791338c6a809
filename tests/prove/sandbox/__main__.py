"""python -m tests.prove.sandbox: all attacks on all tiers, as root and as a normal user; JSON at the end, exit 1 if anything is off.

TIERS (script python command trusted), ENDINGS (20), FORGE (escape, control): from the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chassis import environment
from netra import errors
from services.dispatcher import wiring
from services.dispatcher.settings import DispatcherSettings
from services.dispatcher.tools.sandbox import tiers, walls
from tests.prove.sandbox import judge, suite
from tests.prove.sandbox.suite import Wanted

_ROOT = Path(__file__).resolve().parents[3]
_SUITE_S = 420.0


def ways(names: Sequence[str], endings: int, forge: str) -> list[tuple[str, Wanted]]:
    """The suites, each with a word for how it runs: as root as far as this process is, and as a normal user."""
    found = []
    for tier in names:
        for bare in (False, True) if tier == "python" else (False,):
            for user in ("root", "normal user") if os.getuid() == 0 else ("normal user",):
                way = f"{user}, no namespaces" if bare else user
                plain = os.getuid() == 0 and user != "root"
                found.append((way, Wanted(tier, nobody=plain, namespaces=not bare, endings=endings, forge=forge)))
    return found


async def reported(way: str, wanted: Wanted) -> dict[str, Any]:
    """Run one suite, in a process of its own: it may have to give up root."""
    began = time.monotonic()
    command = [sys.executable, "-m", suite.__name__, *wanted.arguments()]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=_ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        async with asyncio.timeout(_SUITE_S):
            said, errors_said = await process.communicate()
        report: dict[str, Any] = json.loads(said.splitlines()[-1])
    except TimeoutError:
        report = {"error": f"it did not end within {_SUITE_S:g} s"}
    except (IndexError, ValueError):
        report = {"error": errors_said.decode(errors="replace")[-500:] or f"exit code {process.returncode}"}
    finally:
        if process.returncode is None:
            os.killpg(process.pid, 9)
            await process.wait()
    report |= {"tier": wanted.tier, "way": way}
    _tell(report, time.monotonic() - began)
    return report


def _tell(report: dict[str, Any], seconds: float) -> None:
    told = judge.figures(report)
    if "error" in told:
        text = told["error"]
    elif not told["available"]:
        text = f"not available, refused: {told['reason']}"
    else:
        ended = f"gone {told['late_ms_p50']} ms (at most {told['late_ms_max']}) after the deadline" if told["deadlines"] else "none ended"
        text = (
            f"{told['attacks']} attacks of {told['families']} families, {told['successes']} got through, "
            f"{told['controls_failed']} controls failed; {told['deadlines']} calls {ended}"
        )
    print(f"{report['tier']}, {report['way']}: {text} ({seconds:.0f} s)", file=sys.stderr, flush=True)


async def active() -> dict[str, dict[str, Any]]:
    """The tiers that a dispatcher has that is started here with its settings as they come."""
    with tempfile.TemporaryDirectory(prefix="netra-prove-") as folder:
        contained = wiring._sandboxes(DispatcherSettings(), [], Path(folder))
        names: tuple[Any, ...] = ("script", "python", "command", "remote")
        try:
            await contained.start()
            unprobed = {name: contained.availability(name).available for name in names}
            await contained.probe(_nobody_is_told)
            found = {}
            for name in names:
                said = contained.availability(name)
                found[name] = {
                    "available": said.available, "backend": said.backend, "unprobed": unprobed[name], "reason": said.reason,
                    "remedy": said.remedy, "refused": await _refused(contained.tier(name)), "facts": dict(said.facts),
                }  # fmt: skip
            return found
        finally:
            await contained.close()


async def _nobody_is_told(_found: tiers.Availability) -> None:
    """Nothing is done."""


async def _refused(asked: Any) -> bool:
    try:
        await asked
    except errors.SandboxUnavailable as error:
        return bool(error.details.get("remedy"))
    return False


async def prove(names: Sequence[str], endings: int, forge: str) -> dict[str, Any]:
    """Run them all, one after the other: they measure times, too."""
    began = time.monotonic()
    reports = [await reported(*way) for way in ways(names, endings, forge)]
    here = await active()
    found = judge.off(reports, {name: said for name, said in here.items() if name in names or name == "remote"}, endings=endings)
    told = [judge.figures(report) for report in reports]
    return {
        "ok": not found,
        "machine": {
            "system": platform.system(), "kernel": platform.release(), "architecture": platform.machine(), "root": os.getuid() == 0,
            "landlock": walls.landlock_abi(),
        },
        "active": {name: {key: said[key] for key in ("available", "backend", "reason")} for name, said in here.items()},
        "tiers": told,
        "totals": {
            key: sum(one.get(key) or 0 for one in told)
            for key in ("attacks", "successes", "controls_failed", "survivors", "deadlines", "killed")
        },
        "off": found,
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main() -> int:
    """Prove it, and tell."""
    given = environment.get_environment()
    names = (given.get("TIERS") or "script python command trusted").split()
    with contextlib.redirect_stdout(sys.stderr):  # what a dispatcher logs is no part of the report
        report = asyncio.run(prove(names, int(given.get("ENDINGS") or 20), given.get("FORGE") or ""))
    for what in report["off"]:
        print(f"off: {what}", file=sys.stderr, flush=True)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
