"""What DuckDB takes for a time and a count is what is taken for one value at a time, so that an error names the line that is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path

import duckdb
import pytest

from netra import errors
from services.dispatcher.tools.spend import columns, query, values
from services.dispatcher.tools.spend.columns import Column, Role
from tests.unit.dispatcher.spend import bench

TIMES = (
    "2024-01-01", "2024-01-01Z", "2024-01-01 Z", "2024-01-01+01:00", "2024-01-01T", "2024-01-01T10", "2024-01-01T10Z", "2024-01-01T10:00Z",
    "2024-01-01T10:00:00", "2024-01-01T10:00:00Z", "2024-01-01 10:00:00 Z", "2024-01-01 10:00:00 UTC", "2024-01-01T10:00:00+01",
    "2024-01-01T10:00:00+0130", "2024-01-01T10:00:00+01:30", "2024-01-01T10:00:00+24", "2024-01-01T10:00:00+01:60", "2024-01-01T24:00:00Z",
    "2024-01-01T10:00:60Z", "2024-02-30", "2024-02-30T10:00:00Z", "2023-02-29T10:00:00+01:00", "2024-13-01", "0000-01-01", "1969-12-31",
    "2999-12-31", "3000-01-01", "2024-01-01T10:00:00.", "2024-01-01T10:00:00.1234567890", " 2024-01-01", "2024-01-01 ",
    "946684799", "946684800", "4102444799", "4102444800", "946684799999", "946684800000", "4102444799999", "4102444800000",
    "20240501120000", "20240501", "99999999", "946684800.5", "946684799.999999999", "4102444799.999999999", "1699999199999999999",
    "16999991999999999999", "-1699999199", "1.7e9", "now", "infinity", "2024-01-01t10:00:00z",
)  # fmt: skip
COUNTS = (
    "0", "1", "999999999999", "1000000000000", "1.0", "1.00", "1.000", "1234.000", "1.0000", "1.", ".0", "1.5", "1,000", "1 000", "-1",
    "+1", "1e3", "0x10", " 1", "1 ", "\t1", "1\n", "nan", "inf", "true", "٣", "",
)  # fmt: skip


def test_both_take_the_same() -> None:
    mapped = columns.mapped([Column(name, (name,)) for name in ("time", "input", "output", "cached")], {})
    rows = [*itertools.product(TIMES, ("1",)), *itertools.product(("2024-01-01",), COUNTS)]
    names = ("time", "input", "output", "cached", "place")
    source = f"SELECT {', '.join(f'unnest(?) AS {name}' for name in names)}, false AS late"
    places = [str(place) for place in range(len(rows))]
    texts = [[time for time, _ in rows], ["999999999999"] * len(rows), ["1"] * len(rows), [count or None for _, count in rows], places]
    with duckdb.connect() as connection:
        found = connection.execute(query.usage(source, mapped, "", "", more=", place"), texts).fetchall()
        place, fault = (
            next(at for at, named in enumerate(connection.description or []) if named[0] == name) for name in ("place", "fault")
        )
    refused = {rows[int(row[place])] for row in found if row[fault]}
    wanted = {
        (time, count) for time, count in rows
        if values.fault({Role.TIME: time, Role.INPUT: "999999999999", Role.OUTPUT: "1", Role.CACHED: count or None})
    }  # fmt: skip
    assert refused == wanted


def test_a_day_with_a_zone_is_refused_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        bench.load(tmp_path, b"time,input,output\n2024-01-01T10:00:00Z,1,1\n2024-01-01Z,1,1\n")
    assert caught.value.details["line"] == "3"
