"""JSON frame <-> typed frame, with the table of frame types; pure."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from netra import errors, ids

MAX_DEPTH = 32
MAX_MESSAGE_BYTES = 8192
MESSAGES = ("START_AGENT", "USER_MESSAGE", "CHAT")
TYPES = (*MESSAGES, "CANCEL", "SEND", "APPROVE", "RESUME", "SUBSCRIBE", "UNSUBSCRIBE", "STREAM", "STREAM_CANCEL", "AUTH", "PING")
ALIASES = {
    "USER": "USER_MESSAGE",
    "USER_INPUT": "USER_MESSAGE",
    "MESSAGE": "USER_MESSAGE",
    "CHAT_MESSAGE": "USER_MESSAGE",
    "EXECUTE_AGENT": "START_AGENT",
    "AGENT": "START_AGENT",
    "AGENT_REQUEST": "START_AGENT",
    "HEARTBEAT": "PING",
}
# strings, also one that does not end, and what gives JSON its shape; linear in any text
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{}\[\]:,]', re.DOTALL)
# as many as the longest frame that is accepted can have
_MAX_TOKENS = 65536
# keys that change what an object is in a browser that reads it carelessly
_RESERVED = frozenset({"__proto__", "constructor", "prototype"})
# what a token says, nobody may say in a payload
_IDENTITY = ("user_id", "tenant_id", "session_id", "role", "roles", "tier", "permissions", "is_admin")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a client."""

    type: str
    id: str
    thread_id: str
    payload: Any
    alias: str = ""
    # when it was there, in seconds since the epoch
    received_at: float = 0.0

    @property
    def fields(self) -> dict[str, Any]:
        """The payload of a frame whose payload must be an object."""
        return self.payload if isinstance(self.payload, dict) else {}


