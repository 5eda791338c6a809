"""GatewaySettings."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from chassis.settings import ProcessSettings
from gateway import addresses
from netra import errors

_LOOPBACK = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"


class GatewaySettings(ProcessSettings):
    """What the gateway reads."""

    port: int = Field(8080, ge=0, le=65535, validation_alias="NETRA_GATEWAY_PORT")
    allowed_origins: str = Field("", description="Origins that browsers may come from, exact, separated by commas.")
    trusted_proxies: str = Field("", description="Networks of proxies whose X-Forwarded-For counts, separated by commas; none by default.")
    public_url: str = Field("", description="Where browsers find the gateway; outside providers send them back there.")
    anonymous_per_minute: int = Field(6000, ge=1, description="Requests without a user that one address may send.")
    max_connections: int = Field(10_000, ge=1, description="Connections at once, sockets included; as many as files may be open at most.")
    max_frame_bytes: int = Field(65536, ge=1024)
    max_body_bytes: int = Field(256 * 1024, ge=1024, description="The largest HTTP body.")
    artifact_stall_s: float = Field(60.0, gt=0, description="How long nothing may come of an upload.")
    heartbeat_s: float = Field(25.0, gt=0, description="How often a socket is pinged.")
    pong_s: float = Field(10.0, gt=0, description="How long a pong may take.")
    stall_s: float = Field(10.0, gt=0, description="How long a slow reader may take nothing at all.")
    expiring_s: float = Field(60.0, ge=0, description="How long before its end a token is announced to end.")
    token_grace_s: float = Field(25.0, ge=0, description="How long a socket outlives its token.")
    queue_events: int = Field(256, ge=1, description="Events that wait for one socket before it is fed from the record.")
    queue_bytes: int = Field(1024 * 1024, ge=1024)

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: str) -> str:
        addresses.networks(value)
        return value

    @field_validator("public_url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username):
            raise ValueError("must be an address like https://netra.example, or empty")
        return value.rstrip("/")

    @property
    def proxies(self) -> tuple[addresses.Network, ...]:
        """The trusted ones."""
        return addresses.networks(self.trusted_proxies)

    def base_url(self, host: str) -> str:
        """Where browsers find the gateway. Raises `FailedPrecondition` when that cannot be known."""
        # what a client says its host is would send browsers anywhere; on this machine only it is believed
        if not self.public_url and not (self.env in ("dev", "test") and re.fullmatch(_LOOPBACK, f"http://{host}")):
            raise errors.FailedPrecondition("NETRA_PUBLIC_URL is not set, so no provider can send a browser back here.")
        return self.public_url or f"http://{host}"

    @property
    def origins(self) -> frozenset[str]:
        """The exact allow-list."""
        return frozenset(origin.strip() for origin in self.allowed_origins.split(",") if origin.strip())

    @property
    def origin_pattern(self) -> str | None:
        """What else is allowed: pages of this machine, in development."""
        return _LOOPBACK if self.env in ("dev", "test") else None

    def allows(self, origin: str) -> bool:
        """Whether a page of this origin may use the gateway."""
        return origin in self.origins or (self.origin_pattern is not None and re.fullmatch(self.origin_pattern, origin) is not None)
