"""A PostgreSQL and a Valkey of a measurement's own, migrated, with fsync as everywhere; and what runs on them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from chassis import log, settings, telemetry
from standalone import ports, prepare, processes, supervise


@contextlib.asynccontextmanager
async def stack(*services: str) -> AsyncIterator[supervise.Stack]:
    """The stores and some of the services, as `make run` starts them, in a folder that is gone afterwards."""
    table = tuple(row for row in processes.TABLE if row.name in (*processes.STORES, *services))
    with tempfile.TemporaryDirectory() as folder:
        # services that are not run are told ports at which nobody answers
        free = ports.free([row.name for row in processes.TABLE])
        async with supervise.Stack(Path(folder), free, table=table, backend="embedded") as running:
            yield running


def dsn(running: supervise.Stack, service: str, kind: str = "") -> str:
    """The address of the database for one of a service's roles."""
    admin = prepare.on_database(running.backend.postgres_admin_url, "netra")
    secret = (running.place.secrets / service / f"postgres{kind}").read_text().strip()
    return prepare.dsn(admin, f"netra_{service}{kind}", secret, "netra")


def set_up() -> None:
    """What a service does first, for a measurement that runs parts of one in its own process."""
    process = settings.ProcessSettings(log_level="error")
    log.set_up("bench", process)
    telemetry.set_up("bench", process)