class Refused(Exception):
    """A frame that cannot be read, with the id to answer it under, when it has a usable one."""

    def __init__(self, error: errors.NetraError, frame_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.frame_id = frame_id


def strict(text: str | bytes) -> Any:
    """RFC 8259 JSON and nothing more. Raises `BadJson`, `DuplicateKey`, or `InvalidPayload` for what is too deep or has reserved keys."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except errors.NetraError:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.BadJson(f"This is not JSON: {_why(error)}.") from None
    _check_text(value, MAX_DEPTH)
    if (reserved := _reserved(value, "")) is not None:
        raise wrong(reserved, "is a key that is never accepted")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}"
    return "it is nested too deep" if isinstance(error, RecursionError) else "it is not valid UTF-8 or a number is too long"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise errors.DuplicateKey(f"The key {json.dumps(twice[:64])} is there twice.", key=json.dumps(twice[:64])[1:-1])
    return found


def _no_constant(name: str) -> Any:
    raise errors.BadJson(f"{name} is not JSON.")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise errors.BadJson("A number is out of range.")
    return value


def _check_text(value: Any, depth: int) -> None:
    """No lone surrogates, which are not UTF-8, no integer beyond 64 bits, and no abyss."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise errors.BadJson("A string holds half a surrogate pair.")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise errors.BadJson("A number is out of range.")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise errors.InvalidPayload(f"JSON may be nested at most {MAX_DEPTH} deep.", limit=MAX_DEPTH)
        if isinstance(value, dict):
            for key in value:
                _check_text(key, depth)
        for item in value.values() if isinstance(value, dict) else value:
            _check_text(item, depth - 1)


def _reserved(value: Any, where: str) -> str | None:
    """Where the first reserved key is."""
    if isinstance(value, dict):
        if not _RESERVED.isdisjoint(value):
            return f"{where}{next(key for key in value if key in _RESERVED)}"
        nested = ((f"{where}{key[:64]}.", item) for key, item in value.items() if isinstance(item, dict | list))
    elif isinstance(value, list):
        nested = ((f"{where}{at}.", item) for at, item in enumerate(value) if isinstance(item, dict | list))
    else:
        return None
    return next((found for name, item in nested if (found := _reserved(item, name)) is not None), None)


def parse(text: str, max_bytes: int, received_at: float = 0.0) -> Frame:
    """One frame. Raises `Refused` with the error to send."""
    try:
        if len(text) > max_bytes or len(text.encode("utf-8", "surrogatepass")) > max_bytes:
            raise errors.TooLarge(f"A frame has at most {max_bytes} bytes.", limit=max_bytes)
        value = strict(text)
        if not isinstance(value, dict):
            raise errors.NotAnObject("A frame must be a JSON object.")
        return _frame(value, received_at)
    except errors.NetraError as error:
        raise Refused(error, id_in(text)) from None


def id_in(text: str) -> str | None:
    """The id to answer a frame under that is not read, whatever else is wrong with it; None when it has no usable one."""
    if not text.lstrip(" \t\r\n").startswith("{"):
        return None
    found, depth, before, last = [], 0, "", ""
    for match in itertools.islice(_TOKEN.finditer(text), _MAX_TOKENS):
        piece = match[0]
        depth += (piece in "{[") - (piece in "}]")
        if depth == 1 and last == ":" and _said(before) == "id":
            found.append(_said(piece))
        before, last = last, piece
    return found[0] if len(found) == 1 else None


def _said(piece: str) -> str | None:
    """What a short string says; None for anything that no id can be."""
    if not piece.startswith('"') or len(piece) > 6 * 64 + 2:
        return None
    try:
        said = str(json.loads(piece))
        said.encode()
    except ValueError:
        return None
    return said if 0 < len(said) <= 64 else None


def _frame(value: dict[str, Any], received_at: float) -> Frame:
    written = value.get("type")
    if not isinstance(written, str) or not written:
        raise wrong("type", "is required and must be a string")
    name = written.upper()
    known = ALIASES.get(name, name)
    if known not in TYPES:
        raise errors.UnknownType(f"There is no frame of type {json.dumps(written[:64])}.", known=", ".join(TYPES))
    refuse_identity(value, "")
    frame_id = value.get("id")
    if frame_id is not None:
        frame_id = _request_id(frame_id)
    return Frame(
        type=known,
        id=frame_id or "",
        thread_id=optional_id(value.get("thread_id"), "thread_id"),
        payload=_payload(value, known),
        alias=written if name != known else "",
        received_at=received_at,
    )


def _request_id(value: Any) -> str:
    try:
        return ids.RequestId(value)
    except errors.InvalidPayload as error:
        raise errors.InvalidPayload(error.message.replace("request_id", "id"), field="id") from None


def _payload(value: dict[str, Any], known: str) -> Any:
    payload = value.get("payload", {})
    if known == "PING":
        return payload
    if not isinstance(payload, dict):
        raise wrong("payload", "must be an object")
    refuse_identity(payload, "payload.")
    return payload


def refuse_identity(value: dict[str, Any], where: str) -> None:
    for name in _IDENTITY:
        if name in value:
            raise wrong(where + name, "is not read from frames: who you are comes from your token alone")


def wrong(field: str, problem: str) -> errors.InvalidPayload:
    """The error for one field."""
    return errors.InvalidPayload(f"{field} {problem}", field=field)


def optional_id(value: Any, field: str) -> str:
    """A UUID, or nothing. Raises `InvalidPayload`."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise wrong(field, "must be a UUID")
    try:
        return ids.Id(value)
    except errors.InvalidPayload:
        raise wrong(field, "must be a UUID in lower case") from None


def text_of(payload: Mapping[str, Any], names: tuple[str, ...], max_bytes: int) -> str:
    """The first of the fields that is there. Raises `InvalidPayload` or `TooLarge`."""
    name = next((name for name in names if name in payload), names[0])
    value, field = payload.get(name), f"payload.{name}"
    if not isinstance(value, str) or not value.strip():
        raise wrong(field, "is required and must not be empty")
    if "\x00" in value:
        raise wrong(field, "must not hold the character U+0000")
    if len(value.encode()) > max_bytes:
        raise errors.TooLarge(f"{field} has at most {max_bytes} bytes", field=field, limit=max_bytes)
    return value


def optional_text(payload: Mapping[str, Any], name: str, max_length: int = 200) -> str:
    """A short string, or nothing. Raises `InvalidPayload`."""
    value = payload.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > max_length:
        raise wrong(f"payload.{name}", f"must be a string of at most {max_length} characters")
    return value


def cursor_of(payload: Mapping[str, Any], name: str) -> int:
    """A cursor. Raises `InvalidPayload`."""
    value = payload.get(name)
    if type(value) is not int or not 0 <= value < 2**62:
        raise wrong(f"payload.{name}", "must be a cursor: an integer, 0 or more")
    return value


def dump(frame: Mapping[str, Any]) -> bytes:
    """A frame as it is sent."""
    return orjson.dumps(frame)


def ack(frame_id: str, data: Mapping[str, Any], correlation_id: str) -> bytes:
    """The one answer to a frame that was accepted."""
    return dump({"type": "ack", "id": frame_id, "data": data, "correlation_id": correlation_id})


def error(frame_id: str | None, problem: errors.NetraError, correlation_id: str) -> bytes:
    """The one answer to a frame that was refused."""
    return dump({"type": "error", "id": frame_id, **described(problem, correlation_id)})


def passes(problem: errors.NetraError) -> bool:
    """Whether the same may succeed later: want of room passes, what one call took too much of does not."""
    return problem.retryable or (isinstance(problem, errors.ResourceExhausted) and problem.retry_after_ms is not None)


def described(problem: errors.NetraError, correlation_id: str) -> dict[str, Any]:
    """What a user reads about an error, the same in frames and problem+json."""
    return {
        "code": problem.code,
        "message": problem.message,
        "details": problem.details,
        "retryable": passes(problem),
        "retry_after_ms": problem.retry_after_ms,
        "correlation_id": correlation_id,
    }


def deprecated(frame: Frame, correlation_id: str) -> bytes:
    """Says that a type has another name now."""
    return dump(
        {
            "type": "warning",
            "id": frame.id or None,
            "code": "DEPRECATED_TYPE",
            "message": f"{frame.alias} is an old name; send {frame.type}",
            "details": {"type": frame.alias, "use": frame.type},
            "correlation_id": correlation_id,
        }
    )
