"""A payload that comes as we would write it is what it would be if it came in another form: the same bytes, or the same refusal."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netra import errors
from netra.context import payload
from netra.context.payload import Payload

_LIMIT = 10**8
_TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _read(raw: bytes) -> tuple[str, object]:
    try:
        found = Payload.parse("agent_context", raw, _LIMIT)
    except errors.NetraError as error:
        return error.code, error.message
    return found.digest, found.canonical


def _spaced(raw: bytes) -> bytes:
    # no longer as we write it, and the same object
    return raw + b" "


@given(st.dictionaries(_TEXT, _JSON, max_size=3))
def test_our_form_is_taken_as_it_is(value: dict[str, Any]) -> None:
    raw = _canonical(value)
    assert _read(raw) == _read(_spaced(raw)) == _read(json.dumps(value).encode())


def test_every_character_is_written_as_we_write_it() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    raw = _canonical({"text": text, text[-2000:]: 1})
    assert payload._canonical(raw) is not None
    assert _read(raw) == _read(_spaced(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":1}', b'{"b":1,"a":1}', b'{"a":{"c":1,"c":1}}', b'{"a":1e16}', b'{"a":1.0}', b'{"a":[1.5]}', b'{"a":-0.0}',
        b'{"a":18446744073709551616}', b'{"a":NaN}', b'{"a":"\\u00fc"}', b'{"a":"\\ud800"}', b'{"a": 1}', b"[]", b'"a"', b"1", b"{",
        b"\xff", b'{"a":"\\/"}', b'{"a":01}',
    ],
)  # fmt: skip
def test_any_other_form_is_looked_at_closely(raw: bytes) -> None:
    assert payload._canonical(raw) is None
    assert _read(raw)[0] == _read(_spaced(raw))[0]


@pytest.mark.parametrize("levels", range(payload.MAX_NESTING - 3, payload.MAX_NESTING + 3))
@pytest.mark.parametrize("inmost", ["{}", "[]", "1", '""', '{"a":1}'])
@pytest.mark.parametrize(("begin", "end"), [('{"a":', "}"), ("[", "]")])
def test_it_may_be_as_deep_in_our_form_as_in_any(levels: int, inmost: str, begin: str, end: str) -> None:
    raw = f'{{"a":{begin * levels}{inmost}{end * levels}}}'.encode()
    assert _read(raw) == _read(_spaced(raw))


@pytest.mark.parametrize("key", ["user_id", " User_ID ", "scope"])
def test_what_is_reserved_is_so_in_our_form_too(key: str) -> None:
    raw = _canonical({key: "x"})
    with pytest.raises(errors.ReservedKey):
        Payload.parse("agent_context", raw, _LIMIT)
    assert _read(raw) == _read(_spaced(raw))


def test_our_form_may_not_be_longer_than_any() -> None:
    raw = _canonical({"a": "x" * 100})
    assert Payload.parse("agent_context", raw, len(raw)).canonical == raw
    with pytest.raises(errors.TooLarge):
        Payload.parse("agent_context", raw, len(raw) - 1)
