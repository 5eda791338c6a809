"""Applies each service's numbered SQL files once, under an advisory lock."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path

from chassis import log, postgres
from netra import errors

_log = log.get(__name__)
_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_LOCK = 0x6E657472  # "netr"


class MigrationError(Exception):
    """The files and what was applied do not fit together."""


def files(folder: Path) -> list[tuple[int, str, str]]:
    """Number, name and text of each file, in order. Raises `MigrationError` on a gap or a wrong name."""
    found: list[tuple[int, str, str]] = []
    for path in sorted(folder.glob("*.sql")):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) != len(found) + 1:
            raise MigrationError(f"{path} must be named {len(found) + 1:04d}_what.sql")
        found.append((int(match[1]), match[2], path.read_text(encoding="utf-8")))
    return found


def latest(folder: Path) -> int:
    """The number of the last file."""
    return len(files(folder))


async def apply(dsn: str, schema: str, folder: Path) -> list[str]:
    """Apply what is missing, each file in a transaction of its own; returns the names applied.

    Raises `MigrationError` when an applied file was edited since.
    """
    applied: list[str] = []
    async with postgres.connection(dsn) as database:
        await database.execute("SELECT pg_advisory_lock($1)", _LOCK)
        await database.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        await database.execute(
            f"CREATE TABLE IF NOT EXISTS {schema}.migrations (version int PRIMARY KEY, name text NOT NULL,"
            " digest text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        done = {row["version"]: row["digest"] for row in await database.fetch(f"SELECT version, digest FROM {schema}.migrations")}  # noqa: S608
        for version, name, text in files(folder):
            digest = hashlib.sha256(text.encode()).hexdigest()
            if version in done:
                if done[version] != digest:
                    raise MigrationError(f"{folder}/{version:04d}_{name}.sql was edited after it was applied; add a new file instead")
                continue
            async with database.savepoint():
                await database.execute(text)
                insert = f"INSERT INTO {schema}.migrations (version, name, digest) VALUES ($1, $2, $3)"  # noqa: S608
                await database.execute(insert, version, name, digest)
            applied.append(f"{schema}/{version:04d}_{name}")
    return applied


async def awaited(database: postgres.DatabaseManager, schema: str, folder: Path) -> None:
    """Returns when every file of the folder has been applied to the database by the job that does so."""
    wanted = latest(folder)
    while True:
        try:
            if await postgres.schema_version(database, schema) >= wanted:
                return
        except (errors.Unavailable, errors.DeadlineExceeded):
            _log.warning("waiting for the database", schema=schema)
        await asyncio.sleep(0.1)
