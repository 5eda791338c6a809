"""argon2id: right, wrong, unknown, outdated, too many at once."""

import asyncio
from collections.abc import Iterator

import argon2
import pytest

from netra import errors
from services.auth import passwords


@pytest.fixture
def hashing() -> Iterator[passwords.Passwords]:
    made = passwords.Passwords(threads=1, queue=1)
    yield made
    made.close()


async def test_right_and_wrong(hashing: passwords.Passwords) -> None:
    stored = await hashing.hash("a good password")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await hashing.verify(stored, "a good password")
    assert not await hashing.verify(stored, "a bad password")


async def test_nobody_has_no_password(hashing: passwords.Passwords) -> None:
    assert not await hashing.verify(None, "")
    assert not await hashing.verify("not a hash", "a good password")


async def test_only_the_whole_of_an_overlong_password_would_count(hashing: passwords.Passwords) -> None:
    stored = await hashing.hash("x" * 1024)
    assert await hashing.verify(stored, "x" * 1024)
    assert not await hashing.verify(stored, "x" * 1025)


async def test_composed_and_decomposed_letters_are_the_same(hashing: passwords.Passwords) -> None:
    assert await hashing.verify(await hashing.hash("gr\u00fcner baum am see"), "gru\u0308ner baum am see")


def test_other_parameters_are_outdated(hashing: passwords.Passwords) -> None:
    assert hashing.outdated(argon2.PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1).hash("a good password"))


async def test_more_than_fit_are_refused_with_a_time_to_come_back(hashing: passwords.Passwords) -> None:
    answers = await asyncio.gather(*(hashing.verify(None, "x") for _ in range(5)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, errors.RateLimited)]
    assert len(refused) == 3
    assert all(error.retry_after_ms for error in refused)
    assert await hashing.verify(None, "x") is False
