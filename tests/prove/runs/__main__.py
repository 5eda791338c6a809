"""python -m tests.prove.runs: VOLLEYS, CELLS, MINUTES, FAULTS, CANCELS, USERS, RUNS, NOISE, SEED, PARTS; JSON at the end."""

from __future__ import annotations

import asyncio
import json
import sys

from chassis import environment
from tests.prove.runs import proof


def main() -> int:
    """Prove it, and tell."""
    given, usual = environment.get_environment(), proof.Wanted()
    minutes = float(given.get("MINUTES") or usual.minutes)
    wanted = proof.Wanted(
        volleys=int(given.get("VOLLEYS") or usual.volleys),
        cells=float(given.get("CELLS") or usual.cells),
        minutes=minutes,
        storms=int(given.get("FAULTS") or round(20 * minutes)),
        cancels=int(given.get("CANCELS") or usual.cancels),
        users=int(given.get("USERS") or usual.users),
        runs=int(given.get("RUNS") or usual.runs),
        noise=int(given.get("NOISE") or usual.noise),
        seed=int(given.get("SEED") or usual.seed),
        parts=tuple((given.get("PARTS") or " ".join(usual.parts)).split()),
    )
    if unknown := set(wanted.parts) - set(proof.PARTS):
        sys.stderr.write(f"PARTS knows {', '.join(proof.PARTS)}, not {', '.join(sorted(unknown))}\n")
        return 2
    report = asyncio.run(proof.prove(wanted, lambda text: print(text, file=sys.stderr, flush=True)))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
