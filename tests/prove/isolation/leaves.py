"""Every place of a request in which somebody can write something, and the request with something written there; pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Path = tuple[str | int, ...]
_PLAIN = ("google.protobuf.Timestamp", "google.protobuf.Duration")
# beside what an object already says
_NAMES = ("user_id", "tenant_id", "thread_id", "run_id", "owner_id")
_INSIDE = "{}"


def of_message(descriptor: Descriptor, before: Path = (), above: Sequence[Descriptor] = ()) -> Iterator[Path]:
    """Fields of text and of bytes, at any depth; those of bytes once more for what can be said inside of JSON.

    A message that holds its own kind is looked through once.
    """
    for one in descriptor.fields:
        where = (*before, one.name)
        if one.message_type is not None:
            if one.message_type.full_name not in _PLAIN and one.message_type not in (descriptor, *above):
                yield from of_message(one.message_type, where, (*above, descriptor))
        elif one.type == FieldDescriptor.TYPE_STRING:
            yield where
        elif one.type == FieldDescriptor.TYPE_BYTES:
            yield where
            yield (*where, _INSIDE)


def written(requests: Sequence[Message], path: Path, value: str) -> list[Message]:
    """The requests with a value at the path, in the first one that has the place, or in the first one."""
    found = [copy.deepcopy(request) for request in requests]
    holder = next((request for request in found if _holds(request, path)), found[0])
    _write(holder, path, value)
    return found


def _holds(message: Message, path: Path) -> bool:
    """Whether what the path leads through is there."""
    if len(path) == 1 or path[1] == _INSIDE:
        return any(one.name == path[0] for one, _ in message.ListFields())
    inner = getattr(message, str(path[0]))
    if message.DESCRIPTOR.fields_by_name[str(path[0])].is_repeated:
        return any(_holds(item, path[1:]) for item in inner)
    return bool(message.HasField(str(path[0]))) and _holds(inner, path[1:])


def _write(message: Message, path: Path, value: str) -> None:
    name = str(path[0])
    one = message.DESCRIPTOR.fields_by_name[name]
    if one.type == FieldDescriptor.TYPE_MESSAGE:
        inner = getattr(message, name)
        if one.is_repeated:
            _write(inner[0] if inner else inner.add(), path[1:], value)
        else:
            inner.SetInParent()
            _write(inner, path[1:], value)
    elif one.is_repeated:
        del getattr(message, name)[:]
        getattr(message, name).append(value)
    elif path[-1] == _INSIDE:
        setattr(message, name, _inside(getattr(message, name), value))
    else:
        setattr(message, name, value.encode() if one.type == FieldDescriptor.TYPE_BYTES else value)


def _inside(said: bytes, value: str) -> bytes:
    try:
        before = json.loads(said or b"{}")
    except ValueError:
        before = {}
    return json.dumps({**(before if isinstance(before, dict) else {}), **dict.fromkeys(_NAMES, value)}).encode()


def of_json(value: Any, before: Path = ()) -> Iterator[Path]:
    """Every text in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from of_json(inner, (*before, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from of_json(inner, (*before, at))
    elif isinstance(value, str):
        yield before


def placed(value: Any, path: Path, text: str) -> Any:
    """A copy of a JSON value with a text at the path."""
    if not path:
        return text
    found = copy.copy(value)
    found[path[0]] = placed(found[path[0]], path[1:], text)
    return found
