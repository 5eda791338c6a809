"""Typed ids: one type each, validated at birth, sortable by the time they were made."""

from __future__ import annotations

import os
import re
import time
from typing import Self, TypeVar

from netra import errors

NOBODY = frozenset({"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"})
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CORRELATION = re.compile(r"[0-9a-f]{32}")
_AGENT = re.compile(r"[a-z][a-z0-9_.\-]{0,63}")
_REQUEST = re.compile(r"[A-Za-z0-9._:\-]{1,64}")


def uuid7() -> str:
    """A random, time-ordered UUID (RFC 9562, version 7), as text."""
    # by hand: uuid.UUID costs five times as much, and ids are made by the thousand
    random = os.urandom(10)
    text = f"{time.time_ns() // 1_000_000:012x}{random.hex()}"
    return f"{text[:8]}-{text[8:12]}-7{text[13:16]}-{'89ab'[random[2] >> 4 & 3]}{text[17:20]}-{text[20:]}"


class Id(str):
    """A UUID as lower-case text. Raises `InvalidPayload` naming the field when it is not one."""

    __slots__ = ()
    field = "id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not UUID.fullmatch(value):
            raise errors.InvalidPayload(f"{cls.field} must be a UUID in lower case", field=cls.field)
        return str.__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh id, later than all made before it (to the millisecond)."""
        return str.__new__(cls, uuid7())


class UserId(Id):
    """A user."""

    __slots__ = ()
    field = "user_id"


class TenantId(Id):
    """An organisation."""

    __slots__ = ()
    field = "tenant_id"


class SessionId(Id):
    """One sign-in and everything renewed from it."""

    __slots__ = ()
    field = "session_id"


class ThreadId(Id):
    """A conversation."""

    __slots__ = ()
    field = "thread_id"


class RunId(Id):
    """One execution of one agent."""

    __slots__ = ()
    field = "run_id"


class MessageId(Id):
    """One entry of a thread."""

    __slots__ = ()
    field = "message_id"


class ArtifactId(Id):
    """One file of a user."""

    __slots__ = ()
    field = "artifact_id"


class ContextId(Id):
    """One stored execution context."""

    __slots__ = ()
    field = "context_id"


class EventId(Id):
    """One entry of the record."""

    __slots__ = ()
    field = "event_id"


class ToolCallId(Id):
    """One call of one tool."""

    __slots__ = ()
    field = "tool_call_id"


class ApprovalId(Id):
    """One decision that a run asked people for."""

    __slots__ = ()
    field = "approval_id"


class ConnectionId(Id):
    """One socket."""

    __slots__ = ()
    field = "connection_id"


class ExecutionId(Id):
    """One turn of one agent within a run."""

    __slots__ = ()
    field = "execution_id"


class AgentId(str):
    """What an agent is called: 1 to 64 characters of `a-z 0-9 . _ -`, a letter first."""

    __slots__ = ()
    field = "agent_id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not _AGENT.fullmatch(value):
            message = f"{cls.field} must be 1 to 64 characters out of a-z 0-9 . _ -, and begin with a letter"
            raise errors.InvalidPayload(message, field=cls.field)
        return str.__new__(cls, value)


class RequestId(str):
    """What a client calls its request: 1 to 64 characters of `A-Z a-z 0-9 . _ : -`."""

    __slots__ = ()
    field = "request_id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not _REQUEST.fullmatch(value):
            message = f"{cls.field} must be 1 to 64 characters out of A-Z a-z 0-9 . _ : -"
            raise errors.InvalidPayload(message, field=cls.field)
        return str.__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh request id."""
        return str.__new__(cls, uuid7())


class CorrelationId(str):
    """What joins all traces, logs, events and errors of one request: 128 random bits, hex."""

    __slots__ = ()
    field = "correlation_id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not _CORRELATION.fullmatch(value):
            raise errors.InvalidPayload("correlation_id must be 32 hexadecimal digits in lower case", field=cls.field)
        return str.__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh correlation id."""
        return str.__new__(cls, os.urandom(16).hex())


def is_correlation_id(value: str) -> bool:
    """Whether the text is a correlation id."""
    return bool(_CORRELATION.fullmatch(value))


_Known = TypeVar("_Known", bound=Id)


def _ensured(kind: type[_Known], value: object) -> _Known:
    if isinstance(value, Id) and type(value) not in (Id, kind):
        raise errors.InvalidPayload(f"{kind.field} must not be what another field names: this is a {value.field}", field=kind.field)
    if not isinstance(value, str) or value in NOBODY:
        raise errors.InvalidPayload(f"{kind.field} must be a UUID that stands for something", field=kind.field)
    return value if isinstance(value, kind) else kind(value)


def ensure_user_id(value: object) -> UserId:
    """The value, if it is one. Raises `InvalidPayload` naming `user_id`."""
    return _ensured(UserId, value)


def ensure_tenant_id(value: object) -> TenantId:
    """The value, if it is one. Raises `InvalidPayload` naming `tenant_id`."""
    return _ensured(TenantId, value)


def ensure_session_id(value: object) -> SessionId:
    """The value, if it is one. Raises `InvalidPayload` naming `session_id`."""
    return _ensured(SessionId, value)


def ensure_thread_id(value: object) -> ThreadId:
    """The value, if it is one. Raises `InvalidPayload` naming `thread_id`."""
    return _ensured(ThreadId, value)


def ensure_run_id(value: object) -> RunId:
    """The value, if it is one. Raises `InvalidPayload` naming `run_id`."""
    return _ensured(RunId, value)


def ensure_request_id(value: object) -> RequestId:
    """The value, if it is one. Raises `InvalidPayload` naming `request_id`."""
    return value if isinstance(value, RequestId) else RequestId(value if isinstance(value, str) else "")


def ensure_message_id(value: object) -> MessageId:
    """The value, if it is one. Raises `InvalidPayload` naming `message_id`."""
    return _ensured(MessageId, value)


def ensure_connection_id(value: object) -> ConnectionId:
    """The value, if it is one. Raises `InvalidPayload` naming `connection_id`."""
    return _ensured(ConnectionId, value)


def ensure_agent_id(value: object) -> AgentId:
    """The value, if it is one. Raises `InvalidPayload` naming `agent_id`."""
    return value if isinstance(value, AgentId) else AgentId(value if isinstance(value, str) else "")


def ensure_execution_id(value: object) -> ExecutionId:
    """The value, if it is one. Raises `InvalidPayload` naming `execution_id`."""
    return _ensured(ExecutionId, value)
