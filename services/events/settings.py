"""EventsSettings."""

from __future__ import annotations

from pydantic import Field

from chassis.settings import ProcessSettings


class EventsSettings(ProcessSettings):
    """What the events service reads."""

    port: int = Field(7004, ge=0, le=65535, validation_alias="NETRA_EVENTS_PORT")
    events_compare_s: float = Field(2.0, gt=0, description="How often served users are compared with the record.")
    events_poll_s: float = Field(0.5, gt=0, description="The same, while Valkey is not reachable.")
    events_stream_entries: int = Field(1024, gt=0, description="About how many entries each of the 16 live streams keeps.")
    events_unknown_run_s: float = Field(2.0, ge=0, description="How long Subscribe waits for a run that is not in the record yet.")
    events_export_at_once: int = Field(4, gt=0, description="Pages of exports that are read at a time.")
    events_sweep_s: float = Field(3600.0, gt=0, description="How often what is older than its retention is dropped.")
    events_retention_grace_h: float = Field(24.0, ge=0, description="How long a shortened retention waits before it counts.")
    events_follows_per_user: int = Field(64, gt=0, description="Streams of threads that one user may have open at a replica.")
