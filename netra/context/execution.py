"""UserExecutionContext: whose run this is, on what authority, until when; frozen all the way down, without secrets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from netra import errors, ids
from netra.context import arrivals, attachments, checks
from netra.context.payload import Payload
from netra.context.v1 import context_pb2

MAX_DEPTH = checks.MAX_DEPTH
MAX_AGENT_CONTEXT = 64 * 1024
MAX_AUDIT_METADATA = 16 * 1024
# the agent context that makes a context that of a session's calls of tools; a token has its digest
CALLS = {"kind": "calls"}
_set = object.__setattr__


@dataclass(frozen=True, init=False, repr=False)
class UserExecutionContext(attachments.Attached):
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
        raise TypeError("make a UserExecutionContext with one of its factories, such as from_request, from_token or child")

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

    @property
    def serves_calls(self) -> bool:
        """Whether it is that of a session's calls of tools: it is no run's, and each call has a frame of its own in it (`of_call`)."""
        return self.depth == 0 and self._agent_context.digest == _CALLS.digest

    @property
    def is_expired(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and self.deadline <= datetime.now(UTC)

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

    @classmethod
    async def from_token(cls, token: str, verifies: arrivals.Verifies[UserExecutionContext], service: str) -> UserExecutionContext:
        """The context of a token that `service` brings. Raises `Unauthenticated` unless it was signed for that very service."""
        return await verifies.context(token, service)

    @classmethod
    async def from_grpc(
        cls, call: arrivals.Call | Iterable[tuple[str, str | bytes]], verifies: arrivals.Verifies[UserExecutionContext]
    ) -> UserExecutionContext:
        """The context that a service's call carries, given the call or its metadata. Believed are signatures, and nothing beside them.

        Raises `Unauthenticated` when the call lacks the service's token or the context's, or has two of one.
        """
        bearer, token = arrivals.tokens(call)
        return await cls.from_token(token, verifies, await verifies.service(bearer))

    @classmethod
    def from_asgi(cls, request: object, who: arrivals.Who, **more: Any) -> Self:
        """A root context for a request of FastAPI or Starlette, or an ASGI scope; `more` is what `from_request` takes.

        Who it is for is told by the verified token alone (`who`), never by the request. That gives the audit metadata: address, method,
        path, agent and type of content, no query, no cookie, no credential. Thread, run and request get fresh ids unless they are given.
        """
        return cls._arrived("http", request, who, more)

    @classmethod
    def from_websocket(cls, socket: object, who: arrivals.Who, *, connection_id: str | None = None, **more: Any) -> Self:
        """A root context for a socket: as `from_asgi`, with the connection's id, a fresh one unless it is given."""
        return cls._arrived("websocket", socket, who, {**more, "connection_id": connection_id or ids.ConnectionId.new()})

    @classmethod
    def _arrived(cls, kind: str, request: object, who: arrivals.Who, more: dict[str, Any]) -> Self:
        if owned := sorted(_AUTHORITY & set(more)):
            raise errors.InvalidContext(f"{owned[0]} comes from the verified token alone", field=owned[0])
        told, correlation_id = arrivals.origin(request, kind)
        audit = _payload("audit_metadata", more.pop("audit_metadata", None), MAX_AUDIT_METADATA).plain() or {}
        fresh = {"thread_id": ids.ThreadId.new, "run_id": ids.RunId.new, "request_id": ids.RequestId.new}
        more.update({name: make() for name, make in fresh.items() if not more.get(name)})
        more["correlation_id"] = more.get("correlation_id") or correlation_id
        return cls.from_request(**{name: getattr(who, name) for name in _AUTHORITY}, **more, audit_metadata={**audit, **told})

    def child(
        self, operation: str, request_id: str, agent_context: Mapping[str, Any] | bytes | None = None, scope: Iterable[str] | None = None
    ) -> Self:
        """A context one deeper: same user, thread, run and deadline, the same authority, or with a `scope` less; never more.

        `agent_context` is added to the parent's. Raises `DepthExceeded` for the eleventh generation, `PermissionDenied` when the scope
        names a permission the parent is not allowed.
        """
        if self.depth >= MAX_DEPTH:
            raise errors.DepthExceeded(field="depth")
        if request_id == self.request_id:
            raise errors.InvalidContext("request_id must differ from the parent's", field="request_id")
        for name, payload in (("agent_context", self._agent_context), ("audit_metadata", self._audit_metadata)):
            _bytes(payload, name)
        added = _payload("agent_context", agent_context, MAX_AGENT_CONTEXT)
        what = Payload.of("audit_metadata", {"operation": checks.operation(operation)}, MAX_AUDIT_METADATA)
        return self._made(
            **self._frame(), scope=self._narrowed(scope), context_id=ids.ContextId.new(), request_id=request_id,
            created_at=datetime.now(UTC), depth=self.depth + 1,
            parent_request_id=self.request_id,
            agent_context=self._agent_context.with_("agent_context", added, MAX_AGENT_CONTEXT),
            audit_metadata=self._audit_metadata.with_("audit_metadata", what, MAX_AUDIT_METADATA),
        )  # fmt: skip

    def of_call(self, run_id: str, request_id: str, correlation_id: str) -> Self:
        """The frame of one call, made now, in the context of a session's calls: same context, user, thread and authority; a root as well.

        Raises `InvalidContext` in any other context, and naming the id that is wrong.
        """
        if not self.serves_calls:
            raise errors.InvalidContext("it is the context of one run: other runs have none in it", field="agent_context")
        values: dict[str, Any] = {name: getattr(self, name) for name in checks.FIELDS}
        values |= {"run_id": run_id, "request_id": request_id, "correlation_id": correlation_id, "created_at": datetime.now(UTC)}
        return self._made(**values, agent_context=self._agent_context, audit_metadata=self._audit_metadata)

    def _narrowed(self, scope: Iterable[str] | None) -> frozenset[str] | None:
        if scope is None:
            return self.scope
        wanted = checks.permissions("scope", scope)
        if self.scope is not None and wanted is not None and (more := wanted - self.scope):
            raise errors.PermissionDenied(f"A child cannot have more than its parent: {', '.join(sorted(more))}.", field="scope")
        return wanted

    def _frame(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SHARED}

    def with_transaction(self, transaction: object) -> Self:
        """The same with a database transaction attached, as a new context."""
        return self._again(transaction=attachments.required("transaction", transaction), connection=self._connection)

    def with_connection(self, connection: object, connection_id: str | None = None) -> Self:
        """The same with a connection attached, as a new context; with another `connection_id` when one is given."""
        return self._again(
            transaction=self._transaction, connection=attachments.required("connection", connection), connection_id=connection_id
        )

    def _again(self, *, transaction: object | None, connection: object | None, connection_id: str | None = None) -> Self:
        values: dict[str, Any] = {name: getattr(self, name) for name in checks.FIELDS}
        values["connection_id"] = connection_id or self.connection_id
        again = self._made(**values, agent_context=self._agent_context.copied(), audit_metadata=self._audit_metadata.copied())
        _set(again, "_transaction", transaction)
        _set(again, "_connection", connection)
        return again

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it, as a copy: everything but the attachments, of which it says whether they are there.

        The payloads are None where only their digests are known.
        """
        claims = self.to_claims()
        return {
            **{name: str(value) if isinstance(value, str) else value for name, value in claims.items()},
            "created_at": self.created_at.isoformat(), "deadline": self.deadline.isoformat() if self.deadline else None,
            "agent_context": self._agent_context.plain(), "audit_metadata": self._audit_metadata.plain(),
            "has_transaction": self.has_transaction, "has_connection": self.has_connection,
        }  # fmt: skip

    def audit_trail(self) -> dict[str, Any]:
        """Who did what on whose authority, and where in the tree of contexts: for a log line or an audit entry; no agent context."""
        told = self.to_dict()
        kept = {name: told[name] for name in told if name != "agent_context"}
        return {**kept, "is_expired": self.is_expired, "age_s": (datetime.now(UTC) - self.created_at).total_seconds()}

    def __reduce__(self) -> tuple[Any, ...]:
        # copies and pickles: validated when they are read, and without what is attached
        if self._agent_context.canonical is None or self._audit_metadata.canonical is None:
            return _of_claims, (self.to_claims(),)
        return _of_bytes, (self.to_proto().SerializeToString(deterministic=True),)

    @classmethod
    def from_proto(cls, message: context_pb2.ExecutionContext) -> Self:
        """The context in a message. Raises `InvalidContext` naming the field that is wrong."""
        return cls._made(
            context_id=message.context_id, user_id=message.user_id, tenant_id=message.tenant_id, session_id=message.session_id,
            thread_id=message.thread_id, run_id=message.run_id, request_id=message.request_id, connection_id=message.connection_id,
            roles=message.roles, tier=message.tier, scope=message.scope or None,
            created_at=checks.stamped("created_at", message.created_at),
            deadline=checks.stamped("deadline", message.deadline) if message.HasField("deadline") else None, depth=message.depth,
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
        checks.stamp(message.created_at, self.created_at)
        if self.deadline is not None:
            checks.stamp(message.deadline, self.deadline)
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
        values["created_at"] = checks.moment("created_at", claims["created_at"])
        values["deadline"] = None if claims["deadline"] is None else checks.moment("deadline", claims["deadline"])
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
            "created_at": checks.microseconds(self.created_at),
            "deadline": None if self.deadline is None else checks.microseconds(self.deadline),
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
        for name, kind, check in checks.IN_ORDER:
            value = values[name]
            # an id of the right type was checked when it was made
            if type(value) is not kind or value in ids.NOBODY:
                value = check(name, value)
            _set(made, name, value)
        _set(made, "_agent_context", agent_context)
        _set(made, "_audit_metadata", audit_metadata)
        _set(made, "_transaction", None)
        _set(made, "_connection", None)
        if len(values) != len(checks.IN_ORDER):
            raise TypeError(f"unknown fields: {', '.join(sorted(set(values) - set(checks.FIELDS)))}")
        if made.deadline is not None and made.deadline <= made.created_at:
            raise errors.InvalidContext("deadline must lie after the start", field="deadline")
        if (made.depth == 0) != (made.parent_request_id is None):
            raise errors.InvalidContext("parent_request_id goes with a depth of 1 or more", field="parent_request_id")
        return made


def _payload(name: str, value: Mapping[str, Any] | bytes | None, limit: int) -> Payload:
    return Payload.parse(name, value, limit) if isinstance(value, bytes) else Payload.of(name, {} if value is None else value, limit)


def _content(payload: Payload, name: str) -> Mapping[str, Any]:
    if payload.content is None:
        raise _digest_only(name)
    return payload.content


def _bytes(payload: Payload, name: str) -> bytes:
    # not by way of the content, which would be read for that
    if payload.canonical is None:
        raise _digest_only(name)
    return payload.canonical


def _digest_only(name: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"The token carries {name} as a digest only; GetContext returns it.")


def _of_bytes(message: bytes) -> UserExecutionContext:
    return UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(message))


def _of_claims(claims: Mapping[str, Any]) -> UserExecutionContext:
    return UserExecutionContext.from_claims(claims)


_AUTHORITY = frozenset({"user_id", "tenant_id", "session_id", "roles", "tier", "scope"})
# what a child shares with its parent, authority among it
_SHARED = ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "connection_id", "roles", "tier", "deadline", "correlation_id")
_PLAIN = tuple(name for name in checks.FIELDS if name not in ("roles", "scope", "created_at", "deadline"))
_CLAIMS = frozenset(checks.FIELDS) | {"agent_context_sha256", "audit_metadata_sha256"}
_CALLS = Payload.of("agent_context", CALLS, MAX_AGENT_CONTEXT)
