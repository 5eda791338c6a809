"""AuthSettings: what the auth process reads at start."""

from __future__ import annotations

import re

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from chassis import settings

MIN_SECRET_BYTES = 32
_MIN_DISTINCT = 8
_PLACEHOLDER = re.compile(
    r"change(me|this|it)|replace(me|this)|(your|my|super|dev|development|test|default|jwt)secret|secretkey"
    r"|your(256|384|512)bit|yourkey|placeholder|insecure|notasecret|donotuse|example"
)


class AuthSettings(settings.ProcessSettings):
    """Every default works on one machine."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)

    port: int = Field(7001, ge=0, le=65535, validation_alias="NETRA_AUTH_PORT")
    jwt_secret_key: SecretStr | None = Field(
        None, validation_alias="JWT_SECRET_KEY", description="What the signing keys are wrapped with, instead of the secret file `signing`."
    )
    bootstrap_admin: str | None = Field(None, description="E-mail of the first administrator, created at start if absent.")
    access_token_s: int = Field(600, ge=60, le=900, description="How long an access token is valid.")
    service_token_s: int = Field(3600, ge=60, le=3600, description="How long a service token is valid.")
    refresh_idle_days: float = Field(30, gt=0, le=365, description="How long an unused refresh token stays valid.")
    session_days: float = Field(90, gt=0, le=730, description="How long a session lives, however much it is used.")
    key_rotation_days: float = Field(30, gt=0, description="How long a signing key signs.")
    password_threads: int = Field(2, ge=1, le=64, description="How many passwords are hashed at the same time.")
    password_queue: int = Field(64, ge=1, description="How many passwords may wait to be hashed.")
    max_watchers: int = Field(256, ge=1, description="How many processes may follow keys, policy and revocations.")

    @field_validator("jwt_secret_key")
    @classmethod
    def _strong(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_secret("JWT_SECRET_KEY", value.get_secret_value())
        return value


def check_secret(name: str, secret: str) -> None:
    """Raise `ValueError` when the secret is too short, or one that everybody knows."""
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"{name} is shorter than {MIN_SECRET_BYTES} bytes. Set a random one, for example from `openssl rand -base64 48`.")
    letters = re.sub(r"[^a-z0-9]", "", secret.lower())
    if _PLACEHOLDER.search(letters) or len(set(secret)) < _MIN_DISTINCT:
        raise ValueError(f"{name} is a known placeholder. Set a random one, for example from `openssl rand -base64 48`.")
