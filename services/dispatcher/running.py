"""A run in this process: what is owned of it, how its record is opened and told, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from chassis import lifecycle, log, telemetry
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2
from netra.events.v1 import events_pb2
from services.dispatcher import appender, journal, outbox, parking, runs, stages, upstreams
from services.dispatcher.patience import patient
from services.dispatcher.tools import dispatch, permits, workspace

_log = log.get(__name__)
# how long what was told to stop may take for it
GRACE_S = 3.0
_PATIENCE_S = 30.0
# a token lasts an hour
_FRESH_S = 1200.0
_ADMIN = "admin"
# what is said of a context that is closed for good, or gone
_ENDED = (errors.NotFound, errors.FailedPrecondition)


class Ends(Protocol):
    """Where the ends of runs are kept."""

    async def finishing(self, run_id: ids.RunId, epoch: int, passed: Mapping[str, datetime]) -> bool | None:
        """The run's thread is free from now on; it has passed these stages. Whether its messages are to be hidden; that changes no more.

        None when another owns the run.
        """
        ...

    async def ended(
        self, run_id: ids.RunId, epoch: int, state: runs.RunState, outcome: bytes, passed: Mapping[str, datetime], *, context_open: bool
    ) -> None:
        """The run's final state; it has passed these stages. A context that is `context_open` is still to be closed."""
        ...

    async def suspended(
        self, run_id: ids.RunId, epoch: int, waits_for: str, wait_s: float, *, mail_after: int | None = None, asked: Sequence[str] = ()
    ) -> bool:
        """The run waits, and nobody owns it until it is woken or the time is over. False when another owns it by now.

        It is woken at once when there is a message with a greater number than `mail_after`, or one of the approvals `asked` for is decided.
        """
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
    # by `time.monotonic`, from when it was asked for; 0 is not known
    leased_until: float = 0.0
    # its messages are to be hidden when it has ended
    rolled_back: bool = False
    # it has events in the record that it did not have when it was claimed: whoever dies of it now did not die of the same as before
    moved: bool = False
    # its answer is in the record already
    answered: bool = False
    # files of its user were read or made for it: whoever runs its agent again may need them again
    has_files: bool = False
    # its context is closed, with its answer
    closed: bool = False
    # of one of a session's calls, whose context it is in: the token of a context of its own, once it needed one, and since when it has it
    own_token: str = ""
    own_since: float = 0.0
    # it is not in the record yet: its first append opens it there
    unopened: bool = False
    # where its strands wait, once it executes
    parking: parking.Parking | None = None
    # the frame that it executes in, once it was read
    frame: UserExecutionContext | None = None
    # there is something for whoever executes it: it is to stop, or to be put away, or has fallen silent
    notice: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def context(self) -> UserExecutionContext:
        """The frame that it executes in."""
        if self.frame is None:
            self.frame = context_of(self.claim.order)
        return self.frame

    def ask_to_stop(self, by: str = "user") -> None:
        """Cancel the run, once."""
        if not self.stop.is_set():
            self.stop_asked_at, self.stop_asked_by = time.monotonic(), by
            self.stop.set()
            self.notice.set()

    def went_on(self) -> None:
        """There is more in the record of it."""
        self.moved = True

    def wake(self) -> None:
        """Something came that the run may wait for."""
        if self.parking is not None:
            self.parking.wake()

    def is_meant(self, revocation: auth_pb2.Revocation) -> bool:
        """Whether the run was started in the session, or by the user before they were withdrawn."""
        context = self.context
        before = revocation.revoked_at.ToDatetime(UTC)
        return context.session_id == revocation.session_id or (context.user_id == revocation.user_id and context.created_at <= before)

    def narrow(self, user_id: str, rights: runs.Rights) -> None:
        """Take note of what a user has by now; the last word counts, for what they started before."""
        context = self.context
        if context.user_id == user_id and context.created_at <= rights.since + runs.LATE:
            self.left_with(rights)

    def left_with(self, rights: runs.Rights) -> None:
        """The run's user has these rights, unless later ones are known."""
        if self.rights is None or self.rights.since < rights.since:
            self.rights = rights


