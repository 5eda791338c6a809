"""JSON objects that cannot change: canonical bytes, their digest, and a frozen view."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import orjson

from netra import errors

MAX_NESTING = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_set = object.__setattr__
_EMPTY = b"{}"
_EMPTY_DIGEST = hashlib.sha256(_EMPTY).hexdigest()
_SIMPLE = frozenset({str, int, float, bool, type(None)})
_ALIKE = _SIMPLE - {float}
# one for all: json.dumps makes a new encoder for each call with options
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_RESERVED = frozenset(
    {
        "user", "user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id", "context_id", "connection_id",
        "websocket_client_id", "websocket_connection_id", "created_at", "db_session", "roles", "tier", "scope", "permissions",
    }
)  # fmt: skip


class Payload:
    """One JSON object. Two are equal when their canonical bytes are; one known by its digest alone has no content.

    No dataclass: `dataclasses.asdict` of who holds it would take it apart, and the frozen view cannot be copied.
    """

    __slots__ = ("_view", "canonical", "digest")
    digest: str
    canonical: bytes | None
    # made when somebody looks: most hops only pass the bytes on
    _view: Mapping[str, Any] | None

    def __init__(self, digest: str, canonical: bytes | None) -> None:
        _set(self, "digest", digest)
        _set(self, "canonical", canonical)
        _set(self, "_view", None)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a payload cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a payload cannot be changed: {name}")

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Payload) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<Payload sha256={self.digest}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Payload, (self.digest, self.canonical)

    @classmethod
    def of(cls, name: str, value: object, limit: int) -> Payload:
        """Freeze a copy of `value`. Raises `InvalidContext`, `ReservedKey` or `TooLarge` naming the field."""
        if not isinstance(value, Mapping):
            raise errors.InvalidContext(f"{name} must be a JSON object", field=name)
        return cls._sealed(name, value, limit) if value else cls(_EMPTY_DIGEST, _EMPTY)

    @classmethod
    def parse(cls, name: str, raw: bytes, limit: int) -> Payload:
        """Read JSON text, strictly; nothing is an empty object."""
        if not raw or raw == _EMPTY:
            return cls(_EMPTY_DIGEST, _EMPTY)
        if len(raw) > limit:
            raise errors.TooLarge(f"{name} has {len(raw)} bytes; at most {limit} are allowed", field=name)
        if keys := _canonical(raw):
            _refuse_reserved(name, keys)
            return cls(hashlib.sha256(raw).hexdigest(), raw)
        try:
            value = _decode(raw.decode(json.detect_encoding(raw), "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise errors.InvalidContext(f"{name} is not valid JSON: {error}", field=name) from None
        return cls.of(name, value, limit)

    @classmethod
    def known(cls, name: str, digest: object) -> Payload:
        """A payload of which only the digest is known."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise errors.InvalidContext(f"{name} must be a SHA-256 digest in hexadecimal digits", field=name)
        return cls(digest, None)

    @classmethod
    def _sealed(cls, name: str, value: Mapping[str, Any], limit: int) -> Payload:
        try:
            thawed = _thawed(name, value, MAX_NESTING)
            canonical = _encode(thawed).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise errors.InvalidContext(f"{name} is not a JSON object: {error}", field=name) from None
        if len(canonical) > limit:
            raise errors.TooLarge(f"{name} has {len(canonical)} bytes; at most {limit} are allowed", field=name)
        _refuse_reserved(name, thawed)
        return cls(hashlib.sha256(canonical).hexdigest(), canonical)

    @property
    def content(self) -> Mapping[str, Any] | None:
        """The object, frozen all the way down; None when only the digest is known."""
        if self._view is None and self.canonical is not None:
            _set(self, "_view", _frozen(json.loads(self.canonical)))
        return self._view

    def plain(self) -> dict[str, Any] | None:
        """A copy of the object that may be changed; None when only the digest is known."""
        return None if self.canonical is None else dict(json.loads(self.canonical))

    def copied(self) -> Payload:
        """The same object anew: contexts have no object in common."""
        return Payload(self.digest, self.canonical)

    def with_(self, name: str, added: Payload, limit: int) -> Payload:
        """With the keys of another one on top; a copy when that has none. Raises `TooLarge`."""
        if added.canonical == _EMPTY:
            return self.copied()
        return Payload.of(name, {**(self.plain() or {}), **(added.plain() or {})}, limit)


def _thawed(name: str, value: Any, depth: int) -> Any:
    """The same out of plain dicts and lists, which the encoder takes. Raises `InvalidContext` when it goes too deep."""
    if depth < 0:
        raise errors.InvalidContext(f"{name} is nested more than {MAX_NESTING} levels deep", field=name)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError("keys must be text")
        return {key: item if depth and type(item) in _SIMPLE else _thawed(name, item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if depth and type(item) in _SIMPLE else _thawed(name, item, depth - 1) for item in value]
    return value


def _canonical(raw: bytes) -> dict[str, Any] | None:
    """The object, if this is just what we would write for it, as it is when one of ours sent it; None when that is to be seen."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    canonical = type(value) is dict and _alike(value, MAX_NESTING) and orjson.dumps(value, option=orjson.OPT_SORT_KEYS) == raw
    return value if canonical else None


def _alike(value: Any, depth: int) -> bool:
    """Whether it is of what orjson writes as we do, which numbers with a fraction are not, and not too deep."""
    for item in value.values() if type(value) is dict else value:
        if type(item) not in _ALIKE and (type(item) is float or not _alike(item, depth - 1)):
            return False
    return depth > 0


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: item if type(item) in _SIMPLE else _frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple([item if type(item) in _SIMPLE else _frozen(item) for item in value])
    return value


def _refuse_reserved(name: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key in _RESERVED or key.strip().casefold() in _RESERVED:
            message = f"{name} may not carry {key.strip().casefold()}: the platform alone sets it"
            raise errors.ReservedKey(message, field=f"{name}.{key.strip().casefold()}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


# one for all, as the encoder is
_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant).decode
