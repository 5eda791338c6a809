"""UserExecutionContext: whose run this is, on what authority, until when; frozen all the way down, without secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

from netra import errors, ids
from netra.context.payload import Payload
from netra.context.v1 import context_pb2

MAX_DEPTH = 10
MAX_AGENT_CONTEXT = 64 * 1024
MAX_AUDIT_METADATA = 16 * 1024
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PERMISSION = re.compile(r"[a-z_]{1,32}:[a-z_]{1,32}")
_MAX_SCOPE = 64
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OPERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/\-]{0,127}")
_PLACEHOLDERS = frozenset(
    "registry placeholder default temp none null undefined 0 1 xxx yyy example test demo sample template mock fake dummy".split()
)
_PLACEHOLDER_PREFIXES = tuple(
    f"{word}_" for word in ("placeholder", "registry", "default", "temp", "example", "demo", "sample", "template", "mock", "fake")
)
_PREFIX_LENGTH = 20  # a longer value with such a prefix was meant
_EMPTY_IDS = frozenset({"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"})
_Text = TypeVar("_Text", bound=str)


@dataclass(frozen=True, init=False, repr=False)
class UserExecutionContext:
    """The frame one run executes in. Made by factories only; nothing in it can be changed, and it holds no secret.

    One that came out of a signed token (`from_claims`) knows `agent_context` and `audit_metadata` by digest only.
    """

    __slots__ = (  # noqa: RUF023 - in the order of the fields
        "context_id", "user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id", "connection_id", "roles", "tier",
        "scope", "created_at", "deadline", "depth", "parent_request_id", "correlation_id", "_agent_context", "_audit_metadata",
    )  # fmt: skip

    context_id: ids.ContextId
    user_id: ids.UserId
    tenant_id: ids.TenantId
    session_id: ids.SessionId
    thread_id: ids.ThreadId
    run_id: ids.RunId
    request_id: ids.RequestId
    connection_id: ids.ConnectionId | None
    roles: tuple[str, ...]
    tier: str
    # the permissions it is narrowed to; None when it is not
    scope: frozenset[str] | None
    created_at: datetime
    deadline: datetime | None
    depth: int
    parent_request_id: ids.RequestId | None
    correlation_id: ids.CorrelationId
    _agent_context: Payload
    _audit_metadata: Payload

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("make a UserExecutionContext with one of its factories: from_request, from_proto, from_claims, child")

    def __repr__(self) -> str:
        return f"<UserExecutionContext {self.context_id} user={self.user_id} run={self.run_id} depth={self.depth}>"

    @property
    def agent_context(self) -> Mapping[str, Any]:
        """What the agent is given to know. Raises `FailedPrecondition` when only its digest is known."""
        return _content(self._agent_context, "agent_context")

    @property
    def audit_metadata(self) -> Mapping[str, Any]:
        """Where the request came from and how. Raises `FailedPrecondition` when only its digest is known."""
        return _content(self._audit_metadata, "audit_metadata")

    @property
    def agent_context_digest(self) -> str:
        """SHA-256 of the canonical agent context."""
        return self._agent_context.digest

    @classmethod
    def from_request(
        cls,
        *,
        user_id: str,
        tenant_id: str,
        session_id: str,
        thread_id: str,
        run_id: str,
        request_id: str,
        roles: Iterable[str],
        tier: str,
        scope: Iterable[str] | None = None,
        correlation_id: str | None = None,
        connection_id: str | None = None,
        deadline: datetime | None = None,
        agent_context: Mapping[str, Any] | bytes | None = None,
        audit_metadata: Mapping[str, Any] | bytes | None = None,
    ) -> Self:
        """A root context, made now. Raises `PlaceholderValue`, `ReservedKey` or `InvalidContext`, each naming the field."""
        return cls._made(
            context_id=ids.ContextId.new(), user_id=user_id, tenant_id=tenant_id, session_id=session_id, thread_id=thread_id,
            run_id=run_id, request_id=request_id, connection_id=connection_id, roles=roles, tier=tier, scope=scope,
            created_at=datetime.now(UTC), deadline=deadline, depth=0, parent_request_id=None,
            correlation_id=correlation_id or ids.CorrelationId.new(),
            agent_context=_payload("agent_context", agent_context, MAX_AGENT_CONTEXT),
            audit_metadata=_payload("audit_metadata", audit_metadata, MAX_AUDIT_METADATA),
        )  # fmt: skip

    def child(
        self, operation: str, request_id: str, agent_context: Mapping[str, Any] | bytes | None = None, scope: Iterable[str] | None = None
    ) -> Self:
        """A context one deeper: same user, thread, run and deadline, the same authority, or with a `scope` less; never more.

        `agent_context` is added to the parent's. Raises `DepthExceeded` for the eleventh generation, `PermissionDenied` when the scope
        names a permission the parent is not allowed.
        """
        if self.depth >= MAX_DEPTH:
            raise errors.DepthExceeded(field="depth")
        if not isinstance(operation, str) or not _OPERATION.fullmatch(operation):
            raise errors.InvalidContext("operation must be 1 to 128 characters out of A-Z a-z 0-9 . _ : / -", field="operation")
        if request_id == self.request_id:
            raise errors.InvalidContext("request_id must differ from the parent's", field="request_id")
        added = _content(_payload("agent_context", agent_context, MAX_AGENT_CONTEXT), "agent_context")
        known, audit = {**self.agent_context, **added}, {**self.audit_metadata, "operation": operation}
        return self._made(
            **self._frame(), scope=self._narrowed(scope), context_id=ids.ContextId.new(), request_id=request_id,
            created_at=datetime.now(UTC), depth=self.depth + 1,
            parent_request_id=self.request_id, agent_context=Payload.of("agent_context", known, MAX_AGENT_CONTEXT),
            audit_metadata=Payload.of("audit_metadata", audit, MAX_AUDIT_METADATA),
        )  # fmt: skip

    def _narrowed(self, scope: Iterable[str] | None) -> frozenset[str] | None:
        if scope is None:
            return self.scope
        wanted = _scope("scope", scope)
        if self.scope is not None and wanted is not None and (more := wanted - self.scope):
            raise errors.PermissionDenied(f"A child cannot have more than its parent: {', '.join(sorted(more))}.", field="scope")
        return wanted

    def _frame(self) -> dict[str, Any]:
        # what a child shares with its parent, authority among it
        names = "user_id tenant_id session_id thread_id run_id connection_id roles tier deadline correlation_id"
        return {name: getattr(self, name) for name in names.split()}

    @classmethod
    def from_proto(cls, message: context_pb2.ExecutionContext) -> Self:
        """The context in a message. Raises `InvalidContext` naming the field that is wrong."""
        return cls._made(
            context_id=message.context_id, user_id=message.user_id, tenant_id=message.tenant_id, session_id=message.session_id,
            thread_id=message.thread_id, run_id=message.run_id, request_id=message.request_id, connection_id=message.connection_id,
            roles=message.roles, tier=message.tier, scope=message.scope or None, created_at=_datetime("created_at", message.created_at),
            deadline=_datetime("deadline", message.deadline) if message.HasField("deadline") else None, depth=message.depth,
            parent_request_id=message.parent_request_id, correlation_id=message.correlation_id,
            agent_context=Payload.parse("agent_context", message.agent_context, MAX_AGENT_CONTEXT),
            audit_metadata=Payload.parse("audit_metadata", message.audit_metadata, MAX_AUDIT_METADATA),
        )  # fmt: skip

    def to_proto(self) -> context_pb2.ExecutionContext:
        """As a message; `from_proto` and back gives the same bytes. Raises `FailedPrecondition` when only digests are known."""
        message = context_pb2.ExecutionContext(
            context_id=self.context_id, user_id=self.user_id, tenant_id=self.tenant_id, session_id=self.session_id,
            thread_id=self.thread_id, run_id=self.run_id, request_id=self.request_id, connection_id=self.connection_id or "",
            roles=self.roles, tier=self.tier, scope=sorted(self.scope or ()), depth=self.depth,
            parent_request_id=self.parent_request_id or "",
            correlation_id=self.correlation_id, agent_context=self.canonical_agent_context,
            audit_metadata=self.canonical_audit_metadata,
        )  # fmt: skip
        message.created_at.FromDatetime(self.created_at)
        if self.deadline is not None:
            message.deadline.FromDatetime(self.deadline)
        return message

    @property
    def canonical_agent_context(self) -> bytes:
        """`agent_context` as canonical JSON (sorted keys, no spaces, UTF-8)."""
        return _bytes(self._agent_context, "agent_context")

    @property
    def canonical_audit_metadata(self) -> bytes:
        """`audit_metadata` as canonical JSON."""
        return _bytes(self._audit_metadata, "audit_metadata")

    @classmethod
    def from_claims(cls, claims: Mapping[str, Any]) -> Self:
        """The context in the `ctx` claim of a verified token. Raises `InvalidContext`."""
        if not isinstance(claims, Mapping) or set(claims) != _CLAIMS:
            raise errors.InvalidContext("the claims of a context are not exactly those they must be", field="ctx")
        values = {name: value for name, value in claims.items() if name not in ("agent_context_sha256", "audit_metadata_sha256")}
        values["created_at"] = _moment("created_at", claims["created_at"])
        values["deadline"] = None if claims["deadline"] is None else _moment("deadline", claims["deadline"])
        return cls._made(
            **values,
            agent_context=Payload.known("agent_context", claims["agent_context_sha256"]),
            audit_metadata=Payload.known("audit_metadata", claims["audit_metadata_sha256"]),
        )

    def to_claims(self) -> dict[str, Any]:
        """The `ctx` claim: everything but the two payloads, for which their digests stand.

        A token travels in metadata on every call, and gRPC refuses more than 8 KiB of that.
        """
        plain: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        return {
            **plain, "roles": list(self.roles), "scope": None if self.scope is None else sorted(self.scope),
            "created_at": _microseconds(self.created_at),
            "deadline": None if self.deadline is None else _microseconds(self.deadline),
            "agent_context_sha256": self._agent_context.digest, "audit_metadata_sha256": self._audit_metadata.digest,
        }  # fmt: skip

    @classmethod
    def restored(cls, **values: Any) -> Self:
        """A stored context, field by field, payloads as canonical JSON. Validates like every factory."""
        agent = Payload.parse("agent_context", values.pop("agent_context"), MAX_AGENT_CONTEXT)
        audit = Payload.parse("audit_metadata", values.pop("audit_metadata"), MAX_AUDIT_METADATA)
        return cls._made(**values, agent_context=agent, audit_metadata=audit)

    @classmethod
    def _made(cls, *, agent_context: Payload, audit_metadata: Payload, **values: Any) -> Self:
        made = object.__new__(cls)
        for name, check in _CHECKS.items():
            object.__setattr__(made, name, check(name, values.pop(name)))
        object.__setattr__(made, "_agent_context", agent_context)
        object.__setattr__(made, "_audit_metadata", audit_metadata)
        if values:
            raise TypeError(f"unknown fields: {', '.join(values)}")
        if made.deadline is not None and made.deadline <= made.created_at:
            raise errors.InvalidContext("deadline must lie after the start", field="deadline")
        if (made.depth == 0) != (made.parent_request_id is None):
            raise errors.InvalidContext("parent_request_id goes with a depth of 1 or more", field="parent_request_id")
        return made


def _payload(name: str, value: Mapping[str, Any] | bytes | None, limit: int) -> Payload:
    return Payload.parse(name, value, limit) if isinstance(value, bytes) else Payload.of(name, {} if value is None else value, limit)


def _content(payload: Payload, name: str) -> Mapping[str, Any]:
    if payload.content is None:
        raise errors.FailedPrecondition(f"The token carries {name} as a digest only; GetContext returns it.")
    return payload.content


def _bytes(payload: Payload, name: str) -> bytes:
    _content(payload, name)
    return payload.canonical or b""


def is_placeholder(value: str) -> bool:
    """Whether a value was never meant: one of the known stand-ins, or an empty UUID."""
    plain = value.strip().casefold()
    if plain in _PLACEHOLDERS or plain in _EMPTY_IDS:
        return True
    return len(plain) < _PREFIX_LENGTH and plain.startswith(_PLACEHOLDER_PREFIXES)


def _id(kind: type[_Text]) -> Callable[[str, object], _Text]:
    chosen = _chosen(kind)

    def check(name: str, value: object) -> _Text:
        if isinstance(value, str) and is_placeholder(value):
            raise errors.PlaceholderValue(f"{name} is a placeholder; a real value belongs there", field=name)
        return chosen(name, value)

    return check


def _chosen(kind: type[_Text]) -> Callable[[str, object], _Text]:
    """The check of an id that clients choose: `1` is as good a name for a request as any."""

    def check(name: str, value: object) -> _Text:
        if not isinstance(value, str) or not value.strip():
            raise errors.InvalidContext(f"{name} is required", field=name)
        try:
            return value if type(value) is kind else kind(value)
        except errors.InvalidPayload as error:
            raise errors.InvalidContext(error.message.replace(getattr(kind, "field", name), name, 1), field=name) from None

    return check


def _optional(check: Callable[[str, object], _Text]) -> Callable[[str, object], _Text | None]:
    return lambda name, value: None if value is None or value == "" else check(name, value)


def _roles(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise errors.InvalidContext(f"{name} must be a list", field=name)
    roles = tuple(_word(name, role) for role in value)
    if not roles or len(set(roles)) != len(roles):
        raise errors.InvalidContext(f"{name} must name at least one role, and none twice", field=name)
    return roles


def _scope(name: str, value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise errors.InvalidContext(f"{name} must be a list of permissions", field=name)
    scope = list(value)
    if not all(isinstance(item, str) and _PERMISSION.fullmatch(item) for item in scope):
        raise errors.InvalidContext(f"{name} must be a list of permissions such as runs:read", field=name)
    if not 0 < len(scope) <= _MAX_SCOPE or len(set(scope)) != len(scope):
        raise errors.InvalidContext(f"{name} must name 1 to {_MAX_SCOPE} permissions, and none twice", field=name)
    return frozenset(scope)


def _word(name: str, value: object) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise errors.InvalidContext(f"{name} must be a lower-case word", field=name)
    if is_placeholder(value):
        raise errors.PlaceholderValue(f"{name} is a placeholder; a real value belongs there", field=name)
    return value


def _time(name: str, value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise errors.InvalidContext(f"{name} must be a time with a time zone", field=name)
    return value.astimezone(UTC)


def _depth(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise errors.InvalidContext(f"{name} must be 0 or more", field=name)
    if value > MAX_DEPTH:
        raise errors.DepthExceeded(field=name)
    return value


def _datetime(name: str, stamp: Any) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise errors.InvalidContext(f"{name} is out of range", field=name) from None


def _moment(name: str, value: object) -> datetime:
    if type(value) is not int:
        raise errors.InvalidContext(f"{name} must be an integer", field=name)
    try:
        return _EPOCH + timedelta(microseconds=value)
    except OverflowError:
        raise errors.InvalidContext(f"{name} is out of range", field=name) from None


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "context_id": _id(ids.ContextId), "user_id": _id(ids.UserId), "tenant_id": _id(ids.TenantId), "session_id": _id(ids.SessionId),
    "thread_id": _id(ids.ThreadId), "run_id": _id(ids.RunId), "request_id": _chosen(ids.RequestId),
    "connection_id": _optional(_id(ids.ConnectionId)), "roles": _roles, "tier": _word, "scope": _scope, "created_at": _time,
    "deadline": lambda name, value: None if value is None else _time(name, value), "depth": _depth,
    "parent_request_id": _optional(_chosen(ids.RequestId)), "correlation_id": _id(ids.CorrelationId),
}  # fmt: skip
_PLAIN = tuple(name for name in _CHECKS if name not in ("roles", "scope", "created_at", "deadline"))
_CLAIMS = frozenset(_CHECKS) | {"agent_context_sha256", "audit_metadata_sha256"}
