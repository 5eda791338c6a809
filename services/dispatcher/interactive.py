"""Interactive calls: runs of kind `tool`, made by whoever accepted them, and brought to their end by another when that one dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from netra import errors
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.dispatcher import answers, entitlements, journal, ledger, running, runs, settlement, stages
from services.dispatcher.patience import patient
from services.dispatcher.tools import dispatch

_T = TypeVar("_T")


class Interactive:
    """The interactive calls of this process."""

    def __init__(self, course: running.Course, entitled: entitlements.Entitlements) -> None:
        self._course, self._entitled = course, entitled

    async def call(self, mine: running.Running, arguments: dict[str, Any], told: Callable[[bytes], None]) -> None:
        """Take a call to its end; `told` hears the answer that its outcome means once that is in the record, before it is kept."""
        order, context = mine.claim.order, mine.context
        permitted = self._entitled.of_context(context, lambda: mine.rights)
        # a tool with effects is not called before that append is in the record; any other may be called while the record is away
        async with self._course.bridge(mine, context, self._course.unopened(mine)) as bridge:
            try:
                async with self._course.dispatcher(mine, context, permitted, bridge) as tools:
                    calling = tools.execute(order.agent, arguments, step_key=ledger.INTERACTIVE)
                    # the tool has a deadline of its own; a cancel leaves its outcome as the last one
                    outcome = await self._unless_stopped(mine, bridge, calling) or tools.last
            except errors.QuotaExceeded as refused:
                answer = answers.of({"status": "error", "error": journal.error_data(refused)}, "", 0.0)
                await self._course.end(mine, bridge, running.failed(refused), answer)
                raise
            if outcome is None:
                raise errors.Cancelled
            await self._called(mine, bridge, outcome, told)

    async def _unless_stopped(self, mine: running.Running, bridge: journal.AgentWebSocketBridge, work: Awaitable[_T]) -> _T | None:
        """What the work came to; None when it was stopped before, by a cancel."""
        calling: asyncio.Task[tuple[_T | None, Exception | None]] = self._course.tasks.spawn(_captured(work), name="call")
        stop = self._course.tasks.spawn(mine.stop.wait(), name="stop")
        try:
            await asyncio.wait({calling, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                return None
            value, error = calling.result()
            if error is not None:
                raise error
            return value
        except asyncio.CancelledError:
            # this process lets go of the run: that its tools are stopped for it is not how they ended
            bridge.leave()
            raise
        finally:
            stop.cancel()
            calling.cancel()
            await asyncio.wait({calling}, timeout=running.GRACE_S)

    async def _called(
        self,
        mine: running.Running,
        bridge: journal.AgentWebSocketBridge,
        outcome: dispatch.Outcome,
        told: Callable[[bytes], None] | None = None,
    ) -> None:
        """The call is over: once that is in the record, whoever waits is told, and its answer is kept."""
        await bridge.barrier()
        mine.passed.now(stages.RESPONSE_PERSISTED)
        kept = answers.of(
            journal.kept_of(outcome), outcome.call.tool_call_id, outcome.execution_time_ms, attempts=outcome.attempts,
            enforcement=outcome.enforcement, answered_by=outcome.degraded.answered if outcome.degraded is not None else "",
        )  # fmt: skip
        mine.over = True
        if told is not None:
            told(kept)
        await self._over(mine, answers.state_after(outcome.status), kept)

    async def _over(self, mine: running.Running, state: runs.RunState, outcome: bytes) -> None:
        """Store the end of a call, which frees no thread; nobody waits for it, and its context is closed before."""
        order, epoch = mine.claim.order, mine.claim.epoch
        left_open = not await self._course.close_context(mine)
        # should it have failed: what is still to be closed is looked for again and again
        await patient(lambda: self._course.store.ended(order.run_id, epoch, state, outcome, mine.passed.times, context_open=left_open))

    async def take_up(self, mine: running.Running, context: UserExecutionContext, record: events_pb2.OpenRunResponse) -> None:
        """Bring a call to its end whose owner died, by what it left in the record."""
        left = (await self._calls(mine, context)).get(ledger.INTERACTIVE)
        if record.ended:
            known = left.kept if left is not None else None
            state = runs.state_after(record.terminal_type) if known is None else answers.state_after(known["status"])
            await self._course.close_run(mine, state, b"" if left is None or known is None else _answered_before(left, known))
            return
        async with self._course.bridge(mine, context, record) as bridge:
            if record.next_seq == 1:
                error = errors.OwnerLost("The process that was to call the tool died before it did. Call it again.")
                answer = answers.of({"status": "error", "error": journal.error_data(error)}, "", 0.0)
                await self._course.end(mine, bridge, running.failed(error), answer)
                return
            permitted = self._entitled.of_context(context, lambda: mine.rights)
            async with self._course.dispatcher(mine, context, permitted, bridge) as tools:
                settling = settlement.Settlement(tools, self._course.dispatchers.tools, bridge)
                call = left or ledger.unlabelled(mine.claim.order.agent, record.open_tool_calls[0])
                outcome = await self._settled(mine, bridge, settling, call)
            await self._called(mine, bridge, outcome)

    async def _settled(
        self, mine: running.Running, bridge: journal.AgentWebSocketBridge, settling: settlement.Settlement, left: ledger.Call
    ) -> dispatch.Outcome:
        claim = mine.claim
        # an older process left no word of it; and one that so many owners did not survive is not touched any more
        if not left.key or self._course.is_poison(claim):
            return settling.unknown(left)
        if mine.stop.is_set() or claim.finishing:
            return await settling.settle(left, again=False)
        # also of a call that was cancelled its tool is asked what became of it
        outcome = await self._unless_stopped(mine, bridge, settling.settle(left, again=True))
        return outcome or settling.outcomes.get(left.tool_call_id) or settling.unknown(left)

    async def _calls(self, mine: running.Running, context: UserExecutionContext) -> dict[str, ledger.Call]:
        async def read() -> dict[str, ledger.Call]:
            found = ledger.Reading()
            async for _, result in self._course.steps(mine, context):
                found.add(result)
            return found.calls()

        return await patient(read)


async def _captured(work: Awaitable[_T]) -> tuple[_T | None, Exception | None]:
    # what it raises is its caller's, not a failure of the task's owner
    try:
        return await work, None
    except Exception as error:
        return None, error


def _answered_before(call: ledger.Call, kept: Mapping[str, Any]) -> bytes:
    return answers.of(
        kept, call.tool_call_id, call.execution_time_ms, attempts=call.attempts, enforcement=call.enforcement, answered_by=call.answered_by
    )
