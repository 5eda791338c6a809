"""What a client may send, and what it reads when it sent something else."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import frames
from netra import errors

_LIMIT = 65536


def _refused(text: str) -> frames.Refused:
    with pytest.raises(frames.Refused) as caught:
        frames.parse(text, _LIMIT)
    return caught.value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "BAD_JSON"),
        ("{", "BAD_JSON"),
        ('{"type":"PING","payload":NaN}', "BAD_JSON"),
        ('{"type":"PING","payload":-Infinity}', "BAD_JSON"),
        ('{"type":"PING","payload":1e999}', "BAD_JSON"),
        ('{"type":"PING","payload":123456789012345678901234567890}', "BAD_JSON"),
        ('{"type":"PING","payload":"\\ud800"}', "BAD_JSON"),
        ('{"type":"PING","payload":{"\\ud800":1}}', "BAD_JSON"),
        ('{"type":"PING","payload":' + "[" * 20000 + "]" * 20000 + "}", "BAD_JSON"),
        ('{"type":"PING","payload":' + "[" * 40 + "]" * 40 + "}", "INVALID_PAYLOAD"),
        ('{"type":"PING","type":"PING"}', "DUPLICATE_KEY"),
        ('{"type":"CHAT","payload":{"message":"a","message":"b"}}', "DUPLICATE_KEY"),
        ("[]", "NOT_AN_OBJECT"),
        ("null", "NOT_AN_OBJECT"),
        ('{"payload":{}}', "INVALID_PAYLOAD"),
        ('{"type":7}', "INVALID_PAYLOAD"),
        ('{"type":"DANCE"}', "UNKNOWN_TYPE"),
        ('{"type":"CHAT","payload":[]}', "INVALID_PAYLOAD"),
        ('{"type":"PING","id":"has space"}', "INVALID_PAYLOAD"),
        ('{"type":"PING","id":7}', "INVALID_PAYLOAD"),
        ('{"type":"PING","thread_id":"nope"}', "INVALID_PAYLOAD"),
        ('{"type":"PING","payload":"' + "x" * _LIMIT + '"}', "FRAME_TOO_LARGE"),
        ('{"type":"PING","payload":"' + "é" * (_LIMIT // 2) + '"}', "FRAME_TOO_LARGE"),
    ],
)
def test_refuses_what_cannot_be_read(text: str, code: str) -> None:
    assert _refused(text).error.code == code


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"type":"PING","__proto__":1}', "__proto__"),
        ('{"type":"PING","payload":{"__proto__":{"a":1}}}', "payload.__proto__"),
        ('{"type":"PING","payload":{"\\u005f_proto__":1}}', "payload.__proto__"),
        ('{"type":"CHAT","payload":{"message":"x","a":{"rows":[1,{"constructor":2}]}}}', "payload.a.rows.1.constructor"),
        ('{"type":"CHAT","payload":{"message":"x","inputs":{"prototype":[]}}}', "payload.inputs.prototype"),
    ],
)
def test_keys_that_harm_careless_readers_are_named(text: str, field: str) -> None:
    refused = _refused(text)
    assert (refused.error.code, refused.error.details["field"]) == ("INVALID_PAYLOAD", field)


def test_the_same_words_as_values_are_text() -> None:
    assert frames.parse('{"type":"PING","payload":["__proto__",{"x":"constructor","proto":"prototype"}]}', _LIMIT).type == "PING"


@pytest.mark.parametrize("name", ["user_id", "tenant_id", "session_id", "roles", "role", "tier", "permissions", "is_admin"])
def test_identity_is_never_read_from_a_frame(name: str) -> None:
    inside = _refused(json.dumps({"type": "CHAT", "id": "a", "payload": {"message": "x", name: "x"}}))
    outside = _refused(json.dumps({"type": "CHAT", "id": "a", name: "x", "payload": {"message": "x"}}))
    assert inside.error.details["field"] == f"payload.{name}"
    assert outside.error.details["field"] == name


def test_a_refusal_carries_the_id_when_there_is_a_usable_one() -> None:
    assert _refused('{"type":"DANCE","id":"m1"}').frame_id == "m1"
    assert _refused('{"type":"DANCE","id":7}').frame_id is None
    assert _refused("{").frame_id is None


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ('"payload":18446744073709551616', "BAD_JSON"),
        ('"payload":1e999', "BAD_JSON"),
        ('"payload":' + "7" * 5000, "BAD_JSON"),
        ('"payload":NaN', "BAD_JSON"),
        ('"payload":"\\ud800"', "BAD_JSON"),
        ('"payload":{"x":1,"x":2}', "DUPLICATE_KEY"),
        ('"payload":' + "[" * 40 + "]" * 40, "INVALID_PAYLOAD"),
        ('"payload":' + "[" * 20000 + "]" * 20000, "BAD_JSON"),
        ('"payload":{"id":"inner","a":"\\"id\\":\\"text\\""},"user_id":"x"', "INVALID_PAYLOAD"),
        ('"payload":"' + "x" * 200_000 + '"', "FRAME_TOO_LARGE"),
    ],
)
def test_whatever_else_is_wrong_the_id_is_found(rest: str, code: str) -> None:
    for text in ('{"type":"PING","id":"m1",' + rest + "}", '{"type":"PING",' + rest + ', "\\u0069d" : "m1"}'):
        refused = _refused(text)
        assert (refused.error.code, refused.frame_id) == (code, "m1")


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"PING","id":"a","id":"b"}',
        '{"id":7}',
        '{"id":""}',
        '{"id":"\\ud800"}',
        '["id:",{"id":"a"}]',
        '{"a":{"id":"a"}}',
        '{"id":"a',
    ],
)
def test_no_id_is_made_up(text: str) -> None:
    assert _refused(text).frame_id is None


@given(st.text('{}[]",:\\id\ud800 ', max_size=40))
def test_an_id_is_looked_for_in_anything(text: str) -> None:
    found = frames.id_in(text)
    assert found is None or 0 < len(found.encode()) <= 256


@pytest.mark.parametrize(
    ("written", "meant", "alias"),
    [
        ("START_AGENT", "START_AGENT", ""),
        ("start_agent", "START_AGENT", ""),
        ("execute_agent", "START_AGENT", "execute_agent"),
        ("EXECUTE_AGENT", "START_AGENT", "EXECUTE_AGENT"),
        ("user", "USER_MESSAGE", "user"),
        ("user_input", "USER_MESSAGE", "user_input"),
        ("message", "USER_MESSAGE", "message"),
        ("chat_message", "USER_MESSAGE", "chat_message"),
        ("chat", "CHAT", ""),
    ],
)
def test_types_in_either_case_and_old_names(written: str, meant: str, alias: str) -> None:
    frame = frames.parse(json.dumps({"type": written, "payload": {}}), _LIMIT)
    assert (frame.type, frame.alias) == (meant, alias)


def test_a_ping_takes_any_payload() -> None:
    for payload in ({"a": 1}, [1, 2], "x", 3, None, True):
        assert frames.parse(json.dumps({"type": "PING", "payload": payload}), _LIMIT).payload == payload


@given(st.text(max_size=200))
def test_any_text_is_a_frame_or_refused(text: str) -> None:
    with contextlib.suppress(frames.Refused):
        assert frames.parse(text, _LIMIT).type in frames.TYPES


_utf8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | _utf8,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_utf8, inner, max_size=3),
    max_leaves=10,
)


@given(_json)
def test_strict_reads_what_json_writes(value: object) -> None:
    assert frames.strict(json.dumps(value)) == value


def test_an_error_frame_says_everything() -> None:
    problem = errors.RateLimited("Too many frames in a minute.", retry_after_ms=500)
    assert json.loads(frames.error("m1", problem, "c" * 32)) == {
        "type": "error",
        "id": "m1",
        "code": "RATE_LIMITED",
        "message": "Too many frames in a minute.",
        "details": {},
        "retryable": True,
        "retry_after_ms": 500,
        "correlation_id": "c" * 32,
    }
