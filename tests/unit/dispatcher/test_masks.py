"""Secrets in what events show: found by the words of their keys, and told where they were."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dispatcher import masks


def shown(value: Any, size: float = float("inf")) -> tuple[Any, list[str]]:
    """The value masked, and the paths."""
    masked = masks.Masked(size)
    return masked.of(value, "result"), masked.paths


@pytest.mark.parametrize(
    "key",
    [
        "password", "Passwords", "userPassword", "db_passwd", "passphrase", "clientSecret", "secrets", "token", "access-token",
        "accesstoken", "auth_token", "apiKey", "API_KEY", "X-Api-Key", "apikey", "accessKeyId", "private_key", "authorization",
        "auth", "proxyAuth", "credentials", "cookie", "Set-Cookie", "session_id", "access_tokens", "input_token", "max_tokens_secret",
    ],
)  # fmt: skip
def test_keys_that_name_secrets(key: str) -> None:
    assert shown({key: "s"}) == ({key: "***"}, [f"result.{key}"])


@pytest.mark.parametrize(
    "key",
    [
        "keywords",
        "author",
        "tokenizer",
        "secretary",
        "key",
        "monkey",
        "apis",
        "accessed_by",
        "cookiecutter",
        "input_tokens",
        "cachedInputTokens",
        "n_context_tokens_total",
        "max_tokens",
    ],
)
def test_keys_that_name_none(key: str) -> None:
    assert shown({key: "s"}) == ({key: "s"}, [])


def test_numbers_of_tokens_are_not_secrets() -> None:
    counts = {"input_tokens": 7, "percentiles": {"output_tokens": {"p50": 1, "p95": 2.5}}, "tokens_per_minute": 3, "token_count": 4}
    assert shown(counts) == (counts, [])
    wrong = {"tokens": ["a"], "access_tokens": {"a": "b"}, "token": 7, "none": None, "secret": None}
    assert shown(wrong)[0] == {"tokens": "***", "access_tokens": "***", "token": "***", "none": None, "secret": None}


def test_every_place_is_told() -> None:
    value = {"api_key": "k", "nested": [{"Password": "p", "text": "t"}, ["x", {"token": {"deep": 1}}]], "user": {"auth_token": 1}}
    assert shown(value)[1] == ["result.api_key", "result.nested[0].Password", "result.nested[1][1].token", "result.user.auth_token"]


def test_the_list_of_places_is_bounded_and_says_so() -> None:
    paths = shown([{"token": "x"}] * 130)[1]
    assert (len(paths), paths[99], paths[100]) == (101, "result[99].token", "and 30 more")


def test_what_is_written_as_an_object_is_looked_into() -> None:
    @dataclasses.dataclass
    class Login:
        name: str
        password: str

    assert shown([Login("n", "p")]) == ([{"name": "n", "password": "***"}], ["result[0].password"])


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-9999, 9999) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["a", "token", "name", "ü"]), inner, max_size=4),
    max_leaves=40,
)


@given(_json, st.integers(0, 200))
def test_a_beginning_is_that_of_the_whole(value: Any, size: int) -> None:
    whole, part = (orjson.dumps(shown(value, limit)[0]) for limit in (float("inf"), size))
    assert part[:size] == whole[:size]


def test_a_beginning_costs_what_it_shows() -> None:
    seen = 0

    class Counting(list[Any]):
        def __iter__(self) -> Any:
            nonlocal seen
            for item in super().__iter__():
                seen += 1
                yield item

    shown(Counting(["x" * 100] * 100_000), 2048)
    assert seen < 30
