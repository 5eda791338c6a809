"""usage_load: any log that is understood becomes one Parquet file with the same columns, or nothing does.

Its columns: time (UTC, microseconds), model, user, input_tokens (all of it), cached_input_tokens, cache_write_tokens and
cache_write_1h_tokens (parts of it), output_tokens, requests; tier_tokens is the input of one request, by which tiers are chosen,
and single says that the row is one request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from netra import errors
from services.dispatcher.tools.spend import columns, duck, faults, figures, query, reading
from services.dispatcher.tools.spend.columns import Mapped, Role

USAGE = "usage.parquet"
MAX_MODELS = 10_000
# what DuckDB raises for what is in a text file; a damaged Parquet file gets anything but the others
_UNREADABLE = (duckdb.InvalidInputException, duckdb.ConversionException)
_NOT_THE_FILE = (duckdb.OutOfMemoryException, duckdb.PermissionException, duckdb.IOException)
_OFFSET = re.compile(r"[+-]([01]\d|2[0-3]):?[0-5]\d")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller says about a log. An empty text means: nothing."""

    model: str
    columns: Mapping[str, str]
    zone: str


@dataclass(frozen=True, slots=True)
class Found:
    """What was counted while a log was read."""

    rows: int
    faults: int
    zoned: int
    without_model: int
    sums: int
    late: tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """A file and how it is to be read."""

    source: Path
    file: reading.Plain
    layout: reading.Layout
    mapped: Mapped
    wanted: Wanted

    def raw(self) -> str:
        """The SQL of its rows as text."""
        return query.raw(self.file, self.layout, self.mapped)

    def part(self) -> Path:
        """Where it is written until all of it is checked: beside the file it comes from."""
        return self.source.with_name(f"{self.source.name}.part")


def load(folder: Path, path: Path, name: str, *, model: str = "", named: Mapping[str, str] | None = None, zone: str = "") -> figures.Loaded:
    """Check a log and normalise it into `folder`. Raises `InvalidPayload` naming line, column and field of what is wrong."""
    try:
        file = reading.plain(path, name)
        with duck.opened(folder) as connection:
            wanted = Wanted(model.strip(), named or {}, _zone(connection, zone))
            layout = reading.layout(connection, file)
            log = Log(path, file, layout, columns.mapped(layout.columns, wanted.columns, late=file.format == "jsonl"), wanted)
            found = _read(connection, log)
            _check(connection, log, found)
        log.part().replace(folder / USAGE)
    finally:
        for left in path.parent.glob(f"{path.name}.*"):
            left.unlink()
    return _loaded(log, found)


def _read(connection: duckdb.DuckDBPyConnection, log: Log) -> Found:
    try:
        return _written(connection, log)
    except duckdb.Error as error:
        if log.file.format == "parquet" and not isinstance(error, _NOT_THE_FILE):
            raise _damaged(log) from None
        if not isinstance(error, _UNREADABLE):
            raise
        # its own words speak of its options, and name paths
        faults.raise_first(log.file, log.layout, log.mapped, mixed=False)
    if log.file.format != "csv":
        raise _damaged(log)
    # right, but not as DuckDB likes it: mixed ends of lines, very long lines
    file, layout = faults.rewritten(log.file, log.layout, log.mapped)
    return _written(connection, replace(log, file=file, layout=layout))


def _written(connection: duckdb.DuckDBPyConnection, log: Log) -> Found:
    target = duck.text(str(log.part()))
    rows = query.usage(log.raw(), log.mapped, log.wanted.model, log.wanted.zone)
    connection.execute(f"COPY ({rows}) TO {target} (FORMAT parquet, COMPRESSION snappy)")
    late = query.unseen(log.mapped)
    counts = ["fault", "zoned", "filled", "NOT single", *(f"late_{role}" for role in late)]
    counted = ", ".join(f"count(*) FILTER ({condition})" for condition in counts)
    rows_, faulty, zoned, without_model, sums, *came = duck.row(connection, f"SELECT count(*), {counted} FROM read_parquet({target})")
    return Found(rows_, faulty, zoned, without_model, sums, tuple(role for role, count in zip(late, came, strict=True) if count))


