"""How many execution contexts does one process make in a second? Roots and children, checked in full, and what is asked of them.

python bench/contexts.py [rounds] [contexts]

A root is made as for a request: ids that were checked before, a thread and a run of its own, a deadline. `with payloads` has an agent
context and audit metadata as the platform writes them, `from claims` is what every verified call makes of its token, `children` come
from one parent. Memory is looked at ten times, to see whether anything stays behind.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report
from netra import ids
from netra.context import Isolation, UserExecutionContext

GOAL = 10_000
ROUNDS, CONTEXTS, CONCURRENT, CHILDREN, CALLS = 5, 2_000, 1_000, 500, 10_000
# how often memory is looked at, whatever the rounds
_LOOKS = 10


class _User:
    """Who has signed in; their ids were checked with their token."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {
            "user_id": ids.UserId.new(), "tenant_id": ids.TenantId.new(), "session_id": ids.SessionId.new(), "roles": ("user",),
            "tier": "business",
        }  # fmt: skip

    def context(self, **more: Any) -> UserExecutionContext:
        """A root."""
        return UserExecutionContext.from_request(
            **self.known, thread_id=ids.ThreadId.new(), run_id=ids.RunId.new(), request_id=ids.RequestId.new(),
            deadline=datetime.now(UTC) + timedelta(minutes=5), **more,
        )  # fmt: skip


def _rate(make: Callable[[], object], many: int) -> Callable[[], Any]:
    """Of one way: how many in a second of processor time."""

    async def measured() -> float:
        began = time.process_time()
        for _ in range(many):
            make()
        return many / (time.process_time() - began)

    return measured


def _concurrent(user: _User) -> Callable[[], Any]:
    """1,000 tasks that are all under way before the first goes on."""

    async def measured() -> float:
        released, began = asyncio.Event(), time.process_time()

        async def one() -> str:
            context = user.context()
            await released.wait()
            return context.child("step", "m-2").context_id

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one()) for _ in range(CONCURRENT)]
            await asyncio.sleep(0)
            released.set()
        assert len({task.result() for task in tasks}) == CONCURRENT
        return CONCURRENT / (time.process_time() - began)

    return measured


def _ways(many: int) -> dict[str, Callable[[], Any]]:
    user = _User()
    agent = {"goal": "Where does the money go?", "inputs": {"artifact_ids": [ids.uuid7()], "days": 30, "share": 0.25}}
    audit = {"client_ip": "203.0.113.7", "method": "POST", "path": "/v1/runs", "user_agent": "netra/0.1"}
    whole = user.context(agent_context=agent, audit_metadata=audit)
    claims, registry, number = json.loads(json.dumps(whole.to_claims())), Isolation(), iter(range(10**9))
    return {
        "roots": _rate(user.context, many),
        "with payloads": _rate(lambda: user.context(agent_context=agent, audit_metadata=audit), many),
        "from claims": _rate(lambda: UserExecutionContext.from_claims(claims), many),
        "concurrent": _concurrent(user),
        "children": _rate(lambda: whole.child("step", f"m-{next(number)}", {"step": 1}), CHILDREN),
        "correlation_id": _rate(lambda: whole.correlation_id, CALLS),
        "to_dict": _rate(whole.to_dict, CALLS // 10),
        "audit_trail": _rate(whole.audit_trail, CALLS // 10),
        "verify": _rate(lambda: registry.verify(whole), CALLS // 10),
    }


def _left_behind(many: int) -> float:
    """Blocks of memory that one context leaves."""
    user, found = _User(), []
    for _ in range(_LOOKS + 1):
        for _ in range(many):
            user.context(agent_context={"a": [1, 2, 3]}).child("step", "m-2").to_dict()
        gc.collect()
        found.append(sys.getallocatedblocks())
    return (found[-1] - found[1]) / (many * (_LOOKS - 1))


def main(rounds: int = ROUNDS, many: int = CONTEXTS) -> int:
    """Returns the exit code: 1 when fewer are made in a second than the goal, or something stays of those that are gone."""
    found = asyncio.run(report.in_turn(_ways(many), rounds))
    left = _left_behind(many)
    report.table(("way", "per_second_median", "lowest", "highest"), ((name, *report.spread(each, 0)) for name, each in found.items()))
    rates = {name: round(statistics.median(each)) for name, each in found.items()}
    good = rates["roots"] >= GOAL and abs(left) < 0.01
    return report.verdict(
        "contexts", good, f">= {GOAL} a second, nothing left behind", f"{rates['roots']} a second, {left:.4f} blocks left of each",
        rounds=rounds, contexts_per_round=many, **{name.replace(" ", "_"): rate for name, rate in rates.items() if name != "roots"},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
