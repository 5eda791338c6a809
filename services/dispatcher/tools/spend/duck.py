"""DuckDB for one job: bounded memory, one folder to read and write, no network, no extensions."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb

# with the interpreter, the price list and what DuckDB keeps outside its own count, a process stays below 512 MB
MEMORY_LIMIT = "224MB"
THREADS = 2
_FETCHED = 4096


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that can reach the files of `folder` only. What does not fit in memory goes there for a while."""
    spill = Path(tempfile.mkdtemp(prefix="spill-", dir=folder))
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": THREADS,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
    }
    connection = duckdb.connect(":memory:", config=settings)
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"SET allowed_directories = [{text(str(folder.resolve()))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection
    finally:
        connection.close()
        shutil.rmtree(spill, ignore_errors=True)


def text(value: str) -> str:
    """A string as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    """An identifier as SQL writes it."""
    return '"' + value.replace('"', '""') + '"'


def rows(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
    """The rows of a query, a few thousand at a time."""
    found = connection.execute(query, parameters)
    while part := found.fetchmany(_FETCHED):
        yield from part


def row(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> tuple[Any, ...]:
    """The only row of a query."""
    found = connection.execute(query, parameters).fetchone()
    if found is None:
        raise LookupError("the query has no row")
    return found
