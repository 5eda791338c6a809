"""ContextSettings."""

from __future__ import annotations

from pydantic import Field

from chassis.wrapping import WrappingSettings


class ContextSettings(WrappingSettings):
    """What the context service reads beside what every process reads."""

    port: int = Field(7002, validation_alias="NETRA_CONTEXT_PORT", ge=0, le=65535)
