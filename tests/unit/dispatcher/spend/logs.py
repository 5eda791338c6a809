"""Usage logs of every style and format, made from requests whose truth is known."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import duckdb

MODELS = (
    "gpt-4o", "gpt-4o-mini", "gemini-2.5-pro", "claude-sonnet-4-5", "claude-haiku-5-5", "claude-opus-4-1-20250805", "deepseek-chat",
    "deepseek-v4-flash", "o3", "grok-4.3", "perplexity/sonar-pro", "openai/text-embedding-3-small", "azure/gpt-4o", "no-such-model",
    "text-embedding-3-small",
)  # fmt: skip
# on both sides of prices that began on a day, and around the clock
BEGINS = (datetime(2025, 6, 9, 20, tzinfo=UTC), datetime(2026, 8, 16, 22, 30, tzinfo=UTC), datetime(2026, 9, 9, 23, 59, 30, tzinfo=UTC))
INDIA = timezone(timedelta(hours=5, minutes=30))
USERS = tuple(f"user-{number:02}" for number in range(40))


@dataclass(frozen=True, slots=True)
class Request:
    """A row of a log: `input` is all of it, `cached` and `written` are parts of it, `written_1h` is a part of `written`."""

    time: datetime
    input: int
    output: int
    model: str | None = None
    user: str | None = None
    cached: int = 0
    written: int = 0
    written_1h: int = 0
    requests: int = 1
    single: bool = True
    known_requests: bool = True


def requests(
    seed: int,
    count: int,
    *,
    models: Sequence[str | None] = MODELS,
    users: Sequence[str | None] = USERS,
    cached: bool = True,
    writes: bool = False,
) -> list[Request]:
    """Requests in no order, of all lengths, some at the same moment."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        size = dice.choice(
            (dice.randint(0, 40), dice.randint(900, 1200), dice.randint(100_000, 300_000), dice.choice((199_999, 200_000, 200_001)))
        )
        held = dice.randint(0, size) if cached and dice.random() < 0.5 else 0
        written = dice.randint(0, size - held) if writes and dice.random() < 0.5 else 0
        time = dice.choice(BEGINS) + timedelta(microseconds=dice.choice((dice.randint(0, 10**11), dice.randint(0, 9) * 10**9)))
        output, stays = (
            dice.choice((0, dice.randint(1, 30), dice.randint(500, 9000))),
            dice.randint(0, written) if dice.random() < 0.5 else 0,
        )
        made.append(Request(time, size, output, dice.choice(models), dice.choice(users), held, written, stays))
    return made


def generic_csv(rows: Iterable[Request]) -> bytes:
    """time, model, input, output, cached, user."""
    table = [["Time", "Model", "Input Tokens", "output-tokens", "cachedTokens", "User"]]
    table += [[_iso(row.time), row.model or "", str(row.input), str(row.output), str(row.cached), row.user or ""] for row in rows]
    return _csv(table)


def azure_csv(rows: Iterable[Request]) -> bytes:
    """As the Azure traces: local times of seven digits, no model."""
    table = [["TIMESTAMP", "ContextTokens", "GeneratedTokens"]]
    return _csv(table + [[f"{row.time:%Y-%m-%d %H:%M:%S.%f}0", str(row.input), str(row.output)] for row in rows])


def openai_export(rows: Iterable[Request]) -> bytes:
    """The usage export: sums of several requests, whole seconds."""
    table = [
        [
            "start_time",
            "end_time",
            "model",
            "input_tokens",
            "output_tokens",
            "input_cached_tokens",
            "num_model_requests",
            "user_id",
            "api_key_id",
        ]
    ]
    for row in rows:
        begin = int(row.time.timestamp())
        table.append([str(begin), str(begin + 60), row.model or "", str(row.input), str(row.output), str(row.cached), str(row.requests),
                      row.user or "", ""])  # fmt: skip
    return _csv(table)


def anthropic_export(rows: Iterable[Request]) -> bytes:
    """The console's export: days, input without cache."""
    table = [["usage_date_utc", "model_version", "api_key", "workspace", "usage_input_tokens_no_cache", "usage_input_tokens_cache_write_5m",
              "usage_input_tokens_cache_write_1h", "usage_input_tokens_cache_read", "usage_output_tokens", "web_search_count"]]  # fmt: skip
    for row in rows:
        bare = row.input - row.cached - row.written
        table.append([f"{row.time:%Y-%m-%d}", row.model or "", row.user or "", "Default", str(bare), str(row.written - row.written_1h),
                      str(row.written_1h), str(row.cached), str(row.output), "0"])  # fmt: skip
    return _csv(table)


