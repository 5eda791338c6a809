"""python -m tests.prove.record: MINUTES, FAULTS, SEED, USERS, FORGE from the environment; JSON at the end, exit 1 if anything is off."""

from __future__ import annotations

import asyncio
import json
import sys

from chassis import environment
from tests.prove.record import proof


def main() -> int:
    """Prove it, and tell."""
    given = environment.get_environment()
    minutes = float(given.get("MINUTES") or 1)
    wanted = proof.Wanted(
        minutes=minutes,
        faults=int(given.get("FAULTS") or round(20 * minutes)),
        seed=int(given.get("SEED") or 1),
        users=int(given.get("USERS") or 20),
        forged=given.get("FORGE") or "",
    )
    report = asyncio.run(proof.prove(wanted, lambda text: print(text, file=sys.stderr, flush=True)))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
