"""ContextSettings."""

from __future__ import annotations

from pydantic import Field

from chassis.wrapping import WrappingSettings


class ContextSettings(WrappingSettings):
    """What the context service reads beside what every process reads."""

    port: int = Field(7002, validation_alias="NETRA_CONTEXT_PORT", ge=0, le=65535)
    artifact_max_bytes: int = Field(4 * 1024**3, ge=1, le=2**40, description="The largest artifact.")
    artifacts_max_bytes_per_user: int = Field(20 * 1024**3, ge=1, le=2**50, description="All artifacts of one user.")
    artifacts_max_per_user: int = Field(1_000_000, ge=1, description="How many artifacts one user may keep, in any tier.")
    artifact_stall_s: float = Field(60.0, gt=0, description="How long nothing may come of an upload.")
    artifacts_moving: int = Field(64, ge=1, description="Uploads and downloads at once; each takes up to 4 MiB of memory.")
    artifacts_moving_per_user: int = Field(8, ge=1, description="The same for one user.")
    context_keep_days: int = Field(30, ge=1, le=3650, description="How long a closed execution context is kept.")
    # row-level security keeps younger lines than 30 days
    context_audit_keep_days: int = Field(365, ge=30, le=36500, description="How long a line of the audit trail of contexts is kept.")
    thread_keep_days: int = Field(30, ge=1, le=3650, description="How long a deleted thread can be restored before it is erased.")
    grant_token_s: int = Field(120, ge=10, le=300, description="How long a grant token is valid, and so a stream of a withdrawn grant.")
