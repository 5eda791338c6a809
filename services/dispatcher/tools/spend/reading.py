"""What a file is: its format, its compression, its columns; whatever it is not gets an error that says so."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import duckdb

from netra import errors
from services.dispatcher.tools.spend import columns, duck

MAX_BYTES = 16 * 1024**3
MAX_LINE_BYTES = 16 * 1024**2
_HEAD_BYTES = 1 << 16
_PART_BYTES = 1 << 20
_SAMPLE_ROWS, _SAMPLE_BYTES = 1000, 32 * 1024**2
_MAX_DEPTH = 6
_DELIMITERS = ",;\t|"
_MARK = b"\xef\xbb\xbf"
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; save the sheet as CSV",
    b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; use gzip",
    b"BZh": "compressed with bzip2; use gzip",
    b"\xfd7zXZ": "compressed with xz; use gzip",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
Format = Literal["csv", "jsonl", "parquet"]
Compression = Literal["none", "gzip"]


@dataclass(frozen=True, slots=True)
class Plain:
    """A file that is not compressed any more. `bytes` are those of the file as it came."""

    path: Path
    name: str
    format: Format
    compression: Compression
    bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file's rows are laid out. For a CSV: what lies between its columns, and how many records (or empty lines) come first."""

    columns: tuple[columns.Column, ...]
    delimiter: str = ","
    skip: int = 1


def plain(path: Path, name: str, *, limit: int = MAX_BYTES) -> Plain:
    """The file, unpacked beside itself when it is a gzip. Raises `InvalidPayload` saying what it is instead, `TooLarge`."""
    size = path.stat().st_size
    if size > limit:
        raise _too_large(name, limit)
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    unpacked = _unpacked(path, name, limit) if packed else path
    with unpacked.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    format_ = _format(head, name)
    if format_ == "jsonl" and head.startswith(_MARK):
        unpacked = _without_mark(unpacked)  # DuckDB takes it for a part of the first object
    return Plain(unpacked, name, format_, "gzip" if packed else "none", size)


def layout(connection: duckdb.DuckDBPyConnection, file: Plain) -> Layout:
    """The columns a file has. Raises `InvalidPayload` naming the line that cannot be read."""
    if file.format == "csv":
        return _csv_layout(file)
    if file.format == "jsonl":
        return Layout(_json_columns(file))
    return Layout(_parquet_columns(connection, file))


