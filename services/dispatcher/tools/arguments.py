"""What a call is given: JSON, read strictly and within bounds; pure."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson

from netra import errors

MAX_BYTES = 256 * 1024
MAX_DEPTH = 64
# 64 bits have 19 digits and more
_LONG = re.compile(rb"[0-9]{19}")
_LEAST, _MOST, _DIGITS = -(2**63), 2**64, 20


def read(data: bytes, field: str, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object out of bytes; empty bytes mean {}.

    Raises `TooLarge`, or `InvalidPayload` naming the field for what is no JSON object, is nested too deep, has a key twice, or a number
    that does not fit 64 bits.
    """
    value = value_of(data or b"{}", field, most_bytes)
    if not isinstance(value, dict):
        raise errors.InvalidPayload(f"{field} must be a JSON object", field=field)
    return value


def value_of(data: bytes, field: str, most_bytes: int = MAX_BYTES) -> Any:
    """A JSON value out of bytes; raises as `read`."""
    if len(data) > most_bytes:
        raise errors.TooLarge(f"{field} must be at most {most_bytes} bytes", field=field, limit=most_bytes)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise errors.InvalidPayload(f"{field} must be JSON", field=field) from None
    # text may be full of brackets, so only those that could be too deep are looked at
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH:
        _check_depth(value, field)
    # the usual one is the same when it is written again
    if (again := orjson.dumps(value)) != data and not _complete(data, again):
        _look_twice(data, field)
    return value


def _complete(data: bytes, again: bytes) -> bool:
    """Whether what was read, and is written again, surely holds every key and every digit of the text: the cheap way to know."""
    # without escapes the texts in it are the same; each key that was dropped took its colon along
    return b"\\" not in data and again.count(b":") == data.count(b":") and _LONG.search(data) is None


def written(value: object, field: str, most_bytes: int = MAX_BYTES) -> bytes:
    """The JSON of a value that an agent made.

    Raises `TooLarge`, or `InvalidPayload` naming the field for what is not JSON (NaN and keys that are no text among it) or too deep.
    """
    try:
        data = orjson.dumps(value)
    except TypeError as error:
        raise errors.InvalidPayload(f"{field} must be JSON: {error}", field=field) from None
    if len(data) > most_bytes:
        raise errors.TooLarge(f"{field} must be at most {most_bytes} bytes", field=field, limit=most_bytes)
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH:
        _check_depth(orjson.loads(data), field)
    if b"null" in data:
        _check_finite(value, field)
    return data


def nodes(value: object) -> int:
    """How many values there are in a value, itself among them."""
    count, level = 0, [value]
    while level:
        count += len(level)
        level = [inner for one in level for inner in _inside(one)]
    return count


def _inside(value: object) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def depth(value: object, most: int = MAX_DEPTH) -> int:
    """How deep a value is nested; it is not looked at further when that is more than `most`."""
    found, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        found += 1
        if found > most:
            break
        level = [inner for one in level for inner in _inside(one)]
    return found


def _check_depth(value: object, field: str) -> None:
    if depth(value) > MAX_DEPTH:
        raise errors.InvalidPayload(f"{field} may be nested at most {MAX_DEPTH} deep", field=field, limit=MAX_DEPTH)


def _check_finite(value: object, field: str) -> None:
    level = [value]
    while level:
        if any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise errors.InvalidPayload(f"{field} must be JSON: NaN and infinity are not", field=field)
        level = [inner for one in level for inner in _inside(one)]


def _look_twice(data: bytes, field: str) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise errors.InvalidPayload(f"{field} has a key twice in one object", field=field)
        return found

    def whole(digits: str) -> int:
        if len(digits) > _DIGITS or not _LEAST <= int(digits) < _MOST:
            raise errors.InvalidPayload(f"{field} has a whole number that does not fit 64 bits", field=field)
        return int(digits)

    json.loads(data.decode(), object_pairs_hook=unique, parse_int=whole)
