"""AuthSettings: what the auth process reads at start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from chassis.wrapping import WrappingSettings


class AuthSettings(WrappingSettings):
    """Every default works on one machine."""

    port: int = Field(7001, ge=0, le=65535, validation_alias="NETRA_AUTH_PORT")
    oidc_providers: Path | None = Field(
        None, description="The outside identity providers; unset, the secret file `oidc.json` if there is one."
    )
    bootstrap_admin: str | None = Field(None, description="E-mail of the first administrator, created at start if absent.")
    access_token_s: int = Field(600, ge=60, le=900, description="How long an access token is valid.")
    service_token_s: int = Field(3600, ge=60, le=3600, description="How long a service token is valid.")
    session_idle_hours: float = Field(8, gt=0, le=8760, description="A session ends when it was not refreshed for so long.")
    session_hours: float = Field(8, gt=0, le=8760, description="How long a session lives, however much it is used.")
    session_cli_days: float = Field(30, gt=0, le=365, description="The same two for sessions of the command line.")
    # all of them are in the list of devices, beside 50 API keys
    sessions_per_user: int = Field(100, ge=1, le=150, description="Sessions a user may have; one more ends the oldest.")
    calls_per_address: int = Field(6000, ge=1, description="Calls of each kind with a credential that an address may make in a minute.")
    # a refresh that is told to wait must come again within its 10 s
    successes_per_account: int = Field(600, ge=12, description="How many of them may succeed for one account, session or service.")
    key_rotation_days: float = Field(30, gt=0, description="How long a signing key signs.")
    password_threads: int = Field(2, ge=1, le=64, description="How many passwords are hashed at the same time.")
    password_queue: int = Field(64, ge=1, description="How many passwords may wait to be hashed.")
    max_watchers: int = Field(256, ge=1, description="How many processes may follow keys, policy and revocations.")
