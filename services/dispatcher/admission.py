"""Accepts runs: checks, execution context, message, row; the same request is accepted once."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import orjson

from chassis import identity, log, telemetry
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2
from services.dispatcher import call_contexts, entitlements, runs, settings, stages, upstreams
from services.dispatcher.tools import arguments

_MAX_REQUEST_BYTES = 64 * 1024
_MAX_INPUT_BYTES = 64 * 1024
# after these there is no run, for sure
_REFUSED = (errors.Busy, errors.RateLimited, errors.NotFound, errors.PermissionDenied)
# how long a count of all that waits is believed
_COUNTED_S = 1.0
_AGAIN_MS = 5000
# what the message is called that a run begins with
_REQUEST = "request"
_log = log.get(__name__)
# what a context is for that has no run of its own
_SPEAKS = b'{"kind":"message"}'


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants run: an agent, or a tool for kind `tool`. The deadline is in seconds."""

    kind: str
    name: str
    request_id: str
    request: str
    inputs: bytes
    thread_id: str
    connection_id: str
    deadline_s: float
    # it is that of the agent or the tool: nobody asked for another
    deadline_declared: bool = False
    # one of `runs.ON_BUSY`
    on_busy: str = runs.ENQUEUE
    # to the user's run on the thread that is suspended until a message comes, if there is one, in place of a new run
    deliver: bool = False
    agent_version: str = ""
    # when the edge got the message, and had checked it, as it says
    received_at: datetime | None = None
    validated_at: datetime | None = None

    def digest(self) -> bytes:
        """What the same request must have in common."""
        # another process may have another version of what declares a deadline
        deadline_s = 0.0 if self.deadline_declared else self.deadline_s
        parts = [self.kind, self.name, self.request, self.inputs.decode(), self.thread_id, deadline_s]
        return hashlib.sha256(orjson.dumps(parts)).digest()


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that was accepted just now, and the context it executes in: its lease counts from then, by `time.monotonic`."""

    order: runs.Order
    context: UserExecutionContext
    leased_at: float


class Waiting(Protocol):
    """Where the runs of all users are kept."""

    async def queued(self, most: int) -> int:
        """How many runs wait for their start, of whichever user; not more than `most` are counted."""
        ...


class Room:
    """The queue of all users has an end. It is looked at once a second: a few more may come in before it is known to be full."""

    def __init__(self, waiting: Waiting, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._waiting, self._most, self._clock = waiting, most, clock
        self._looked_at, self._full = -math.inf, False

    async def require(self) -> None:
        """Raises `RateLimited` while as many runs wait as may."""
        if (now := self._clock()) - self._looked_at >= _COUNTED_S:
            # those that come meanwhile go by what was known before
            self._looked_at = now
            self._full = await self._waiting.queued(self._most) >= self._most
        if self._full:
            raise errors.RateLimited("Too many runs wait for their start just now. Try again soon.", retry_after_ms=_AGAIN_MS)


class Known(Protocol):
    """Where the runs of users are kept."""

    async def add(
        self, user_id: ids.UserId, run: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, on_busy: str, passed: Mapping[str, datetime], owner: str, lease_s: float, concurrent: int,
    ) -> runs.Added:  # fmt: skip
        """Add a run, or return the one with this request id. With an `owner` it runs at once, at epoch 1, if it may."""
        ...

    async def begin(
        self, user_id: ids.UserId, call: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, passed: Mapping[str, datetime], owner: str, lease_s: float,
    ) -> runs.Run | None:  # fmt: skip
        """Add a call, which executes at once at epoch 1, or return the run with this request id. Raises `RateLimited` if too many wait."""
        ...

    async def known(self, user_id: ids.UserId, request_id: str, *, thread_id: str, most_queued: int, on_busy: str) -> runs.Run | None:
        """The run that a request started, if any. Raises `Busy` or `RateLimited` when there is none and a new one may not come."""
        ...

    async def by_request(self, user_id: ids.UserId, request_id: str) -> runs.Run | None:
        """The run that a request started, if any."""
        ...

    async def require_free(self, user_id: ids.UserId, request_id: str, thread_id: str) -> None:
        """Raise `Busy` while anybody's run goes on in a thread that the user may use, unless this request has started one."""
        ...


