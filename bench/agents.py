"""How many agents a second does a process make for its users, take through their life and put away, and is anything left of them?

python bench/agents.py [rounds] [agents]

  life      an execution as the engine has it: begun for one of 50 users, five steps, its end in history and statistics
  instance  an instance from the registry, active, completed and gone from its user's session
  object    a slotted object of the same context and agent, put into a dictionary and taken out: what nobody could do without

Nothing is stored and no agent is called: this is what the platform itself does for each. All instances of a round are there at the same
time, so that the goal holds with a full process; when the rounds are over, no user has any. `per_s` is by processor time.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report, stores
from netra import ids
from netra.agent import AgentSpec, Turn, agent
from netra.context import UserExecutionContext
from services.dispatcher import executions
from services.dispatcher.agents import registry, sessions

PER_S = 1_000.0
ROUNDS, AGENTS, USERS, STEPS = 9, 5_000, 50, 5


@agent("idle")
async def idle(turn: Turn) -> None:
    """Does nothing."""


@dataclass(slots=True)
class _Bare:
    """As little as an execution can be."""

    execution_id: str
    context: UserExecutionContext
    spec: AgentSpec


def contexts() -> list[UserExecutionContext]:
    """One for each user."""
    return [
        UserExecutionContext.from_request(
            user_id=ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(),
            request_id=ids.uuid7(), roles=("user",), tier="business",
        )
        for _ in range(USERS)
    ]  # fmt: skip


class World:
    """A process with users."""

    def __init__(self, many: int) -> None:
        self.agents = registry.AgentRegistry([*registry.built_in(), idle])
        self.executions = executions.Executions(self.agents)
        self.contexts, self.many = contexts(), many
        self.blocks_each = 0.0

    def life(self) -> None:
        """Each is executed."""
        before = sys.getallocatedblocks()
        made = [self.executions.begin(self._of(at), idle, self._of(at).run_id) for at in range(self.many)]
        self.blocks_each = (sys.getallocatedblocks() - before) / self.many
        for instance in made:
            for _ in range(STEPS):
                with instance.step():
                    pass
            instance.end(sessions.AgentState.COMPLETED)

    def instance(self) -> None:
        """Each is made and put away."""
        made = [self.agents.create_agent_for_user(self._of(at), "idle", accepted=True) for at in range(self.many)]
        for instance in made:
            instance.state(sessions.AgentState.ACTIVE)
            instance.end(sessions.AgentState.COMPLETED)

    def bare(self) -> None:
        """Nothing but an object each."""
        held: dict[str, _Bare] = {}
        for at in range(self.many):
            one = _Bare(ids.uuid7(), self._of(at), idle)
            held[one.execution_id] = one
        for name in list(held):
            del held[name]

    def _of(self, at: int) -> UserExecutionContext:
        return self.contexts[at % USERS]


def _timed(many: int, work: Callable[[], None]) -> Callable[[], Awaitable[float]]:
    async def measured() -> float:
        began = time.process_time()
        work()
        return many / (time.process_time() - began)

    return measured


async def _measured(rounds: int, many: int) -> tuple[dict[str, list[float]], World, int]:
    world = World(many)
    ways = {name: _timed(many, work) for name, work in (("life", world.life), ("instance", world.instance), ("object", world.bare))}
    world.life()
    gc.collect()
    before = sys.getallocatedblocks()
    found = await report.in_turn(ways, rounds)
    await asyncio.sleep(0)
    gc.collect()
    return found, world, sys.getallocatedblocks() - before


def main(rounds: int = ROUNDS, many: int = AGENTS) -> int:
    """Returns the exit code: 1 when fewer are made than the goal, or something of them is left."""
    stores.set_up()
    found, world, left = uvloop.run(_measured(rounds, many))
    report.table(("way", "per_s_median", "lowest", "highest"), ((name, *report.spread(each, 0)) for name, each in found.items()))
    health = world.agents.get_registry_health()
    # the history of each user and what Python keeps for itself: far less than one round's instances
    gone = health.instances == 0 and world.executions.health().executing == 0 and left < many
    rate = statistics.median(found["life"])
    return report.verdict(
        "agents", rate >= PER_S and gone, f">= {PER_S:,.0f}/s, nothing left behind", f"{rate:,.0f}/s",
        instance_per_s=round(statistics.median(found["instance"])), object_per_s=round(statistics.median(found["object"])),
        blocks_each=round(world.blocks_each, 1), blocks_left=left, made=health.made, over=health.over, users=USERS,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
