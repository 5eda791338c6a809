"""Runs measurements one after the other and ends with one table of them all: python -m bench.harness.every FILE..."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_HEADER = ("bench", "goal", "figure", "", "seconds", "load")
# a bench that hangs must not hold up the others
_PATIENCE_S = 300


def _run(path: str) -> dict[str, Any]:
    """What a bench said last, printed with all that it said before."""
    print(f"\n== {path}", flush=True)
    began, load, last = time.monotonic(), os.getloadavg()[0], ""
    try:
        done = subprocess.run([sys.executable, path], stdout=subprocess.PIPE, text=True, timeout=_PATIENCE_S)  # noqa: S603 - files of ours
        print(done.stdout, end="", flush=True)
        last, code = (done.stdout.strip().splitlines() or [""])[-1], done.returncode
    except subprocess.TimeoutExpired:
        code = 1
    told: dict[str, Any] = json.loads(last) if last.startswith("{") else {"bench": Path(path).stem, "ok": False, "figure": "it broke"}
    return {**told, "ok": told["ok"] and code == 0, "took": time.monotonic() - began, "before": load}


def main(paths: list[str]) -> int:
    """Returns the exit code: 1 when a goal was missed, or a bench broke."""
    found = [_run(path) for path in paths]
    rows = [_HEADER]
    for told in found:
        verdict = "ok" if told["ok"] else "MISSED"
        rows.append((told["bench"], told.get("goal", ""), told.get("figure", ""), verdict, f"{told['took']:.0f}", f"{told['before']:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if all(told["ok"] for told in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
