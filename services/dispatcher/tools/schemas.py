"""Schemas of tools: compiled so that nothing is fetched and no pattern runs away; those from outside are vetted first; pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs

from netra import errors
from services.dispatcher.tools import arguments

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_WEIGHT = 2_000
MAX_PATTERN = 256
_REGEX_BYTES = 1024 * 1024
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# what renames places of the schema, so that a reference may lead anywhere
_REFUSED = frozenset({"$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary"})
_ONE = ("additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then", "unevaluatedItems",
        "unevaluatedProperties")  # fmt: skip
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
# keywords in which there are schemas: one, a list of them, or some by name
_HOLDS: dict[str, type] = {**dict.fromkeys(_ONE, object), **dict.fromkeys(_MANY, list), **dict.fromkeys(_NAMED, dict)}
Validator = jsonschema_rs.Draft202012Validator


def compiled(schema: Any) -> Validator:
    """Ready to check values. Raises `ValueError` when it is no JSON Schema 2020-12, or refers to something elsewhere."""
    try:
        return jsonschema_rs.Draft202012Validator(
            schema, retriever=_no_fetching, pattern_options=jsonschema_rs.RegexOptions(size_limit=_REGEX_BYTES), mask="the value"
        )
    except jsonschema_rs.ValidationError as error:
        place = ".".join(map(str, error.instance_path))
        raise ValueError(f"{place or 'the schema'}: {error.message}") from None
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise ValueError(str(error)) from None


def _no_fetching(uri: str) -> Any:
    raise ValueError(f"a schema may not refer to {uri}: nothing is fetched")


def received(data: bytes, field: str) -> tuple[dict[str, Any], int]:
    """A schema that came from outside, and its weight. Raises `TooLarge`, `InvalidPayload` naming the field."""
    schema = arguments.read(data, field, MAX_BYTES)
    if arguments.depth(schema) > MAX_DEPTH:
        raise errors.InvalidPayload(f"{field} may be nested at most {MAX_DEPTH} deep", field=field, limit=MAX_DEPTH)
    try:
        return schema, weigh(schema)
    except ValueError as error:
        raise errors.InvalidPayload(f"{field}: {error}", field=field) from None


def weigh(schema: Any) -> int:
    """How many schemas one value may be held against, references followed: what checking a value costs at most, per value in it.

    Raises `ValueError` for a schema that refers elsewhere or to itself, weighs more than 2,000, or has patterns that are too long.
    """
    if isinstance(schema, dict) and schema.get("$schema", _DIALECT) not in (_DIALECT, f"{_DIALECT}#"):
        raise ValueError(f"$schema must be {_DIALECT}")
    return _Scales(schema).weigh(schema, ())


class _Scales:
    """Weighs each place that is referred to once, however often it is."""

    def __init__(self, root: Any) -> None:
        self._root, self._known = root, dict[str, int]()

    def weigh(self, schema: Any, within: tuple[str, ...]) -> int:
        """The weight of one schema; `within` is the references that led here."""
        if isinstance(schema, bool):
            return 1
        if not isinstance(schema, dict):
            raise ValueError("a schema must be an object, true or false")
        if refused := _REFUSED & schema.keys():
            raise ValueError(f"{min(refused)} is not accepted")
        _check_patterns(schema)
        # each value that is listed is compared, too
        listed = sum(len(schema[name]) for name in ("enum", "required") if isinstance(schema.get(name), list))
        total = 1 + listed + sum(self.weigh(inner, within) for inner in _inner(schema))
        if "$ref" in schema:
            total += self._referred(schema["$ref"], within)
        if total > MAX_WEIGHT:
            raise ValueError(f"it is too large: with its references followed, it has more than {MAX_WEIGHT} schemas")
        return total

    def _referred(self, reference: Any, within: tuple[str, ...]) -> int:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ValueError("a $ref must lead to a place in the schema itself (#/$defs/...): nothing is fetched")
        if reference in within or reference == "#":
            raise ValueError(f"{reference} refers to itself: a value could be held against it without end")
        if len(within) >= MAX_DEPTH:
            raise ValueError(f"references lead to references more than {MAX_DEPTH} times")
        if reference not in self._known:
            self._known[reference] = self.weigh(self._at(reference), (*within, reference))
        return self._known[reference]

    def _at(self, reference: str) -> Any:
        found = self._root
        parts = reference.removeprefix("#").split("/")
        if parts[0]:
            raise ValueError(f"{reference} does not lead to a place in the schema")
        for part in parts[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if found is None:
            raise ValueError(f"{reference} does not lead to a place in the schema")
        return found


def _inner(schema: dict[str, Any]) -> Iterator[Any]:
    for name, value in schema.items():
        kind = _HOLDS.get(name)
        if kind is None:
            continue
        if kind is dict:
            yield from _of_type(value, dict, name).values()
        elif kind is list:
            yield from _of_type(value, list, name)
        else:
            yield value


def _of_type(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is not what it must be")
    return value


def _check_patterns(schema: dict[str, Any]) -> None:
    patterns = [schema["pattern"]] if "pattern" in schema else []
    if "patternProperties" in schema:
        patterns += _of_type(schema["patternProperties"], dict, "patternProperties")
    if any(not isinstance(pattern, str) or len(pattern) > MAX_PATTERN for pattern in patterns):
        raise ValueError(f"a pattern has at most {MAX_PATTERN} characters")
