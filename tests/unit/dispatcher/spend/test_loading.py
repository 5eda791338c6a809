"""What is read out of a log that is unusual, but right."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from netra import errors
from services.dispatcher.tools.spend import faults, reading
from tests.unit.dispatcher.spend import bench, logs

ROW = "gpt-4o,10,5"


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of the normalised log."""
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT * FROM '{folder}/usage.parquet' ORDER BY time")  # noqa: S608 - a temporary folder
        names = [name for name, *_ in found.description or []]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


@pytest.mark.parametrize(
    ("time", "moment"),
    [
        ("2025-03-30 10:00:00", "2025-03-30 10:00:00"),
        ("2025-03-30", "2025-03-30 00:00:00"),
        ("2025-03-30T10:00", "2025-03-30 10:00:00"),
        ("2025-03-30 10:00:00.1234567", "2025-03-30 10:00:00.123456"),
        ("2025-03-30T10:00:00.999999999Z", "2025-03-30 10:00:00.999999"),
        ("2025-03-30T10:00:00+02:00", "2025-03-30 08:00:00"),
        ("2025-03-30T10:00:00-0530", "2025-03-30 15:30:00"),
        ("2025-03-30 10:00:00 UTC", "2025-03-30 10:00:00"),
        ("2025-03-30 10:00:00+00", "2025-03-30 10:00:00"),
        ("1743328800", "2025-03-30 10:00:00"),
        ("1743328800.5", "2025-03-30 10:00:00.500000"),
        ("1743328800123", "2025-03-30 10:00:00.123000"),
        ("1743328800123.9", "2025-03-30 10:00:00.123900"),
        ("1743328800123456", "2025-03-30 10:00:00.123456"),
        ("1743328800123456789", "2025-03-30 10:00:00.123456"),
        # a double would round these up, into the next hour
        ("1699999199.9999999", "2023-11-14 21:59:59.999999"),
        ("1699999199999.9999999", "2023-11-14 21:59:59.999999"),
        ("1699999199999999.9", "2023-11-14 21:59:59.999999"),
        ("1699999199999999999", "2023-11-14 21:59:59.999999"),
    ],
)
def test_times_are_read_to_the_microsecond(time: str, moment: str, tmp_path: Path) -> None:
    bench.load(tmp_path, f"time,model,input,output\n{time},{ROW}\n".encode())
    assert read(tmp_path)[0]["time"] == datetime.fromisoformat(moment)


@pytest.mark.parametrize(
    ("zone", "moment"),
    [("Europe/Berlin", "2025-07-01 08:00:00"), ("europe/berlin", "2025-07-01 08:00:00"), ("+02:00", "2025-07-01 08:00:00"),
     ("-0330", "2025-07-01 13:30:00"), ("UTC", "2025-07-01 10:00:00")],
)  # fmt: skip
def test_a_given_zone_is_that_of_times_without_one(zone: str, moment: str, tmp_path: Path) -> None:
    text = f"time,model,input,output\n2025-07-01 10:00:00,{ROW}\n2025-07-02T10:00:00Z,{ROW}\n"
    loaded = bench.load(tmp_path, text.encode(), zone=zone)
    assert [row["time"] for row in read(tmp_path)] == [datetime.fromisoformat(moment), datetime(2025, 7, 2, 10)]  # noqa: DTZ001 - UTC
    assert loaded["timezone"].lower() == f"utc (times without a zone are {zone}, as given)".lower()


@pytest.mark.parametrize(
    ("time", "moment"),
    [("2025-03-30 02:30:00", "2025-03-30 01:30:00"), ("2025-10-26 02:30:00", "2025-10-26 01:30:00")], ids=["skipped", "twice"],
)  # fmt: skip
def test_a_time_that_a_clock_does_not_show_or_shows_twice_is_read_as_documented(time: str, moment: str, tmp_path: Path) -> None:
    bench.load(tmp_path, f"time,model,input,output\n{time},{ROW}\n".encode(), zone="Europe/Berlin")
    assert read(tmp_path)[0]["time"] == datetime.fromisoformat(moment)


def test_a_zone_in_each_time_needs_no_assumption(tmp_path: Path) -> None:
    loaded = bench.load(tmp_path, f"time,model,input,output\n2025-07-01T10:00:00+02:00,{ROW}\n".encode())
    assert (loaded["timezone"], loaded["assumptions"]) == ("UTC (each time names its zone)", [])


