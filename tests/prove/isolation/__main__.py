"""python -m tests.prove.isolation: MINUTES, FAULTS, SEED, PAIRS, SHARE, FORGE; JSON at the end, exit 1 if anything is off."""

from __future__ import annotations

import asyncio
import json
import sys

from chassis import environment
from tests.prove.isolation import proof, timing


def main() -> int:
    """Prove it, and tell."""
    given = environment.get_environment()
    wanted = proof.Wanted(
        seconds=60 * float(given.get("MINUTES") or 0.5),
        faults=int(given.get("FAULTS") or 11),
        seed=int(given.get("SEED") or 1),
        pairs=int(given.get("PAIRS") or timing.PAIRS),
        share=float(given.get("SHARE") or 1),
        forged=frozenset((given.get("FORGE") or "").split()),
    )
    if unknown := wanted.forged - set(proof.FORGERIES):
        sys.stderr.write(f"FORGE knows {', '.join(proof.FORGERIES)}, not {', '.join(sorted(unknown))}\n")
        return 2
    report = asyncio.run(proof.prove(wanted, lambda text: print(text, file=sys.stderr, flush=True)))
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
