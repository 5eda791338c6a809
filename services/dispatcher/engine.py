"""ExecutionEngine: takes one agent, or one tool, through one run, from its first event to its last, whoever began it."""

from __future__ import annotations

import asyncio
import enum
import functools
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson

from chassis import lifecycle, log, telemetry
from netra import errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.dispatcher import (
    appender,
    approvals,
    entitlements,
    interactive,
    journal,
    ledger,
    parking,
    past,
    running,
    runs,
    settings,
    settlement,
    stages,
    turn,
    upstreams,
)  # fmt: skip
from services.dispatcher.agents import registry as agents_
from services.dispatcher.patience import patient
from services.dispatcher.running import Ends, Running
from services.dispatcher.tools import dispatch, permits, results, workspace

__all__ = ["Ends", "ExecutionEngine", "Executions", "Instance", "Running"]
_log = log.get(__name__)
# what a message of a thread may have, in bytes; a longer answer is in the artifact of its result
_MAX_MESSAGE = 256 * 1024
_DECIDED = (approvals.APPROVED, approvals.REJECTED)
_NO_HEARTBEAT = "no_heartbeat"
# the engine's own steps: what was told at the begin of the run, and each time that it was put away or came back
_STARTED, _REQUEST, _SUSPENDED, _RESUMED = "~started", "~request", "~s", "~r"


class Instance(turn.Heart, Protocol):
    """An agent that executes, as it is seen by who watches over all of them."""

    def when_stopped(self, stop: Callable[[str], None]) -> None:
        """Have this called with the reason when the instance is to stop."""
        ...

    def end(self, state: str) -> bool:
        """It is over here: in a final state, or `suspended`."""
        ...

    def leave(self) -> None:
        """It is over here; how it ends is seen elsewhere."""
        ...


class Executions(Protocol):
    """What executes in this process."""

    def begin(self, context: UserExecutionContext, spec: AgentSpec, run_id: ids.RunId) -> Instance:
        """An agent executes from now on."""
        ...


class _How(enum.Enum):
    """Why an agent is not waited for any longer."""

    DONE = enum.auto()
    STOPPED = enum.auto()
    AWAY = enum.auto()
    DIFFERS = enum.auto()
    SILENT = enum.auto()
    LATE = enum.auto()


@dataclass(frozen=True, slots=True)
class _Frame:
    """In what an agent executes."""

    mine: Running
    context: UserExecutionContext
    record: events_pb2.OpenRunResponse
    bridge: journal.AgentWebSocketBridge
    past: past.Past
    permitted: permits.Permits
    tools: dispatch.UnifiedToolDispatcher
    settling: settlement.Settlement


