"""usage_load: any log that is understood becomes one Parquet file with the same columns, or nothing does.

Its columns: time (UTC, microseconds), span (the microseconds a row stands for; null: nobody knows), model, user, context (how it was
processed: `values.CONTEXTS`), input_tokens (all of it), cached_input_tokens, cache_write_tokens, cache_write_1h_tokens, input_audio_tokens
(not from a cache) and cached_audio_tokens (parts of it), output_tokens, output_audio_tokens (a part of it), web_searches, requests;
tier_tokens is the input of one request, by which tiers are chosen, and single says that the row is one request.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from netra import errors
from services.dispatcher.tools.spend import columns, duck, faults, figures, query, reading, values
from services.dispatcher.tools.spend.columns import Column, Mapped, Role

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
    days: int
    late: int
    processed: Mapping[str, int]
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Log:
    """A file and how it is to be read."""

    source: Path
    file: reading.Plain
    layout: reading.Layout
    mapped: Mapped
    wanted: Wanted
    later: tuple[Column, ...] = ()

    def raw(self) -> str:
        """The SQL of its rows as text."""
        return query.raw(self.file, self.layout, self.mapped, self.later)

    def part(self) -> Path:
        """Where it is written until all of it is checked: beside the file it comes from."""
        return self.source.with_name(f"{self.source.name}.part")


def load(folder: Path, path: Path, name: str, *, model: str = "", named: Mapping[str, str] | None = None, zone: str = "") -> figures.Loaded:
    """Check a log and normalise it into `folder`. Raises `InvalidPayload` naming line, column and field of what is wrong."""
    try:
        file = reading.plain(path, name)
        with duck.opened(folder) as connection:
            wanted = Wanted(model.strip(), named or {}, _zone(connection, zone))
            log = _mapped(path, file, reading.layout(connection, file), wanted)
            log, found = _read(connection, log)
            if found.late and (came := _came(connection, log)):
                log, found = _read(connection, _mapped(path, log.file, replace(log.layout, columns=(*log.layout.columns, *came)), wanted))
            _check(connection, log, found)
            found = _named_tiers(connection, log, found)
        log.part().replace(folder / USAGE)
    finally:
        for left in path.parent.glob(f"{path.name}.*"):
            left.unlink()
    return _loaded(log, found)


def _mapped(path: Path, file: reading.Plain, layout: reading.Layout, wanted: Wanted) -> Log:
    line = {"csv": layout.skip, "jsonl": 1, "parquet": 0}[file.format]
    mapped = columns.mapped(layout.columns, wanted.columns, line=line)
    return Log(path, file, layout, mapped, wanted, columns.later(layout.columns, mapped) if file.format == "jsonl" else ())


def _came(connection: duckdb.DuckDBPyConnection, log: Log) -> list[Column]:
    """Columns that only later rows have: what the rows mean is decided once more with them."""
    return list(itertools.compress(log.later, duck.row(connection, query.came(log.file, log.later))))


def _read(connection: duckdb.DuckDBPyConnection, log: Log) -> tuple[Log, Found]:
    try:
        return log, _written(connection, log)
    except duckdb.Error as error:
        if log.file.format == "parquet" and not isinstance(error, _NOT_THE_FILE):
            raise _damaged(log) from None
        if not isinstance(error, _UNREADABLE):
            raise
        # its own words speak of its options, and name paths
        return _read_again(connection, log)


def _read_again(connection: duckdb.DuckDBPyConnection, log: Log) -> tuple[Log, Found]:
    """Raise for what is wrong in a text file, or read it in a plainer form: mixed ends of lines, very long lines."""
    if log.file.format == "csv" and (plain := reading.with_same_ends(log.file)):
        log = replace(log, file=plain)
        with contextlib.suppress(*_UNREADABLE):
            return log, _written(connection, log)
    faults.raise_first(log.file, log.layout, log.mapped, mixed=False)
    if log.file.format != "csv":
        raise _damaged(log)
    file, layout = faults.rewritten(log.file, log.layout, log.mapped)
    return log, _written(connection, replace(log, file=file, layout=layout))


def _written(connection: duckdb.DuckDBPyConnection, log: Log) -> Found:
    target = duck.text(str(log.part()))
    rows = query.usage(log.raw(), log.mapped, log.wanted.model, log.wanted.zone)
    connection.execute(f"COPY ({rows}) TO {target} (FORMAT parquet, COMPRESSION snappy)")
    counts = ("fault", "zoned", "filled", "NOT single", "bare", "late", *(f"context = '{context}'" for context in values.CONTEXTS[1:]))
    counted = ", ".join(f"count(*) FILTER ({condition})" for condition in counts)
    rows_, faulty, zoned, filled, sums, days, late, *processed = duck.row(
        connection, f"SELECT count(*), {counted} FROM read_parquet({target})"
    )
    how = {context: count for context, count in zip(values.CONTEXTS[1:], processed, strict=True) if count}
    return Found(rows_, faulty, zoned, filled, sums, days, late, how)


def _named_tiers(connection: duckdb.DuckDBPyConnection, log: Log, found: Found) -> Found:
    if "other" not in found.processed:
        return found
    named = f"SELECT DISTINCT tier FROM read_parquet({duck.text(str(log.part()))}) WHERE tier IS NOT NULL ORDER BY tier LIMIT 5"
    return replace(found, tiers=tuple(name for (name,) in duck.rows(connection, named)))


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
    for number, *texts_ in duck.rows(connection, f"{wrong} ORDER BY row LIMIT 2"):
        place, row = faults.Place("row", number), dict(zip(log.mapped.roles, texts_, strict=True))
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
        columns=log.mapped.named(),
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
    yield from _of_tokens(mapped)
    yield from _of_prices(found)
    if found.days:
        yield f"{found.days:,} rows have a day and no time: each is the sum of that day."
    if found.sums and Role.REQUESTS in mapped.roles:
        yield (
            f"{found.sums:,} rows are not one request each: percentiles are of rows, and prices that depend on the length of a prompt"
            " use the mean of the row."
        )
    elif found.sums:
        yield "Rows are sums of an unknown number of requests: each counts as one, and is priced as if its prompts were short."
    if found.sums:
        yield "A sum counts at the time it begins: the busiest minute and hour are those in which most of it begins."


def _of_tokens(mapped: Mapped) -> Iterator[str]:
    for role, what in ((Role.CACHED, "Cached tokens"), (Role.WRITTEN, "Tokens written to a cache")):
        if role in mapped.roles:
            yield f"{what} ({' or '.join(column.name for column in mapped.roles[role])}) are a part of the input tokens."
    lasting = Role.WRITTEN not in mapped.roles and {Role.CACHE_WRITE_5M, Role.CACHE_WRITE_1H} & mapped.roles.keys()
    if lasting or {Role.CACHE_READ, Role.CACHE_WRITE} & mapped.roles.keys():
        yield "Tokens read from and written to the cache come on top of the counted input, and are added to it."
    if Role.CACHE_WRITE in mapped.roles or Role.WRITTEN in mapped.roles:
        yield "Cache writes that do not say how long they last are taken as five minutes."
    if Role.INPUT_AUDIO in mapped.roles or Role.OUTPUT_AUDIO in mapped.roles:
        yield "Audio tokens are a part of the input and output tokens."


def _of_prices(found: Found) -> Iterator[str]:
    named = {context: count for context, count in found.processed.items() if context != "other"}
    if named:
        counts = ", ".join(f"{count:,} as {context}" for context, count in named.items())
        yield f"Of {found.rows:,} rows these were not processed as usual: {counts}. They have the list's price for that, where it has one."
    if other := found.processed.get("other"):
        yield f"{other:,} rows have a service tier that the list has no price for ({', '.join(found.tiers)}): they are priced as usual."


def _damaged(log: Log) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"{log.file.name} cannot be read as {log.file.format.upper()}; it may be damaged.", field="artifact_id")