@pytest.mark.parametrize(
    "text",
    [
        "time;model;input;output\n2025-01-01;gpt-4o;10;5\n",
        "time\tmodel\tinput\toutput\n2025-01-01\tgpt-4o\t10\t5\n",
        "time|model|input|output\r\n2025-01-01|gpt-4o|10|5\r\n",
        "\ufefftime,model,input,output\n2025-01-01,gpt-4o,10,5",
        '"time","model","input","output"\n"2025-01-01","gpt-4o","10","5"\n\n',
        "\n\ntime,model,input,output\n\n2025-01-01, gpt-4o , 10 ,5.0\n",
        "time,model,input,output\r2025-01-01,gpt-4o,10,5\r",
        "time,model,input,output\n2025-01-01,gpt-4o,10.00,5.0000\n",
        "time,model,input,output,\n2025-01-01,gpt-4o,10,5,\n",
        '"time\nof day",model,input,output\n2025-01-01,gpt-4o,10,5\n',
        '{"time":"2025-01-01","model":"gpt-4o","input":10,"output":5}',
        '\n{"time":"2025-01-01","model":"gpt-4o","input":"10","output":5.0}\n\n',
        '\ufeff{"body":{"time":"2025-01-01","model":"gpt-4o","input":10,"output":5}}\r\n',
        '{"TIME":"2025-01-01","a/b~c":{"d.e":1},"model":"gpt-4o","input":10,"output":5}\n',
    ],
)
def test_a_log_may_be_written_in_many_ways(text: str, tmp_path: Path) -> None:
    named = {"time": "time\nof day"} if "of day" in text else {}
    assert bench.load(tmp_path, text.encode(), named=named)["rows"] == 1
    (row,) = read(tmp_path)
    wanted = (datetime(2025, 1, 1), "gpt-4o", 10, 5)  # noqa: DTZ001 - UTC
    assert (row["time"], row["model"], row["input_tokens"], row["output_tokens"]) == wanted


def test_a_csv_with_mixed_ends_and_very_long_lines_is_read(tmp_path: Path) -> None:
    long = "x" * 5_000_000
    text = f'time,model,input,output,prompt\n2025-01-01,gpt-4o,1,1,a\r\n2025-01-02,gpt-4o,2,2,"{long}"\n2025-01-03,gpt-4o,3,3,"b\nc"\r\n'
    bench.load(tmp_path, text.encode())
    assert [row["input_tokens"] for row in read(tmp_path)] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "usage.parquet"]


