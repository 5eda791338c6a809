"""Owns every running run of this process: claims, leases, cancels, lets go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import stamina

from chassis import identity, lifecycle, log, streams, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.dispatcher import admission, approvals, calling, engine, entitlements, renewals, runs, settings, upstreams
from services.dispatcher.agents import registry as agents_
from services.dispatcher.running import GRACE_S

_log = log.get(__name__)
_WAKE = "wake"
_CANCEL = "cancel"
# behind a run's id: its messages are to be hidden as well
_ROLLBACK = " rollback"
# how long after a tool's own deadline another process closes an interactive call that its owner left open
_TOOL_GRACE_S = 10.0
_CONTEXTS_AT_ONCE = 100
_CLOSE_AGAIN_S = 2.0
_RETRY_S = 0.1
# how often a dispatcher says which agents it has, and looks for those that none has
_SEEN_S = 10.0
# what is let go of is let go of so long before another process may have it
_BEFORE_S = 1.0
_LATE_S = 1.0
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)


class Mine(Protocol):
    """Where the runs of one user are kept."""

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """Ask a run to stop, unless it has ended: the user's, or with a thread of theirs anybody's in it. Raises `NotFound`."""
        ...

    async def get(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """One run: the user's, or with a thread that was granted to them anybody's in it. Raises `NotFound`."""
        ...

    async def addressee(self, user_id: ids.UserId, request_id: str, thread_id: str) -> ids.RunId | None:
        """The run that a message to a thread goes to, in place of a new one."""
        ...

    async def mail_by_request(self, user_id: ids.UserId, request_id: str) -> runs.Sent | None:
        """The message that the user sent under this request id, to whichever run."""
        ...

    async def require_mail_room(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> None:
        """Raises `QuotaExceeded` when the run has had as many messages as one takes."""
        ...

    async def send(self, user_id: ids.UserId, sent: runs.Sent, granted: str = "") -> None:
        """Bring a message to a run, once, and wake it. Raises `FailedPrecondition` when it has ended, `AlreadyExists`, `QuotaExceeded`."""
        ...

    async def vote(self, user_id: ids.UserId, approval_id: str, decision: str, comment: str, granted: str = "") -> approvals.Approval:
        """Add a user's vote; one that decides wakes the run. Raises `NotFound`, `FailedPrecondition`."""
        ...

    async def approval(self, user_id: ids.UserId, approval_id: str, granted: str = "") -> approvals.Approval:
        """One approval with its votes. Raises `NotFound`."""
        ...

    async def approvals(
        self, user_id: ids.UserId, *, run_id: str, state: str, after: str, size: int, granted: str = ""
    ) -> list[approvals.Approval]:  # fmt: skip
        """Up to `size` approvals, newest first, older than the one `after` when given."""
        ...


class Leases(renewals.Kept, Protocol):
    """Where the leases of all runs are kept."""

    async def claim(
        self, owner: str, lease_s: float, agents: Sequence[tuple[str, str]], most: int, concurrent: Mapping[str, int], *,
        after_user: str, missing_s: float, queued_s: float,
    ) -> runs.Claims:  # fmt: skip
        """Own up to `most` runs that wait or whose owner is silent, from the user behind `after_user` on; see `SystemStore.claim`."""
        ...

    async def queued(self, most: int) -> int:
        """How many runs wait for their start, of whichever user; not more than `most` are counted."""
        ...

    async def seen(self, agents: Sequence[tuple[str, str]]) -> None:
        """There is a dispatcher that has these agents, by name and version."""
        ...

    async def context_token(self, run_id: ids.RunId) -> str:
        """The token of a run's context, as it was renewed last. Raises `NotFound`."""
        ...

    async def renew(self, owner: str, lease_s: float, run_ids: Sequence[str], moved: Sequence[str] = ()) -> dict[str, runs.Held]:
        """Keep owning runs. Those still owned, each with what its row says by now. Of those that `moved` takeovers are counted anew."""
        ...

    async def open_contexts(self, most: int) -> list[tuple[ids.RunId, str]]:
        """Runs that have ended and whose context is still to be closed, with its token while that lasts."""
        ...

    async def context_closed(self, run_id: ids.RunId) -> None:
        """The context of a run that has ended is closed, or has ended as well."""
        ...

    async def revoke(self, session_id: str, user_id: str, before: datetime) -> None:
        """Ask all runs of a session to stop, or those that a user started before."""
        ...

    async def narrow(self, user_id: str, rights: runs.Rights) -> None:
        """Take note of what a user has by now, for all runs that they started before and that have not ended."""
        ...

    async def disown(self, owner: str, user_id: ids.UserId, request_id: str, kept: Sequence[str]) -> None:
        """Let others have at once what a request has begun at this owner, unless that is one of the runs it has `kept`."""
        ...

    async def release(self, owner: str) -> None:
        """Let others take over at once what this owner still has."""
        ...