class Admission:
    """Turns what a user wants into a stored run that somebody will take to its end."""

    def __init__(
        self, contexts: upstreams.Contexts, known: Known, entitled: entitlements.Entitlements, limits: settings.DispatcherSettings
    ) -> None:
        self._contexts, self._store, self._entitled, self._limits = contexts, known, entitled, limits
        self._calls = call_contexts.CallContexts(contexts)

    def check(self, wanted: Wanted) -> None:
        """Raises `InvalidPayload` naming what no run can have."""
        _check(wanted, self._limits.max_deadline_s)

    async def known(self, user: identity.Principal, wanted: Wanted) -> runs.Run | None:
        """The run that the same request started. Raises `AlreadyExists` when it was another request under the same id.

        Raises `Busy` or `RateLimited` when there is none yet, so that a refused request leaves nothing behind.
        """
        self.check(wanted)
        run = await self._store.known(
            user.user_id, ids.RequestId(wanted.request_id), thread_id=wanted.thread_id,
            most_queued=self._entitled.queued(user.tier), on_busy=wanted.on_busy,
        )  # fmt: skip
        if run is not None:
            require_same(run.digest, wanted)
        return run

    async def begin(self, user: identity.Principal, wanted: Wanted, owner: str, lease_s: float) -> Begun | runs.Run:
        """Store a call, as one that this owner executes; or the run that the same request started.

        One that names a thread gets a context of its own. Any other one executes in the context of its session's calls, and the store
        settles which of the same requests is the first. Raises `AlreadyExists` when it was another request under the same id,
        `RateLimited`; `FailedPrecondition` when the same one is over.
        """
        passed = stages.accepted(wanted.received_at, wanted.validated_at, datetime.now(UTC))
        opened = await (self._opened(user, wanted) if wanted.thread_id else self._calls.of(user, wanted.request_id))
        passed.now(stages.ROUTING)
        order, began = _order(wanted, opened, ""), time.monotonic()
        try:
            known = await self._store.begin(
                user.user_id, order, session_id=opened.context.session_id, tier=user.tier, thread_id=opened.context.thread_id,
                request_id=wanted.request_id, digest=wanted.digest(), correlation_id=opened.context.correlation_id,
                most_queued=self._entitled.queued(user.tier), passed=passed.times, owner=owner, lease_s=lease_s,
            )  # fmt: skip
        except _REFUSED:
            await self._rest(user, wanted, opened)
            raise
        if known is None:
            return Begun(order, opened.context, began)
        require_same(known.digest, wanted)
        return known

    async def accept(
        self, user: identity.Principal, wanted: Wanted, *, owner: str = "", lease_s: float = 0.0
    ) -> tuple[runs.Added, runs.Order]:
        """Open a context, store the message and the run of an agent. With an `owner` it is that process's at once, if it may.

        Of a request that is refused after that a context is left that rests: it may start later, and nothing waits for it.
        """
        passed = stages.accepted(wanted.received_at, wanted.validated_at, datetime.now(UTC))
        await self._entitled.count_run(user)
        opened = await self._opened(user, wanted)
        try:
            return await self._added(user, wanted, opened, passed, owner, lease_s)
        except _REFUSED:
            await self._rest(user, wanted, opened)
            raise

    async def _added(
        self, user: identity.Principal, wanted: Wanted, opened: upstreams.Opened, passed: stages.Passed, owner: str, lease_s: float
    ) -> tuple[runs.Added, runs.Order]:
        if wanted.on_busy == runs.REJECT and wanted.thread_id:
            # runs of others count as well, and may be told of now that the user is known to write there; no message was left yet
            await self._store.require_free(user.user_id, ids.RequestId(wanted.request_id), opened.context.thread_id)
        message_id = await self._message(wanted, opened)
        passed.now(stages.PERSISTED)
        order = _order(wanted, opened, message_id)
        added = await self._store.add(
            user.user_id, order, session_id=opened.context.session_id, tier=user.tier, thread_id=opened.context.thread_id,
            request_id=wanted.request_id, digest=wanted.digest(), correlation_id=opened.context.correlation_id,
            most_queued=self._entitled.queued(user.tier), on_busy=wanted.on_busy,
            passed=passed.times, owner=owner, lease_s=lease_s, concurrent=self._entitled.concurrent().get(user.tier, 0),
        )  # fmt: skip
        return added, order

    def forget(self, user_id: ids.UserId) -> None:
        """What is kept of a user is erased: their next calls are not to execute in a context of before."""
        self._calls.forget(user_id)

    async def _rest(self, user: identity.Principal, wanted: Wanted, opened: upstreams.Opened) -> None:
        if opened.context.serves_calls:
            # that of others, too
            return
        # the same request may start later, so it is not closed; but no erasure waits for a run that never was
        try:
            if await self._store.by_request(user.user_id, wanted.request_id) is None:
                await self._contexts.rest(opened)
        except errors.NetraError as error:
            _log.warning("a context was left open", code=error.code)

    async def _opened(self, user: identity.Principal, wanted: Wanted) -> upstreams.Opened:
        known = {"kind": wanted.kind, "name": wanted.name, "digest": wanted.digest().hex()}
        # the context service settles who is first: all who bring the same request id get the context, and so the run, of the first
        return await self._contexts.open(
            context_pb2.OpenContextRequest(
                request_id=wanted.request_id,
                access_token=user.token,
                run_id=ids.RunId.new(),
                thread_id=wanted.thread_id,
                connection_id=wanted.connection_id,
                correlation_id=telemetry.correlation_id(),
                agent_context=orjson.dumps(known),
                message=_first(wanted),
            )
        )

    async def speaking(self, user: identity.Principal, run: runs.Run, request_id: str) -> str:
        """The token of a context in which somebody speaks in the thread of another user's run. Raises `PermissionDenied`, `NotFound`."""
        request = context_pb2.OpenContextRequest(
            request_id=request_id, access_token=user.token, run_id=run.run_id, thread_id=run.thread_id,
            correlation_id=telemetry.correlation_id(), agent_context=_SPEAKS,
        )  # fmt: skip
        return (await self._contexts.open(request)).token

    async def _message(self, wanted: Wanted, opened: upstreams.Opened) -> str:
        if opened.message_id:
            return opened.message_id
        return await self._contexts.append_message(opened.token, f"{opened.context.run_id}:{_REQUEST}", "user", wanted.request)


