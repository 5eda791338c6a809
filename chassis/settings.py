"""Frozen typed settings of one process, read once; every default works on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from chassis import environment


class MissingSecret(Exception):
    """A secret file that a process needs is not there."""


class _FromEnvironment(EnvSettingsSource):
    """Reads the variables through `chassis.environment`."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        variables = environment.get_environment().all()
        return {name.lower(): value for name, value in variables.items() if value}


class ProcessSettings(BaseSettings):
    """What every process reads. Variables are named `NETRA_` plus the field in capitals."""

    model_config = SettingsConfigDict(env_prefix="NETRA_", frozen=True, extra="ignore", populate_by_name=True)

    env: Literal["dev", "test", "staging", "prod"] = "dev"
    host: str = Field("127.0.0.1", description="The address to listen on.")
    auth_target: str = "127.0.0.1:7001"
    context_target: str = "127.0.0.1:7002"
    dispatcher_target: str = Field(
        "127.0.0.1:7003", description="Where the dispatcher is; several replicas with commas between, or dns:name:port."
    )
    events_target: str = Field("127.0.0.1:7004", description="Where events is; several replicas with commas between, or dns:name:port.")
    postgres_url: str = Field("postgresql://127.0.0.1:7005/netra", description="Without user and password.")
    postgres_pool: int = Field(8, ge=2, le=200, description="Connections that serve users; calls beyond wait (events: 16 at least).")
    valkey_url: str = Field("redis://127.0.0.1:7006/0", description="Without user and password.")
    valkey_namespace: str = Field("", description="Set apart the keys of systems that share one Valkey.")
    secrets_dir: Path = Field(Path(".netra/secrets"), description="One file per secret of this process.")
    state_dir: Path | None = Field(None, description="Where the last known keys and policy are kept.")
    trust_stale_s: float = Field(60.0, gt=0, description="How long auth may be silent before tools wait until it is heard of again.")
    trace_dir: Path | None = Field(None, description="Where spans are written as OTLP JSON lines.")
    otlp_endpoint: str | None = Field(None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    tls_cert: Path | None = Field(None, description="The certificate of this process (PEM); it names the service.")
    tls_key: Path | None = Field(None, description="The private key of the certificate (PEM).")
    tls_ca: Path | None = Field(None, description="Who vouches for the certificates of the other processes (PEM).")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus text of this process; 0 is off.")
    drain_s: float = Field(5.0, gt=0, description="How long open calls may take to end on SIGTERM, in seconds.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = {"NETRA_TLS_CERT": self.tls_cert, "NETRA_TLS_KEY": self.tls_key, "NETRA_TLS_CA": self.tls_ca}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"{', '.join(given)} go together, but {' and '.join(missing)} is not set. Set all of them, or none.")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment; there are no other sources."""
        return init_settings, _FromEnvironment(settings_cls)

    def secret(self, name: str) -> SecretStr:
        """The content of one secret file. Raises `MissingSecret` naming the file and the remedy."""
        path = self.secrets_dir / name
        try:
            return SecretStr(path.read_text(encoding="utf-8").strip())
        except OSError as error:
            remedy = "run `python -m standalone.prepare secrets` or set NETRA_SECRETS_DIR"
            raise MissingSecret(f"the secret file {path} cannot be read ({error.strerror}): {remedy}") from None

    def postgres_dsn(self, role: str, secret: str) -> str:
        """The address of PostgreSQL with a role and its password."""
        return with_credentials(self.postgres_url, role, self.secret(secret))

    def valkey_dsn(self, user: str) -> str:
        """The address of Valkey with an ACL user and its password."""
        return with_credentials(self.valkey_url, user, self.secret("valkey"))

    @classmethod
    def load(cls) -> Self:
        """Read the settings of this process. Raises `pydantic.ValidationError` naming each wrong variable."""
        return cls()


def with_credentials(url: str, user: str, password: SecretStr) -> str:
    """The same address with user and password put in."""
    parts = urlsplit(url)
    address = parts.netloc.rpartition("@")[2]
    login = f"{quote(user, safe='')}:{quote(password.get_secret_value(), safe='')}"
    return urlunsplit(parts._replace(netloc=f"{login}@{address}"))
