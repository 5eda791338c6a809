"""ExecutionEngine: takes one agent, or one tool, through one run, from its first event to its last."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import orjson
import stamina

from chassis import lifecycle, log, telemetry
from netra import errors, ids
from netra.agent import AgentSpec
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2
from netra.events.v1 import events_pb2
from services.dispatcher import answers, appender, entitlements, journal, ledger, outbox, runs, settlement, stages, turn, upstreams
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import dispatch, permits, results, workspace

_log = log.get(__name__)
_T = TypeVar("_T")
_GRACE_S = 3.0
# a run that so many owners could not bring to an end is given up
_MOST_OWNERS = 10
_PATIENCE_S = 30.0
# what a message of a thread may have, in bytes; a longer answer is in the artifact of its result
_MAX_MESSAGE = 256 * 1024
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)
_ADMIN = "admin"
# what is said of a context that is closed for good, or gone
_ENDED = (errors.NotFound, errors.FailedPrecondition)


class Ends(Protocol):
    """Where the ends of runs are kept."""

    async def finishing(self, run_id: ids.RunId, epoch: int, passed: Mapping[str, datetime]) -> bool:
        """The run's thread is free from now on; it has passed these stages. False when another owns the run."""
        ...

    async def ended(
        self, run_id: ids.RunId, epoch: int, state: runs.RunState, outcome: bytes, passed: Mapping[str, datetime], *, context_open: bool
    ) -> None:
        """The run's final state; it has passed these stages. A context that is `context_open` is still to be closed."""
        ...

    async def context_closed(self, run_id: ids.RunId) -> None:
        """The context of a run that has ended is closed, or has ended as well."""
        ...


