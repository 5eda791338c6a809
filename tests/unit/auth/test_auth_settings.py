"""JWT_SECRET_KEY refuses what is weak, by name and without showing it."""

import secrets

import pydantic
import pytest

from chassis.wrapping import check_secret
from services.auth.settings import AuthSettings


def test_random_secrets_are_fine() -> None:
    for _ in range(200):
        check_secret("x", secrets.token_urlsafe(32))
        check_secret("x", secrets.token_hex(32))


@pytest.mark.parametrize(
    "weak",
    [
        "k7f-short-one",
        "x" * 64,
        "change-me-change-me-change-me-change-me",
        "your-256-bit-secret-and-more-of-it-here",
        "My_Super_Secret_0123456789_abcdefgh",
    ],
)
def test_weak_secrets_keep_the_process_from_starting(weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET_KEY", weak)
    with pytest.raises(pydantic.ValidationError, match="JWT_SECRET_KEY") as caught:
        AuthSettings.load()
    assert weak not in str(caught.value)


def test_thirty_two_bytes_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET_KEY", secrets.token_hex(16))
    loaded = AuthSettings.load()
    assert loaded.jwt_secret_key is not None
    assert "***" in repr(loaded.jwt_secret_key)


def test_access_tokens_cannot_be_made_to_outlive_what_verifiers_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_ACCESS_TOKEN_S", "901")
    with pytest.raises(pydantic.ValidationError):
        AuthSettings.load()