def openai_chat(rows: Iterable[Request]) -> bytes:
    """Answers of the chat API, one per line; cached tokens only where there are any, users as metadata."""
    return _lines(_chat(row) for row in rows)


def openai_responses(rows: Iterable[Request]) -> bytes:
    """Answers of the responses API, inside of a log line."""
    return _lines(
        {"level": "info", "response": {"object": "response", "created_at": row.time.timestamp(), "model": row.model, "user": row.user,
                                       "usage": {"input_tokens": row.input, "output_tokens": row.output,
                                                 "input_tokens_details": {"cached_tokens": row.cached}}}}
        for row in rows
    )  # fmt: skip


def anthropic_messages(rows: Iterable[Request]) -> bytes:
    """Answers of the messages API with the time at which they were logged, in another time zone."""
    return _lines(
        {"timestamp": row.time.astimezone(INDIA).isoformat(), "type": "message", "model": row.model, "user_id": row.user,
         "usage": {"input_tokens": row.input - row.cached - row.written, "cache_read_input_tokens": row.cached,
                   "cache_creation_input_tokens": row.written, "output_tokens": row.output,
                   "cache_creation": {"ephemeral_1h_input_tokens": row.written_1h,
                                      "ephemeral_5m_input_tokens": row.written - row.written_1h}}}
        for row in rows
    )  # fmt: skip


def generic_parquet(rows: Sequence[Request]) -> bytes:
    """time (with a zone), model, input_tokens (fractions of none), output_tokens, cached_tokens, user."""
    columns: list[Sequence[object]] = [
        [row.time.isoformat() for row in rows], [row.model for row in rows], [float(row.input) for row in rows],
        [row.output for row in rows], [row.cached for row in rows], [row.user for row in rows],
    ]  # fmt: skip
    kinds = {"time": "TIMESTAMPTZ", "model": "VARCHAR", "input_tokens": "DOUBLE", "output_tokens": "INTEGER", "cached_tokens": "BIGINT",
             "user": "VARCHAR"}  # fmt: skip
    return parquet(kinds, columns)


def nested_parquet(rows: Sequence[Request]) -> bytes:
    """Answers of the chat API as nested columns, seconds since 1970."""
    usage = "{'prompt_tokens': i, 'completion_tokens': o, 'prompt_tokens_details': {'cached_tokens': c}}"
    columns: list[Sequence[object]] = [
        [int(row.time.timestamp()) for row in rows], [row.model for row in rows], [row.input for row in rows],
        [row.output for row in rows], [row.cached for row in rows], [row.user for row in rows],
    ]  # fmt: skip
    kinds = {"created": "BIGINT", "model": "VARCHAR", "i": "BIGINT", "o": "BIGINT", "c": "BIGINT", "user": "VARCHAR"}
    return parquet(kinds, columns, f"created, model, {usage} AS usage, user")


def parquet(kinds: dict[str, str], columns: Sequence[Sequence[object]], select: str = "*") -> bytes:
    """A Parquet file of these columns."""
    read = ", ".join(f"unnest(?::{kind}[]) AS {name}" for name, kind in kinds.items())
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder) / "log.parquet"
        connection.execute(f"COPY (SELECT {select} FROM (SELECT {read})) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 2048)", columns)  # noqa: S608 - all of it is written here
        return path.read_bytes()


def zipped(content: bytes) -> bytes:
    """The same as a gzip of two members, as rotated logs are when they are put together."""
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


def in_seconds(rows: Iterable[Request]) -> list[Request]:
    """The truth of a log that tells whole seconds."""
    return [replace(row, time=row.time.replace(microsecond=0)) for row in rows]


def _chat(row: Request) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": row.cached}} if row.cached else {}
    usage = {"prompt_tokens": row.input, "completion_tokens": row.output, "total_tokens": row.input + row.output, **details}
    named = {"user": row.user} if row.user else {}
    return {"id": "chatcmpl-1", "created": int(row.time.timestamp()), "model": row.model, "usage": usage, **named}


def _iso(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _csv(table: Iterable[Sequence[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue().encode()


def _lines(values: Iterable[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


Writer = Callable[[Sequence[Request]], bytes]