@dataclass(slots=True)
class Running:
    """A run in this process: what is owned, its current context token, what its user has by now, and whether it is to stop."""

    claim: runs.Claim
    token: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_asked_at: float = 0.0
    stop_asked_by: str = "user"
    token_old: bool = False
    rights: runs.Rights | None = None
    # its final state is being stored: from then on nobody owns it
    over: bool = False
    task: asyncio.Task[Any] | None = None
    passed: stages.Passed = field(default_factory=stages.Passed)
    # the record was away for longer than the run may take
    overdue: bool = False
    # by `time.monotonic`; of an interactive call, whose lease begins longer than those that are renewed
    leased_until: float = 0.0

    def ask_to_stop(self, by: str = "user") -> None:
        """Cancel the run, once."""
        if not self.stop.is_set():
            self.stop_asked_at, self.stop_asked_by = time.monotonic(), by
            self.stop.set()

    def is_meant(self, revocation: auth_pb2.Revocation) -> bool:
        """Whether the run was started in the session, or by the user before they were withdrawn."""
        context = _context(self.claim.order)
        before = revocation.revoked_at.ToDatetime(UTC)
        return context.session_id == revocation.session_id or (context.user_id == revocation.user_id and context.created_at <= before)

    def narrow(self, user_id: str, rights: runs.Rights) -> None:
        """Take note of what a user has by now; the last word counts, for what they started before."""
        context = _context(self.claim.order)
        if context.user_id == user_id and context.created_at <= rights.since + runs.LATE:
            self.left_with(rights)

    def left_with(self, rights: runs.Rights) -> None:
        """The run's user has these rights, unless later ones are known."""
        if self.rights is None or self.rights.since < rights.since:
            self.rights = rights


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a run ends: the final state and what tells it to the record."""

    state: runs.RunState
    tell: Callable[[journal.AgentWebSocketBridge], None]
    answer: str = ""


class ExecutionEngine:
    """Executes runs that this process owns. It never continues a run that it cannot record."""

    def __init__(
        self, contexts: upstreams.Contexts, records: upstreams.Records, appends: appender.Appender, store: Ends,
        agents: agents_.AgentRegistry, dispatchers: dispatch.Dispatchers, entitled: entitlements.Entitlements,
        workspaces: workspace.Workspaces,
    ) -> None:  # fmt: skip
        self._contexts, self._records, self._appends, self._store = contexts, records, appends, store
        self._agents, self._dispatchers, self._entitled, self._workspaces = agents, dispatchers, entitled, workspaces
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("an agent's task failed", exc_info=error))

    async def run(self, running: Running) -> None:
        """Take a claimed run to its end. Returns without one when another process owns the run by now."""
        order = running.claim.order
        context = _context(order)
        headers = {"traceparent": order.traceparent, telemetry.CORRELATION_HEADER: context.correlation_id}
        with telemetry.span(f"run {order.agent}", headers) as span:
            span.set_attribute("netra.run_id", order.run_id)
            log.bind(run_id=order.run_id, user_id=context.user_id)
            try:
                await self._run(running, context)
            except errors.Fenced:
                _log.warning("another process owns the run by now")
            except errors.NetraError as error:
                # the lease runs out, and whoever claims the run then tries again, up to the cap
                _log.error("the run cannot be carried on just now", code=error.code, reason=error.message)

    async def _run(self, running: Running, context: UserExecutionContext) -> None:
        order = running.claim.order
        record = await self._opened(running)
        if record is None:
            await self._close(running, runs.RunState.FAILED)
            return
        if order.kind == "tool":
            await self._take_up(running, context, record)
            return
        if record.ended:
            await self._close(running, runs.state_after(record.terminal_type))
            return
        spec = self._agents.get(order.agent)
        async with self._bridge(running, context, record, spec) as bridge:
            if record.next_seq > 1:
                ending = await self._lost(running, context, record, bridge)
            elif running.stop.is_set():
                ending = _cancelled(running, [])
            elif running.claim.finishing or running.claim.epoch > _MOST_OWNERS:
                ending = _failed(errors.OwnerLost())
            elif running.overdue:
                ending = _timed_out(order)
            elif (refused := self._refusal(running, context, spec)) is not None:
                ending = _failed(refused)
            else:
                bridge.started(context.depth, f"{spec.name} begins.")
                bridge.message_created(order.message_id, "user", order.request)
                running.passed.now(stages.STARTED)
                ending = await self._agent(running, context, spec, bridge)
            await self._end(running, bridge, ending)

    def _bridge(
        self, running: Running, context: UserExecutionContext, record: events_pb2.OpenRunResponse, spec: AgentSpec | None
    ) -> contextlib.AbstractAsyncContextManager[journal.AgentWebSocketBridge]:
        order = running.claim.order
        owned = outbox.Owned(order.run_id, context.user_id, running.claim.epoch, lambda: running.token, self._files(running).keep)
        version = spec.version if spec is not None else ""
        bridge = journal.AgentWebSocketBridge(
            self._appends, owned, record.next_seq, order.agent, agent_version=version, ends_with_tool=order.kind == "tool"
        )
        return _closing(bridge)

    async def _opened(self, running: Running) -> events_pb2.OpenRunResponse | None:
        """The record so far; None when nothing can be recorded in the user's name any more."""
        order, epoch = running.claim.order, running.claim.epoch
        if running.claim.expired:
            _log.error("the context token of the run ran out; it ends without an event")
            return None
        user_id, began = _context(order).user_id, time.monotonic()

        async def opened() -> events_pb2.OpenRunResponse:
            # only what the record was away counts: it answers within the first call, or it is
            running.overdue = time.monotonic() - began > order.deadline_s
            return await self._records.open(order.run_id, user_id, epoch, running.token, telemetry.trace_id())

        try:
            return await _patient(opened)
        except errors.Fenced:
            raise
        except errors.NetraError as error:
            if epoch <= _MOST_OWNERS:
                raise
            _log.error("the record of the run cannot be opened; it ends without an event", code=error.code)
            return None

    async def _agent(
        self, running: Running, context: UserExecutionContext, spec: AgentSpec, bridge: journal.AgentWebSocketBridge
    ) -> _Ending:
        order, began = running.claim.order, time.perf_counter()
        permitted = self._entitled.of_context(context, lambda: running.rights)
        async with self._dispatcher(running, context, permitted, bridge) as tools:
            agents = functools.partial(self._part, permitted)
            mine = turn.Turn(order.request, orjson.loads(order.inputs), context, bridge, tools, agents)
            finished = await self._until(running, bridge, _guarded(spec, mine, self._files(running)), order.deadline_s)
            if finished is None and running.stop.is_set():
                return _cancelled(running, tools.stopped)
            if finished is None:
                return _timed_out(order)
            running.passed.now(stages.COMPLETED)
            if isinstance(finished, errors.NetraError):
                return _failed(finished)
            running.passed.now(stages.RESPONDED)
            usage = {"steps": mine.steps, "tools": tools.calls, "tokens": 0, "cost": 0.0}
        elapsed = round((time.perf_counter() - began) * 1000, 3)
        return _Ending(runs.RunState.COMPLETED, lambda bridge: bridge.completed(finished, elapsed, usage), _answer(finished))

    def _dispatcher(
        self, running: Running, context: UserExecutionContext, permitted: permits.Permits, bridge: journal.AgentWebSocketBridge
    ) -> contextlib.AbstractAsyncContextManager[dispatch.UnifiedToolDispatcher]:
        order = running.claim.order
        is_agent = order.kind == "agent"
        # what an admin's agent calls, an admin calls: nobody else has the role
        strategy: dispatch.Strategy = "admin" if _ADMIN in context.roles else "default"
        # the end of the run stops its calls, as what it is; should it not come, they end soon after
        deadline_s = order.deadline_s + _GRACE_S if is_agent else None
        return self._dispatchers.for_context(
            context, permitted, bridge, self._files(running), strategy=strategy, deadline_s=deadline_s,
            held=is_agent or running.claim.epoch > 1, most=permitted.concurrent(),
        )  # fmt: skip

    def _files(self, running: Running) -> workspace.Workspace:
        return self._workspaces.of(running.claim.order.run_id, lambda: running.token)

    def _part(self, permitted: permits.Permits, name: str) -> AgentSpec:
        spec = self._agents.get(name)
        self._entitled.require_part(permitted, spec)
        return spec

    def _refusal(self, running: Running, context: UserExecutionContext, spec: AgentSpec) -> errors.PermissionDenied | None:
        """What stands by now against a run that was accepted at its time."""
        try:
            self._entitled.require_begin(self._entitled.of_context(context, lambda: running.rights), spec)
        except errors.PermissionDenied as refused:
            return refused
        return None

    async def _until(
        self, running: Running, bridge: journal.AgentWebSocketBridge, work: Awaitable[_T], deadline_s: float | None
    ) -> _T | None:
        """What the work came to; None when it was stopped before, by a cancel or its deadline."""
        agent: asyncio.Task[_T] = self._tasks.spawn(_awaited(work), name="agent")
        stop = self._tasks.spawn(running.stop.wait(), name="stop")
        try:
            await asyncio.wait({agent, stop}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            return agent.result() if agent.done() else None
        except asyncio.CancelledError:
            # this process lets go of the run: that its tools are stopped for it is not how they ended
            bridge.leave()
            raise
        finally:
            stop.cancel()
            agent.cancel()
            await asyncio.wait({agent}, timeout=_GRACE_S)

    async def _end(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: _Ending, outcome: bytes = b"") -> None:
        if ending.answer:
            ending = await self._answered(running, bridge, ending)
        if not await self._finishing(running):
            raise errors.Fenced
        await self._close(running, await self._told(bridge, ending), outcome)

    async def _finishing(self, running: Running) -> bool:
        return await _patient(lambda: self._store.finishing(running.claim.order.run_id, running.claim.epoch, running.passed.times))

    async def _told(self, bridge: journal.AgentWebSocketBridge, ending: _Ending) -> runs.RunState:
        """The state that the run ends in, once its end is in the record. What the record refuses makes it a failure."""
        try:
            await bridge.barrier()
            ending.tell(bridge)
            await bridge.barrier()
            return ending.state
        except errors.Fenced:
            raise
        except errors.NetraError as refused:
            bridge.mend()
            bridge.failed(errors.AgentFailed(f"The record refused an event of this run: {refused.message}"))
            await bridge.barrier()
            return runs.RunState.FAILED

    async def _answered(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: _Ending) -> _Ending:
        request_id = f"{running.claim.order.run_id}:answer"
        try:
            message_id = await _patient(
                lambda: self._contexts.append_message(running.token, request_id, "assistant", ending.answer), _PATIENCE_S
            )
        except errors.NetraError as error:
            return _failed(error)
        # it is in the thread now; the end of the run may be on a socket before the record's answer is here
        running.passed.now(stages.RESPONSE_PERSISTED)
        bridge.message_created(message_id, "assistant", ending.answer)
        return ending

    async def _close(self, running: Running, state: runs.RunState, outcome: bytes = b"") -> None:
        order, epoch = running.claim.order, running.claim.epoch
        await self._finishing(running)
        running.over = True
        # the run ends all the same; an open context holds up the erasure of its thread, so the row says that it is still to be closed
        left_open = not await self.closed(running.token)
        await _patient(
            lambda: self._store.ended(order.run_id, epoch, state, outcome, running.passed.times, context_open=left_open)
        )  # fmt: skip

    async def closed(self, token: str) -> bool:
        """Close the context of a run that is at its end; False when that may succeed another time."""
        try:
            await self._contexts.close(token)
        except _ENDED as error:
            _log.info("the context had ended already", code=error.code)
        except errors.NetraError as error:
            _log.warning("the context could not be closed yet", code=error.code)
            return False
        return True

    async def call(self, running: Running, arguments: dict[str, Any]) -> bytes:
        """Take an interactive tool call to its end; returns and keeps the answer that its outcome means."""
        order, context = running.claim.order, _context(running.claim.order)
        record = await self._opened(running)
        if record is None:
            raise errors.Unauthenticated("The context of the call has ended.")
        permitted = self._entitled.of_context(context, lambda: running.rights)
        async with self._bridge(running, context, record, None) as bridge:
            if running.overdue:
                await self._end(running, bridge, _timed_out(order))
                raise errors.DeadlineExceeded(
                    f"{order.agent} was not called: the record could not be reached within {order.deadline_s:g} s."
                )
            try:
                async with self._dispatcher(running, context, permitted, bridge) as tools:
                    calling = tools.execute(order.agent, arguments, step_key=ledger.INTERACTIVE)
                    # the tool has a deadline of its own; a cancel leaves its outcome as the last one
                    outcome = await self._until(running, bridge, calling, None) or tools.last
            except errors.QuotaExceeded as refused:
                answer = answers.of({"status": "error", "error": journal.error_data(refused)}, "", 0.0)
                await self._end(running, bridge, _failed(refused), answer)
                raise
            if outcome is None:
                raise errors.Cancelled
            return await self._called(running, bridge, outcome)

    async def _called(self, running: Running, bridge: journal.AgentWebSocketBridge, outcome: dispatch.Outcome) -> bytes:
        """The call is over: once that is in the record, its answer is kept."""
        await bridge.barrier()
        running.passed.now(stages.RESPONSE_PERSISTED)
        kept = answers.of(
            journal.kept_of(outcome), outcome.call.tool_call_id, outcome.execution_time_ms, attempts=outcome.attempts,
            enforcement=outcome.enforcement, answered_by=outcome.degraded.answered if outcome.degraded is not None else "",
        )  # fmt: skip
        await self._over(running, answers.state_after(outcome.status), kept)
        return kept

    async def _over(self, running: Running, state: runs.RunState, outcome: bytes) -> None:
        """Store the end of a call, which frees no thread; its context is closed behind its caller's back."""
        order, epoch = running.claim.order, running.claim.epoch
        running.over = True
        await _patient(lambda: self._store.ended(order.run_id, epoch, state, outcome, running.passed.times, context_open=True))
        self._tasks.spawn(self._close_late(running), name="close the context of a call")

    async def _close_late(self, running: Running) -> None:
        if await self.closed(running.token):
            # should it fail: what is still to be closed is looked for again and again
            with contextlib.suppress(*_AWAY):
                await self._store.context_closed(running.claim.order.run_id)

    async def _take_up(self, running: Running, context: UserExecutionContext, record: events_pb2.OpenRunResponse) -> None:
        """Bring an interactive call to its end whose owner died, by what it left in the record."""
        left = (await self._calls(running, context)).get(ledger.INTERACTIVE)
        if record.ended:
            known = left.kept if left is not None else None
            state = runs.state_after(record.terminal_type) if known is None else answers.state_after(known["status"])
            await self._close(running, state, b"" if left is None or known is None else _answered_before(left, known))
            return
        async with self._bridge(running, context, record, None) as bridge:
            if record.next_seq == 1:
                error = errors.OwnerLost("The process that was to call the tool died before it did. Call it again.")
                answer = answers.of({"status": "error", "error": journal.error_data(error)}, "", 0.0)
                await self._end(running, bridge, _failed(error), answer)
                return
            permitted = self._entitled.of_context(context, lambda: running.rights)
            async with self._dispatcher(running, context, permitted, bridge) as tools:
                outcome = await self._settled(running, record, bridge, tools, left)
            await self._called(running, bridge, outcome)

    async def _settled(
        self, running: Running, record: events_pb2.OpenRunResponse, bridge: journal.AgentWebSocketBridge,
        tools: dispatch.UnifiedToolDispatcher, left: ledger.Call | None,
    ) -> dispatch.Outcome:  # fmt: skip
        claim = running.claim
        again = not (running.stop.is_set() or claim.finishing)
        settling = settlement.Settlement(tools, self._dispatchers.tools, bridge, again=again)
        # one that so many owners did not survive is not touched any more
        if left is not None and claim.epoch <= _MOST_OWNERS:
            # also of a call that was cancelled its tool is asked what became of it
            await (self._until(running, bridge, settling.settle(left), None) if again else settling.settle(left))
        if settling.outcome is None:
            # an older process left it, or it was cancelled while its tool was asked
            settling.unknown(left or ledger.unlabelled(claim.order.agent, record.open_tool_calls[0]))
        if settling.outcome is None:
            raise errors.Internal
        return settling.outcome

    async def _lost(
        self, running: Running, context: UserExecutionContext, record: events_pb2.OpenRunResponse, bridge: journal.AgentWebSocketBridge
    ) -> _Ending:
        """A run that cannot be carried on: what became of its open calls is told first."""
        # a long run has any number of steps, with all that its tools returned
        left_open = frozenset(record.open_tool_calls)
        calls = {call.tool_call_id: call for call in (await self._calls(running, context, left_open)).values()} if left_open else {}
        permitted = self._entitled.of_context(context, lambda: running.rights)
        async with self._dispatcher(running, context, permitted, bridge) as tools, asyncio.TaskGroup() as group:
            settling = settlement.Settlement(tools, self._dispatchers.tools, bridge, again=False)
            for left in (calls.get(tool_call_id) or ledger.unlabelled("", tool_call_id) for tool_call_id in record.open_tool_calls):
                if running.claim.epoch <= _MOST_OWNERS:
                    group.create_task(settling.settle(left))
                else:
                    settling.unknown(left)
        return _failed(errors.OwnerLost())

    async def _calls(
        self, running: Running, context: UserExecutionContext, wanted: Container[str] | None = None
    ) -> dict[str, ledger.Call]:  # fmt: skip
        order, epoch = running.claim.order, running.claim.epoch

        async def read() -> dict[str, ledger.Call]:
            found = ledger.Reading(wanted)
            async for _, result in self._records.steps(order.run_id, context.user_id, epoch, running.token):
                found.add(result)
            return found.calls()

        return await _patient(read)

    def require_room(self, user_id: str, most: int) -> None:
        """Raises `ResourceExhausted` or `QuotaExceeded` when a call of the user's would not be let in; see `Dispatchers`."""
        self._dispatchers.require_room(user_id, most)

    @property
    def can_record(self) -> bool:
        """Whether a run that begins now could be recorded, as far as is known."""
        return self._appends.reachable

    async def close(self) -> None:
        """Stop all agents."""
        await self._tasks.close()


@contextlib.asynccontextmanager
async def _closing(bridge: journal.AgentWebSocketBridge) -> AsyncIterator[journal.AgentWebSocketBridge]:
    try:
        yield bridge
    finally:
        await bridge.close()


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


async def _guarded(spec: AgentSpec, mine: turn.Turn, files: workspace.Workspace) -> results.Result | errors.NetraError:
    try:
        keep = functools.partial(files.keep, "result")
        return await results.recorded(await spec.function(mine), spec.name, f"{spec.name}.json", keep, errors.AgentFailed)
    except asyncio.CancelledError:
        if lifecycle.told_to_stop():
            raise
        return errors.AgentFailed(f"The agent {spec.name} cancelled itself.")
    except errors.NetraError as error:
        return error
    except Exception as error:
        # where, not what: its words may quote an input, and so a secret
        code, where = secrets.token_hex(4).upper(), traceback.format_tb(error.__traceback__)
        _log.error("an agent failed", agent=spec.name, support_code=code, error=type(error).__name__, where=where)
        return errors.AgentFailed(f"The agent {spec.name} failed with {type(error).__name__}. Support code {code}.", support_code=code)


async def _patient(call: Callable[[], Awaitable[_T]], patience_s: float | None = None) -> _T:
    """The call's answer, asked for again while a part of the platform is away."""
    async for attempt in stamina.retry_context(on=_AWAY, attempts=None, timeout=patience_s, wait_initial=0.05, wait_max=1.0):
        with attempt:
            return await call()
    raise errors.Unavailable


def _context(order: runs.Order) -> UserExecutionContext:
    return UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(order.context))