def _check(connection: duckdb.DuckDBPyConnection, log: Log, found: Found) -> None:
    mixed = not log.wanted.zone and 0 < found.zoned < found.rows
    if found.faults or mixed:
        if log.file.format == "parquet":
            _raise_in_parquet(connection, log, mixed=mixed)
        faults.raise_first(log.file, log.layout, log.mapped, mixed=mixed)
        raise _damaged(log)
    part = duck.text(str(log.part()))
    (models,) = duck.row(connection, f"SELECT count(*) FROM (SELECT 1 FROM read_parquet({part}) GROUP BY model)")
    if models > MAX_MODELS:
        column = log.mapped.roles[Role.MODEL][0].name
        message = f"{log.file.name}, column {column}: more than {MAX_MODELS:,} different models; is this the column of the model?"
        raise errors.InvalidPayload(message, column=column, field="model")


def _raise_in_parquet(connection: duckdb.DuckDBPyConnection, log: Log, *, mixed: bool) -> None:
    """Raise for the first row that cannot be used, or whose time has a zone when the first one's has none."""
    texts = "".join(f", {duck.name(role)} AS text_{role}" for role in log.mapped.roles)
    marked = query.usage(
        f"SELECT *{texts} FROM ({log.raw()})", log.mapped, "", "", more=f", row{''.join(f', text_{r}' for r in log.mapped.roles)}"
    )
    first = f"(SELECT arg_min(zoned, row) FROM ({marked}))"
    wrong = (
        f"SELECT row, {', '.join(f'text_{role}' for role in log.mapped.roles)} FROM ({marked}) WHERE row = 1 OR fault OR zoned <> {first}"
    )
    zones: faults.Zones | None = None
    for number, *values in duck.rows(connection, f"{wrong} ORDER BY row LIMIT 2"):
        place, row = faults.Place("row", number), dict(zip(log.mapped.roles, values, strict=True))
        faults.check(log.file.name, log.mapped, place, row)
        zones = faults.agreed(log.file.name, log.mapped, zones, place, row) if mixed else None


def _zone(connection: duckdb.DuckDBPyConnection, zone: str) -> str:
    """The zone as the reader knows it. Raises `InvalidPayload`."""
    if not zone or _OFFSET.fullmatch(zone):
        return zone
    found = connection.execute("SELECT name FROM pg_timezone_names() WHERE lower(name) = lower(?) LIMIT 1", [zone]).fetchone()
    if found is None:
        message = f"inputs.timezone {zone[:64]!r} is not known. Write a name such as Europe/Berlin, or an offset such as +02:00."
        raise errors.InvalidPayload(message, field="timezone")
    return str(found[0])


def _loaded(log: Log, found: Found) -> figures.Loaded:
    file = log.file
    return figures.Loaded(
        name=file.name,
        format=file.format,
        compression=file.compression,
        bytes=file.bytes,
        rows=found.rows,
        columns=log.mapped.named(late=found.late),
        recognised_as=log.mapped.style,
        timezone=_said_zone(log, found),
        model=f"{log.wanted.model} (given)" if log.wanted.model else None,
        assumptions=list(_assumptions(log, found)),
    )


def _said_zone(log: Log, found: Found) -> str:
    if found.zoned == found.rows:
        return "UTC (each time names its zone)"
    if log.wanted.zone:
        return f"UTC (times without a zone are {log.wanted.zone}, as given)"
    return "UTC (assumed: times carry none)"


def _assumptions(log: Log, found: Found) -> Iterator[str]:
    mapped, wanted = log.mapped, log.wanted
    if found.zoned < found.rows and not wanted.zone:
        yield "Times without a zone are taken as UTC."
    if wanted.model:
        yield f"{found.without_model:,} of {found.rows:,} rows name no model and are taken as {wanted.model}, as given."
    cached = [
        columns_[0].name for role, columns_ in mapped.roles.items() if role is Role.CACHED and (columns_[0].seen or role in found.late)
    ]
    if cached:
        yield f"Cached tokens ({cached[0]}) are a part of the input tokens."
    if Role.CACHE_READ in mapped.roles or Role.CACHE_WRITE in mapped.roles or Role.CACHE_WRITE_5M in mapped.roles:
        yield "Tokens read from and written to the cache come on top of the counted input, and are added to it."
    if Role.CACHE_WRITE in mapped.roles:
        yield "Cache writes that do not say how long they last are taken as five minutes."
    if found.sums and Role.REQUESTS in mapped.roles:
        yield (
            f"{found.sums:,} rows are not one request each: percentiles are of rows, and prices that depend on the length of a prompt"
            " use the mean of the row."
        )
    elif found.sums:
        yield "Rows are sums of an unknown number of requests: each counts as one, and is priced as if its prompts were short."


def _damaged(log: Log) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"{log.file.name} cannot be read as {log.file.format.upper()}; it may be damaged.", field="artifact_id")
