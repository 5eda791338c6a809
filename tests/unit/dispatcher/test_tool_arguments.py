"""What a call is given: read strictly and within bounds; and schemas that come from outside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from netra import errors
from services.dispatcher.tools import arguments, schemas


def refusal(data: bytes) -> errors.NetraError:
    """Why these are no arguments."""
    with pytest.raises(errors.NetraError) as caught:
        arguments.read(data, "arguments")
    assert caught.value.details["field"] == "arguments"
    return caught.value


@pytest.mark.parametrize("text", ['{"a":1,"b":[1.5,null,true,"x"]}', '{ "a" : 1.50, "b":[] }', '{"a":"\\u00e9"}', '{"a":"é"}', "{}"])
def test_json_is_read_as_it_is(text: str) -> None:
    assert arguments.read(text.encode(), "arguments") == json.loads(text)


def test_nothing_means_no_arguments() -> None:
    assert arguments.read(b"", "arguments") == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}', '{ "a": 1, "b": {"c": ":", "c": 2} }', '{"a": "\\u003a", "b": 1, "b": 2}', '{"a": 18446744073709551616}',
        '{"x":{"a":1,"\\u0061":2}}', '{"a":NaN}', '{"a":Infinity}', '{"a":1e999}', '{"a":"\\ud800"}', "[]", '"text"',
        "null", "{", '{"a":01}', '{"a":1,}', '{"a":18446744073709551616}', '{"a":-9223372036854775809}', '{"a":' + "9" * 5000 + "}", "{}{}",
        "\ufeff{}", "// no\n{}",
    ],
)  # fmt: skip
def test_what_is_no_json_object_or_two_in_one_is_refused(text: str) -> None:
    assert refusal(text.encode()).code == "INVALID_PAYLOAD"


@pytest.mark.parametrize("data", [b"\xff{}", b'{"a":"\xed\xa0\x80"}', '{"a":1}'.encode("utf-16")])
def test_what_is_not_utf_8_is_refused(data: bytes) -> None:
    assert refusal(data).code == "INVALID_PAYLOAD"


def test_whole_numbers_of_64_bits_stay_whole() -> None:
    assert arguments.read(b'{"a":18446744073709551615, "b":-9223372036854775808}', "arguments") == {"a": 2**64 - 1, "b": -(2**63)}


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(opening: str, closing: str) -> None:
    def nested(depth: int) -> bytes:
        return f'{{"a":{opening * (depth - 1)}1{closing * (depth - 1)}}}'.encode()

    arguments.read(nested(64), "arguments")
    assert refusal(nested(65)).details["limit"] == refusal(nested(900)).details["limit"] == "64"
    # beyond what the reader itself bears
    assert refusal(nested(20_000)).code == "INVALID_PAYLOAD"


def test_brackets_in_text_are_not_depth() -> None:
    assert arguments.read(b'{"a":"' + b"[" * 1000 + b'"}', "arguments") == {"a": "[" * 1000}


def test_size_is_bounded() -> None:
    most = b'{"a":"' + b"x" * (arguments.MAX_BYTES - 8) + b'"}'
    assert len(arguments.read(most, "arguments")["a"]) == arguments.MAX_BYTES - 8
    assert refusal(most + b" ").code == errors.TooLarge.code


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": [float("-inf")]}, {1: 2}, {"a": object()}, {"a": "\ud800"}, {"a": 2**64}])
def test_what_an_agent_made_must_be_json_too(value: Any) -> None:
    with pytest.raises(errors.InvalidPayload):
        arguments.written(value, "arguments")


def test_what_an_agent_made_is_bounded_too() -> None:
    deep: Any = 1
    for _ in range(65):
        deep = [deep]
    with pytest.raises(errors.InvalidPayload, match="64 deep"):
        arguments.written({"a": deep[0]}, "arguments")
    assert arguments.written({"a": deep[0][0], "b": None}, "arguments").startswith(b'{"a":[[')
    with pytest.raises(errors.TooLarge):
        arguments.written({"a": "x" * arguments.MAX_BYTES}, "arguments")


def test_values_are_counted() -> None:
    assert arguments.nodes({"a": [1, 2, {"b": None}], "c": "x"}) == 7


# schemas


def vetted(schema: Any) -> int:
    """The weight of a schema that a worker sent."""
    return schemas.received(json.dumps(schema).encode(), "tool.input_schema")[1]


def doubled(levels: int) -> dict[str, Any]:
    """A schema of a few lines that a value is held against twice per level."""
    places: dict[str, Any] = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": {**places, f"a{levels}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def chained(levels: int) -> dict[str, Any]:
    """A schema whose references lead on so often."""
    places: dict[str, Any] = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(levels)}
    return {"$defs": {**places, f"a{levels}": True}, "$ref": "#/$defs/a0"}


def within(schema: Any, depth: int) -> Any:
    """A schema so many levels below others."""
    return within({"not": schema}, depth - 1) if depth else schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"}, {"properties": {"$ref": {"type": "string"}, "$id": {}}}, {"default": {"$ref": "https://x.example"}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema"}, {"enum": list(range(1000))}, {"pattern": "^[a-z]{1,20}$"},
        {"$defs": {"a/b": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/$defs/a~1b"}}},
        doubled(6), chained(20), within({}, 20),
    ],
)  # fmt: skip
def test_a_bounded_schema_is_accepted(schema: Any) -> None:
    assert vetted(schema) <= schemas.MAX_WEIGHT
    schemas.compiled(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "https://schemas.example/all.json"}, "nothing is fetched"), ({"$ref": "other.json"}, "nothing is fetched"),
        ({"$ref": "file:///etc/passwd"}, "nothing is fetched"), ({"items": {"$ref": "http://x#/a"}}, "nothing is fetched"),
        ({"$ref": "#"}, "itself"), ({"properties": {"a": {"$ref": "#"}}}, "itself"),
        ({"$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "itself"),
        ({"$ref": "#/$defs/none"}, "does not lead"), ({"$ref": "#anchor"}, "does not lead"), ({"$ref": 1}, "nothing is fetched"),
        ({"$id": "https://x.example"}, "not accepted"), ({"properties": {"a": {"$anchor": "x"}}}, "not accepted"),
        ({"$dynamicRef": "#x"}, "not accepted"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "2020-12"),
        ({"pattern": "a" * 257}, "256"), ({"patternProperties": {"a" * 257: {}}}, "256"), ({"pattern": 1}, "256"),
        ({"enum": list(range(2001))}, "too large"), ({"anyOf": [{"const": n} for n in range(2000)]}, "too large"),
        (doubled(30), "too large"), (chained(40), "more than 32 times"), (within({}, 40), "32 deep"),
        ({"properties": []}, "properties"), ({"items": 1}, "an object, true or false"), ({"$defs": {"a": "text"}}, "an object, true"),
    ],
)  # fmt: skip
def test_a_schema_that_leads_away_or_goes_on_for_ever_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(errors.InvalidPayload, match=words) as caught:
        vetted(schema)
    assert caught.value.details["field"] == "tool.input_schema"


@pytest.mark.parametrize("pattern", ["(?=a)b", "(a)\\1", "(", "(a{1000}){1000}", "(\\w{250}){250}"])
def test_a_pattern_that_could_run_away_does_not_compile(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        schemas.compiled({"pattern": pattern})


def test_a_pattern_takes_no_longer_for_odd_texts() -> None:
    # one that tries every way would need years
    validator = schemas.compiled({"properties": {"a": {"pattern": "^(a+)+$"}}})
    assert not validator.is_valid({"a": "a" * 200_000 + "b"})
