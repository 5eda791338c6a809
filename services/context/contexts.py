"""Opens, derives, signs and closes contexts; keeps their audit trail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from chassis import identity
from chassis.postgres import Conflict
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import changes, drafts
from services.context.keys import SigningKey

LIFETIME = timedelta(hours=1)
# how long the end of a run may still be told after its deadline
_LATE = timedelta(seconds=60)
_SECURITY = "context"


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
    said: drafts.Said | None = None

    def frame(self, principal: identity.Principal, thread_id: ids.ThreadId) -> UserExecutionContext:
        """The context to store. Raises `InvalidContext`, `PlaceholderValue`, `ReservedKey` or `TooLarge`."""
        return UserExecutionContext.from_request(
            user_id=principal.user_id, tenant_id=principal.tenant_id, session_id=principal.session_id, thread_id=thread_id,
            run_id=self.run_id, request_id=self.request_id, roles=principal.roles, tier=principal.tier, scope=principal.scope,
            correlation_id=self.correlation_id, connection_id=self.connection_id, deadline=self.deadline,
            agent_context=self.agent_context, audit_metadata=self.audit_metadata,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One of a session's calls."""

    run_id: ids.RunId
    correlation_id: ids.CorrelationId


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
class Filter:
    """Which contexts are meant; what is None does not narrow."""

    thread_id: ids.ThreadId | None = None
    run_id: ids.RunId | None = None
    open: bool = False


@dataclass(frozen=True, slots=True)
class About:
    """Which lines of an audit trail are meant; what is None does not narrow."""

    context_id: ids.ContextId | None = None
    thread_id: ids.ThreadId | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the audit trail as it is read; ids of what it is not about are empty."""

    entry_id: int
    at: datetime
    context_id: str
    thread_id: str
    actor: str
    action: str
    correlation_id: str
    detail: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    """A context with a token for `x-netra-context`, and the id of the message that was stored with it."""

    context: UserExecutionContext
    token: str
    expires_at: datetime
    message_id: ids.MessageId | None = None


class Kept(Protocol):
    """Where contexts and their audit trail are kept."""

    async def by_id(self, user_id: ids.UserId, context_id: ids.ContextId, within: ids.ContextId | None = None) -> Stored | None:
        """The user's context with this id; None, too, when it is asked for within another one that is closed."""
        ...

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Stored | None:
        """The user's context that was made under this request id."""
        ...

    async def open(
        self, frame: UserExecutionContext, asked: bytes, line: Line, until: datetime, *, new_thread: bool, first: drafts.First | None = None
    ) -> None:
        """Store a context whose token ends then, its thread when that is new, and a message that begins it.

        Raises `Conflict` when the request id of context or message is taken; `NotFound` when the thread is neither new nor one the user
        sees, `PermissionDenied` when it was granted to them for reading only.
        """
        ...

    async def derive(self, frame: UserExecutionContext, parent_id: ids.ContextId, asked: bytes, line: Line, until: datetime) -> bool:
        """Store a child; False when its parent is closed, or its thread not there for writing any more. Raises `Conflict`."""
        ...

    async def renew(self, user_id: ids.UserId, context_id: ids.ContextId, until: datetime) -> bool:
        """Take note of when the last token of an open context ends; False when there is no open one."""
        ...

    async def rest(self, user_id: ids.UserId, context_id: ids.ContextId, until: datetime) -> None:
        """Take note that the token that ends then is used no more, if it is the last one."""
        ...

    async def close(self, frame: UserExecutionContext, line: Line) -> datetime | None:
        """Close an open context; None when there is no open one."""
        ...


