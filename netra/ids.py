"""Typed ids: one type each, validated at birth, sortable by the time they were made."""

from __future__ import annotations

import re
import secrets
import time
import uuid
from typing import Self

from netra import errors

_CORRELATION = re.compile(r"[0-9a-f]{32}")
_REQUEST = re.compile(r"[A-Za-z0-9._:\-]{1,64}")


def uuid7() -> str:
    """A random, time-ordered UUID (RFC 9562, version 7), as text."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = (value & ~(0xF << 76) | 0x7 << 76) & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


class Id(str):
    """A UUID as lower-case text. Raises `InvalidPayload` naming the field when it is not one."""

    __slots__ = ()
    field = "id"

    def __new__(cls, value: str) -> Self:
        try:
            canonical: str | None = str(uuid.UUID(value))
        except (ValueError, AttributeError, TypeError):
            canonical = None
        if canonical != value:
            raise errors.InvalidPayload(f"{cls.field} must be a UUID in lower case", field=cls.field)
        return super().__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh id, later than all made before it (to the millisecond)."""
        return cls(uuid7())


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


class ConnectionId(Id):
    """One socket."""

    __slots__ = ()
    field = "connection_id"


class RequestId(str):
    """What a client calls its request: 1 to 64 characters of `A-Z a-z 0-9 . _ : -`."""

    __slots__ = ()
    field = "request_id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not _REQUEST.fullmatch(value):
            message = f"{cls.field} must be 1 to 64 characters out of A-Z a-z 0-9 . _ : -"
            raise errors.InvalidPayload(message, field=cls.field)
        return super().__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh request id."""
        return cls(uuid7())


class CorrelationId(str):
    """What joins all traces, logs, events and errors of one request: 128 random bits, hex."""

    __slots__ = ()
    field = "correlation_id"

    def __new__(cls, value: str) -> Self:
        if not isinstance(value, str) or not _CORRELATION.fullmatch(value):
            raise errors.InvalidPayload("correlation_id must be 32 hexadecimal digits in lower case", field=cls.field)
        return super().__new__(cls, value)

    @classmethod
    def new(cls) -> Self:
        """A fresh correlation id."""
        return cls(secrets.token_hex(16))


def is_correlation_id(value: str) -> bool:
    """Whether the text is a correlation id."""
    return bool(_CORRELATION.fullmatch(value))
