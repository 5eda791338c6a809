"""ContextSettings."""

from __future__ import annotations

import re

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from chassis.settings import ProcessSettings

_SHORTEST_SECRET, _FEWEST_CHARACTERS = 32, 8
_PLACEHOLDER = re.compile(
    r"change(me|this|it)|replace(me|this)|(your|my|super|dev|development|test|default|jwt)secret|secretkey"
    r"|your(256|384|512)bit|yourkey|placeholder|insecure|notasecret|donotuse|example"
)


class ContextSettings(ProcessSettings):
    """What the context service reads beside what every process reads."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)

    port: int = Field(7002, validation_alias="NETRA_CONTEXT_PORT", ge=0, le=65535)
    jwt_secret_key: SecretStr | None = Field(
        None, validation_alias="JWT_SECRET_KEY", description="Wraps the signing key; the secret file `signing` when unset."
    )

    @field_validator("jwt_secret_key")
    @classmethod
    def _strong(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            plain = value.get_secret_value()
            if len(plain.encode()) < _SHORTEST_SECRET:
                raise ValueError(f"JWT_SECRET_KEY has fewer than {_SHORTEST_SECRET} bytes; set a random one, or unset it")
            letters = re.sub(r"[^a-z0-9]", "", plain.casefold())
            if len(set(plain)) < _FEWEST_CHARACTERS or _PLACEHOLDER.search(letters):
                raise ValueError("JWT_SECRET_KEY is a known placeholder; set a random one, or unset it")
        return value

    def wrapping_secret(self) -> bytes:
        """What the signing key is wrapped with."""
        return (self.jwt_secret_key or self.secret("signing")).get_secret_value().encode()