class Contexts:
    """The contexts of all users; each method works for one."""

    def __init__(self, kept: Kept, key: SigningKey, verifier: identity.Verifier) -> None:
        self._kept, self._key, self._verifier, self._trust = kept, key, verifier, verifier.trust

    async def open(self, principal: identity.Principal, opening: Opening, actor: str) -> Signed:
        """A new context, or the one made under the same request id.

        Same means: same thread as asked for, same agent context. Run, connection, deadline, correlation id, session and
        audit metadata belong to the attempt and may differ in a retry; those of the first one stay.
        Raises `NotFound` for a thread that is not there for the user, `PermissionDenied` for one they may only read, `AlreadyExists`
        when something else was asked before, `Unauthenticated` when the session was withdrawn meanwhile.
        With the first one its message is stored, if it has one; what is known already comes without the id of a message.
        """
        thread_id = opening.thread_id or ids.ThreadId.new()
        frame = opening.frame(principal, thread_id)
        asked = _asked("open", opening.thread_id or "", frame.agent_context_digest, *sorted(frame.scope or ()))
        detail = {"request_id": frame.request_id, "session_id": frame.session_id, "run_id": frame.run_id}
        line, until, new_thread = Line(actor, "open", detail), _until(frame), opening.thread_id is None
        first = None if opening.said is None else drafts.First(ids.MessageId.new(), opening.said.draft(frame.run_id))
        # the usual case in one statement: what is known already, or refused, is looked at afterwards
        try:
            await self._kept.open(frame, asked, line, until, new_thread=new_thread, first=first)
            opened = frame
        except (Conflict, errors.NotFound, errors.PermissionDenied) as refused:
            (opened, until), first = await self._known(frame, asked, refused), None
        await self._close_withdrawn(principal, opened)
        signed = self._sign(opened, actor, until)
        return signed if first is None else replace(signed, message_id=first.message_id)

    async def derive(
        self,
        parent: UserExecutionContext,
        request_id: ids.RequestId,
        operation: str,
        agent_context: bytes,
        scope: Sequence[str],
        actor: str,
        call: Call | None = None,
    ) -> Signed:
        """A child of an open context, or the one made under the same request id. A child of that of a session's calls is one `call`'s.

        Raises `FailedPrecondition` when the parent is closed or past its deadline, `DepthExceeded`, `InvalidContext`,
        `PermissionDenied` when the scope names what the parent may not; `InvalidPayload` when there is a call and the parent is no such
        context, or none and it is one.
        """
        if parent.serves_calls != (call is not None):
            raise errors.InvalidPayload("run_id goes with a child of the context of a session's calls, and with no other", field="run_id")
        complete = await self._usable(parent)
        if call is not None:
            complete = complete.of_call(call.run_id, complete.request_id, call.correlation_id)
        frame = complete.child(operation, request_id, agent_context, scope or None)
        run = (call.run_id,) if call is not None else ()
        asked = _asked("derive", complete.context_id, operation, frame.agent_context_digest, *sorted(frame.scope or ()), *run)
        parent_request_id = complete.request_id
        detail = {"request_id": frame.request_id, "operation": operation, "parent_request_id": parent_request_id, "depth": frame.depth}
        detail |= {"run_id": call.run_id} if call is not None else {}
        line, until = Line(actor, "derive", detail), _until(frame)
        try:
            if not await self._kept.derive(frame, complete.context_id, asked, line, until):
                await self._usable(parent)
                raise changes.no_thread()
        except Conflict as refused:
            frame, until = await self._known(frame, asked, refused)
        if self._withdrawn(frame):
            await self._revoke(frame)
            raise closed()
        return self._sign(frame, actor, until)

    async def renew(self, frame: UserExecutionContext, actor: str) -> Signed:
        """A fresh token. Raises `FailedPrecondition` when the context is closed or past its deadline, `NotFound`."""
        return self._sign(frame, actor, await self._renewed(frame))

    async def close(self, frame: UserExecutionContext, actor: str) -> datetime:
        """When the context was closed, now or before. Raises `NotFound`."""
        closed_at = await self._kept.close(frame, Line(actor, "close", {"run_id": frame.run_id}))
        if closed_at is not None:
            return closed_at
        closed_before = (await self._stored(frame)).closed_at
        if closed_before is None:
            raise errors.Unavailable("The context could not be closed just now. Try again.")
        return closed_before

    async def rest(self, frame: UserExecutionContext, until: datetime) -> None:
        """Let nothing wait for a context that came to nothing. Whoever was given a later token of it goes on."""
        await self._kept.rest(frame.user_id, frame.context_id, until)

    def require_standing(self, frame: UserExecutionContext) -> None:
        """That nobody withdrew the session or the user for reasons of security. Raises `FailedPrecondition`.

        What is closed for that reason a moment later confers nothing any more from here on.
        """
        if self._withdrawn(frame):
            raise closed()

    def _withdrawn(self, frame: UserExecutionContext) -> bool:
        withdrawn = self._trust.revocation(_Bearer(frame.user_id, frame.session_id, frame.created_at.timestamp()))
        return withdrawn is not None and withdrawn.security

    async def _revoke(self, frame: UserExecutionContext) -> None:
        await self._kept.close(frame, Line(_SECURITY, "revoke", {"run_id": frame.run_id}))

    def _sign(self, context: UserExecutionContext, actor: str, until: datetime) -> Signed:
        # for the service that asked, and no other; until then, so no lifetime is to be added
        expires_at = int(until.timestamp())
        claims = {"sub": str(context.user_id), "azp": actor, "ctx": context.to_claims(), "exp": expires_at}
        token = identity.sign(self._key.private, self._key.kid, identity.CONTEXT, claims, 0)
        # it comes back with the end of its run, mostly soon
        self._verifier.believe(token, self._key.kid, expires_at)
        return Signed(context, token, until)

    async def _close_withdrawn(self, principal: identity.Principal, opened: UserExecutionContext) -> None:
        # heard of while the context was being stored, and so perhaps before there was one to close
        withdrawn = self._trust.revocation(principal)
        if withdrawn is not None and withdrawn.security:
            await self._revoke(opened)
            raise errors.Unauthenticated("The session has ended. Sign in again.")

    async def _stored(self, frame: UserExecutionContext) -> Stored:
        found = await self._kept.by_id(frame.user_id, frame.context_id)
        if found is None:
            raise no_context()
        return found

    async def _usable(self, frame: UserExecutionContext) -> UserExecutionContext:
        self.require_standing(frame)
        stored = await self._stored(frame)
        _refuse_ended(stored)
        return stored.context

    async def _renewed(self, frame: UserExecutionContext) -> datetime:
        """When the fresh token of a context ends, which is noted."""
        self.require_standing(frame)
        until = _until(frame)
        _refuse_late(frame)
        if not await self._kept.renew(frame.user_id, frame.context_id, until):
            await self._usable(frame)
            raise errors.Unavailable("The context could not be renewed just now. Try again.")
        return until

    async def _known(self, frame: UserExecutionContext, asked: bytes, refused: Exception) -> tuple[UserExecutionContext, datetime]:
        """The context made under the request id before, or by another one at the same moment, and when its fresh token ends."""
        known = await self._kept.by_request(frame.user_id, frame.request_id)
        if known is None and not isinstance(refused, Conflict):
            raise refused
        if known is None or known.asked != asked:
            raise errors.AlreadyExists(field="request_id")
        return known.context, await self._renewed(known.context)


@dataclass(frozen=True, slots=True)
class _Bearer:
    """Of whom it is asked whether they were withdrawn."""

    user_id: str
    session_id: str
    issued_at: float


def closed() -> errors.FailedPrecondition:
    """The error for a context that is closed."""
    return errors.FailedPrecondition("The execution context is closed.")


def no_context() -> errors.NotFound:
    """The error for a context that does not exist, or not for the caller."""
    return errors.NotFound("There is no such context.")


def _until(frame: UserExecutionContext) -> datetime:
    """When a token made now ends: in an hour, and soon after the deadline. In whole seconds, as tokens count."""
    until = datetime.now(UTC) + LIFETIME
    if frame.deadline is not None:
        until = min(until, frame.deadline + _LATE)
    return until.replace(microsecond=0)


def _refuse_ended(stored: Stored) -> None:
    if stored.closed_at is not None:
        raise closed()
    _refuse_late(stored.context)


def _refuse_late(frame: UserExecutionContext) -> None:
    if frame.deadline is not None and frame.deadline <= datetime.now(UTC):
        raise errors.FailedPrecondition("The deadline of the execution context has passed.")


def _asked(*parts: str) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