class Supervisor:
    """All runs of this process."""

    def __init__(
        self, accepted: admission.Admission, executing: engine.ExecutionEngine, mine: Mine, all_runs: Leases,
        contexts: upstreams.Contexts, signals: streams.Streams, agents: agents_.AgentRegistry, entitled: entitlements.Entitlements,
        trusted: trust.Trust, limits: settings.DispatcherSettings,
    ) -> None:  # fmt: skip
        self._admission, self._engine, self._store, self._all = accepted, executing, mine, all_runs
        self._contexts, self._signals, self._agents, self._entitled, self._limits = contexts, signals, agents, entitled, limits
        self._trust = trusted
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{ids.uuid7()}"
        self._running: dict[str, engine.Running] = {}
        self._calls = calling.Calls()
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("a run's task failed", exc_info=error))
        self._woken = asyncio.Event()
        self._room = admission.Room(all_runs, limits.queued_total)
        self._seen_s = min(_SEEN_S, limits.version_missing_s / 3)
        # the user who had the last turn; agents that nobody has are looked for once others had the time to say that they have them
        self._after, self._missing_at = "", time.monotonic() + limits.version_missing_s
        # a look at the queue that has begun is waited for before all is let go of
        self._looking = asyncio.Lock()
        self._claiming = True
        # what the last look left: nothing that may begin, as far as is known; something that may once a run ends here
        self._nothing_left, self._waits = False, True
        self._renewals = renewals.Renewals(contexts, all_runs, lambda: tuple(self._running.values()), limits.tokens_s)
        # slots of runs that are being accepted, and begin at once if they may
        self._taken = 0

    async def start(self, user: identity.Principal, wanted: admission.Wanted) -> tuple[runs.Run, bool]:
        """Accept a run of an agent; or, when that is `wanted`, bring the message to the user's run on the thread that waits for one.

        Returns the run, and whether it was there before and waited; it has the id of this message then. Raises `NotFound` for an
        unknown agent or thread, `InvalidPayload`, `Busy`, `AlreadyExists`, `RateLimited`.
        """
        spec = self._agents.get(wanted.name)
        self._entitled.require_agent(user, spec)
        if wanted.deliver and wanted.thread_id and (waited := await self._delivered(user, wanted)) is not None:
            return waited, True
        self._agents.check_inputs(spec, admission.json_object(wanted.inputs, "inputs"))
        wanted = dataclasses.replace(wanted, agent_version=wanted.agent_version or spec.version)
        if (known := await self._admission.known(user, wanted)) is not None:
            return known, False
        await self._room.require()
        try:
            added, order = await self._accepted(user, wanted)
        except errors.FailedPrecondition:
            # the same request came twice at once, and the other one has ended its run already
            if (known := await self._admission.known(user, wanted)) is None:
                raise
            return known, False
        for earlier in added.stopped:
            self._stop(earlier, rolled_back=wanted.on_busy == runs.ROLLBACK)
        if added.leased_at:
            self._begin(runs.Claim(order, 1, cancelled="", expired=False), added.leased_at + self._limits.lease_s)
        elif added.run.state == runs.RunState.QUEUED:
            self._woken.set()
            # others may have room for it
            self._tasks.spawn(self._tell(_WAKE, self.owner), name="wake")
        self._stop_if_withdrawn(user)
        return added.run, False

    async def _accepted(self, user: identity.Principal, wanted: admission.Wanted) -> tuple[runs.Added, runs.Order]:
        """Accept a run: it is this process's at once when a slot is free for it and nobody waits for one, else it waits."""
        at_once = self._nothing_left and not self._woken.is_set() and self._free() > 0 and self._may_claim()
        if not at_once:
            return await self._admission.accept(user, wanted)
        self._taken += 1
        try:
            return await self._admission.accept(user, wanted, owner=self.owner, lease_s=self._limits.lease_s)
        except (asyncio.CancelledError, *_AWAY):
            # whoever asked has gone, or nobody knows: if it was stored all the same, it is not to wait until its lease has run out
            self._tasks.spawn(self._disown(user.user_id, wanted.request_id), name="disown")
            raise
        finally:
            self._taken -= 1
            if not self._nothing_left:
                # a look at the queue meanwhile has left this slot out
                self._woken.set()

    async def _disown(self, user_id: ids.UserId, request_id: str) -> None:
        try:
            await self._all.disown(self.owner, user_id, request_id, list(self._running))
        except _AWAY:
            _log.warning("a run that may have begun could not be let go of; its lease runs out by itself")
        self._woken.set()

    async def _delivered(self, user: identity.Principal, wanted: admission.Wanted) -> runs.Run | None:
        self._admission.check(wanted)
        found = await self._store.addressee(user.user_id, wanted.request_id, wanted.thread_id)
        if found is None:
            return None
        try:
            return await self.send(user, found, wanted.request_id, wanted.request)
        except errors.FailedPrecondition:
            # it ended in this moment
            return None

    async def send(self, user: identity.Principal, run_id: ids.RunId, request_id: str, text: str, granted: str = "") -> runs.Run:
        """Send a message to a run that has not ended, the user's or with a thread that they may write to anybody's in it; once.

        Returns the run with the id of this message. Raises `NotFound`, `FailedPrecondition` when it has ended, `QuotaExceeded` when it
        has had as many as a run takes, and `AlreadyExists` when the request id was used for another message.
        """
        run = await self._store.get(user.user_id, run_id, granted)
        if (sent := await self._store.mail_by_request(user.user_id, request_id)) is None:
            if run.kind != "agent" or run.state not in runs.GOES_ON:
                raise errors.FailedPrecondition("The run has ended, or is about to.", state=run.state)
            await self._store.require_mail_room(user.user_id, run_id, granted)
            # an entry of the run's own thread, by its context: two users may use the same request id
            key = uuid.uuid5(uuid.UUID(run_id), f"{user.user_id} {request_id}")
            theirs = user.user_id != run.user_id
            token = await (self._admission.speaking(user, run, str(key)) if theirs else self._all.context_token(run_id))
            message_id = await self._contexts.append_message(token, f"{key}:message", "user", text)
            sent = runs.Sent(run_id, request_id, message_id, text)
            await self._store.send(user.user_id, sent, granted)
            self._wake(run_id)
            if theirs:
                # it was for these words alone; should it stay open, it ends within the hour
                await self._engine.closed(token)
        elif (sent.run_id, sent.content) != (run_id, text):
            raise errors.AlreadyExists(field="request_id")
        return dataclasses.replace(run, message_id=sent.message_id)

    async def resolve(
        self, user: identity.Principal, approval_id: str, decision: str, comment: str, granted: str = ""
    ) -> approvals.Approval:
        """A user's vote on an approval; the same again changes nothing. What the approval has come to by now.

        Raises `InvalidPayload`, `NotFound`, and `FailedPrecondition` when it is too late or the user has voted otherwise.
        """
        approvals.check_vote(decision, comment)
        found = await self._store.vote(user.user_id, approval_id, decision, comment, granted)
        if found.state != approvals.PENDING:
            self._wake(found.run_id)
        return found

    async def approval(self, user: identity.Principal, approval_id: str, granted: str = "") -> approvals.Approval:
        """One approval: of a run of the user's, or of a thread that was `granted` to them. Raises `NotFound`."""
        return await self._store.approval(user.user_id, approval_id, granted)

    async def approvals(
        self, user: identity.Principal, *, run_id: str = "", state: str = "", after: str = "", size: int = 50, granted: str = ""
    ) -> list[approvals.Approval]:
        """Up to `size` approvals, newest first, older than the one `after`: of the user's runs, or of a thread `granted` to them."""
        approvals.check_state(state)
        return await self._store.approvals(user.user_id, run_id=run_id, state=state, after=after, size=size, granted=granted)

    def _wake(self, run_id: ids.RunId) -> None:
        if (running := self._running.get(run_id)) is not None:
            running.wake()
        else:
            # not waited for: the row carries the same word
            self._tasks.spawn(self._tell(_WAKE, run_id), name="wake")
        self._woken.set()

    async def call(self, user: identity.Principal, wanted: admission.Wanted, arguments: dict[str, Any]) -> tuple[ids.RunId, bytes]:
        """Execute one tool and return its run and its answer, which is in the record by then; the same request gets the same answer.

        When the process that executes it dies another settles the call; empty when nothing of it was kept. Raises `Busy` until it is over.
        """
        self._admission.check(wanted)
        if (known := self._calls.known(user.user_id, wanted)) is not None:
            # its end is being stored
            return known
        try:
            # before anything is stored: who is refused may send the same request again
            self._engine.require_room(user.user_id, self._entitled.of_user(user).concurrent())
            begun = await self._admission.begin(user, wanted, self.owner, wanted.deadline_s + _TOOL_GRACE_S)
        except (errors.ResourceExhausted, errors.QuotaExceeded, errors.FailedPrecondition):
            # what is over already has its answer; its context is closed
            if (before := await self._admission.known(user, wanted)) is None:
                raise
            begun = before
        if isinstance(begun, admission.Begun):
            return await self._execute(user, wanted, begun, arguments)
        if begun.outcome or begun.state in runs.ENDED:
            return begun.run_id, begun.outcome
        raise calling.still_executes()

    async def _execute(
        self, user: identity.Principal, wanted: admission.Wanted, begun: admission.Begun, arguments: dict[str, Any]
    ) -> tuple[ids.RunId, bytes]:
        run_id = begun.order.run_id
        claim = runs.Claim(begun.order, 1, cancelled="", expired=False)
        leased_until = begun.leased_at + wanted.deadline_s + _TOOL_GRACE_S
        running = engine.Running(claim, begun.order.context_token, leased_until=leased_until, frame=begun.context)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._running[run_id] = running
        self._stop_if_withdrawn(user)
        # the call ends in the record even when its caller has gone, and its row after its caller is answered
        running.task = task = self._tasks.spawn(self._called(running, arguments, answer), name=f"call {run_id}")
        return await self._calls.add(user.user_id, wanted, calling.Call(run_id, wanted.digest(), answer, task)).over()

    async def _called(self, running: engine.Running, arguments: dict[str, Any], answer: asyncio.Future[bytes]) -> None:
        try:
            await self._engine.call(running, arguments, answer.set_result)
        finally:
            self._forget(running)

    async def stored(self, user_id: ids.UserId) -> None:
        """Returns when the rows of the user's calls that were answered here say how they ended, or a second later."""
        await self._calls.stored(user_id)

    def erasing(self, user_id: ids.UserId) -> None:
        """What is kept of the user's runs is taken away: what they call from now on is apart from that."""
        self._admission.forget(user_id)

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """Ask a run to stop, wherever it runs; of a thread of theirs that was `granted` anybody's. Raises `NotFound`."""
        run = await self._store.cancel(user_id, run_id, granted)
        self._stop(run_id)
        return run

    def _stop(self, run_id: ids.RunId, *, rolled_back: bool = False) -> None:
        if (running := self._running.get(run_id)) is not None:
            running.rolled_back = running.rolled_back or rolled_back
            running.ask_to_stop()
        else:
            # not waited for: the row carries the same word
            self._tasks.spawn(self._tell(_CANCEL, f"{run_id}{_ROLLBACK}" if rolled_back else run_id), name="cancel")
        self._woken.set()

    def revoked(self, revocation: auth_pb2.Revocation) -> None:
        """Stop the runs of a session or a user that was withdrawn for reasons of security; otherwise they go on."""
        if not revocation.security:
            return
        for running in tuple(self._running.values()):
            if running.is_meant(revocation):
                running.ask_to_stop("security")
        # those that wait, and those of other processes, whether or not these hear of it themselves
        before = revocation.revoked_at.ToDatetime(UTC)
        self._tasks.spawn(self._stored(lambda: self._all.revoke(revocation.session_id, revocation.user_id, before)), name="revoke")

    def narrowed(self, change: auth_pb2.Revocation) -> None:
        """Let the runs of a user do no more than roles and tier allow that the user has by now."""
        rights = runs.Rights(tuple(change.rights.roles), change.rights.tier, change.revoked_at.ToDatetime(UTC))
        for running in tuple(self._running.values()):
            running.narrow(change.user_id, rights)
        self._tasks.spawn(self._stored(lambda: self._all.narrow(change.user_id, rights)), name="narrow")

    async def _stored(self, write: Callable[[], Awaitable[None]]) -> None:
        # a second time for those that were being stored the first time
        for pause_s in (0.0, _LATE_S):
            await asyncio.sleep(pause_s)
            async for attempt in stamina.retry_context(on=_AWAY, attempts=None, timeout=None, wait_initial=_RETRY_S, wait_max=1.0):
                with attempt:
                    await write()
            self._woken.set()

    def _stop_if_withdrawn(self, user: identity.Principal) -> None:
        # heard of while the run was being accepted, and so before there was a run to stop
        if (withdrawn := self._trust.revocation(user)) is not None:
            self.revoked(withdrawn)

    async def run(self) -> None:
        """Claim and renew, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._claim_always())
            group.create_task(self._renew_always())
            # apart from the leases: a context service that hangs must not cost them
            group.create_task(self._renewals.run())
            group.create_task(self._close_contexts_always())
            group.create_task(self._seen_always())
            group.create_task(self._listen(_WAKE))
            group.create_task(self._listen(_CANCEL))

    async def _tell(self, topic: str, message: str) -> None:
        try:
            await self._signals.publish(topic, message)
        except errors.Unavailable:
            # the row carries the same word; it is read at the next poll
            _log.warning("a signal was not sent", topic=topic)

    async def _listen(self, topic: str) -> None:
        async for message in self._signals.listen(topic):
            if message != self.owner:
                # its own word is not meant for it: it has looked already
                self._signalled(topic, message)

    def _signalled(self, topic: str, message: str) -> None:
        if (running := self._running.get(message.removesuffix(_ROLLBACK))) is not None:
            if topic == _CANCEL:
                running.rolled_back = running.rolled_back or message.endswith(_ROLLBACK)
                running.ask_to_stop()
            else:
                running.wake()
        self._woken.set()

    async def _claim_always(self) -> None:
        while True:
            self._woken.clear()
            if not await self._claim():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.poll_s):
                        await self._woken.wait()

    def _free(self) -> int:
        """Slots for runs that nobody has yet."""
        return self._limits.slots - len(self._running) - self._taken

    def _may_claim(self) -> bool:
        """Whether runs may begin here. What could not be recorded waits in the queue, where another process can take it."""
        return self._claiming and not self._looking.locked() and self._engine.can_record

    async def _claim(self) -> bool:
        """Look at the queue. Whether another look may find more at once."""
        free, may_claim = self._free(), self._may_claim()
        # until it is known what there is
        self._nothing_left, self._waits = False, True
        if free <= 0 or not may_claim:
            return False
        async with self._looking:
            began, looks = time.monotonic(), time.monotonic() >= self._missing_at
            try:
                claims = await self._all.claim(
                    self.owner, self._limits.lease_s, self._agents.versions(), free, self._entitled.concurrent(), after_user=self._after,
                    missing_s=self._limits.version_missing_s if looks else math.inf, queued_s=self._limits.queued_s,
                )  # fmt: skip
            except _AWAY:
                return False
            self._after = claims.after
            if looks and not any(claim.orphaned for claim in claims):
                self._missing_at = began + self._seen_s
            for claim in claims:
                self._begin(claim, began + self._limits.lease_s)
            self._nothing_left, self._waits = not claims.more, claims.waits
            return claims.more and bool(claims)

    def _begin(self, claim: runs.Claim, leased_until: float) -> None:
        running = engine.Running(
            claim, claim.order.context_token, rights=claim.rights, leased_until=leased_until, rolled_back=claim.rolled_back
        )
        if claim.cancelled:
            running.ask_to_stop(claim.cancelled)
        before = self._running.get(claim.order.run_id)
        self._running[claim.order.run_id] = running
        running.task = self._tasks.spawn(self._own(running, before), name=f"run {claim.order.run_id}")

    async def _own(self, running: engine.Running, before: engine.Running | None) -> None:
        try:
            if before is not None and before.task is not None:
                # this process lost the lease and got it again: what it still runs goes first
                before.task.cancel()
                await asyncio.wait({before.task})
            await self._engine.run(running)
        finally:
            self._forget(running)

    def _forget(self, running: engine.Running) -> None:
        run_id = running.claim.order.run_id
        if self._running.get(run_id) is running:
            del self._running[run_id]
        # what waits may wait for this slot, for this user's end of a run, or for this thread; what was put away may be awake by now;
        # and `close` waits for the end of all
        if self._waits or not running.over or not self._claiming:
            self._woken.set()

    async def _renew_always(self) -> None:
        pause_s = self._limits.lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            leased = dict(self._running)
            try:
                await self._renew(leased)
                pause_s = self._limits.lease_s / 3
            except _AWAY:
                pause_s = _RETRY_S
                self._let_go(self._run_out(leased), "the lease could not be renewed")

    def _run_out(self, leased: Mapping[str, engine.Running]) -> dict[str, engine.Running]:
        """Those that another process may take over in a moment."""
        now = time.monotonic()
        return {run_id: running for run_id, running in leased.items() if now > running.leased_until - _BEFORE_S}

    async def _renew(self, leased: dict[str, engine.Running]) -> None:
        # a lease counts from here: nobody knows how long the answer was under way
        asked = time.monotonic()
        moved = [run_id for run_id, running in leased.items() if running.moved]
        kept = await self._all.renew(self.owner, self._limits.lease_s, list(leased), moved) if leased else {}
        for run_id, running in leased.items():
            held = kept.get(run_id, runs.Held(0))
            if held.epoch != running.claim.epoch:
                if not running.over and self._running.get(run_id) is running:
                    self._let_go({run_id: running}, "another process owns it")
                continue
            running.leased_until = max(running.leased_until, asked + self._limits.lease_s)
            self._heard(running, held)

    def _heard(self, running: engine.Running, held: runs.Held) -> None:
        """What the row of a run says by now."""
        running.rolled_back = running.rolled_back or held.rolled_back
        if held.cancelled:
            running.ask_to_stop(held.cancelled)
        if held.woken:
            running.wake()
        if held.rights is not None:
            running.left_with(held.rights)
        running.token_old = held.token_old

    async def _seen_always(self) -> None:
        while True:
            try:
                await self._all.seen(self._agents.versions())
            except _AWAY:
                _log.warning("it could not be said which agents are here")
            await asyncio.sleep(self._seen_s)

    async def _close_contexts_always(self) -> None:
        # whosever runs they were: the process that ended them may be gone
        while True:
            try:
                for run_id, token in await self._all.open_contexts(_CONTEXTS_AT_ONCE):
                    if await self._engine.closed(token):
                        await self._all.context_closed(run_id)
            except _AWAY:
                _log.warning("contexts of runs that ended could not be looked at")
            await asyncio.sleep(_CLOSE_AGAIN_S)

    def _let_go(self, leased: dict[str, engine.Running], why: str) -> None:
        for run_id, running in leased.items():
            _log.warning("letting a run go", run_id=run_id, reason=why)
            if running.task is not None:
                running.task.cancel()

    async def close(self) -> None:
        """Claim no more, give what runs its time, then let go of it: another process carries it on, and it counts as no takeover."""
        self._claiming = False
        async with self._looking:
            pass
        deadline = time.monotonic() + self._limits.drain_s
        while (self._running or self._taken) and time.monotonic() < deadline:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._woken.wait()
        await self._tasks.close()
        try:
            # nothing more is told of any of them; an agent that does not heed its cancellation must not keep the others
            await self._all.release(self.owner)
        except _AWAY:
            _log.warning("leases could not be released; they run out by themselves")
        try:
            async with asyncio.timeout(GRACE_S):
                await self._engine.close()
        except TimeoutError:
            _log.error("an agent does not heed its cancellation; it is left to itself")
