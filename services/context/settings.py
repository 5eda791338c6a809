"""ContextSettings."""

from __future__ import annotations

from pydantic import Field

from chassis.wrapping import WrappingSettings


class ContextSettings(WrappingSettings):
    """What the context service reads beside what every process reads."""

    port: int = Field(7002, validation_alias="NETRA_CONTEXT_PORT", ge=0, le=65535)
    artifact_max_bytes: int = Field(4 * 1024**3, ge=1, le=2**40, description="The largest artifact.")
    artifacts_max_bytes_per_user: int = Field(20 * 1024**3, ge=1, le=2**50, description="All artifacts of one user.")
    artifact_stall_s: float = Field(60.0, gt=0, description="How long nothing may come of an upload.")
    artifacts_moving: int = Field(64, ge=1, description="Uploads and downloads at once; each takes up to 4 MiB of memory.")
    artifacts_moving_per_user: int = Field(8, ge=1, description="The same for one user.")
