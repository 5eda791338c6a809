"""Opens, derives, signs and closes contexts; keeps their audit trail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from chassis import identity
from chassis.postgres import Conflict, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import store
from services.context.keys import SigningKey

LIFETIME_S = 3600
_Make = Callable[[Transaction], Awaitable[None]]


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
            run_id=self.run_id, request_id=self.request_id, roles=principal.roles, tier=principal.tier,
            correlation_id=self.correlation_id, connection_id=self.connection_id, deadline=self.deadline,
            agent_context=self.agent_context, audit_metadata=self.audit_metadata,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signed:
    """A context with a token for `x-netra-context`."""

    context: UserExecutionContext
    token: str
    expires_at: datetime


class Contexts:
    """The contexts of all users; each method works for one."""

    def __init__(self, contexts: store.Store, key: SigningKey) -> None:
        self._store = contexts
        self._key = key

    def sign(self, context: UserExecutionContext) -> Signed:
        """A token for the context, valid for one hour."""
        claims = {"sub": str(context.user_id), "ctx": context.to_claims()}
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
        asked = _asked("open", opening.thread_id or "", frame.agent_context_digest)

        async def make(transaction: Transaction) -> None:
            if opening.thread_id is None:
                await store.insert_thread(transaction, principal.user_id, principal.tenant_id, thread_id)
            elif await store.thread(transaction, principal.user_id, thread_id) is None:
                raise errors.NotFound("There is no such thread.", field="thread_id")
            await _keep(transaction, frame, asked, actor, "open", {"session_id": frame.session_id, "run_id": frame.run_id})

        return self.sign(await self._once(frame, asked, make))

    async def derive(
        self, parent: UserExecutionContext, request_id: ids.RequestId, operation: str, agent_context: bytes, actor: str
    ) -> Signed:
        """A child of an open context, or the one made under the same request id.

        Raises `FailedPrecondition` when the parent is closed or past its deadline, `DepthExceeded`, `InvalidContext`.
        """
        complete = await self._usable(parent)
        frame = complete.child(operation, request_id, agent_context)
        asked = _asked("derive", complete.context_id, operation, frame.agent_context_digest)
        detail: Mapping[str, object] = {"operation": operation, "parent_request_id": complete.request_id, "depth": frame.depth}

        async def make(transaction: Transaction) -> None:
            await _keep(transaction, frame, asked, actor, "derive", detail)

        return self.sign(await self._once(frame, asked, make))

    async def renew(self, frame: UserExecutionContext) -> Signed:
        """A fresh token. Raises `FailedPrecondition` when the context is closed or past its deadline."""
        return self.sign(await self._usable(frame))

    async def get(self, user_id: ids.UserId, context_id: ids.ContextId) -> store.Stored:
        """A stored context of the user. Raises `NotFound`."""
        async with self._store.transaction(user_id) as transaction:
            found = await store.context_by_id(transaction, user_id, context_id)
        if found is None:
            raise errors.NotFound("There is no such context.")
        return found

    async def close(self, frame: UserExecutionContext, actor: str) -> datetime:
        """When the context was closed, now or before. Raises `NotFound`."""
        async with self._store.transaction(frame.user_id) as transaction:
            closed_at = await store.close_context(transaction, frame.user_id, frame.context_id)
            if closed_at is not None:
                await store.insert_audit(transaction, frame, actor, "close", {"run_id": frame.run_id})
                return closed_at
        closed_before = (await self.get(frame.user_id, frame.context_id)).closed_at
        if closed_before is None:
            raise errors.Unavailable("The context could not be closed just now. Try again.")
        return closed_before

    async def _usable(self, frame: UserExecutionContext) -> UserExecutionContext:
        stored = await self.get(frame.user_id, frame.context_id)
        _refuse_ended(stored)
        return stored.context

    async def _once(self, frame: UserExecutionContext, asked: bytes, make: _Make) -> UserExecutionContext:
        known = await self._known(frame)
        if known is None:
            try:
                async with self._store.transaction(frame.user_id) as transaction:
                    await make(transaction)
                return frame
            except Conflict:
                # the same request came in twice at once, and the other one was first
                known = await self._known(frame)
        if known is None or known.asked != asked:
            raise errors.AlreadyExists(field="request_id")
        _refuse_ended(known)
        return known.context

    async def _known(self, frame: UserExecutionContext) -> store.Stored | None:
        async with self._store.transaction(frame.user_id) as transaction:
            return await store.context_by_request(transaction, frame.user_id, frame.request_id)


def _refuse_ended(stored: store.Stored) -> None:
    if stored.closed_at is not None:
        raise errors.FailedPrecondition("The execution context is closed.")
    if stored.context.deadline is not None and stored.context.deadline <= datetime.now(UTC):
        raise errors.FailedPrecondition("The deadline of the execution context has passed.")


async def _keep(
    transaction: Transaction, frame: UserExecutionContext, asked: bytes, actor: str, action: str, detail: Mapping[str, object]
) -> None:
    await store.insert_context(transaction, frame, asked)
    await store.insert_audit(transaction, frame, actor, action, {"request_id": frame.request_id, **detail})


def _asked(*parts: str) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