def records(file: Plain, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV, each with the number of the line it begins on. Raises `InvalidPayload` naming a line that is none."""
    lines = _counted(file)
    reader = csv.reader((text for _, text in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    while True:
        begin = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise errors.InvalidPayload(f"{file.name}, line {begin}: {error}.", line=begin, field="artifact_id") from None
        if record not in ([], [""]):
            yield begin, record


def objects(file: Plain) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSONL file, each with its line. Raises `InvalidPayload` naming line and column of what is none."""
    for number, text in _counted(file):
        if not text.strip():
            continue
        try:
            value = json.loads(text.rstrip(), parse_constant=_refused)
            json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            message = f"{file.name}, line {number}, column {error.colno}: not JSON: {error.msg}."
            raise errors.InvalidPayload(message, line=number, column=error.colno, field="artifact_id") from None
        except (UnicodeEncodeError, RecursionError, ValueError) as error:
            message = f"{file.name}, line {number}: not JSON that can be read: {type(error).__name__}."
            raise errors.InvalidPayload(message, line=number, field="artifact_id") from None
        if not isinstance(value, dict):
            raise errors.InvalidPayload(f"{file.name}, line {number}: not a JSON object.", line=number, column=1, field="artifact_id")
        yield number, value


def _refused(constant: str) -> float:
    raise ValueError(constant)


def _counted(file: Plain) -> Iterator[tuple[int, str]]:
    """The lines of a text file from 1 on. CR, LF and CRLF end one."""
    with file.path.open("rb") as raw:
        for number, line in enumerate(_lines(raw), 1):
            if len(line) > MAX_LINE_BYTES:
                message = f"{file.name}, line {number}: longer than {MAX_LINE_BYTES:,} bytes."
                raise errors.TooLarge(message, line=number, limit=MAX_LINE_BYTES, field="artifact_id")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                message = f"{file.name}, line {number}, byte {error.start + 1}: not UTF-8. Save the file as UTF-8."
                raise errors.InvalidPayload(message, line=number, field="artifact_id") from None


def _lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, at most about twice as long as a line may be."""
    begun = b""
    while part := raw.readline(MAX_LINE_BYTES + 1):
        part = begun + part if begun else part
        if b"\r" not in part[:-2] and part.endswith(b"\n"):
            begun = b""
            yield part
            continue
        # ends of CR alone, and what a long line was cut at: its last part goes on, unless it is too long to be a line
        *whole, begun = part.splitlines(keepends=True)
        yield from whole
        if begun.endswith(b"\n") or len(begun) > MAX_LINE_BYTES:
            yield begun
            begun = b""
    if begun:
        yield begun


def with_same_ends(file: Plain) -> Plain | None:
    """The same text with a line feed after each line, also of those within quotes; None where none has another end."""
    with file.path.open("rb") as raw:
        if not any(b"\r" in part for part in _parts(raw)):
            return None
    target = file.path.with_name(file.path.name + ".ends")
    with file.path.open("rb") as raw, target.open("wb") as out:
        held = b""
        for part in _parts(raw):
            text = held + part
            held = b"\r" if text.endswith(b"\r") else b""
            out.write(text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        out.write(held.replace(b"\r", b"\n"))
    return replace(file, path=target)


def _parts(raw: BinaryIO) -> Iterator[bytes]:
    while part := raw.read(_PART_BYTES):
        yield part


def _unpacked(path: Path, name: str, limit: int) -> Path:
    target = path.with_name(path.name + ".plain")
    written = lines = 0
    try:
        with path.open("rb") as packed, target.open("wb") as out:
            for part in _inflated(packed):
                written += len(part)
                lines += part.count(b"\n")
                if written > limit:
                    raise _too_large(f"{name}, unpacked,", limit)
                out.write(part)
    except EOFError:
        raise _broken(name, lines + 1, f"the gzip is truncated: it ends on line {lines + 1}, after {written:,} unpacked bytes") from None
    except zlib.error as error:
        raise _broken(name, lines + 1, f"the gzip is damaged near line {lines + 1}: {error}") from None
    return target


def _without_mark(path: Path) -> Path:
    target = path.with_name(path.name + ".unmarked")
    with path.open("rb") as file, target.open("wb") as out:
        file.seek(len(_MARK))
        shutil.copyfileobj(file, out)
    return target


def _inflated(packed: BinaryIO) -> Iterator[bytes]:
    """The content of all members. Raises `EOFError` when the last one does not end, `zlib.error` when one is damaged."""
    data = packed.read(_PART_BYTES)
    while data.strip(b"\0"):  # zeros may follow the last member: tapes and block devices leave them
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data and not (data := packed.read(_PART_BYTES)):
                raise EOFError
            yield member.decompress(data, _PART_BYTES)
            data = member.unconsumed_tail
        data = member.unused_data or packed.read(_PART_BYTES)


def _format(head: bytes, name: str) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise _unreadable(name, f"it is {what}", line=1)
    if not (text := head.removeprefix(_MARK).lstrip()):
        raise _unreadable(name, "it is empty", line=1)
    if b"\0" in head:
        line = head[: head.index(b"\0")].count(b"\n") + 1
        raise _unreadable(name, "it holds binary data. Give a CSV, a JSONL or a Parquet file", line=line)
    if text.startswith(b"["):
        raise _unreadable(name, "it is one JSON array. Write one JSON object per line: jq -c '.[]' log.json > log.jsonl", line=1)
    if text.split(b"\n")[0].strip() == b"{":
        how = columns.PAGE if b'"results"' in text else "jq -c . log.json > log.jsonl"
        raise _unreadable(name, f"it is JSON over several lines. Write one object per line: {how}", line=1)
    return "jsonl" if text.startswith(b"{") else "csv"


def _csv_layout(file: Plain) -> Layout:
    header = next((line for _, line in itertools.islice(_counted(file), _SAMPLE_ROWS) if line.strip()), "")
    outside = "".join(header.split('"')[::2])
    delimiter = max(_DELIMITERS, key=outside.count)
    counted = records(file, delimiter)
    begin, names = next(counted, (1, []))
    after, _ = next(counted, (0, []))
    if not after:
        raise _unreadable(file.name, f"it has a first line with {len(names)} columns and no rows", line=begin + 1)
    found = tuple(columns.Column(name.strip(), (f"c{place}",)) for place, name in enumerate(names))
    return Layout(found, delimiter, skip=begin)


def _json_columns(file: Plain) -> tuple[columns.Column, ...]:
    paths: dict[tuple[str, ...], None] = {}
    seen_bytes = 0
    for _, value in itertools.islice(objects(file), _SAMPLE_ROWS):
        paths.update(dict.fromkeys(_leaves(value)))
        seen_bytes += len(str(value))
        if seen_bytes > _SAMPLE_BYTES:
            break
    return tuple(columns.Column(".".join(path), path) for path in paths)


def _leaves(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items():
        if isinstance(item, dict) and len(above) < _MAX_DEPTH:
            yield from _leaves(item, (*above, key))
        else:
            yield (*above, key)


def _parquet_columns(connection: duckdb.DuckDBPyConnection, file: Plain) -> tuple[columns.Column, ...]:
    try:
        described = connection.execute(f"SELECT * FROM read_parquet({duck.text(str(file.path))}) LIMIT 0").description or []
        (rows,) = duck.row(connection, f"SELECT count(*) FROM read_parquet({duck.text(str(file.path))})")
    except duckdb.Error:
        raise _unreadable(file.name, "it begins like a Parquet file but cannot be read as one; it may be truncated") from None
    if not rows:
        raise _unreadable(file.name, "it has no rows")
    return tuple(column for name, kind, *_ in described for column in _flattened(kind, (name,)))


def _flattened(kind: Any, path: tuple[str, ...]) -> Iterator[columns.Column]:
    if kind.id == "struct" and len(path) <= _MAX_DEPTH:
        for name, child in kind.children:
            yield from _flattened(child, (*path, name))
    else:
        yield columns.Column(".".join(path), path, str(kind))


def _unreadable(name: str, what: str, *, line: int = 0) -> errors.InvalidPayload:
    if line:
        return errors.InvalidPayload(f"{name}, line {line}: {what}.", line=line, field="artifact_id")
    return errors.InvalidPayload(f"{name} cannot be analysed: {what}.", field="artifact_id")


def _broken(name: str, line: int, what: str) -> errors.InvalidPayload:
    return _unreadable(name, what, line=line)


def _too_large(name: str, limit: int) -> errors.TooLarge:
    return errors.TooLarge(
        f"{name} has more than {limit:,} bytes; that is the limit. Split the log by time.", field="artifact_id", limit=limit
    )