def _answer(result: results.Result) -> str:
    value = result.value
    message = value.get("message") if isinstance(value, dict) else None
    if isinstance(message, str) and message.strip() and len(message.encode()) <= _MAX_MESSAGE:
        return message
    if result.artifact is not None:
        return f"The result has {result.artifact.size} bytes; it is the artifact {result.artifact.artifact_id}. It begins: {result.preview}"
    return orjson.dumps(value).decode()


def _answered_before(call: ledger.Call, kept: Mapping[str, Any]) -> bytes:
    return answers.of(
        kept, call.tool_call_id, call.execution_time_ms, attempts=call.attempts, enforcement=call.enforcement, answered_by=call.answered_by
    )


def _failed(error: errors.NetraError) -> _Ending:
    return _Ending(runs.RunState.FAILED, lambda bridge: bridge.failed(error))


def _cancelled(running: Running, stopped: list[dispatch.Stopped]) -> _Ending:
    asked = running.stop_asked_at
    tools = [{"tool_call_id": call.tool_call_id, "after_ms": _ms(call.stopped_at - asked), "confirmed": call.confirmed} for call in stopped]
    return _Ending(runs.RunState.CANCELLED, lambda bridge: bridge.cancelled(running.stop_asked_by, tools, _ms(time.monotonic() - asked)))


def _timed_out(order: runs.Order) -> _Ending:
    error = errors.DeadlineExceeded(f"The run did not finish within {order.deadline_s:g} s.")
    return _Ending(runs.RunState.TIMED_OUT, lambda bridge: bridge.timed_out(error))


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
