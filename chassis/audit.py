"""Tells the record of access who was refused what, and what is issued too often to wait for it: gathered, counted, sent later."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from chassis import identity, log, status, telemetry
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_log = log.get(__name__)
_lost = telemetry.meter.create_counter("netra.audit.lost", description="Entries that could not be told to the record of access.")
_EVERY_S = 1.0
_LAST_S = 2.0
_AT_ONCE = 500
_MOST_TEXT = 1_000
# different entries within a second, and entries that wait while auth is away
_MOST_DIFFERENT, _MOST_WAITING = 1_000, 10_000
_TOLD = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "SECURITY_VIOLATION"})
_AWAY = (errors.Unavailable, errors.DeadlineExceeded, errors.RateLimited, errors.Unauthenticated)
Send = Callable[[Sequence[auth_pb2.AuditEntry]], Awaitable[None]]


def actor(caller: identity.Caller) -> str:
    """Who acts, as the record names them; a service that acts for a user names both."""
    if caller.principal is not None:
        user = f"user:{caller.principal.user_id}"
        return f"service:{caller.principal.actor} for {user}" if caller.principal.actor else user
    if caller.service:
        return f"service:{caller.service} for user:{caller.context.user_id}" if caller.context is not None else f"service:{caller.service}"
    return "anonymous"


def to_auth(stub: auth_pb2_grpc.AuthServiceAsyncStub, authorized: Callable[[], Awaitable[tuple[tuple[str, str], ...]]]) -> Send:
    """Send over gRPC, in the name of this process."""

    async def send(entries: Sequence[auth_pb2.AuditEntry]) -> None:
        with status.translated():
            await stub.AppendAudit(auth_pb2.AppendAuditRequest(entries=entries), metadata=await authorized(), timeout=5.0)

    return send


@dataclass(frozen=True, slots=True)
class _Told:
    """What makes two entries the same."""

    actor: str
    user_id: str
    tenant_id: str
    action: str
    outcome: str
    detail: str


class Refusals:
    """What was refused here. Many of the same within a second are one entry with a number; what is lost is counted, and told too."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now: dict[_Told, tuple[int, str]] = {}
        self._waiting: deque[auth_pb2.AuditEntry] = deque()
        self._missing = 0

    def note(self, what: str, error: errors.NetraError, caller: identity.Caller, *, with_credential: bool = True) -> None:
        """Take note of a refusal. Anything but a refusal is passed over, and so is a caller who brought nothing to refuse."""
        if error.code in _TOLD and (error.code != "UNAUTHENTICATED" or with_credential):
            self._count(_refusal(what, error, caller))

    def issued(self, to: str, detail: str, *, user_id: str = "") -> None:
        """Take note of a token that an actor was given; they do not wait until that is on record."""
        self._count(_Told(to, user_id, "", "issue_token", "ok", _clean(detail)))

    def done(self, action: str, detail: str, caller: identity.Caller) -> None:
        """Take note of what somebody changed for all; they do not wait until that is on record."""
        subject = caller.principal
        user_id, tenant_id = (subject.user_id, subject.tenant_id) if subject is not None else ("", "")
        self._count(_Told(actor(caller), user_id, tenant_id, action, "ok", _clean(detail)))

    def _count(self, told: _Told) -> None:
        known = self._now.get(told)
        if known is None and len(self._now) >= _MOST_DIFFERENT:
            self._lose(1)
        else:
            count, correlation_id = known or (0, telemetry.correlation_id())
            self._now[told] = count + 1, correlation_id

    async def run(self) -> None:
        """Send every second, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.flush()

    async def close(self) -> None:
        """Send what is left, in a moment or not at all."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await self.flush()

    async def flush(self) -> None:
        """Send what was gathered. What cannot be sent now waits."""
        self._gather()
        at_once = _AT_ONCE
        while self._waiting:
            batch = list(itertools.islice(self._waiting, at_once))
            try:
                await self._send(batch)
            except _AWAY:
                return
            except errors.NetraError as error:
                # the same again would be refused again; it is all but surely one of them
                if len(batch) > 1:
                    at_once = len(batch) // 2
                    continue
                _log.error("the record of access does not take this entry", code=error.code, reason=error.message)
                self._lose(1)
            for _ in batch:
                self._waiting.popleft()
            at_once = min(at_once * 2, _AT_ONCE)

    def _gather(self) -> None:
        # the last place is kept for this: the number must not be lost as well; while there is none, it grows
        if self._missing and len(self._waiting) < _MOST_WAITING:
            lost = f"{self._missing} entries are not in the record"
            self._waiting.append(auth_pb2.AuditEntry(action="deny", outcome="lost", detail=lost))
            self._missing = 0
        gathered, self._now = self._now, {}
        for told, (count, correlation_id) in gathered.items():
            self._wait(_entry(told, count, correlation_id))

    def _wait(self, entry: auth_pb2.AuditEntry) -> None:
        if len(self._waiting) < _MOST_WAITING - 1:
            self._waiting.append(entry)
        else:
            self._lose(1)

    def _lose(self, count: int) -> None:
        if not self._missing:
            _log.warning("entries are lost: they come faster than they can be recorded, or are not taken")
        self._missing += count
        _lost.add(count)


class Acts:
    """What is done on somebody's behalf: told before it is done, or it is not done."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def tell(self, action: str, outcome: str, caller: identity.Caller, *, user_id: str, tenant_id: str) -> None:
        """Record an act upon a user. Raises `Unavailable` when the record of access cannot be reached."""
        entry = auth_pb2.AuditEntry(
            actor=actor(caller), user_id=user_id, tenant_id=tenant_id, action=action, outcome=outcome,
            correlation_id=telemetry.correlation_id(),
        )  # fmt: skip
        try:
            await self._send([entry])
        except _AWAY:
            raise errors.Unavailable(
                "What is done here is recorded first, and the record of access cannot be reached. Try again."
            ) from None


def _refusal(what: str, error: errors.NetraError, caller: identity.Caller) -> _Told:
    subject = caller.principal or caller.context
    needed = error.details.get("permission") or error.details.get("feature", "")
    detail = _clean(f"{what}: {error.code.lower()}" + (f", {needed}" if needed else ""))
    user_id, tenant_id = (subject.user_id, subject.tenant_id) if subject is not None else ("", "")
    return _Told(actor(caller), user_id, tenant_id, "deny", "refused", detail)


def _clean(text: str) -> str:
    """A line of a bearable length: what came from outside may hold anything, and one bad entry would hold up the others."""
    line = text[:_MOST_TEXT]
    return line if line.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in line)


def _entry(told: _Told, count: int, correlation_id: str) -> auth_pb2.AuditEntry:
    detail = told.detail if count == 1 else f"{told.detail}; {count} times"
    return auth_pb2.AuditEntry(
        actor=told.actor, user_id=told.user_id, tenant_id=told.tenant_id, action=told.action, outcome=told.outcome, detail=detail,
        correlation_id=correlation_id,
    )  # fmt: skip
