"""Owns every running run of this process: claims, leases, cancels, lets go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import stamina

from chassis import identity, lifecycle, log, streams, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.dispatcher import admission, engine, entitlements, runs, settings, upstreams
from services.dispatcher.agents import registry as agents_

_log = log.get(__name__)
_WAKE = "wake"
_CANCEL = "cancel"
# how long after a tool's own deadline another process closes an interactive call that its owner left open
_TOOL_GRACE_S = 10.0
_TOKENS_AT_ONCE = 100
_CLOSE_AGAIN_S = 2.0
_RETRY_S = 0.1
_LATE_S = 1.0
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)


class Mine(Protocol):
    """Where the runs of one user are kept."""

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """Ask a run to stop, unless it has ended: the user's, or with a thread of theirs anybody's in it. Raises `NotFound`."""
        ...


class Leases(Protocol):
    """Where the leases of all runs are kept."""

    async def claim(
        self, owner: str, lease_s: float, agents: Sequence[str], most: int, concurrent: Mapping[str, int]
    ) -> list[runs.Claim]:  # fmt: skip
        """Own up to `most` runs that wait or whose owner is silent, oldest first; `concurrent` of a user's at a time, by tier."""
        ...

    async def renew(self, owner: str, lease_s: float, run_ids: Sequence[str]) -> dict[str, runs.Held]:
        """Keep owning runs. Those still owned, each with what its row says by now."""
        ...

    async def old_tokens(self, most: int) -> list[tuple[ids.RunId, int, str]]:
        """Run, epoch and context token of runs that wait and whose token needs renewal; each is told to one process."""
        ...

    async def token_renewed(self, run_id: ids.RunId, epoch: int, token: str) -> None:
        """Keep the fresh context token of a run."""
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
        self._tasks = lifecycle.Tasks(on_failure=lambda error: _log.error("a run's task failed", exc_info=error))
        self._woken = asyncio.Event()
        self._renewed_at = time.monotonic()
        self._claiming = True

    async def start(self, user: identity.Principal, wanted: admission.Wanted) -> runs.Run:
        """Accept a run of an agent. Raises `NotFound` for an unknown agent or thread, `Busy`, `AlreadyExists`, `RateLimited`."""
        self._entitled.require_agent(user, self._agents.get(wanted.name))
        if (known := await self._admission.known(user, wanted)) is not None:
            return known
        try:
            run, _ = await self._admission.accept(user, wanted)
        except errors.FailedPrecondition:
            # the same request came twice at once, and the other one has ended its run already
            if (known := await self._admission.known(user, wanted)) is None:
                raise
            return known
        self._stop_if_withdrawn(user)
        self._woken.set()
        self._tasks.spawn(self._tell(_WAKE, ""), name="wake")
        return run

    async def call(self, user: identity.Principal, wanted: admission.Wanted, arguments: dict[str, Any]) -> tuple[ids.RunId, bytes]:
        """Execute one tool and return its run and its answer; the same request gets the same answer.

        When the process that executes it dies another settles the call; empty when nothing of it was kept. Raises `Busy` until it is over.
        """
        run = await self._admission.known(user, wanted)
        if run is None:
            # before anything is stored: who is refused may send the same request again
            self._engine.require_room(user.user_id, self._entitled.of_user(user).concurrent())
            lease_s, began = wanted.deadline_s + _TOOL_GRACE_S, time.monotonic()
            run, order = await self._admission.accept(user, wanted, owner=self.owner, lease_s=lease_s)
            if run.run_id not in self._running and run.state == runs.RunState.RUNNING:
                running = engine.Running(
                    runs.Claim(order, 1, cancelled="", expired=False), order.context_token, leased_until=began + lease_s
                )
                self._running[run.run_id] = running
                self._stop_if_withdrawn(user)
                # the call ends in the record even when its caller has gone
                running.task = self._tasks.spawn(self._called(running, arguments), name=f"call {run.run_id}")
                return run.run_id, await _outcome(running.task)
        if run.outcome or run.state in runs.ENDED:
            return run.run_id, run.outcome
        raise errors.Busy("The same request still executes. Ask again for its outcome.", retry_after_ms=1000)

    async def _called(self, running: engine.Running, arguments: dict[str, Any]) -> bytes:
        try:
            return await self._engine.call(running, arguments)
        finally:
            self._forget(running)

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """Ask a run to stop, wherever it runs; of a thread of theirs that was `granted` anybody's. Raises `NotFound`."""
        run = await self._store.cancel(user_id, run_id, granted)
        if (running := self._running.get(run_id)) is not None:
            running.ask_to_stop()
        else:
            # not waited for: the row carries the same word
            self._tasks.spawn(self._tell(_CANCEL, run_id), name="cancel")
        self._woken.set()
        return run

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
            group.create_task(self._renew_tokens_always())
            group.create_task(self._close_contexts_always())
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
            if topic == _CANCEL and (running := self._running.get(message)) is not None:
                running.ask_to_stop()
            self._woken.set()

    async def _claim_always(self) -> None:
        while True:
            self._woken.clear()
            if not await self._claim():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.poll_s):
                        await self._woken.wait()

    async def _claim(self) -> bool:
        free = self._limits.slots - len(self._running)
        # what could not be recorded waits in the queue, where another process can take it
        if free <= 0 or not self._claiming or not self._engine.can_record:
            return False
        try:
            claims = await self._all.claim(self.owner, self._limits.lease_s, self._agents.names(), free, self._entitled.concurrent())
        except (errors.Unavailable, errors.DeadlineExceeded):
            return False
        for claim in claims:
            running = engine.Running(claim, claim.order.context_token, rights=claim.rights)
            if claim.cancelled:
                running.ask_to_stop(claim.cancelled)
            before = self._running.get(claim.order.run_id)
            self._running[claim.order.run_id] = running
            running.task = self._tasks.spawn(self._own(running, before), name=f"run {claim.order.run_id}")
        return bool(claims)

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
        self._woken.set()

    async def _renew_always(self) -> None:
        pause_s = self._limits.lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            leased = dict(self._running)
            try:
                await self._renew(leased)
                self._renewed_at, pause_s = time.monotonic(), self._limits.lease_s / 3
            except (errors.Unavailable, errors.DeadlineExceeded):
                pause_s = _RETRY_S
                self._let_go(self._run_out(leased), "the lease could not be renewed")

    def _run_out(self, leased: Mapping[str, engine.Running]) -> dict[str, engine.Running]:
        """Those that another process may take over in a moment."""
        now, kept_s = time.monotonic(), self._limits.lease_s
        return {
            run_id: running
            for run_id, running in leased.items()
            if now > max(self._renewed_at + kept_s, running.leased_until) - 1.0
        }  # fmt: skip

    async def _renew(self, leased: dict[str, engine.Running]) -> None:
        kept = await self._all.renew(self.owner, self._limits.lease_s, list(leased)) if leased else {}
        for run_id, running in leased.items():
            held = kept.get(run_id, runs.Held(0))
            if held.epoch != running.claim.epoch and not running.over and self._running.get(run_id) is running:
                self._let_go({run_id: running}, "another process owns it")
            elif held.cancelled:
                running.ask_to_stop(held.cancelled)
            if held.rights is not None:
                running.left_with(held.rights)
            running.token_old = held.token_old

    async def _renewed(self, run_id: ids.RunId, epoch: int, token: str) -> str:
        try:
            fresh = await self._contexts.renew(token)
        except errors.NetraError as error:
            _log.warning("a context could not be renewed", run_id=run_id, code=error.code)
            return token
        await self._all.token_renewed(run_id, epoch, fresh)
        return fresh

    async def _renew_tokens_always(self) -> None:
        # apart from the leases: a context service that hangs must not cost them
        while True:
            try:
                for running in [running for running in self._running.values() if running.token_old]:
                    running.token = await self._renewed(running.claim.order.run_id, running.claim.epoch, running.token)
                for run_id, epoch, token in await self._all.old_tokens(_TOKENS_AT_ONCE):
                    await self._renewed(run_id, epoch, token)
            except (errors.Unavailable, errors.DeadlineExceeded):
                _log.warning("context tokens could not be looked at")
            await asyncio.sleep(self._limits.tokens_s)

    async def _close_contexts_always(self) -> None:
        # whosever runs they were: the process that ended them may be gone
        while True:
            try:
                for run_id, token in await self._all.open_contexts(_TOKENS_AT_ONCE):
                    if await self._engine.closed(token):
                        await self._all.context_closed(run_id)
            except (errors.Unavailable, errors.DeadlineExceeded):
                _log.warning("contexts of runs that ended could not be looked at")
            await asyncio.sleep(_CLOSE_AGAIN_S)

    def _let_go(self, leased: dict[str, engine.Running], why: str) -> None:
        for run_id, running in leased.items():
            _log.warning("letting a run go", run_id=run_id, reason=why)
            if running.task is not None:
                running.task.cancel()

    async def close(self) -> None:
        """Claim no more, give what runs its time, then let go of it so that another process can take it over."""
        self._claiming = False
        deadline = time.monotonic() + self._limits.drain_s
        while self._running and time.monotonic() < deadline:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._woken.wait()
        await self._tasks.close()
        await self._engine.close()
        try:
            await self._all.release(self.owner)
        except (errors.Unavailable, errors.DeadlineExceeded):
            _log.warning("leases could not be released; they run out by themselves")


async def _outcome(call: asyncio.Task[bytes]) -> bytes:
    """What a call came to; it ends even when nobody waits for it. Raises `Unavailable` when this process had to let go of it."""
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        if lifecycle.told_to_stop():
            raise
        raise errors.Unavailable("The process that executed the call let go of it. Ask again for its outcome.") from None
