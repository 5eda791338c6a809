"""Tells the record of access who was refused what: gathered, counted, sent in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from chassis import identity, log, status, telemetry
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_log = log.get(__name__)
_lost = telemetry.meter.create_counter("netra.audit.lost", description="Refusals that could not be told to the record of access.")
_EVERY_S = 1.0
_LAST_S = 2.0
_AT_ONCE = 500
# different refusals within a second, and entries that wait while auth is away
_MOST_DIFFERENT, _MOST_WAITING = 1_000, 10_000
_TOLD = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED"})
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
class _Refusal:
    """What makes two refusals the same."""

    actor: str
    user_id: str
    tenant_id: str
    detail: str


class Refusals:
    """What was refused here. Many of the same within a second are one entry with a number; what is lost is counted, and told too."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now: dict[_Refusal, tuple[int, str]] = {}
        self._waiting: deque[auth_pb2.AuditEntry] = deque()
        self._missing = 0

    def note(self, what: str, error: errors.NetraError, caller: identity.Caller, *, with_token: bool = True) -> None:
        """Take note of a refusal. Anything but a refusal is passed over, and so is a caller who brought nothing to refuse."""
        if error.code not in _TOLD or (error.code == "UNAUTHENTICATED" and not with_token):
            return
        refusal = _refusal(what, error, caller)
        known = self._now.get(refusal)
        if known is None and len(self._now) >= _MOST_DIFFERENT:
            self._lose(1)
        else:
            count, correlation_id = known or (0, telemetry.correlation_id())
            self._now[refusal] = count + 1, correlation_id

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
        while self._waiting:
            batch = [self._waiting[at] for at in range(min(_AT_ONCE, len(self._waiting)))]
            try:
                await self._send(batch)
            except _AWAY:
                return
            except errors.NetraError as error:
                # the same again would be refused again
                _log.error("the record of access does not take these entries", code=error.code, reason=error.message)
                self._lose(len(batch))
            for _ in batch:
                self._waiting.popleft()

    def _gather(self) -> None:
        if self._missing:
            lost = auth_pb2.AuditEntry(action="deny", outcome="lost", detail=f"{self._missing} refusals are not in the record")
            self._missing = 0
            self._wait(lost)
        gathered, self._now = self._now, {}
        for refusal, (count, correlation_id) in gathered.items():
            self._wait(_entry(refusal, count, correlation_id))

    def _wait(self, entry: auth_pb2.AuditEntry) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(entry)
        else:
            self._lose(1)

    def _lose(self, count: int) -> None:
        if not self._missing:
            _log.warning("refusals come faster than they can be recorded")
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


def _refusal(what: str, error: errors.NetraError, caller: identity.Caller) -> _Refusal:
    subject = caller.principal or caller.context
    needed = error.details.get("permission") or error.details.get("feature", "")
    detail = f"{what}: {error.code.lower()}" + (f", {needed}" if needed else "")
    if subject is None:
        return _Refusal(actor(caller), "", "", detail)
    return _Refusal(actor(caller), subject.user_id, subject.tenant_id, detail)


def _entry(refusal: _Refusal, count: int, correlation_id: str) -> auth_pb2.AuditEntry:
    detail = refusal.detail if count == 1 else f"{refusal.detail}; {count} times"
    return auth_pb2.AuditEntry(
        actor=refusal.actor, user_id=refusal.user_id, tenant_id=refusal.tenant_id, action="deny", outcome="refused", detail=detail,
        correlation_id=correlation_id,
    )  # fmt: skip