def require_same(digest: bytes, wanted: Wanted) -> None:
    """Raises `AlreadyExists` when what a request id was used for is not what is wanted under it now."""
    if digest != wanted.digest():
        raise errors.AlreadyExists(field="request_id")


def _order(wanted: Wanted, opened: upstreams.Opened, message_id: str) -> runs.Order:
    # a call is executed here or not at all: its arguments, which may hold secrets, need not outlive it
    inputs = wanted.inputs if wanted.kind == "agent" else b"{}"
    return runs.Order(
        run_id=opened.context.run_id, kind=wanted.kind, agent=wanted.name, request=wanted.request, inputs=inputs,
        deadline_s=wanted.deadline_s, message_id=message_id, context=opened.stored, context_token=opened.token,
        traceparent=telemetry.carrier().get("traceparent", ""), agent_version=wanted.agent_version,
    )  # fmt: skip


def _first(wanted: Wanted) -> context_pb2.RunMessage | None:
    """The message that is stored with the context. None where there is none, or where it is not known yet whether the run may start."""
    if wanted.kind != "agent" or (wanted.on_busy == runs.REJECT and wanted.thread_id):
        return None
    return context_pb2.RunMessage(name=_REQUEST, role="user", content=wanted.request)


def _check(wanted: Wanted, longest_s: float) -> None:
    ids.RequestId(wanted.request_id)
    if wanted.thread_id:
        ids.ThreadId(wanted.thread_id)
    if wanted.kind == "agent" and not wanted.request.strip():
        raise errors.InvalidPayload("user_request is required and must not be empty", field="user_request")
    if len(wanted.request.encode()) > _MAX_REQUEST_BYTES:
        raise errors.TooLarge(f"user_request must be at most {_MAX_REQUEST_BYTES} bytes", field="user_request")
    if wanted.on_busy not in runs.ON_BUSY:
        raise errors.InvalidPayload(f"on_busy must be one of {', '.join(runs.ON_BUSY)}", field="on_busy")
    if not 0 < wanted.deadline_s <= longest_s:
        raise errors.InvalidPayload(f"deadline must be more than 0 and at most {longest_s:g} seconds", field="deadline")


def json_object(data: bytes, field: str, most_bytes: int = _MAX_INPUT_BYTES) -> dict[str, object]:
    """A JSON object out of bytes; empty bytes mean {}. Raises `TooLarge`, `InvalidPayload` naming the field."""
    return arguments.read(data, field, most_bytes)
