"""What does a socket cost that nobody uses, and is all of it given back? Memory of a gateway with thousands of idle sockets.

python bench/sockets.py [sockets] [cycles]

First a few users open sockets and cut them again, many times. Then many sockets are open at once, each of a user of its own, who is
followed in the tail.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import gateway, report

GOAL_KIB, GOAL_CYCLE_KIB = 48.0, 1.0
SOCKETS, CYCLES, WARM_UP, AT_ONCE, SAMPLES = 5000, 4000, 1500, 50, 20


async def _opened(place: gateway.Place, tokens: list[str]) -> list[gateway.Socket]:
    port, found = place.gateway.told["port"], list[gateway.Socket]()
    for start in range(0, len(tokens), AT_ONCE):
        found += await asyncio.gather(*(gateway.Socket.open(port, token) for token in tokens[start : start + AT_ONCE]))
    return found


async def _settled(place: gateway.Place) -> float:
    """The memory of the gateway when it has done what there was to do."""
    await asyncio.sleep(1.0)
    place.gateway.ask()
    return place.gateway.rss_kib()


async def _cycles(place: gateway.Place, tokens: list[str], many: int) -> None:
    for _ in range(0, many, len(tokens)):
        for one in await _opened(place, tokens):
            one.close()


async def _measured(sockets: int, cycles: int) -> tuple[list[float], dict[str, float]]:
    """The memory while sockets come and go, and before, during and after many of them."""
    async with gateway.place(__file__) as place:
        few = [place.user()[1] for _ in range(AT_ONCE)]
        await _cycles(place, few, WARM_UP)
        samples = []
        for _ in range(SAMPLES):
            await _cycles(place, few, cycles // SAMPLES)
            samples.append(place.gateway.rss_kib())
        found = {"before": await _settled(place)}
        mine = await _opened(place, [place.user()[1] for _ in range(sockets)])
        found["idle"] = await _settled(place)
        for one in mine:
            one.close()
        found["closed"] = await _settled(place)
        return samples, found


def main(sockets: int = SOCKETS, cycles: int = CYCLES) -> int:
    """Returns the exit code: 1 when a socket costs more than the goal, or leaves something behind."""
    samples, found = uvloop.run(_measured(sockets, cycles))
    report.table(("state", "rss_kib"), ((name, f"{rss:.0f}") for name, rss in found.items()))
    per_socket = (found["idle"] - found["before"]) / sockets
    # a line through the samples: single ones move with the collector of garbage
    per_cycle = statistics.linear_regression(range(SAMPLES), samples).slope / (cycles // SAMPLES)
    good = per_socket <= GOAL_KIB and per_cycle <= GOAL_CYCLE_KIB
    return report.verdict(
        "sockets", good, f"<= {GOAL_KIB:g} KiB idle, <= {GOAL_CYCLE_KIB:g} KiB a cycle",
        f"{per_socket:.1f} KiB idle, {per_cycle:.2f} KiB a cycle", sockets=sockets, cycles=cycles,
    )  # fmt: skip


if __name__ == "__main__":
    if "--gateway" in sys.argv:
        gateway.serve(sys.argv[-1])
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
