"""Secrets in what events show: found by the words of their keys, and told where they were."""

from __future__ import annotations

import collections
import dataclasses
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
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
        "secretkey", "AWS_SECRETKEY", "sessionid", "JSESSIONID", "PHPSESSID", "signingkey", "encryptionkey", "authkey", "userpwd", "pass",
        "db_pass", "smtpPass", "passcode", "pass_code", "passWord", "pass-phrase", "bearer", "jwt", "id_jwt", "otp", "totp_seed",
        "password2", "tokenid", "secretid", "passwordhash", "generated_tokens", "max_tokens", "signing key", "APIKeys", "privatekeyfile",
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
        "passenger",
        "compass",
        "compass_words",
        "pass_rate",
        "bypass",
        "passage",
        "api_keywords",
        "tokenization",
        "secretion",
        "authored_by",
        "assessed",
        "laptop",
        "keyboard",
    ],
)
def test_keys_that_name_none(key: str) -> None:
    assert shown({key: "s"}) == ({key: "s"}, [])


def test_numbers_of_tokens_are_not_secrets() -> None:
    counts = {"input_tokens": 7, "percentiles": {"output_tokens": {"p50": 1, "p95": 2.5}}, "tokens_per_minute": 3, "token_count": 4}
    assert shown(counts) == (counts, [])
    more = {"total_tokens": 12, "tokens": 7, "cachedInputTokens": 1, "n_context_tokens_total": 2, "tokens_of_text": [101, 7592]}
    assert shown(more) == (more, [])
    wrong = {"tokens": ["a"], "access_tokens": {"a": "b"}, "token": 7, "none": None, "secret": None, "generated_tokens": ["sk-…", 1]}
    assert shown(wrong)[0] == {
        "tokens": "***", "access_tokens": "***", "token": "***", "none": None, "secret": None, "generated_tokens": "***"
    }  # fmt: skip


def test_yes_and_no_are_not_secrets() -> None:
    assert shown({"pass": True, "token": False, "tokens": {"sk-…": True}}) == (
        {"pass": True, "token": False, "tokens": "***"}, ["result.tokens"]
    )  # fmt: skip


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


# how long this machine takes to think of values is not asked here
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


_long = [{"id": number, "tags": ["a", 1.5, None], "deep": {"ok": True}} for number in range(5_000)]


class Watched(dict[str, Any]):
    """An object that knows whether it was gone through."""

    seen = 0

    def items(self) -> Any:
        """Counts."""
        self.seen += 1
        return super().items()


def test_what_looks_like_no_secret_is_not_even_gone_through() -> None:
    plain, hinted = Watched(a=1, deep={"b": "c"}), Watched(a="keys are in it")
    masked = masks.Masked()
    assert [masked.of(plain, "result"), masked.of(hinted, "result")] == [plain, hinted]
    assert (plain.seen, hinted.seen) == (0, 1)


def test_only_what_holds_a_secret_is_made_anew() -> None:
    value = {"rows": _long, "total_tokens": 1}
    masked = masks.Masked()
    assert masked.of(value, "result") is value
    with_one = masked.of({**value, "login": {"token": "t"}}, "result")
    assert (with_one["rows"] is _long, with_one["login"], masked.paths) == (True, {"token": "***"}, ["result.login.token"])


def test_going_through_a_large_value_holds_up_nobody() -> None:
    value = {"token": "t", "rows": [{"a": number % 10} for number in range(25_000)]}

    def least(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    # as long as adding up a few numbers takes, whatever the machine; by abstract classes it would be thirty times that
    assert least(lambda: masks.Masked().of(value, "result")) < 8 * least(lambda: sum(number for number in range(200_000)))


def test_subclasses_are_masked_and_can_be_written() -> None:
    value = {"a": types.MappingProxyType({"b": collections.OrderedDict(token="t"), "c": Row("x", "y")}), "b": types.MappingProxyType({})}
    assert orjson.dumps(shown(value)[0]) == b'{"a":{"b":{"token":"***"},"c":["x","y"]},"b":{}}'


class Row(NamedTuple):
    """A tuple of its own."""

    x: str
    y: str