@pytest.mark.parametrize("mixed", ["\r\n{}\n{}\r\n", "\n{}\r\n{}\n", "\r\n{}\r{}\n"])
def test_mixed_ends_of_lines_are_read_as_fast_as_others(mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "raise_first", None)  # what reads row by row
    rows = '2025-01-01 10:00,"gpt-4o",1,1', '"2025-01-02 10:00","gpt-4o",2,"2"'
    bench.load(tmp_path, f"time,model,input,output{mixed}".format(*rows).encode())
    assert [row["input_tokens"] for row in read(tmp_path)] == [1, 2]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_are_counted_across_the_blocks_that_a_file_is_read_in(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "log"
    text = "".join(f"{number},{'x' * 331}{end}" for number in range(1, 41))
    path.write_bytes(text.encode())
    file = reading.Plain(path, "a.csv", "csv", "none", 1)
    assert [(line, int(record[0])) for line, record in reading.records(file, ",")] == [(number, number) for number in range(1, 41)]
    path.write_bytes(f"{text}{'x' * 1001}{end}y{end}".encode())
    with pytest.raises(errors.TooLarge, match="line 41: longer than 1,000 bytes"):
        list(reading.records(file, ","))


def test_a_parquet_file_may_have_any_column(tmp_path: Path) -> None:
    kinds = {"time": "VARCHAR", "input_tokens": "DECIMAL(18,3)", "output_tokens": "BIGINT", "file_row_number": "BIGINT", "row": "BIGINT"}
    good = logs.parquet(kinds, [["2025-01-01 10:00"] * 3, [12, 1000, 100], [1, 2, 3], [7, 7, 7], [8, 8, 8]])
    bench.load(tmp_path, good)
    assert sorted(row["input_tokens"] for row in read(tmp_path)) == [12, 100, 1000]
    bad = logs.parquet(kinds, [["2025-01-01 10:00"] * 3000, [1] * 3000, [1] * 2500 + [-1] * 500, [7] * 3000, [8] * 3000])
    with pytest.raises(errors.InvalidPayload) as caught:
        bench.load(tmp_path, bad)
    assert (caught.value.details["row"], caught.value.details["column"]) == ("2501", "output_tokens")


def test_columns_that_are_not_recognised_can_be_named(tmp_path: Path) -> None:
    text = "when,who,time,in,out,from_cache\n2025-01-01 00:00,ann,3.5,10,5,4\n"
    given = {"time": "when", "user": "WHO", "input_tokens": "in", "output": "out", "cached": "from_cache"}
    loaded = bench.load(tmp_path, text.encode(), named=given, model="gpt-4o")
    (row,) = read(tmp_path)
    assert (row["user"], row["input_tokens"], row["cached_input_tokens"], row["model"]) == ("ann", 10, 4, "gpt-4o")
    assert loaded["columns"] == {
        "time": "when", "input_tokens": "in", "output_tokens": "out", "cached_input_tokens": "from_cache", "user": "who"
    }  # fmt: skip
    assert loaded["model"] == "gpt-4o (given)"
    assert loaded["assumptions"] == [
        "Times without a zone are taken as UTC.",
        "1 of 1 rows name no model and are taken as gpt-4o, as given.",
        "Cached tokens (from_cache) are a part of the input tokens.",
    ]


def test_an_empty_name_says_that_there_is_no_such_column(tmp_path: Path) -> None:
    text = "time,model,input,output,user,customer\n2025-01-01,gpt-4o,10,5,a,b\n"
    assert "user" not in bench.load(tmp_path, text.encode(), named={"user": ""})["columns"]


def test_a_given_model_is_only_for_rows_without_one(tmp_path: Path) -> None:
    text = "time,model,input,output\n2025-01-01,,1,1\n2025-01-02, ,1,1\n2025-01-03,o3,1,1\n"
    loaded = bench.load(tmp_path, text.encode(), model="gpt-4o's")
    assert [row["model"] for row in read(tmp_path)] == ["gpt-4o's", "gpt-4o's", "o3"]
    assert "2 of 3 rows name no model and are taken as gpt-4o's, as given." in loaded["assumptions"]


def test_columns_that_only_later_lines_have_are_read(tmp_path: Path) -> None:
    chat: dict[str, Any] = {"created": 1700000000, "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
    late = {**chat, "model": "gpt-4o", "user": "ann"} | {"usage": {**chat["usage"], "prompt_tokens_details": {"cached_tokens": 4}}}
    loaded = bench.load(tmp_path, b"\n".join(json.dumps(value).encode() for value in [chat] * 1500 + [late]))
    rows = read(tmp_path)
    assert (len(rows), sum(row["cached_input_tokens"] for row in rows)) == (1501, 4)
    assert [row["user"] for row in rows if row["model"]] == ["ann"]
    assert loaded["columns"]["cached_input_tokens"] == "usage.prompt_tokens_details.cached_tokens"
    assert loaded["columns"]["model"] == "model"


def test_a_column_that_no_line_has_is_not_claimed(tmp_path: Path) -> None:
    chat = b'{"created":1700000000,"usage":{"prompt_tokens":10,"completion_tokens":5}}\n'
    assert bench.load(tmp_path, chat)["columns"] == {
        "time": "created", "input_tokens": "usage.prompt_tokens", "output_tokens": "usage.completion_tokens"
    }  # fmt: skip


def test_names_are_data_never_statements(tmp_path: Path) -> None:
    rows = [logs.Request(datetime(2025, 1, 1, tzinfo=UTC), 1, 1, "a'); DROP TABLE usage; --", 'o\'hara "x"')]
    bench.load(tmp_path, logs.generic_csv(rows), name="a'b.csv")
    assert [(row["model"], row["user"]) for row in read(tmp_path)] == [(rows[0].model, rows[0].user)]
    odd = {"it's": {'"quoted"': {"x~/y": 7}}, "time": "2025-01-01", "output": 1}
    bench.load(tmp_path, json.dumps(odd).encode(), named={"input": 'it\'s."quoted".x~/y'})
    assert read(tmp_path)[0]["input_tokens"] == 7


def test_a_file_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_bytes(logs.generic_csv(logs.requests(1, 5)))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "log").symlink_to(outside)
    request = {"tool": "usage_load", "file": "log", "name": "a.csv", "model": "", "named": {}, "zone": ""}
    with pytest.raises(duckdb.PermissionException):
        bench.asked(inside, request)
