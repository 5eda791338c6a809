"""A PostgreSQL and a Valkey of a measurement's own, migrated, with fsync as everywhere; and what runs on them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from chassis import log, settings, telemetry
from standalone import ports, prepare, processes, supervise


@contextlib.asynccontextmanager
async def stack(
    *services: str, commands: Mapping[str, tuple[str, ...]] | None = None, environment: Mapping[str, str] | None = None
) -> AsyncIterator[supervise.Stack]:
    """The stores and some of the services, as `make run` starts them, in a folder that is gone afterwards.

    `commands` start some of them in another way, `environment` is what all of them are told besides.
    """
    others = commands or {}
    wanted = [row for row in processes.TABLE if row.name in (*processes.STORES, *services)]
    table = tuple(dataclasses.replace(row, command=others.get(row.name, row.command)) for row in wanted)
    with tempfile.TemporaryDirectory() as folder:
        # services that are not run are told ports at which nobody answers
        free = ports.free([row.name for row in processes.TABLE])
        async with supervise.Stack(Path(folder), free, table=table, backend="embedded", environment=environment) as running:
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
