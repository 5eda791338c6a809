"""Where a file goes wrong: read slowly, row by row, once DuckDB has found that something is."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from netra import errors
from services.dispatcher.tools.spend import reading, values
from services.dispatcher.tools.spend.columns import FIELD, Column, Mapped, Role

Row = Mapping[Role, str | None]


@dataclass(frozen=True, slots=True)
class Place:
    """A row of a file: what its number counts, and the number."""

    unit: str
    number: int


@dataclass(frozen=True, slots=True)
class Zones:
    """What the times seen so far have in common."""

    zoned: bool
    place: Place


def raise_first(file: reading.Plain, layout: reading.Layout, mapped: Mapped, *, mixed: bool) -> None:
    """Raise `InvalidPayload` for the first line that cannot be used; with `mixed`, times with and without zone do not go together."""
    zones: Zones | None = None
    for place, row in _rows(file, layout, mapped):
        check(file.name, mapped, place, row)
        if mixed:
            zones = agreed(file.name, mapped, zones, place, row)


def check(name: str, mapped: Mapped, place: Place, row: Row) -> None:
    """Raise `InvalidPayload` if the row cannot be used."""
    if (fault := values.fault(row)) is not None:
        raise _error(name, mapped, place, fault.role, fault.what)


def agreed(name: str, mapped: Mapped, zones: Zones | None, place: Place, row: Row) -> Zones:
    """Raise `InvalidPayload` if a time has a zone and an earlier one has none, or the reverse."""
    here = values.zoned(row[Role.TIME])
    if zones is None or zones.zoned == here:
        return zones or Zones(here, place)
    said, before = ("a time zone", "none") if here else ("no time zone", "one")
    what = f"has {said}, {zones.place.unit} {zones.place.number} has {before}; say the zone of the times without: inputs.timezone"
    raise _error(name, mapped, place, Role.TIME, what)


def rewritten(file: reading.Plain, layout: reading.Layout, mapped: Mapped) -> tuple[reading.Plain, reading.Layout]:
    """The same CSV with the columns that are used, in the plainest form: for files that a person can read and DuckDB cannot."""
    used = {int(column.path[0][1:]) for columns in mapped.roles.values() for column in columns}
    target = file.path.with_name(file.path.name + ".rewritten")
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        for number, (_, record) in enumerate(reading.records(file, layout.delimiter)):
            if number:
                writer.writerow([record[place] if place in used else "" for place in range(len(layout.columns))])
    return replace(file, path=target), replace(layout, delimiter=",", skip=0)


def _rows(file: reading.Plain, layout: reading.Layout, mapped: Mapped) -> Iterator[tuple[Place, Row]]:
    if file.format == "jsonl":
        for line, value in reading.objects(file):
            yield Place("line", line), {role: _first(value, columns) for role, columns in mapped.roles.items()}
        return
    counted = reading.records(file, layout.delimiter)
    next(counted)
    for line, record in counted:
        _check_width(file.name, line, record, len(layout.columns))
        yield (
            Place("line", line),
            {
                role: next((text for column in columns if (text := record[int(column.path[0][1:])])), None)
                for role, columns in mapped.roles.items()
            },
        )


def _check_width(name: str, line: int, record: list[str], width: int) -> None:
    if len(record) == width or (len(record) == width + 1 and not record[-1]):
        return
    message = f"{name}, line {line}: {len(record)} fields where the first line names {width} columns."
    raise errors.InvalidPayload(message, line=line, column=min(len(record), width) + 1, field="artifact_id")


def _first(value: Mapping[str, Any], columns: tuple[Column, ...]) -> str | None:
    return next((text for column in columns if (text := _text(value, column.path))), None)


def _text(value: Any, path: tuple[str, ...]) -> str | None:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _error(name: str, mapped: Mapped, place: Place, role: Role, what: str) -> errors.InvalidPayload:
    column = " or ".join(column.name for column in mapped.roles[role])
    message = f"{name}, {place.unit} {place.number}, column {column}: {what}."
    return errors.InvalidPayload(message, column=column, field=FIELD[role], **{place.unit: place.number})
