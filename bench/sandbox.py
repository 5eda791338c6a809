"""What does it cost to contain a call? By tier of enforcement, beside a bare start of the same Python, in the same run.

python bench/sandbox.py [rounds] [calls]

  script    one expression in a warm interpreter of its owner's, as model-written code runs
  python    one expression in a fork of its own, behind all walls that this machine has
  module    the same for a plain function that is a tool: the code imports a module, which imports `netra.tool` and what that needs
  command   `true` in bubblewrap
  bare      `python -I -S -c 1`, started and awaited: what it costs to contain nothing
  per second: calls of the tier `python`, as many at a time as there are places

A tier that is not available here is left out, and named at the end. Times are from being asked to the result, everything of the call
gone. What is judged is the lowest of the rounds' medians: whatever else the machine does adds to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report
from netra import errors
from services.dispatcher.tools.sandbox import tiers
from services.dispatcher.tools.sandbox.command import Command
from services.dispatcher.tools.sandbox.guardian import Guardian
from services.dispatcher.tools.sandbox.python import Python
from services.dispatcher.tools.sandbox.script import Script

SCRIPT_MS, PYTHON_MS, PER_SECOND = 0.25, 3.0, 800
ROUNDS, CALLS, AT_ONCE, TOGETHER = 7, 60, 4, 10
_MODULE = "netra.tool"
Way = Callable[[], Awaitable[float]]


def _job(folder: Path, code: str = "", *argv: str, module: str = "") -> tiers.Job:
    return tiers.Job(folder, tiers.Limits(30.0), code=code, argv=argv, owner="ann", module=module)


def _one_by_one(call: Callable[[], Awaitable[object]], calls: int) -> Way:
    """Milliseconds that a call takes, the middle of so many."""

    async def measured() -> float:
        found = []
        for _ in range(calls):
            began = time.perf_counter()
            await call()
            found.append((time.perf_counter() - began) * 1000)
        return statistics.median(found)

    return measured


def _together(call: Callable[[], Awaitable[object]], calls: int) -> Way:
    """Milliseconds for each of many calls at once: a thousand by it is how many there are in a second."""

    async def measured() -> float:
        began = time.perf_counter()

        async def some() -> None:
            for _ in range(calls // AT_ONCE):
                await call()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(some())
        return (time.perf_counter() - began) * 1000 / (calls // AT_ONCE * AT_ONCE)

    return measured


async def _bare() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", "1", stdin=subprocess.DEVNULL)
    await process.wait()


@contextlib.asynccontextmanager
async def _ways(calls: int) -> AsyncIterator[tuple[dict[str, Way], list[str]]]:
    """The ways that there are here, and the tiers that are not."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netra-bench-")))
        empty = folder / "call"
        empty.mkdir()
        guardian = Guardian(30.0)
        stack.push_async_callback(guardian.close)
        script, python, command = Script(guardian), Python(folder, modules=["netra", _MODULE], concurrency=AT_ONCE), Command(guardian)
        fresh = lambda: python.run(_job(empty, "1"))  # noqa: E731
        known: list[tuple[tiers.Sandbox, dict[str, Way]]] = [
            (script, {"script": _one_by_one(lambda: script.run(_job(empty, "1 + 1")), calls)}),
            (python, {
                "python": _one_by_one(fresh, calls), "per second": _together(fresh, calls * TOGETHER),
                "module": _one_by_one(lambda: python.run(_job(empty, "from netra.tool import tool\n1", module=_MODULE)), calls // 4),
            }),
            (command, {"command": _one_by_one(lambda: command.run(_job(empty, "", "true")), calls // 4)}),
        ]  # fmt: skip
        ways: dict[str, Way] = {"bare": _one_by_one(_bare, calls // 2)}
        absent = []
        for tier, its in known:
            stack.push_async_callback(tier.close)
            found = await tier.probe() if await _started(tier) else None
            if found is not None and found.available:
                ways |= its
            else:
                absent.append(type(tier).__name__.lower())
        yield ways, absent


async def _started(tier: tiers.Sandbox) -> bool:
    try:
        await tier.start()
    except errors.SandboxUnavailable:
        return False
    return True


async def _measured(rounds: int, calls: int) -> tuple[dict[str, list[float]], list[str]]:
    async with _ways(calls) as (ways, absent):
        return await report.in_turn(ways, rounds), absent


def main(rounds: int = ROUNDS, calls: int = CALLS) -> int:
    """Returns the exit code: 1 when a tier that is there misses its goal."""
    found, absent = uvloop.run(_measured(rounds, calls))
    rows = ((name, *report.spread(each, 3), f"{report.ratio(each, found['bare']):.3f}") for name, each in found.items())
    report.table(("way", "ms_median", "lowest", "highest", "of_bare"), rows)
    best = {name: min(each) for name, each in found.items()}
    rate = 1000 / best["per second"] if "per second" in best else None
    fresh = max(best.get("python", 0), best.get("module", 0))
    good = (best.get("script", 0) <= SCRIPT_MS, fresh <= PYTHON_MS, rate is None or rate >= PER_SECOND)
    return report.verdict(
        "sandbox", all(good), f"script <= {SCRIPT_MS} ms warm, python <= {PYTHON_MS} ms fresh and >= {PER_SECOND} a second",
        f"script {best.get('script', 0):.2f} ms, python {best.get('python', 0):.2f} ms (with a module {best.get('module', 0):.2f}), "
        f"{rate or 0:.0f} a second", rounds=rounds, calls_per_round=calls, absent=absent,
        lowest_ms={name: round(value, 3) for name, value in best.items()},
        of_bare={name: round(report.ratio(each, found["bare"]), 3) for name, each in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
