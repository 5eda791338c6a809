"""The data of each kind of event, checked against kinds.proto; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import orjson
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from netra import errors
from netra.events.v1 import kinds_pb2

_VALUE, _STRUCT = "google.protobuf.Value", "google.protobuf.Struct"
_TYPES = {
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    validator: jsonschema_rs.Draft202012Validator
    # fields of any JSON, and of any JSON object: not looked into
    free: frozenset[str]
    objects: frozenset[str]


def _schema(message: Descriptor) -> dict[str, Any]:
    raw = descriptor_pb2.DescriptorProto()
    message.CopyToProto(raw)
    optional = {field.name for field in raw.field if field.proto3_optional}
    required = [field.name for field in message.fields if not field.is_repeated and field.name not in optional]
    properties = {field.name: _property(field) for field in message.fields}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _property(field: FieldDescriptor) -> dict[str, Any]:
    one = _single(field)
    return {"type": "array", "items": one} if field.is_repeated else one


def _single(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type is None:
        values = list(field.GetOptions().Extensions[kinds_pb2.one_of])
        return {"type": _TYPES[field.cpp_type], **({"enum": values} if values else {})}
    if field.message_type.full_name == _VALUE:
        return {}
    return {"type": "object"} if field.message_type.full_name == _STRUCT else _schema(field.message_type)


def _no_fetching(uri: str) -> Any:
    raise ValueError(f"a schema may not refer to {uri}: nothing is fetched")


def _kinds() -> Iterator[tuple[str, _Kind]]:
    for name, message in kinds_pb2.DESCRIPTOR.message_types_by_name.items():
        if "agent_id" in message.fields_by_name:
            kind = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]
            validator = jsonschema_rs.Draft202012Validator(_schema(message), retriever=_no_fetching, mask="the value")
            yield kind, _Kind(validator, _fields_of(message, _VALUE), _fields_of(message, _STRUCT))


def _fields_of(message: Descriptor, full_name: str) -> frozenset[str]:
    return frozenset(field.name for field in message.fields if field.message_type and field.message_type.full_name == full_name)


_KINDS = dict(_kinds())
KINDS = frozenset(_KINDS)


def check(kind: str, data: Mapping[str, Any]) -> None:
    """Raises `InvalidPayload` naming the field when the data is not what the kind promises. An agent's own kinds promise nothing."""
    written(kind, data)


def written(kind: str, data: Mapping[str, Any]) -> bytes:
    """The data as it is recorded. Raises what `check` raises."""
    known = _KINDS.get(kind)
    if known is None:
        return orjson.dumps(dict(data))
    # each field is written once, and what was written is looked at: our ids are a str of their own, which the validator does not know
    fields = {name: orjson.dumps(value) for name, value in data.items()}
    _look(kind, known, {name: _looked_at(known, name, text) for name, text in fields.items()})
    return orjson.dumps({name: orjson.Fragment(text) for name, text in fields.items()})


def _look(kind: str, known: _Kind, looked_at: Mapping[str, Any]) -> None:
    if (problem := next(known.validator.iter_errors(looked_at), None)) is not None:
        place = ".".join(["data", *map(str, problem.instance_path)])
        raise errors.InvalidPayload(f"{kind}: {place}: {problem.message}", field=place)


def _looked_at(kind: _Kind, name: str, text: bytes) -> Any:
    if name in kind.free:
        return None
    return {} if name in kind.objects and text.startswith(b"{") else orjson.loads(text)
