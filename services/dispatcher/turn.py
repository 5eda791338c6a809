"""What an agent may do, each a step with a deterministic key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from netra import errors
from netra.context import UserExecutionContext
from services.dispatcher import journal
from services.dispatcher.tools import dispatch

_MAX_SLEEP_S = 86_400.0
_MAX_REASONING = 16 * 1024


class Turn:
    """The turn of one agent in one run: `netra.agent.Turn`, told to the record. Step keys count calls in the order of the code."""

    def __init__(
        self, request: str, inputs: Mapping[str, Any], context: UserExecutionContext,
        bridge: journal.AgentWebSocketBridge, tools: dispatch.UnifiedToolDispatcher,
    ) -> None:  # fmt: skip
        self.request, self.inputs, self.context = request, inputs, context
        self._bridge, self._tools = bridge, tools
        self._thoughts = 0
        self.steps = 0

    def _key(self, name: str) -> str:
        self.steps += 1
        return f"{self.steps}:{name}"

    async def think(self, reasoning: str, *, progress: float | None = None) -> None:
        """Show what the agent considers. Raises `InvalidPayload` when that is empty or longer than 16 Ki characters."""
        if not reasoning or len(reasoning) > _MAX_REASONING:
            raise errors.InvalidPayload(f"reasoning must have 1 to {_MAX_REASONING} characters", field="reasoning")
        await self._bridge.room()
        self._thoughts += 1
        self._bridge.thinking(reasoning, self._thoughts, progress, self._key("think"))

    async def tool(self, name: str, **arguments: object) -> Any:
        """Call a tool and return its result. Raises what went wrong."""
        await self._bridge.room()
        outcome = await self._tools.execute(name, arguments, step_key=self._key(f"tool:{name}"))
        return outcome.unwrap()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        if not 0 <= seconds <= _MAX_SLEEP_S:
            raise errors.InvalidPayload(f"seconds must be from 0 to {_MAX_SLEEP_S:g}", field="seconds")
        await self._bridge.room()
        await asyncio.sleep(seconds)
        self._bridge.step(self._key("sleep"), None)
