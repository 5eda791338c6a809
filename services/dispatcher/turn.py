"""What an agent may do, each a step with a deterministic key."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from chassis import lifecycle
from netra import errors
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher import journal
from services.dispatcher.tools import dispatch

_MAX_SLEEP_S = 86_400.0
_MAX_REASONING = 16 * 1024
MAX_DEPTH = 10
# the record takes keys of up to 200 characters
_MAX_NAME, _MAX_PREFIX = 80, 100


@dataclass(slots=True)
class _Steps:
    """Counts steps in the order of the code, in one strand of it: another strand, running beside, has keys and a count of its own."""

    prefix: str = ""
    count: int = 0

    def next(self) -> str:
        """The key of the next step."""
        self.count += 1
        return f"{self.prefix}{self.count}"


@dataclass(slots=True)
class _Totals:
    """What a run took, over all of its agents."""

    steps: int = 0
    thoughts: int = 0


# of the strand that executes; none is the first one of its turn
_strand: ContextVar[_Steps | None] = ContextVar("strand", default=None)


class Turn:
    """The turn of one agent in one run: `netra.agent.Turn`, told to the record. Step keys count calls in the order of the code.

    `agents` finds those that may do a part of the work, and raises for others.
    """

    def __init__(
        self, request: str, inputs: Mapping[str, Any], context: UserExecutionContext,
        bridge: journal.AgentWebSocketBridge, tools: dispatch.UnifiedToolDispatcher, agents: Callable[[str], AgentSpec],
    ) -> None:  # fmt: skip
        self.request, self.inputs, self.context = request, inputs, context
        self._bridge, self._tools, self._agents = bridge, tools, agents
        self._first, self._totals, self._depth = _Steps(), _Totals(), context.depth

    @property
    def steps(self) -> int:
        """Steps so far, those of children among them."""
        return self._totals.steps

    def _next(self) -> str:
        return (_strand.get() or self._first).next()

    def _key(self, name: str) -> str:
        self._totals.steps += 1
        return f"{self._next()}:{name[:_MAX_NAME]}"

    async def think(self, reasoning: str, *, progress: float | None = None) -> None:
        """Show what the agent considers. Raises `InvalidPayload` when that is empty or longer than 16 Ki characters."""
        if not reasoning or len(reasoning) > _MAX_REASONING:
            raise errors.InvalidPayload(f"reasoning must have 1 to {_MAX_REASONING} characters", field="reasoning")
        key = self._key("think")
        await self._bridge.room()
        self._totals.thoughts += 1
        self._bridge.thinking(reasoning, self._totals.thoughts, progress, key)

    def delta(self, text: str) -> None:
        """Show text as it is produced; dropped where it cannot be shown, and when it has more than 16 KiB."""
        if text:
            self._bridge.delta(text)

    async def tool(self, name: str, /, **arguments: object) -> Any:
        """Call a tool and return its result. Raises what went wrong."""
        key = self._key(f"tool:{name}")
        await self._bridge.room()
        outcome = await self._tools.execute(name, arguments, step_key=key, reporter=self._bridge)
        return outcome.unwrap()

    async def child(self, agent: str, *, request: str | None = None, **inputs: object) -> Any:
        """Have another agent do a part of the work, in this run, and return its result. Raises what it raises.

        It gets this run's request and inputs; those given win. Raises `NotFound`, `PermissionDenied` when its feature is not part
        of the user's tier, and `DepthExceeded` for the eleventh generation.
        """
        spec = self._agents(agent)
        other = self._of(spec, request, inputs)
        outer = _strand.set(_Steps(_short(f"{self._next()}:child:{agent}/")))
        try:
            return await spec.function(other)
        finally:
            _strand.reset(outer)

    def _of(self, spec: AgentSpec, request: str | None, inputs: Mapping[str, object]) -> Turn:
        if self._depth >= MAX_DEPTH:
            raise errors.DepthExceeded(f"{spec.name} would be generation {MAX_DEPTH + 1}; at most {MAX_DEPTH} are allowed.", field="depth")
        asked = self.request if request is None else request
        bridge = self._bridge.under(spec.name)
        other = Turn(asked, {**self.inputs, **inputs}, self.context, bridge, self._tools, self._agents)
        other._totals, other._depth = self._totals, self._depth + 1
        return other

    async def gather(self, *steps: Awaitable[Any]) -> list[Any]:
        """Take steps at the same time; their results in the order given. When one raises, the others are stopped, then that is raised."""
        key, failed = self._next(), list[BaseException]()
        # not a TaskGroup: up to Python 3.12 one that failed leaves its task looking cancelled
        tasks = lifecycle.Tasks(on_failure=failed.append)
        branches = [tasks.spawn(_branch(f"{key}.{place}:", step), f"{key}.{place}") for place, step in enumerate(steps)]
        try:
            if branches:
                await asyncio.wait(branches, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await tasks.close()
            for step in steps:
                if inspect.iscoroutine(step):
                    step.close()  # one that was stopped before it began
        if failed:
            raise failed[0]
        return [branch.result() for branch in branches]

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        if not 0 <= seconds <= _MAX_SLEEP_S:
            raise errors.InvalidPayload(f"seconds must be from 0 to {_MAX_SLEEP_S:g}", field="seconds")
        key = self._key("sleep")
        await self._bridge.room()
        await asyncio.sleep(seconds)
        self._bridge.step(key, None)


async def _branch(prefix: str, step: Awaitable[Any]) -> Any:
    _strand.set(_Steps(_short(prefix)))
    return await step


def _short(prefix: str) -> str:
    return prefix if len(prefix) <= _MAX_PREFIX else f"{hashlib.sha256(prefix.encode()).hexdigest()[:32]}/"
