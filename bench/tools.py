"""What does a tool call cost beside the tool, before anything is stored? And the same tool over MCP on standard input and output?

python bench/tools.py [rounds] [calls]

  ours      `UnifiedToolDispatcher.execute` of a trusted coroutine: permission, quota, schema, deadline, both events, metrics; the events go
            nowhere
  function  the same coroutine, awaited
  mcp       the same tool behind the MCP SDK, client and server, on standard input and output: a warm server, one call at a time
  checked   arguments from their bytes to a checked object, by the schema that the tool declares

A call costs what it takes from being asked to being answered; `cpu_us` is the processor time of this process for it, which a busy machine
changes little.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import mcp
import orjson
import uvloop
from mcp.server import MCPServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report, stores
from chassis import audit, identity, trust
from netra import ids
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.tool import tool
from services.dispatcher.tools import arguments, calls, dispatch, permits, registry, workspace

OVERHEAD_US, TIMES, CHECKED_US = 50.0, 10.0, 3.0
ROUNDS, CALLS = 9, 500
GIVEN = {"text": "How much did we spend in May?", "limit": 20, "tags": ["spend", "may"], "options": {"currency": "USD", "exact": True}}


@tool(idempotent=True, timeout_s=5)
async def lookup(text: str, limit: int, tags: list[str], options: dict[str, str | bool]) -> dict[str, Any]:
    """Answers with what it was asked."""
    return {"text": text, "limit": limit, "tags": tags, "options": options}


async def _no_token() -> str:
    return ""


class _Nobody:
    """Who is told of calls, and does nothing with it."""

    def tool_executing(self, call: calls.Call, step_key: str, effects: bool) -> None:
        """A call begins."""

    def tool_progress(self, call: calls.Call, progress: float | None, message: str | None) -> None:
        """It has come so far."""

    def tool_completed(self, outcome: calls.Outcome, enforcement: Mapping[str, object], step_key: str) -> None:
        """It is over."""

    def security_violation(self, violation: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        """Something was tried."""

    async def barrier(self) -> None:
        """Everything is recorded."""

    def require_lease(self) -> None:
        """It is ours."""


class _Uncounted:
    """Quotas are in Valkey; here everybody may."""

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count."""


@contextlib.asynccontextmanager
async def _dispatcher() -> AsyncIterator[dispatch.UnifiedToolDispatcher]:
    """Of a user with a role and a tier, under a policy."""
    trusted = trust.Trust()
    grant = auth_pb2.Grant(role="user", tier="business", permissions=["tools:execute"])
    limits = auth_pb2.TierLimits(tier="business", tool_calls_per_minute=10**9)
    await trusted.apply(auth_pb2.WatchTrustResponse(policy=auth_pb2.Policy(version=1, grants=[grant], limits=[limits])))
    context = UserExecutionContext.from_request(
        user_id=ids.uuid7(), tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(),
        request_id=ids.uuid7(), roles=("user",), tier="business",
    )  # fmt: skip
    caller = identity.Caller(service="dispatcher", context=context)
    holder = permits.Holder(context.user_id, context.roles, context.tier, None, caller, context.session_id, 0.0)

    async def unheard(_entries: object) -> None:
        pass

    mine = permits.Permits(holder, trusted, _Uncounted(), audit.Refusals(unheard))
    with tempfile.TemporaryDirectory() as folder:
        spaces = workspace.Workspaces(Path(folder) / "work", workspace.NoArtifacts(), 1)
        made = dispatch.Dispatchers(registry.ToolRegistry([lookup]))
        async with made.for_context(context, mine, _Nobody(), spaces.of(context.run_id, _no_token), deadline_s=3600) as tools:
            yield tools
        spaces.close()


@contextlib.asynccontextmanager
async def _peer() -> AsyncIterator[mcp.Client]:
    """A client of an MCP server on the other end of two pipes."""
    server = mcp.StdioServerParameters(command=sys.executable, args=[__file__, "serve"], cwd=Path.cwd())
    async with mcp.Client(server) as peer:
        yield peer


def serve() -> int:
    """The server, until its input ends."""
    server = MCPServer("bench")
    server.tool()(lookup.function)
    server.run("stdio")
    return 0


async def _timed(many: int, call: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Microseconds of a call: by the clock, and of this process's processors."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(many):
        await call()
    return (time.perf_counter() - began) / many * 1e6, (time.process_time() - cpu) / many * 1e6


def _checks(data: bytes, many: int) -> Callable[[], Awaitable[tuple[float, float]]]:
    known = registry.ToolRegistry([lookup]).get("lookup")

    async def measured() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(many):
            known.check_arguments(arguments.read(data, "arguments"))
        return (time.perf_counter() - began) / many * 1e6, (time.process_time() - cpu) / many * 1e6

    return measured


async def _measured(rounds: int, many: int) -> dict[str, list[tuple[float, float]]]:
    async with _dispatcher() as tools, _peer() as peer:

        async def ours() -> None:
            outcome = await tools.execute("lookup", GIVEN)
            assert outcome.error is None

        async def theirs() -> None:
            result = await peer.call_tool("lookup", GIVEN)
            assert result.structured_content == GIVEN, result

        ways: dict[str, Callable[[], Awaitable[tuple[float, float]]]] = {
            "ours": functools.partial(_timed, many, ours),
            "function": functools.partial(_timed, many, lambda: lookup.function(**GIVEN)),
            "mcp": functools.partial(_timed, many, theirs),
            "checked": _checks(orjson.dumps(GIVEN), many * 10),
        }
        return await report.in_turn(ways, rounds)


def main(rounds: int = ROUNDS, many: int = CALLS) -> int:
    """Returns the exit code: 1 when a call costs more than the goal, or is not so much faster, or checking takes longer."""
    stores.set_up()
    found = uvloop.run(_measured(rounds, many))
    clock = {name: [took for took, _ in each] for name, each in found.items()}
    cpu = {name: statistics.median(spent for _, spent in each) for name, each in found.items()}
    report.table(
        ("way", "us_per_call_median", "lowest", "highest", "cpu_us_median"),
        ((name, *report.spread(each), f"{cpu[name]:.1f}") for name, each in clock.items()),
    )
    overhead, times, checked = cpu["ours"] - cpu["function"], report.ratio(clock["mcp"], clock["ours"]), cpu["checked"]
    good = overhead <= OVERHEAD_US and times >= TIMES and checked <= CHECKED_US
    goal = f"<= {OVERHEAD_US / 1000:g} ms, {TIMES:g} times as fast as MCP on stdio, arguments checked in {CHECKED_US:g} us"
    return report.verdict(
        "tools", good, goal, f"{overhead / 1000:.3f} ms, {times:.1f} times, {checked:.1f} us",
        mcp_us=round(statistics.median(clock["mcp"])), ours_us=round(statistics.median(clock["ours"]), 1),
        rounds=rounds, calls_per_round=many,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["serve"] else main(*map(int, sys.argv[1:])))
