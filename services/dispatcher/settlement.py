"""Settles the calls that an earlier owner of a run left: made again, found out from their tools or from a person, or told as unknown."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

from chassis import log, telemetry
from netra import errors, ids
from netra.tool import ToolSpec
from services.dispatcher import journal, ledger
from services.dispatcher.tools import calls, dispatch, results
from services.dispatcher.tools import registry as tools_

_log = log.get(__name__)
_settled = telemetry.meter.create_counter(
    "netra.tools.settled", description="Calls that a dead owner left, by tool and how they were settled."
)


# whether a call of which nobody knows if it was made is to be made again: a person says so
Ask = Callable[[ledger.Call], Awaitable[bool]]


class Settlement:
    """The calls of one run. `outcomes` is what became of each, by its id, once it was told."""

    def __init__(self, made: dispatch.UnifiedToolDispatcher, tools: tools_.ToolRegistry, bridge: journal.AgentWebSocketBridge) -> None:
        self._calls, self._tools, self._bridge = made, tools, bridge
        self.outcomes: dict[str, calls.Outcome] = {}

    async def settle(
        self, left: ledger.Call, *, again: bool, ask: Ask | None = None, only: Container[str] | None = None
    ) -> calls.Outcome:  # fmt: skip
        """Bring an open call to its end, tell it, and return what became of it; `only` are the tools that may be called for it.

        Nothing is made again unless `again`: a run that ends now has no use for it. Before a call ends as unknown that could be made again,
        a person is asked whether to, if there is a way to `ask`. Takes no longer than the tool may and the person needs, or twice that when
        the tool is asked and called.
        """
        tool = self._find(left.tool)
        if tool is None:
            return self.unknown(left)
        way = ledger.way(left, tool.spec, again=again)
        if way is ledger.Way.ASK:
            try:
                settled, result = await self._calls.reconcile(tool, left)
            except errors.NetraError as wrong:
                # it was made: what is wrong is its result
                return self._tell(left, tool.spec, "error", error=wrong, how="reconcile")
            way = ledger.asked(left, tool.spec, settled, again=again)
            if way is ledger.Way.RETURN:
                return self._tell(left, tool.spec, "success", result=result, how="reconcile")
        if way is ledger.Way.REPORT and left.whole and ask is not None and await ask(left):
            way = ledger.Way.REPEAT
        if way is ledger.Way.REPEAT:
            return await self._repeat(left, tool, only)
        if way is ledger.Way.DROP:
            error = errors.OwnerLost("The process that made the call died. Nothing was changed, and the call was not made again.")
            return self._tell(left, tool.spec, "error", error=error, how="dropped")
        return self.unknown(left)

    def unknown(self, left: ledger.Call, why: errors.NetraError | None = None) -> calls.Outcome:
        """Nobody knows what became of a call: it is not made again."""
        more = f" It was not made again: {why.message}" if why is not None else ""
        error = errors.OwnerLost(f"The process that made the call died; whether it was made, and what it changed, is not known.{more}")
        _log.warning("the outcome of a call is unknown", tool=left.tool, tool_call_id=left.tool_call_id)
        tool = self._find(left.tool)
        return self._tell(left, tool.spec if tool is not None else None, "unknown", error=error, how="unknown")

    async def _repeat(self, left: ledger.Call, tool: tools_.Registered, only: Container[str] | None) -> calls.Outcome:
        arguments, again = left.arguments or {}, _Again(self, self._bridge, left, tool.spec)
        call_id = ids.ToolCallId(left.tool_call_id)
        await self._calls.execute(left.tool, arguments, step_key=left.key, reporter=again, tool_call_id=call_id, only=only)
        return self.outcomes[left.tool_call_id]

    def _tell(
        self, left: ledger.Call, spec: ToolSpec | None, status: str, *, how: str, result: results.Result | None = None,
        error: errors.NetraError | None = None,
    ) -> calls.Outcome:  # fmt: skip
        call = calls.Call(ids.ToolCallId(left.tool_call_id), left.tool, left.version, left.arguments or {})
        contained = _contained(spec)
        outcome = calls.Outcome(call, status, result, error, 0.0, attempts=left.attempts, enforcement=contained)
        self.tell(outcome, contained, left.key, how)
        return outcome

    def tell(self, outcome: calls.Outcome, enforcement: Mapping[str, object], step_key: str, how: str) -> None:
        """Tell how a call was settled, and count it."""
        self.outcomes[outcome.call.tool_call_id] = outcome
        _settled.add(1, {"tool": outcome.call.tool, "how": how})
        self._bridge.tool_completed(outcome, enforcement, step_key, settled=how)

    def _find(self, name: str) -> tools_.Registered | None:
        try:
            return self._tools.get(name)
        except errors.NotFound:
            return None


class _Again:
    """Where a call is told of that is made again: that it began is in the record already, and how it ends counts for all attempts."""

    def __init__(self, owner: Settlement, bridge: journal.AgentWebSocketBridge, left: ledger.Call, spec: ToolSpec) -> None:
        self._owner, self._bridge, self._left, self._spec = owner, bridge, left, spec

    def tool_executing(self, call: calls.Call, step_key: str, effects: bool) -> None:
        """It begins once more; or a call for it, which is told as any other."""
        if call.tool_call_id != self._left.tool_call_id:
            self._bridge.tool_executing(call, step_key, effects)
        else:
            self._bridge.tool_again(call, step_key, self._left.attempts + 1)

    def tool_completed(self, outcome: calls.Outcome, enforcement: Mapping[str, object], step_key: str) -> None:
        """It is over."""
        if outcome.call.tool_call_id != self._left.tool_call_id:
            self._bridge.tool_completed(outcome, enforcement, step_key)
        elif self._spec.side_effects and not outcome.attempts:
            # refused this time, and nobody knows what the first time did
            self._owner.unknown(self._left, outcome.error)
        else:
            outcome = dataclasses.replace(outcome, attempts=self._left.attempts + outcome.attempts)
            self._owner.tell(outcome, enforcement, step_key, "repeat")

    def tool_progress(self, call: calls.Call, progress: float | None, message: str | None) -> None:
        """How far it has come."""
        self._bridge.tool_progress(call, progress, message)

    def security_violation(self, violation: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        """What it ran has tried what is forbidden."""
        self._bridge.security_violation(violation, message, details)

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record."""
        await self._bridge.barrier()

    def require_lease(self) -> None:
        """Raises `Fenced` when somebody else may own the run in a moment."""
        self._bridge.require_lease()


def _contained(spec: ToolSpec | None) -> dict[str, Any]:
    return {"tier": spec.enforcement, "backend": spec.backend} if spec is not None else {"tier": "trusted", "backend": "asyncio"}
