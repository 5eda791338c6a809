"""Opens, derives, signs and closes contexts; keeps their audit trail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from chassis import identity
from chassis.postgres import Conflict
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context.keys import SigningKey

LIFETIME_S = 3600


@dataclass(frozen=True, slots=True)
class Opening:
    """What is asked for; who asks is told by the principal alone."""

    request_id: ids.RequestId
    run_id: ids.RunId
    thread_id: ids.ThreadId | None
    connection_id: ids.ConnectionId | None
    deadline: datetime | None
    correlation_id: ids.CorrelationId | None
    agent_context: bytes
    audit_metadata: bytes

    def frame(self, principal: identity.Principal, thread_id: ids.ThreadId) -> UserExecutionContext:
        """The context to store. Raises `InvalidContext`, `PlaceholderValue`, `ReservedKey` or `TooLarge`."""
        return UserExecutionContext.from_request(
            user_id=principal.user_id, tenant_id=principal.tenant_id, session_id=principal.session_id, thread_id=thread_id,
            run_id=self.run_id, request_id=self.request_id, roles=principal.roles, tier=principal.tier, scope=principal.scope,
            correlation_id=self.correlation_id, connection_id=self.connection_id, deadline=self.deadline,
            agent_context=self.agent_context, audit_metadata=self.audit_metadata,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A context, what was asked under its request id, and when it was closed."""

    context: UserExecutionContext
    asked: bytes
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the audit trail: who did what to a context."""

    actor: str
    action: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Signed:
    """A context with a token for `x-netra-context`."""

    context: UserExecutionContext
    token: str
    expires_at: datetime


class Kept(Protocol):
    """Where contexts and their audit trail are kept."""

    async def by_id(self, user_id: ids.UserId, context_id: ids.ContextId) -> Stored | None:
        """The user's context with this id."""
        ...

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Stored | None:
        """The user's context that was made under this request id."""
        ...

    async def open(self, frame: UserExecutionContext, asked: bytes, line: Line, *, new_thread: bool) -> None:
        """Store a context, and its thread when that is new.

        Raises `NotFound` when the thread is neither new nor the user's, `Conflict` when the request id is taken.
        """
        ...

    async def derive(self, frame: UserExecutionContext, asked: bytes, line: Line) -> None:
        """Store a child. Raises `Conflict` when the request id is taken."""
        ...

    async def close(self, frame: UserExecutionContext, line: Line) -> datetime | None:
        """Close an open context; None when there is no open one."""
        ...


class Contexts:
    """The contexts of all users; each method works for one."""

    def __init__(self, kept: Kept, key: SigningKey) -> None:
        self._kept = kept
        self._key = key

    def sign(self, context: UserExecutionContext, actor: str) -> Signed:
        """A token for the context, valid for one hour and for the service that asked."""
        claims = {"sub": str(context.user_id), "azp": actor, "ctx": context.to_claims()}
        expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=LIFETIME_S)
        return Signed(context, identity.sign(self._key.private, self._key.kid, identity.CONTEXT, claims, LIFETIME_S), expires_at)

    async def open(self, principal: identity.Principal, opening: Opening, actor: str) -> Signed:
        """A new context, or the one made under the same request id.

        Same means: same thread as asked for, same agent context. Run, connection, deadline, correlation id, session and
        audit metadata belong to the attempt and may differ in a retry; those of the first one stay.
        Raises `NotFound` for a thread that is not the user's, `AlreadyExists` when something else was asked before.
        """
        thread_id = opening.thread_id or ids.ThreadId.new()
        frame = opening.frame(principal, thread_id)
        asked = _asked("open", opening.thread_id or "", frame.agent_context_digest, *sorted(frame.scope or ()))
        detail = {"request_id": frame.request_id, "session_id": frame.session_id, "run_id": frame.run_id}
        line, new_thread = Line(actor, "open", detail), opening.thread_id is None
        return self.sign(await self._once(frame, asked, lambda: self._kept.open(frame, asked, line, new_thread=new_thread)), actor)

    async def derive(
        self,
        parent: UserExecutionContext,
        request_id: ids.RequestId,
        operation: str,
        agent_context: bytes,
        scope: Sequence[str],
        actor: str,
    ) -> Signed:
        """A child of an open context, or the one made under the same request id.

        Raises `FailedPrecondition` when the parent is closed or past its deadline, `DepthExceeded`, `InvalidContext`.
        """
        complete = await self._usable(parent)
        frame = complete.child(operation, request_id, agent_context, scope or None)
        asked = _asked("derive", complete.context_id, operation, frame.agent_context_digest, *sorted(frame.scope or ()))
        parent_request_id = complete.request_id
        detail = {"request_id": frame.request_id, "operation": operation, "parent_request_id": parent_request_id, "depth": frame.depth}
        line = Line(actor, "derive", detail)
        return self.sign(await self._once(frame, asked, lambda: self._kept.derive(frame, asked, line)), actor)

    async def renew(self, frame: UserExecutionContext, actor: str) -> Signed:
        """A fresh token. Raises `FailedPrecondition` when the context is closed or past its deadline."""
        return self.sign(await self._usable(frame), actor)

    async def get(self, user_id: ids.UserId, context_id: ids.ContextId) -> Stored:
        """A stored context of the user. Raises `NotFound`."""
        found = await self._kept.by_id(user_id, context_id)
        if found is None:
            raise errors.NotFound("There is no such context.")
        return found

    async def close(self, frame: UserExecutionContext, actor: str) -> datetime:
        """When the context was closed, now or before. Raises `NotFound`."""
        closed_at = await self._kept.close(frame, Line(actor, "close", {"run_id": frame.run_id}))
        if closed_at is not None:
            return closed_at
        closed_before = (await self.get(frame.user_id, frame.context_id)).closed_at
        if closed_before is None:
            raise errors.Unavailable("The context could not be closed just now. Try again.")
        return closed_before

    async def _usable(self, frame: UserExecutionContext) -> UserExecutionContext:
        stored = await self.get(frame.user_id, frame.context_id)
        _refuse_ended(stored)
        return stored.context

    async def _once(self, frame: UserExecutionContext, asked: bytes, make: Callable[[], Awaitable[None]]) -> UserExecutionContext:
        known = await self._kept.by_request(frame.user_id, frame.request_id)
        if known is None:
            try:
                await make()
                return frame
            except Conflict:
                # the same request came in twice at once, and the other one was first
                known = await self._kept.by_request(frame.user_id, frame.request_id)
        if known is None or known.asked != asked:
            raise errors.AlreadyExists(field="request_id")
        _refuse_ended(known)
        return known.context


def _refuse_ended(stored: Stored) -> None:
    if stored.closed_at is not None:
        raise errors.FailedPrecondition("The execution context is closed.")
    if stored.context.deadline is not None and stored.context.deadline <= datetime.now(UTC):
        raise errors.FailedPrecondition("The deadline of the execution context has passed.")


def _asked(*parts: str) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
