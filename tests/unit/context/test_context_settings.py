"""ContextSettings: a weak JWT_SECRET_KEY is refused by name and never printed."""

import pydantic
import pytest

from services.context.settings import ContextSettings

GOOD = "Zq8vN2rT5xWb7kLmP0sD3fGh6jYc9aEu"


@pytest.mark.parametrize("secret", ["short", GOOD[:31], "changeme" * 4, "your-256-bit-secret-your-256-bit", "a" * 64])
def test_weak_secrets_are_refused(secret: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="JWT_SECRET_KEY") as refused:
        ContextSettings(jwt_secret_key=pydantic.SecretStr(secret))
    assert secret not in str(refused.value)


def test_a_strong_secret_is_taken_and_hidden() -> None:
    settings = ContextSettings(jwt_secret_key=pydantic.SecretStr(GOOD))
    assert settings.wrapping_secret() == GOOD.encode()
    assert GOOD not in repr(settings)
