"""What a field of an execution context may be; each wrong one is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from netra import errors, ids

MAX_DEPTH = 10
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
_Text = TypeVar("_Text", bound=str)


class _Never:
    """No value is one."""


def is_placeholder(value: str) -> bool:
    """Whether a value was never meant: one of the known stand-ins, or an empty UUID."""
    plain = value.strip().casefold()
    return plain in ids.NOBODY or _stands_in(plain)


def _stands_in(plain: str) -> bool:
    return plain in _PLACEHOLDERS or (len(plain) < _PREFIX_LENGTH and plain.startswith(_PLACEHOLDER_PREFIXES))


def _placeholder(name: str) -> errors.PlaceholderValue:
    return errors.PlaceholderValue(f"{name} is a placeholder; a real value belongs there", field=name)


def _id(kind: type[_Text]) -> Callable[[str, object], _Text]:
    chosen, uuid = _chosen(kind), issubclass(kind, ids.Id)

    def check(name: str, value: object) -> _Text:
        # what nearly all are, in one step
        if uuid and type(value) is str and ids.UUID.fullmatch(value) and value not in ids.NOBODY:
            return str.__new__(kind, value)
        try:
            made = chosen(name, value)
        except errors.InvalidContext:
            if isinstance(value, str) and is_placeholder(value):
                raise _placeholder(name) from None
            raise
        if made in ids.NOBODY:
            raise _placeholder(name)
        return made

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


def permissions(name: str, value: object) -> frozenset[str] | None:
    """What an authority is narrowed to. Raises `InvalidContext` for anything but distinct permissions, at least one; None is none."""
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
    if _stands_in(value):
        raise _placeholder(name)
    return value


def _time(name: str, value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise errors.InvalidContext(f"{name} must be a time with a time zone", field=name)
    return value if value.tzinfo is UTC else value.astimezone(UTC)


def _optional_time(name: str, value: object) -> datetime | None:
    return None if value is None else _time(name, value)


def _depth(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise errors.InvalidContext(f"{name} must be 0 or more", field=name)
    if value > MAX_DEPTH:
        raise errors.DepthExceeded(field=name)
    return value


def operation(value: object) -> str:
    """What a child is made for. Raises `InvalidContext`."""
    if not isinstance(value, str) or not _OPERATION.fullmatch(value):
        raise errors.InvalidContext("operation must be 1 to 128 characters out of A-Z a-z 0-9 . _ : / -", field="operation")
    return value


def stamped(name: str, stamp: Any) -> datetime:
    """The time in a protobuf timestamp. Raises `InvalidContext`."""
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise errors.InvalidContext(f"{name} is out of range", field=name) from None


def stamp(message: Any, time: datetime) -> None:
    """Set a protobuf timestamp to a time with a time zone."""
    # in whole numbers: `FromDatetime` goes by way of the calendar
    message.seconds, micros = divmod(microseconds(time), 1_000_000)
    message.nanos = micros * 1000


def moment(name: str, value: object) -> datetime:
    """The time in a claim, microseconds since 1970. Raises `InvalidContext`."""
    if type(value) is not int:
        raise errors.InvalidContext(f"{name} must be an integer", field=name)
    try:
        return _EPOCH + timedelta(microseconds=value)
    except OverflowError:
        raise errors.InvalidContext(f"{name} is out of range", field=name) from None


def microseconds(time: datetime) -> int:
    """A time as it stands in a claim."""
    return (time - _EPOCH) // _MICROSECOND


_CHECKS: dict[str, tuple[type, Callable[[str, object], object]]] = {
    "context_id": (ids.ContextId, _id(ids.ContextId)), "user_id": (ids.UserId, _id(ids.UserId)),
    "tenant_id": (ids.TenantId, _id(ids.TenantId)), "session_id": (ids.SessionId, _id(ids.SessionId)),
    "thread_id": (ids.ThreadId, _id(ids.ThreadId)), "run_id": (ids.RunId, _id(ids.RunId)),
    "request_id": (ids.RequestId, _chosen(ids.RequestId)), "connection_id": (ids.ConnectionId, _optional(_id(ids.ConnectionId))),
    "roles": (_Never, _roles), "tier": (_Never, _word), "scope": (_Never, permissions), "created_at": (_Never, _time),
    "deadline": (_Never, _optional_time), "depth": (_Never, _depth),
    "parent_request_id": (ids.RequestId, _optional(_chosen(ids.RequestId))),
    "correlation_id": (ids.CorrelationId, _id(ids.CorrelationId)),
}  # fmt: skip
FIELDS = tuple(_CHECKS)
# name, the type whose values were checked at their birth, the check of all others
IN_ORDER = tuple((name, kind, check) for name, (kind, check) in _CHECKS.items())