# the step that an answer is told with, and what its message is called in the thread
ANSWER, _ANSWERED = "~answer", "answer"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: the final state and what tells it to the record, and what is said in the thread before."""

    state: runs.RunState
    tell: Callable[[journal.AgentWebSocketBridge], None]
    answer: str = ""


class Course:
    """What runs of agents and of tools have in common: both are opened, told and ended in the same way."""

    def __init__(
        self, contexts: upstreams.Contexts, records: upstreams.Records, appends: appender.Appender, store: Ends,
        dispatchers: dispatch.Dispatchers, workspaces: workspace.Workspaces, takeovers: int,
    ) -> None:  # fmt: skip
        """A run whose owner has died more often than `takeovers` says, without anything new of it in the record, is given up."""
        self._contexts, self._records, self._appends = contexts, records, appends
        self.store, self.dispatchers, self.takeovers = store, dispatchers, takeovers
        self._workspaces = workspaces
        self.tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("an agent's task failed", exc_info=error))

    def is_poison(self, claim: runs.Claim) -> bool:
        """Whether too many owners in a row did not survive the run, and none of them brought it further."""
        return claim.takeovers > self.takeovers

    def bridge(
        self, running: Running, context: UserExecutionContext, record: events_pb2.OpenRunResponse, version: str = ""
    ) -> contextlib.AbstractAsyncContextManager[journal.AgentWebSocketBridge]:
        """The run's way to its record for the time of the block. Whoever is told to stop in it lets go of the run."""
        order, keep = running.claim.order, self.files(running).keep
        opening = (
            outbox.Opening(telemetry.trace_id(), telemetry.span_id(), lambda: patient(lambda: self._open(running)))
            if running.unopened
            else None
        )
        owned = outbox.Owned(
            order.run_id, context.user_id, running.claim.epoch, lambda: running.token, keep, lambda: running.leased_until,
            running.went_on, opening, _call_of(context),
        )  # fmt: skip
        bridge = journal.AgentWebSocketBridge(
            self._appends, owned, record.next_seq, order.agent, agent_version=version, ends_with_tool=order.kind == "tool"
        )
        return _closing(bridge)

    def dispatcher(
        self, running: Running, context: UserExecutionContext, permitted: permits.Permits, bridge: journal.AgentWebSocketBridge
    ) -> contextlib.AbstractAsyncContextManager[dispatch.UnifiedToolDispatcher]:
        """What the run calls tools with."""
        order = running.claim.order
        is_agent = order.kind == "agent"
        # what an admin's agent calls, an admin calls: nobody else has the role
        strategy: dispatch.Strategy = "admin" if _ADMIN in context.roles else "default"
        # the end of the run stops its calls, as what it is; should it not come, they end soon after
        deadline_s = order.deadline_s + GRACE_S if is_agent else None
        return self.dispatchers.for_context(
            context, permitted, bridge, self.files(running), strategy=strategy, deadline_s=deadline_s,
            held=is_agent or running.claim.epoch > 1, most=permitted.concurrent(),
        )  # fmt: skip

    def files(self, running: Running) -> workspace.Workspace:
        """The files of the run."""
        return self._workspaces.of(running.claim.order.run_id, lambda: self._token_for_files(running))

    async def _token_for_files(self, running: Running) -> str:
        """The token of the run's own context, for files of its user; that there were some is known from then on."""
        running.has_files = True
        if not running.context.serves_calls:
            return running.token
        if not running.own_token or time.monotonic() - running.own_since > _FRESH_S:
            # the same one again, with another token
            running.own_token, running.own_since = await self._contexts.derive(running.token, running.claim.order.run_id), time.monotonic()
        return running.own_token

    async def opened(self, running: Running) -> events_pb2.OpenRunResponse | None:
        """The record so far; None when nothing can be recorded in the user's name any more.

        For the first owner of a run that is nothing: while the record is there, the first append opens the run.
        """
        order = running.claim.order
        if running.claim.expired:
            _log.error("the context token of the run ran out; it ends without an event")
            return None
        if running.claim.epoch == 1 and self.can_record:
            return self.unopened(running)
        began = time.monotonic()

        async def opened() -> events_pb2.OpenRunResponse:
            # only what the record was away counts: it answers within the first call, or it is
            running.overdue = time.monotonic() - began > order.deadline_s
            return await self._open(running)

        try:
            return await patient(opened)
        except errors.Fenced:
            raise
        except errors.NetraError as error:
            if not self.is_poison(running.claim):
                raise
            _log.error("the record of the run cannot be opened; it ends without an event", code=error.code)
            return None

    def unopened(self, running: Running) -> events_pb2.OpenRunResponse:
        """The record of a run that its first append opens there: nothing, so far."""
        running.unopened = True
        return events_pb2.OpenRunResponse(next_seq=1)

    async def _open(self, running: Running) -> events_pb2.OpenRunResponse:
        run_id, context = running.claim.order.run_id, running.context
        return await self._records.open(
            run_id, context.user_id, running.claim.epoch, running.token, telemetry.trace_id(), _call_of(context)
        )  # fmt: skip

    def steps(self, running: Running, context: UserExecutionContext) -> AsyncIterator[tuple[str, bytes]]:
        """The steps of the run's earlier owners."""
        order, epoch = running.claim.order, running.claim.epoch
        return self._records.steps(order.run_id, context.user_id, epoch, running.token)

    async def end(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: Ending, outcome: bytes = b"") -> None:
        """Bring the run to its end: the answer in the thread, which is free then, the end in the record, and the row's final state."""
        if bridge.left:
            raise errors.Fenced
        if ending.answer:
            ending = await self._answered(running, bridge, ending)
        with contextlib.suppress(errors.NetraError):
            # should the record refuse it, that is how the run ends
            await bridge.begun()
        await self._finishing(running)
        await self.close_run(running, await self._told(bridge, ending), outcome, finishing=True)

    async def _finishing(self, running: Running) -> None:
        """Raises `Fenced` when another owns the run."""
        order, epoch = running.claim.order, running.claim.epoch
        hidden = await patient(lambda: self.store.finishing(order.run_id, epoch, running.passed.times))
        if hidden is None:
            raise errors.Fenced
        # whoever asked for that may have said so in the row alone, however the run ends
        running.rolled_back = running.rolled_back or hidden

    async def _told(self, bridge: journal.AgentWebSocketBridge, ending: Ending) -> runs.RunState:
        """The state that the run ends in, once its end is in the record. What the record refuses makes it a failure."""
        try:
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

    async def _answered(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: Ending) -> Ending:
        try:
            # a message goes out: whoever should have to end the run again comes to the same one, out of the record
            await bridge.barrier()
        except errors.Fenced:
            raise
        except errors.NetraError:
            # then that is how it ends
            return ending
        try:
            message_id = await self._said(running, bridge, ending)
        except errors.NetraError as error:
            return failed(error)
        # it is in the thread now; the end of the run may be on a socket before the record's answer is here
        running.passed.now(stages.RESPONSE_PERSISTED)
        return ending if running.answered else _with_answer(ending, message_id, {"at": time.time()})

    async def _said(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: Ending) -> ids.MessageId:
        """The id of the answer in the thread. The context is closed with it when nothing needs that any more."""
        if self._is_last(running, bridge, ending) and (last := await patient(lambda: self._closed_with(running, ending), _PATIENCE_S)):
            running.closed = True
            return last
        request_id = f"{running.claim.order.run_id}:{_ANSWERED}"
        return await patient(
            lambda: self._contexts.append_message(running.token, request_id, "assistant", ending.answer), _PATIENCE_S
        )  # fmt: skip

    def _is_last(self, running: Running, bridge: journal.AgentWebSocketBridge, ending: Ending) -> bool:
        """Whether the context of the run serves for nothing but its answer any more: nor for whoever should have to end the run again.

        Otherwise it is closed once the end is in the record: when messages are to be hidden, when the token is to be renewed or the record
        is away, when there are files, or something of the end is kept as one.
        """
        if not self.can_record or running.rolled_back or running.token_old or running.has_files:
            return False

        def tell(draft: journal.AgentWebSocketBridge) -> None:
            # its own id is not known yet, and as long
            draft.message_created(running.claim.order.run_id, "assistant", ending.answer)
            ending.tell(draft)

        return bridge.fits(tell)

    async def _closed_with(self, running: Running, ending: Ending) -> ids.MessageId | None:
        """The id of the answer with which the context was closed; None where that is not to be done, or an older service does not know how.

        Nobody closes the context of a run that another process may own by then.
        """
        left_s = running.leased_until - time.monotonic() if running.leased_until else _PATIENCE_S
        if left_s < journal.MARGIN_S:
            return None
        return await self._contexts.close_with(running.token, _ANSWERED, "assistant", ending.answer, left_s)

    async def close_run(self, running: Running, state: runs.RunState, outcome: bytes = b"", *, finishing: bool = False) -> None:
        """Store the run's final state, its messages hidden when it was rolled back, its context closed; it may be `finishing` already."""
        order, epoch = running.claim.order, running.claim.epoch
        if not finishing:
            await self._finishing(running)
        running.over = True
        await self._hide(running)
        # the run ends all the same; an open context holds up the erasure of its thread, so the row says that it is still to be closed
        left_open = not (running.closed or await self.close_context(running))
        await patient(
            lambda: self.store.ended(order.run_id, epoch, state, outcome, running.passed.times, context_open=left_open)
        )  # fmt: skip

    async def _hide(self, running: Running) -> None:
        if running.rolled_back:
            try:
                await patient(lambda: self._contexts.hide(running.token))
            except errors.NetraError as error:
                _log.error("the messages of a run could not be hidden", code=error.code, reason=error.message)

    async def close_context(self, running: Running) -> bool:
        """Close the context that is the run's own, at its end; False when that may succeed another time."""
        if not running.context.serves_calls:
            return await self.closed(running.token)
        # that of the session's calls goes on; one that cannot be closed now ends with its token
        if running.own_token:
            await self.closed(running.own_token)
        return True

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

    @property
    def can_record(self) -> bool:
        """Whether a run that begins now could be recorded, as far as is known."""
        return self._appends.reachable