class ExecutionEngine:
    """Executes runs that this process owns. It never continues a run that it cannot record."""

    def __init__(
        self, contexts: upstreams.Contexts, records: upstreams.Records, appends: appender.Appender, store: Ends,
        agents: agents_.AgentRegistry, dispatchers: dispatch.Dispatchers, entitled: entitlements.Entitlements,
        workspaces: workspace.Workspaces, outside: turn.Outside, limits: settings.DispatcherSettings, executions: Executions,
    ) -> None:  # fmt: skip
        self._course = running.Course(contexts, records, appends, store, dispatchers, workspaces, limits.takeovers)
        self._interactive = interactive.Interactive(self._course, entitled)
        self._agents, self._entitled, self._outside, self._limits = agents, entitled, outside, limits
        self._executions = executions

    async def run(self, mine: Running) -> None:
        """Take a claimed run to its end, or to where it waits. Returns without one when another process owns the run by now."""
        order = mine.claim.order
        context = mine.context
        headers = {"traceparent": order.traceparent, telemetry.CORRELATION_HEADER: context.correlation_id}
        with telemetry.span(f"run {order.agent}", headers) as span:
            span.set_attribute("netra.run_id", order.run_id)
            log.bind(run_id=order.run_id, user_id=context.user_id)
            try:
                await self._run(mine, context)
            except errors.Fenced:
                _log.warning("another process owns the run by now")
            except errors.NetraError as error:
                # the lease runs out, and whoever claims the run then tries again, up to the cap
                _log.error("the run cannot be carried on just now", code=error.code, reason=error.message)

    async def _run(self, mine: Running, context: UserExecutionContext) -> None:
        order = mine.claim.order
        record = await self._course.opened(mine)
        if record is None:
            await self._course.close_run(mine, runs.RunState.FAILED)
            return
        if order.kind == "tool":
            await self._interactive.take_up(mine, context, record)
            return
        if record.ended:
            await self._course.close_run(mine, runs.state_after(record.terminal_type))
            return
        spec = self._spec(order)
        version = order.agent_version or (spec.version if isinstance(spec, AgentSpec) else "")
        async with self._course.bridge(mine, context, record, version) as bridge:
            known = past.Past()
            if record.next_seq > 1:
                known = await patient(lambda: past.Past.of(self._course.steps(mine, context)))
            permitted = self._entitled.of_context(context, lambda: mine.rights)
            async with self._course.dispatcher(mine, context, permitted, bridge) as tools:
                settling = settlement.Settlement(tools, self._course.dispatchers.tools, bridge)
                frame = _Frame(mine, context, record, bridge, known, permitted, tools, settling)
                ending = self._unbegun(frame, spec)
                if ending is None and isinstance(spec, AgentSpec):
                    ending = await self._executed(frame, spec)
                if ending is None:
                    return
                await self._settled(frame)
            await self._course.end(mine, bridge, ending)

    def _spec(self, order: runs.Order) -> AgentSpec | errors.NotFound:
        try:
            return self._agents.get(order.agent, order.agent_version)
        except errors.NotFound as missing:
            return missing

    def _unbegun(self, frame: _Frame, spec: AgentSpec | errors.NotFound) -> running.Ending | None:
        """The end of a run that is not begun, or not carried on, any more."""
        mine, claim, order = frame.mine, frame.mine.claim, frame.mine.claim.order
        if mine.stop.is_set():
            return running.cancelled(mine, [])
        if self._course.is_poison(claim):
            message = f"{claim.takeovers} processes that executed the run died, so it was given up. Start it again."
            return running.failed(errors.OwnerLost(message, takeovers=claim.takeovers))
        if claim.orphaned:
            what = f"agent {order.agent} in version {order.agent_version}" if order.agent_version else f"agent {order.agent}"
            message = f"No dispatcher has had {what} for {max(claim.missing_s, self._limits.version_missing_s):.0f} s."
            return running.failed(errors.AgentFailed(message, agent=order.agent, agent_version=order.agent_version))
        if isinstance(spec, errors.NotFound):
            return running.failed(spec)
        if claim.overdue:
            return running.timed_out(f"The run was not begun within {self._limits.queued_s:g} s.")
        if mine.overdue or claim.ran_s >= order.deadline_s:
            return running.timed_out(_late(order))
        if claim.finishing and frame.record.next_seq == 1:
            # one that had begun would be in the record: whatever end that was, nobody knows of it any more
            return running.failed(errors.OwnerLost())
        if frame.record.next_seq > 1 and frame.past.is_empty:
            # the first append has a step already: what was done is not known any more, and must not be done again
            return running.failed(errors.OwnerLost("The steps of the run are gone from the record, so it cannot go on. Start it again."))
        refused = self._refusal(frame, spec) if frame.record.next_seq == 1 else None
        return running.failed(refused) if refused is not None else None

    def _refusal(self, frame: _Frame, spec: AgentSpec) -> errors.NetraError | None:
        """What stands by now against a run that was accepted at its time."""
        try:
            self._entitled.require_begin(frame.permitted, spec)
            self._agents.check_inputs(spec, orjson.loads(frame.mine.claim.order.inputs))
        except errors.NetraError as refused:
            return refused
        return None

    async def _executed(self, frame: _Frame, spec: AgentSpec) -> running.Ending | None:
        """How the agent ended; None when its run was put away."""
        mine, began = frame.mine, time.monotonic()
        order, ran_s = mine.claim.order, mine.claim.ran_s
        instance = self._executions.begin(frame.context, spec, order.run_id)
        silent = asyncio.Event()
        instance.when_stopped(functools.partial(_told_to_stop, mine, silent))
        life = self._life(frame, instance, lambda: ran_s + time.monotonic() - began)
        only = None if spec.tools is None else frozenset(spec.tools)
        part = functools.partial(self._part, frame.permitted)
        its = turn.Turn(order.request, orjson.loads(order.inputs), frame.context, frame.bridge, frame.tools, part, life, only)
        ending = None
        try:
            # who waits for a part of the platform is not silent
            instance.step_began(counts=False)
            await self._begin(frame, spec, life)
            instance.step_over()
            work = self._guarded(spec, its, self._course.files(mine), instance)
            agent = self._course.tasks.spawn(work, name="agent")
            how, ending = await self._watched(frame, life, agent, silent)
            if how is not _How.AWAY:
                ending = self._ending(frame, spec, life, how, agent)
            if ending is None:
                instance.end(runs.RunState.SUSPENDED)
            return ending
        finally:
            mine.parking = None
            if ending is not None:
                instance.end(ending.state)
            instance.leave()

    def _life(self, frame: _Frame, instance: Instance, ran_s: Callable[[], float]) -> turn.Life:
        mine, settle = frame.mine, frame.settling.settle
        root = parking.Strand()
        # the thread of a run at its end is free already: it neither waits nor asks any more
        at_end = mine.claim.finishing
        mine.parking = parking.Parking(root, mine.notice.set, stays=at_end)
        return turn.Life(
            past=frame.past, root=root, parking=mine.parking, outside=None if at_end else self._outside,
            settle=functools.partial(settle, again=True), whole=functools.partial(_whole, self._course.files(mine)), ran_s=ran_s,
            heart=instance, longest_s=self._limits.suspended_s, heard=frame.past.heard(), notice=mine.notice.set,
            check_inputs=self._agents.check_inputs, check_result=self._agents.check_result,
        )  # fmt: skip

    async def _begin(self, frame: _Frame, spec: AgentSpec, life: turn.Life) -> None:
        """Tell that the run begins, as far as it was not told; or that it goes on."""
        mine, bridge, order = frame.mine, frame.bridge, frame.mine.claim.order
        mine.answered = running.ANSWER in frame.past
        at = {"at": time.time()}
        fresh = frame.record.next_seq == 1
        if fresh:
            bridge.started(frame.context.depth, f"{spec.name} begins.", (_STARTED, at))
        # a run that an older process began has told of it in another way
        if _REQUEST not in frame.past and (fresh or _STARTED in frame.past):
            bridge.message_created(order.message_id, "user", order.request, (_REQUEST, at))
        number = frame.past.numbered(_SUSPENDED)
        if number > frame.past.numbered(_RESUMED):
            away = frame.past.found(f"{_SUSPENDED}{number}").over or {}
            reason = await self._reason(order.run_id, away, life)
            bridge.resumed(reason, round(max(time.time() - away["at"], 0.0) * 1000, 3), (f"{_RESUMED}{number}", at))
        mine.passed.now(stages.STARTED)

    async def _reason(self, run_id: ids.RunId, away: Mapping[str, Any], life: turn.Life) -> str:
        """What brought a run back that was put away."""
        if away["waits_for"] == parking.MESSAGE:
            mail = await self._outside.mail(run_id, life.heard_until)
            if any(one.number not in life.heard for one in mail):
                return "message"
        for approval_id in away["approvals"]:
            if (await self._outside.approval(run_id, approval_id)).state in _DECIDED:
                return "approval"
        return "timeout"

    async def _watched(
        self, frame: _Frame, life: turn.Life, agent: asyncio.Task[results.Result | errors.NetraError], silent: asyncio.Event
    ) -> tuple[_How, running.Ending | None]:
        """Why the agent is not waited for any longer; it has ended then. With the ending of one that could not be put away."""
        mine, ending = frame.mine, None
        notice = self._course.tasks.spawn(mine.notice.wait(), name="notice")
        left_s = max(mine.claim.order.deadline_s - life.ran_s(), 0.0)
        try:
            await asyncio.wait({agent, notice}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            how = _how(mine, life, agent, silent)
            if how is _How.AWAY:
                ending = await self._put_away(frame, life, agent)
            return how, ending
        except asyncio.CancelledError:
            # this process lets go of the run: that its tools are stopped for it is not how they ended
            frame.bridge.leave()
            raise
        finally:
            notice.cancel()
            agent.cancel()
            await asyncio.wait({agent}, timeout=running.GRACE_S)

    async def _put_away(self, frame: _Frame, life: turn.Life, agent: asyncio.Task[Any]) -> running.Ending | None:
        """The run waits from now on, and nobody owns it; what it says no more is not told. An ending when that was refused."""
        mine, bridge, away = frame.mine, frame.bridge, _away(frame.mine)
        order, epoch = mine.claim.order, mine.claim.epoch
        number, now = frame.past.numbered(_SUSPENDED) + 1, time.time()
        about = {"at": now, "waits_for": away.waits_for, "approvals": list(away.approvals), "until": away.until}
        approval_id = away.approvals[0] if away.waits_for == parking.APPROVAL else None
        until = datetime.fromtimestamp(away.until, UTC).isoformat()
        try:
            bridge.suspended(away.waits_for, approval_id=approval_id, until=until, step=(f"{_SUSPENDED}{number}", about))
            await bridge.barrier()
        except errors.Fenced:
            raise
        except errors.NetraError as refused:
            return running.failed(refused)
        bridge.leave()
        agent.cancel()
        mine.over = True
        wait_s = min(max(away.until - now, 0.0), self._limits.suspended_s)
        after = life.heard_until if away.waits_for == parking.MESSAGE else None
        if not await patient(
            lambda: self._course.store.suspended(
                order.run_id, epoch, away.waits_for, wait_s, mail_after=after, asked=away.approvals
            )
        ):  # fmt: skip
            raise errors.Fenced
        return None

    def _ending(
        self, frame: _Frame, spec: AgentSpec, life: turn.Life, how: _How, agent: asyncio.Task[results.Result | errors.NetraError]
    ) -> running.Ending:
        mine = frame.mine
        if frame.bridge.left:
            raise errors.Fenced
        if how is _How.STOPPED:
            return running.cancelled(mine, frame.tools.stopped, confirmed=agent.done())
        if life.differs is not None:
            return running.failed(life.differs)
        if how is _How.SILENT:
            return running.failed(self._silent(spec))
        if how is _How.LATE:
            return running.timed_out(_late(mine.claim.order))
        mine.passed.now(stages.COMPLETED)
        finished = agent.result()
        if isinstance(finished, errors.NetraError):
            return running.failed(finished)
        if unasked := frame.past.unasked():
            return running.failed(past.differs(unasked, "its end"))
        mine.passed.now(stages.RESPONDED)
        usage = {"steps": life.steps, "tools": life.calls, "tokens": 0, "cost": 0.0}
        elapsed = round(life.ran_s() * 1000, 3)
        return running.Ending(runs.RunState.COMPLETED, lambda bridge: bridge.completed(finished, elapsed, usage), _answer(finished))

    def _silent(self, spec: AgentSpec) -> errors.AgentFailed:
        code, silent_s = secrets.token_hex(4).upper(), self._limits.agent_silent_s
        _log.error("an agent has fallen silent and was stopped", agent=spec.name, support_code=code)
        message = f"The agent {spec.name} took no step and gave no sign of life for {silent_s:g} s. Support code {code}."
        return errors.AgentFailed(message, cause=_NO_HEARTBEAT, support_code=code)

    async def _settled(self, frame: _Frame) -> None:
        """What became of the calls that an earlier owner left open, and that the agent did not come back to, is told before the end."""
        left_open = [call_id for call_id in frame.record.open_tool_calls if call_id not in frame.settling.outcomes]
        if not left_open:
            return
        known = {call.tool_call_id: call for call in frame.past.open_calls()}
        async with asyncio.TaskGroup() as group:
            for left in (known.get(call_id) or ledger.unlabelled("", call_id) for call_id in left_open):
                if self._course.is_poison(frame.mine.claim):
                    # what too many owners did not survive is not touched any more
                    frame.settling.unknown(left)
                else:
                    group.create_task(frame.settling.settle(left, again=False))

    def _part(self, permitted: permits.Permits, name: str) -> AgentSpec:
        spec = self._agents.get(name)
        self._entitled.require_part(permitted, spec)
        return spec

    async def _guarded(
        self, spec: AgentSpec, its: turn.Turn, files: workspace.Workspace, instance: Instance
    ) -> results.Result | errors.NetraError:
        """What the agent returned, or what it raised."""
        try:
            value = await spec.function(its)
            # it has said all it had to
            instance.step_began(counts=False)
            self._agents.check_result(spec, value)
            return await results.recorded(
                value, spec.name, f"{spec.name}.json", functools.partial(files.keep, "result"), errors.AgentFailed
            )
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

    async def call(self, mine: Running, arguments: dict[str, Any], told: Callable[[bytes], None]) -> None:
        """Take an interactive tool call to its end; `told` hears the answer that its outcome means once that is in the record."""
        await self._interactive.call(mine, arguments, told)

    async def closed(self, token: str) -> bool:
        """Close the context of a run that is at its end; False when that may succeed another time."""
        return await self._course.closed(token)

    def require_room(self, user_id: str, most: int) -> None:
        """Raises `ResourceExhausted` or `QuotaExceeded` when a call of the user's would not be let in; see `Dispatchers`."""
        self._course.dispatchers.require_room(user_id, most)

    @property
    def can_record(self) -> bool:
        """Whether a run that begins now could be recorded, as far as is known."""
        return self._course.can_record

    async def close(self) -> None:
        """Stop all agents."""
        await self._course.tasks.close()


def _told_to_stop(mine: Running, silent: asyncio.Event, why: str) -> None:
    """Whoever watches over what executes here wants an agent stopped."""
    if why == _NO_HEARTBEAT:
        silent.set()
        mine.notice.set()
    else:
        mine.ask_to_stop()


def _how(mine: Running, life: turn.Life, agent: asyncio.Task[Any], silent: asyncio.Event) -> _How:
    if agent.done():
        return _How.DONE
    if mine.stop.is_set():
        return _How.STOPPED
    if life.differs is not None:
        return _How.DIFFERS
    if mine.parking is not None and mine.parking.away is not None:
        return _How.AWAY
    return _How.SILENT if silent.is_set() else _How.LATE


def _away(mine: Running) -> parking.Away:
    """How the strands of the run wait. Raises `Internal` when not all of them do."""
    if mine.parking is None or mine.parking.away is None:
        raise errors.Internal
    return mine.parking.away


async def _whole(files: workspace.Workspace, reference: Mapping[str, Any]) -> Any:
    """What is kept as an artifact."""
    to = files.folder / f"{reference['artifact_id']}.replayed"
    await patient(lambda: files.fetch(reference["artifact_id"], to))
    try:
        return orjson.loads(await asyncio.to_thread(to.read_bytes))
    finally:
        to.unlink(missing_ok=True)


def _answer(result: results.Result) -> str:
    value = result.value
    message = value.get("message") if isinstance(value, dict) else None
    if isinstance(message, str) and message.strip() and len(message.encode()) <= _MAX_MESSAGE:
        return message
    if result.artifact is not None:
        return f"The result has {result.artifact.size} bytes; it is the artifact {result.artifact.artifact_id}. It begins: {result.preview}"
    return orjson.dumps(value).decode()


def _late(order: runs.Order) -> str:
    return f"The run did not finish within {order.deadline_s:g} s."
