"""A file that cannot be analysed is refused with the line, the column and the field that is wrong."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from netra import errors
from services.dispatcher.tools.spend import columns, normal, reading
from tests.unit.dispatcher.spend import bench, logs

HEAD = "time,model,input_tokens,output_tokens,cached_tokens,user\n"
GOOD = "2025-01-01T10:00:00Z,gpt-4o,10,5,0,ann\n"
CHAT = '{"created":1700000000,"model":"gpt-4o","usage":{"prompt_tokens":10,"completion_tokens":5}}\n'


def refused(folder: Path, content: bytes | str, **given: object) -> errors.InvalidPayload:
    """The error this file gets; nothing is left of the file."""
    with pytest.raises(errors.InvalidPayload) as caught:
        bench.load(folder, content if isinstance(content, bytes) else content.encode(), "my.log", **given)
    assert [path.name for path in folder.iterdir()] == ["log"]
    assert caught.value.message.startswith(("my.log", "No usable", "'", "columns.", "inputs."))
    assert str(folder) not in caught.value.message
    return caught.value


def row(
    time: str = "2025-01-01T10:00:00Z", model: str = "gpt-4o", inputs: str = "10", outputs: str = "5", cached: str = "0", user: str = ""
) -> str:
    """A line of a CSV."""
    return ",".join([time, model, inputs, outputs, cached, user]) + "\n"


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", "1", "my.log, line 1: it is empty"),
        (b" \n\n\t\n", "1", "it is empty"),
        (HEAD.encode(), "2", "no rows"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "3", "line 3: it holds binary data"),
        (b"PK\x03\x04\x14\0", "1", "save the sheet as CSV"),
        (b"%PDF-1.7\n", "1", "it is a PDF"),
        (b"\x28\xb5\x2f\xfd\0", "1", "zstd; use gzip"),
        ("time,input,output\n1,2,3\n".encode("utf-16"), "1", "UTF-16; save it as UTF-8"),
        (b'[{"time":1}]', "1", "one JSON object per line: jq -c '.[]' log.json > log.jsonl"),
        (b'{\n  "time": 1\n}\n', "1", "JSON over several lines. Write one object per line: jq -c . log.json > log.jsonl"),
        (b'{\n  "data": [{"results": []}]\n}\n', "1", columns.PAGE),
        (b"PAR1 and then nothing of the sort", None, "may be truncated"),
        ((HEAD + GOOD * 3).encode() + "2025-01-01,gpt-4o,1,1,0,Zoé\n".encode("latin-1"), "5", "line 5, byte 27: not UTF-8"),
    ],
)
def test_what_is_no_log_at_all(content: bytes, line: str | None, said: str, tmp_path: Path) -> None:
    error = refused(tmp_path, content)
    assert said in error.message
    assert (error.details.get("line"), error.details["field"]) == (line, "artifact_id")


@pytest.mark.parametrize(
    ("bad", "column", "field", "said"),
    [
        (row(inputs="abc"), "input_tokens", "input_tokens", "'abc' is not a number of tokens"),
        (row(inputs=""), "input_tokens", "input_tokens", "is empty"),
        (row(inputs="-1"), "input_tokens", "input_tokens", "'-1' is negative"),
        (row(inputs="NaN"), "input_tokens", "input_tokens", "'NaN' is not a number"),
        (row(inputs="inf"), "input_tokens", "input_tokens", "'inf' is not a number"),
        (row(outputs="1.5"), "output_tokens", "output_tokens", "'1.5' is not a whole number"),
        (row(outputs='"1,000"'), "output_tokens", "output_tokens", "'1,000' is not a number"),
        (row(outputs="1_000"), "output_tokens", "output_tokens", "'1_000' must be written with at most 12 digits"),
        (row(outputs="0x10"), "output_tokens", "output_tokens", "'0x10' is not a number"),
        (row(outputs="1e3"), "output_tokens", "output_tokens", "'1e3' must be written"),
        (row(outputs="1234567890123"), "output_tokens", "output_tokens", "at most 12 digits"),
        (row(outputs="٣"), "output_tokens", "output_tokens", "must be written"),
        (row(outputs="1\x01"), "output_tokens", "output_tokens", "is not a number"),
        (row(inputs="12.000", outputs="1.000"), "input_tokens", "input_tokens", "'12.000' may be thousands or a fraction"),
        (row(inputs="1.234.000"), "input_tokens", "input_tokens", "'1.234.000' is not a number"),
        (row(cached="x"), "cached_tokens", "cached_input_tokens", "'x' is not a number"),
        (row(cached="11"), "cached_tokens", "cached_input_tokens", "11 cached tokens are more than the 10 input tokens"),
        (row(time=""), "time", "time", "is empty"),
        (row(time="yesterday"), "time", "time", "'yesterday' cannot be read as a time; write ISO 8601"),
        (row(time="2025-02-29T10:00:00Z"), "time", "time", "cannot be read"),
        (row(time="2025-02-28T24:00:00Z"), "time", "time", "cannot be read"),
        (row(time="2025-01-01T10:00:60Z"), "time", "time", "cannot be read"),
        (row(time="01/02/2025 10:00"), "time", "time", "cannot be read"),
        (row(time="20250101"), "time", "time", "cannot be read"),
        (row(time="1969-12-31T23:59:59Z"), "time", "time", "cannot be read"),
        (row(time="infinity"), "time", "time", "cannot be read"),
        (row(time="2025-01-01Z"), "time", "time", "cannot be read"),
        (row(time="20240501120000"), "time", "time", "would be milliseconds since 1970, in the year 2611; write ISO 8601, such as 2024"),
        (row(time="100000000"), "time", "time", "would be seconds since 1970, in the year 1973"),
        (row(time="99999999999999999"), "time", "time", "would be microseconds since 1970, in the year 5138"),
        (row(time="2025-01-01T10:00:00"), "time", "time", "has no time zone, line 2 has one; say the zone"),
        (row(model="m\x07"), "model", "model", "has control characters"),
        (row(model="m" * 513), "model", "model", "longer than 512 characters"),
        (row(user="u\x1b"), "user", "user", "has control characters"),
    ],
)
def test_a_value_is_named_by_line_and_column(bad: str, column: str, field: str, said: str, tmp_path: Path) -> None:
    text = HEAD + GOOD * 6 + bad + GOOD * 3 + row(inputs="later")
    error = refused(tmp_path, text.encode())
    assert error.details == {"line": "8", "column": column, "field": field}
    assert error.message.startswith(f"my.log, line 8, column {column}: ")
    assert said in error.message


def test_a_line_is_a_line_of_the_file(tmp_path: Path) -> None:
    # one record of three lines, two empty lines, and ends of lines of both kinds
    text = HEAD + row(user='"a\nb\nc"').replace("\n", "\r\n").replace("a\r\nb\r\nc", "abc") + "\r\n\n" + GOOD + row(inputs="x")
    assert refused(tmp_path, text).details["line"] == "6"
    quoted = HEAD + row(user='"ann"') + '2025-01-01T10:00:00Z,"gpt\n-4o",1,1,0,\n' + row(inputs="x")
    error = refused(tmp_path, quoted)
    assert (error.details["line"], error.details["column"]) == ("3", "model")


def test_the_first_wrong_line_of_a_long_file_is_found(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + GOOD * 8000 + row(inputs="x\0") + GOOD * 10 + row(outputs="y"))
    assert error.details == {"line": "8002", "column": "input_tokens", "field": "input_tokens"}


@pytest.mark.parametrize(
    ("bad", "line", "column", "said"),
    [
        ("2025-01-01T10:00:00Z,gpt-4o,10\n", "3", "4", "3 fields where the first line names 6 columns"),
        ("2025-01-01T10:00:00Z,gpt-4o,10,5,0,ann,more\n", "3", "7", "7 fields"),
        ('2025-01-01T10:00:00Z,gpt-4o,10,5,0,"ann\n', "3", None, "unexpected end of data"),
        ('2025-01-01T10:00:00Z,gpt-4o,10,5,0,"ann"x\n', "3", None, "expected after"),
    ],
)
def test_a_line_that_is_not_one_of_this_table(bad: str, line: str, column: str | None, said: str, tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + GOOD + bad)
    assert (error.details["line"], error.details.get("column")) == (line, column)
    assert said in error.message


@pytest.mark.parametrize(
    ("bad", "details", "said"),
    [
        ('{"created":1700000000,"usage":{"prompt_tokens":1,\n', {"line": "4", "column": "50", "field": "artifact_id"}, "not JSON"),
        ("[1]\n", {"line": "4", "column": "1", "field": "artifact_id"}, "not a JSON object"),
        ("7\n", {"line": "4", "column": "1", "field": "artifact_id"}, "not a JSON object"),
        (CHAT.replace("10,", "NaN,"), {"line": "4", "field": "artifact_id"}, "not JSON"),
        (CHAT.replace("gpt-4o", "\\ud800"), {"line": "4", "field": "artifact_id"}, "not JSON that can be read"),
        (CHAT.replace("10,", "1.5,"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "'1.5' is not a whole"),
        (CHAT.replace("10,", "true,"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "'true' is not a number"),
        (CHAT.replace("10,", "-1,"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "negative"),
        (CHAT.replace("10,", "null,"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "is empty"),
        (CHAT.replace("10,", "{},"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "is not a number"),
        (CHAT.replace("10,", "1e30,"), {"line": "4", "column": "usage.prompt_tokens", "field": "input_tokens"}, "at most 12 digits"),
        (CHAT.replace("1700000000", '"soon"'), {"line": "4", "column": "created", "field": "time"}, "'soon' cannot be read"),
        (CHAT.replace("5}", '5,"prompt_tokens_details":{"cached_tokens":11}}'),
         {"line": "4", "column": "usage.prompt_tokens_details.cached_tokens", "field": "cached_input_tokens"}, "11 cached tokens"),
        ('{"error":"overloaded"}\n', {"line": "4", "column": "created", "field": "time"}, "is empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sample", [1000, 2], ids=["early", "late"])
def test_a_line_of_json_is_named(
    bad: str, details: dict[str, str], said: str, sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SAMPLE_ROWS", sample)
    error = refused(tmp_path, CHAT * 2 + "\n" + bad + CHAT)
    assert error.details == details
    assert said in error.message


@pytest.mark.parametrize(
    ("head", "details", "said"),
    [
        ("a,b\n1,2\n", {"field": "columns.time", "line": "1"}, "none of them says time or input or output. Found a, b."),
        ("time,input_tokens\n1,2\n", {"field": "columns.output", "line": "1"}, "none of them says output"),
        ("time,ts,input,output\n1,1,1,1\n", {"field": "columns.time", "column": "time"}, "'time' and 'ts' could each be the time"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens,context_tokens\n1,1,1,1\n",
            {"field": "columns.input", "column": "ContextTokens"},
            "'ContextTokens' and 'context_tokens' could each be the input",
        ),
        (
            '{"start_time":1730419200,"end_time":1730505600,"results":[{"input_tokens":1}]}\n',
            {"field": "columns.input", "line": "1"},
            "this is a page of a usage interface. Write one of its results on each line: jq",
        ),
        ('{"object":"page","data":[],"has_more":false}\n', {"field": "columns.time", "line": "1"}, columns.PAGE),
        ("\n\na,b\n1,2\n", {"field": "columns.time", "line": "3"}, "none of them says time"),
        ("time,Model,model,input,output\n1,,,1,1\n", {"field": "columns.model", "column": "Model"}, "inputs.columns = {'model': 'NAME'}"),
    ],
)
def test_columns_that_are_not_understood(head: str, details: dict[str, str], said: str, tmp_path: Path) -> None:
    error = refused(tmp_path, head)
    assert error.details == details
    assert said in error.message


@pytest.mark.parametrize(
    ("given", "details", "said"),
    [
        ({"named": {"tokens": "x"}}, {"field": "columns.tokens"}, "is not known; name one of time, input, output"),
        ({"named": {"time": "when"}}, {"field": "columns.time", "column": "when"}, "of which the file has 0"),
        ({"zone": "Mars/Olympus"}, {"field": "timezone"}, "is not known. Write a name such as Europe/Berlin"),
        ({"zone": "+25:00"}, {"field": "timezone"}, "is not known"),
        ({"named": {"time": ""}}, {"field": "columns.time", "line": "1"}, "none of them says time"),
    ],
)
def test_what_the_caller_says_must_fit(given: dict[str, Any], details: dict[str, str], said: str, tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + GOOD, **given)
    assert error.details == details
    assert said in error.message


def test_a_gzip_that_ends_too_early_or_is_damaged(tmp_path: Path) -> None:
    packed = gzip.compress(logs.generic_csv(logs.requests(1, 2000)))
    error = refused(tmp_path, packed[: len(packed) // 2])
    lines = gzip.decompress(packed).count(b"\n")
    assert "the gzip is truncated: it ends on line" in error.message
    assert 500 < int(error.details["line"]) < lines
    assert refused(tmp_path, packed[:-4]).details == {"line": str(lines + 1), "field": "artifact_id"}
    wrong = bytearray(packed)
    wrong[-6] ^= 1
    assert "the gzip is damaged near line" in refused(tmp_path, bytes(wrong)).message
    assert "the gzip is damaged near line" in refused(tmp_path, packed + b"tail").message
    assert "it is empty" in refused(tmp_path, gzip.compress(b"")).message


def test_a_file_over_the_limit_packed_or_not(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * 1001)
    with pytest.raises(errors.TooLarge, match="more than 1,000 bytes"):
        reading.plain(path, "big.csv", limit=1000)
    path.write_bytes(gzip.compress(b"x" * 10_000_000))
    with pytest.raises(errors.TooLarge, match="unpacked, has more than 1,000,000 bytes") as caught:
        reading.plain(path, "big.csv.gz", limit=1_000_000)
    assert caught.value.details == {"field": "artifact_id", "limit": "1000000"}


def test_a_column_that_is_not_the_model(tmp_path: Path) -> None:
    rows = "".join(row(model=f"id-{number}") for number in range(normal.MAX_MODELS + 1))
    error = refused(tmp_path, HEAD + rows)
    assert error.details == {"column": "model", "field": "model"}


PARQUET = {"time": "VARCHAR", "input_tokens": "DOUBLE", "output_tokens": "BIGINT", "model": "VARCHAR"}


@pytest.mark.parametrize(
    ("time", "inputs", "outputs", "column", "said"),
    [
        ("2025-01-01T10:00:00Z", 1.5, 1, "input_tokens", "'1.5' is not a whole number"),
        ("2025-01-01T10:00:00Z", float("nan"), 1, "input_tokens", "'nan' is not a number"),
        ("2025-01-01T10:00:00Z", 1.0, None, "output_tokens", "is empty"),
        ("2025-01-01T10:00:00Z", 1.0, -7, "output_tokens", "'-7' is negative"),
        ("soon", 1.0, 1, "time", "'soon' cannot be read"),
        ("2025-01-01T10:00:00", 1.0, 1, "time", "has no time zone, row 1 has one"),
    ],
)
def test_a_row_of_parquet_is_named(time: str, inputs: float, outputs: int | None, column: str, said: str, tmp_path: Path) -> None:
    cells: Sequence[Sequence[object]] = [
        ["2025-01-01T10:00:00Z"] * 2500 + [time],
        [1.0] * 2500 + [inputs],
        [1] * 2500 + [outputs],
        ["gpt-4o"] * 2501,
    ]
    error = refused(tmp_path, logs.parquet(PARQUET, cells))
    assert (error.details["row"], error.details["column"]) == ("2501", column)
    assert said in error.message


def test_a_parquet_file_that_is_cut_or_damaged(tmp_path: Path) -> None:
    whole = logs.generic_parquet(logs.requests(3, 5000))
    assert "may be truncated" in refused(tmp_path, whole[: len(whole) // 2]).message
    damaged = bytearray(whole)
    damaged[4:2000] = bytes(1996)
    assert "it may be damaged" in refused(tmp_path, bytes(damaged)).message
    empty = logs.parquet({"time": "VARCHAR", "input": "BIGINT", "output": "BIGINT"}, [[], [], []])
    assert "it has no rows" in refused(tmp_path, empty).message
    unknown = logs.parquet({"a": "VARCHAR"}, [["x"]])
    assert refused(tmp_path, unknown).details == {"field": "columns.time"}  # no line of it names the columns
