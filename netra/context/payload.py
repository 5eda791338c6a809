"""JSON objects that cannot change: canonical bytes, their digest, and a frozen view."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

from netra import errors

MAX_NESTING = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RESERVED = frozenset(
    {
        "user", "user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id", "context_id", "connection_id",
        "websocket_client_id", "websocket_connection_id", "created_at", "db_session", "roles", "tier", "scope", "permissions",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Payload:
    """One JSON object. Two are equal when their canonical bytes are; one known by its digest alone has no content."""

    digest: str
    canonical: bytes | None = field(compare=False, repr=False)
    content: Mapping[str, Any] | None = field(compare=False, repr=False)

    @classmethod
    def of(cls, name: str, value: object, limit: int) -> Payload:
        """Freeze a copy of `value`. Raises `InvalidContext`, `ReservedKey` or `TooLarge` naming the field."""
        canonical = _canonical(name, value)
        if len(canonical) > limit:
            raise errors.TooLarge(f"{name} has {len(canonical)} bytes; at most {limit} are allowed", field=name)
        copy = json.loads(canonical)
        _refuse_reserved(name, copy)
        return cls(hashlib.sha256(canonical).hexdigest(), canonical, _frozen(name, copy, MAX_NESTING))

    @classmethod
    def parse(cls, name: str, raw: bytes, limit: int) -> Payload:
        """Read JSON text, strictly; nothing is an empty object."""
        if len(raw) > limit:
            raise errors.TooLarge(f"{name} has {len(raw)} bytes; at most {limit} are allowed", field=name)
        try:
            value = json.loads(raw or b"{}", object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise errors.InvalidContext(f"{name} is not valid JSON: {error}", field=name) from None
        return cls.of(name, value, limit)

    @classmethod
    def known(cls, name: str, digest: object) -> Payload:
        """A payload of which only the digest is known."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise errors.InvalidContext(f"{name} must be a SHA-256 digest in hexadecimal digits", field=name)
        return cls(digest, None, None)


def _canonical(name: str, value: object) -> bytes:
    if not isinstance(value, Mapping):
        raise errors.InvalidContext(f"{name} must be a JSON object", field=name)
    try:
        return json.dumps(_thawed(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidContext(f"{name} is not a JSON object: {error}", field=name) from None


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys must be text")
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thawed(item) for item in value]
    return value


def _frozen(name: str, value: Any, depth: int) -> Any:
    if depth < 0:
        raise errors.InvalidContext(f"{name} is nested more than {MAX_NESTING} levels deep", field=name)
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(name, item, depth - 1) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_frozen(name, item, depth - 1) for item in value)
    return value


def _refuse_reserved(name: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key.strip().casefold() in _RESERVED:
            message = f"{name} may not carry {key.strip().casefold()}: the platform alone sets it"
            raise errors.ReservedKey(message, field=f"{name}.{key.strip().casefold()}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