@contextlib.asynccontextmanager
async def _closing(bridge: journal.AgentWebSocketBridge) -> AsyncIterator[journal.AgentWebSocketBridge]:
    try:
        yield bridge
    except asyncio.CancelledError:
        # another one goes on with it: what was told until now is not to be done again
        await bridge.part()
        raise
    finally:
        await bridge.close()


def _call_of(context: UserExecutionContext) -> events_pb2.Call | None:
    """What the record is told of a call whose context is that of its session's calls."""
    if not context.serves_calls:
        return None
    return events_pb2.Call(request_id=context.request_id, correlation_id=context.correlation_id)


def context_of(order: runs.Order) -> UserExecutionContext:
    """The frame that a run executes in."""
    return UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(order.context))


def _with_answer(ending: Ending, message_id: ids.MessageId, about: Mapping[str, Any]) -> Ending:
    """It ends with its answer, which is told together with the end."""

    def tell(bridge: journal.AgentWebSocketBridge) -> None:
        bridge.message_created(message_id, "assistant", ending.answer, (ANSWER, about))
        ending.tell(bridge)

    return replace(ending, tell=tell)


def failed(error: errors.NetraError) -> Ending:
    """It could not finish."""
    return Ending(runs.RunState.FAILED, lambda bridge: bridge.failed(error))


def cancelled(running: Running, stopped: Sequence[dispatch.Stopped], *, confirmed: bool = True) -> Ending:
    """It was told to stop, and did, unless that is not `confirmed`; with the calls that were under way."""
    asked = running.stop_asked_at
    tools = [{"tool_call_id": call.tool_call_id, "after_ms": _ms(call.stopped_at - asked), "confirmed": call.confirmed} for call in stopped]

    def tell(bridge: journal.AgentWebSocketBridge) -> None:
        bridge.cancelled(running.stop_asked_by, tools, _ms(time.monotonic() - asked), confirmed=confirmed)

    return Ending(runs.RunState.CANCELLED, tell)


def timed_out(message: str) -> Ending:
    """Its time is over."""
    error = errors.DeadlineExceeded(message)
    return Ending(runs.RunState.TIMED_OUT, lambda bridge: bridge.timed_out(error))


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
