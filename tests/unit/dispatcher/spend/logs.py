"""Usage logs of every style and format, made from requests whose truth is known."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import duckdb

MODELS = (
    "gpt-4o", "gpt-4o-mini", "gemini-2.5-pro", "claude-sonnet-4-5", "claude-haiku-5-5", "claude-opus-4-1-20250805", "deepseek-chat",
    "deepseek-v4-flash", "o3", "grok-4.3", "perplexity/sonar-pro", "openai/text-embedding-3-small", "azure/gpt-4o", "no-such-model",
    "text-embedding-3-small", "gpt-audio", "gpt-realtime-mini", "gemini-2.5-flash", "claude-opus-5",
)  # fmt: skip
CONTEXTS = ("", "", "batch", "flex", "priority", "fast", "other")
# on both sides of prices that began on a day, and around the clock
BEGINS = (
    datetime(2025, 6, 9, 20, tzinfo=UTC), datetime(2026, 8, 16, 22, 30, tzinfo=UTC), datetime(2026, 9, 9, 23, 59, 30, tzinfo=UTC),
    datetime(2026, 10, 13, 20, tzinfo=UTC),
)  # fmt: skip
INDIA = timezone(timedelta(hours=5, minutes=30))
USERS = tuple(f"user-{number:02}" for number in range(40))


@dataclass(frozen=True, slots=True)
class Request:
    """A row of a log: `input` is all of it; `cached`, `written` and `audio` are parts of it, `written_1h` is a part of `written`.

    `audio_cached` is a part of `cached`, not of `audio`. Most fields have no part in the hash: it would take longer than what it finds.
    """

    time: datetime
    input: int
    output: int
    model: str | None = None
    user: str | None = field(default=None, hash=False)
    cached: int = 0
    written: int = field(default=0, hash=False)
    written_1h: int = field(default=0, hash=False)
    requests: int = field(default=1, hash=False)
    single: bool = field(default=True, hash=False)
    known_requests: bool = field(default=True, hash=False)
    span: timedelta | None = field(default=timedelta(), hash=False)
    context: str = field(default="", hash=False)
    audio: int = field(default=0, hash=False)
    audio_cached: int = field(default=0, hash=False)
    audio_output: int = field(default=0, hash=False)
    searches: int = field(default=0, hash=False)


def requests(
    seed: int,
    count: int,
    *,
    models: Sequence[str | None] = MODELS,
    users: Sequence[str | None] = USERS,
    cached: bool = True,
    writes: bool = False,
    more: bool = False,
) -> list[Request]:
    """Requests in no order, of all lengths, some at the same moment; with `more` in all contexts, with audio and searches."""
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
        row = Request(time, size, output, dice.choice(models), dice.choice(users), held, written, stays)
        made.append(_with_more(row, dice) if more else row)
    return made


def _with_more(row: Request, dice: random.Random) -> Request:
    row = replace(row, context=dice.choice(CONTEXTS), searches=dice.choice((0, 0, 0, 1, 7)))
    if dice.random() < 0.7:
        return row
    plain = row.input - row.cached - row.written
    parts: dict[str, Any] = {
        "audio": dice.randint(0, plain),
        "audio_cached": dice.randint(0, row.cached),
        "audio_output": dice.randint(0, row.output),
    }
    return replace(row, **parts)


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
    table = [["start_time", "end_time", "model", "input_tokens", "output_tokens", "input_cached_tokens", "num_model_requests", "user_id",
              "api_key_id", "batch", "service_tier", "input_audio_tokens", "input_cached_audio_tokens", "output_audio_tokens"]]  # fmt: skip
    for row in rows:
        begin = int(row.time.timestamp())
        table.append([str(begin), str(begin + 60), row.model or "", str(row.input), str(row.output), str(row.cached), str(row.requests),
                      row.user or "", "", str(row.context == "batch"), "" if row.context == "batch" else _tier(row),
                      str(row.audio + row.audio_cached), str(row.audio_cached), str(row.audio_output)])  # fmt: skip
    return _csv(table)


def context_totals(rows: Iterable[Request]) -> bytes:
    """The older export: sums, told by when they begin alone."""
    table = [["aggregation_timestamp", "snapshot_id", "n_requests", "n_context_tokens_total", "n_generated_tokens_total",
              "n_cached_context_tokens_total", "api_key_id"]]  # fmt: skip
    table += [[str(int(row.time.timestamp())), row.model or "", str(row.requests), str(row.input), str(row.output), str(row.cached),
               row.user or ""] for row in rows]  # fmt: skip
    return _csv(table)


def daily_csv(rows: Iterable[Request]) -> bytes:
    """One row for each day and model, as people keep them."""
    table = [["date", "model", "input_tokens", "output_tokens", "cached_tokens"]]
    return _csv(table + [[f"{row.time:%Y-%m-%d}", row.model or "", str(row.input), str(row.output), str(row.cached)] for row in rows])


def anthropic_export(rows: Iterable[Request]) -> bytes:
    """The console's export: days, input without cache."""
    table = [["usage_date_utc", "model_version", "api_key", "workspace", "usage_type", "usage_input_tokens_no_cache",
              "usage_input_tokens_cache_write_5m", "usage_input_tokens_cache_write_1h", "usage_input_tokens_cache_read",
              "usage_output_tokens", "web_search_count"]]  # fmt: skip
    table += [[f"{row.time:%Y-%m-%d}", row.model or "", row.user or "", "Default", row.context or "standard", str(_bare(row)),
               str(row.written - row.written_1h), str(row.written_1h), str(row.cached), str(row.output), str(row.searches)]
              for row in rows]  # fmt: skip
    return _csv(table)


def anthropic_report(rows: Iterable[Request]) -> bytes:
    """The admin interface's report, one result on each line."""
    return _lines(
        {"starting_at": _iso(row.time), "ending_at": _iso(row.time + timedelta(hours=1)), "model": row.model, "api_key_id": row.user,
         "uncached_input_tokens": _bare(row), "cache_read_input_tokens": row.cached, "output_tokens": row.output,
         "cache_creation": _lasting(row), "server_tool_use": {"web_search_requests": row.searches},
         "service_tier": _tier(row) or "standard", "context_window": None}
        for row in rows
    )  # fmt: skip


def anthropic_flat(rows: Iterable[Request]) -> bytes:
    """Messages as somebody has written their usage down."""
    return _lines(
        {"timestamp": _iso(row.time), "model": row.model, "user": row.user, "input_tokens": _bare(row), "output_tokens": row.output,
         "cache_read_input_tokens": row.cached, "cache_creation_input_tokens": row.written, "cache_creation": _lasting(row)}
        for row in rows
    )  # fmt: skip


def anthropic_flat_csv(rows: Iterable[Request]) -> bytes:
    """The same as a table, with what lasts an hour in a column of its own."""
    table = [["timestamp", "model", "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
              "cache_creation.ephemeral_1h_input_tokens", "user"]]  # fmt: skip
    return _csv(table + [[_iso(row.time), row.model or "", str(_bare(row)), str(row.output), str(row.cached), str(row.written),
                          str(row.written_1h), row.user or ""] for row in rows])  # fmt: skip


def litellm(rows: Iterable[Request]) -> bytes:
    """Answers of the gateway: Anthropic's names for the cache, but counted as parts of the prompt."""
    return _lines(
        {"created": int(row.time.timestamp()), "model": row.model, "user": row.user, "usage": {
            "prompt_tokens": row.input, "completion_tokens": row.output, "cache_read_input_tokens": row.cached,
            "cache_creation_input_tokens": row.written,
            "prompt_tokens_details": {"cached_tokens": row.cached, "cache_creation_tokens": row.written,
                                      "cache_creation_token_details": _lasting(row)}}}
        for row in rows
    )  # fmt: skip


def batch_output(rows: Iterable[Request]) -> bytes:
    """What OpenAI's batch interface gives back."""
    return _lines(
        {"id": f"batch_req_{number}", "custom_id": f"request-{number}", "error": None, "response": {
            "status_code": 200, "request_id": "x", "body": _chat(row)}}
        for number, row in enumerate(rows)
    )  # fmt: skip


def mixed_providers(rows: Sequence[Request]) -> bytes:
    """Answers of two providers in one log, each under its own names; the first of them appears late."""
    lines = []
    for number, (one, other) in enumerate(zip(openai_responses(rows).splitlines(), anthropic_messages(rows).splitlines(), strict=True)):
        theirs, row = json.loads(one)["response"], rows[number]
        del theirs["user"]
        lines.append(json.loads(other) if of_anthropic(number, row) else theirs | {"timestamp": _iso(row.time), "user_id": row.user})
    return _lines(lines)


def of_anthropic(number: int, row: Request) -> bool:
    """Whether a row of the mixed log is one of Anthropic's: what was written to a cache, OpenAI's names do not tell."""
    return row.written > 0 or number % 2 == 1


def openai_chat(rows: Iterable[Request]) -> bytes:
    """Answers of the chat API, one per line; cached tokens only where there are any, users as metadata."""
    return _lines(_chat(row) for row in rows)


def openai_responses(rows: Iterable[Request]) -> bytes:
    """Answers of the responses API, inside of a log line."""
    return _lines(
        {"level": "info", "response": {"object": "response", "created_at": row.time.timestamp(), "model": row.model, "user": row.user,
                                       "service_tier": _tier(row) or "default",
                                       "usage": {"input_tokens": row.input, "output_tokens": row.output,
                                                 "input_tokens_details": {"cached_tokens": row.cached}}}}
        for row in rows
    )  # fmt: skip


def anthropic_messages(rows: Iterable[Request]) -> bytes:
    """Answers of the messages API with the time at which they were logged, in another time zone."""
    return _lines(
        {"timestamp": row.time.astimezone(INDIA).isoformat(), "type": "message", "model": row.model, "user_id": row.user,
         "usage": {"input_tokens": _bare(row), "cache_read_input_tokens": row.cached, "cache_creation_input_tokens": row.written,
                   "output_tokens": row.output, "cache_creation": _lasting(row), "server_tool_use": {"web_search_requests": row.searches},
                   "service_tier": "standard" if row.context == "fast" else _tier(row) or "standard",
                   "speed": "fast" if row.context == "fast" else "standard"}}
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
    details = {"cached_tokens": row.cached, "audio_tokens": row.audio} if row.cached or row.audio else {}
    usage: dict[str, Any] = {"prompt_tokens": row.input, "completion_tokens": row.output, "total_tokens": row.input + row.output}
    usage |= {"prompt_tokens_details": details} if details else {}
    usage |= {"completion_tokens_details": {"audio_tokens": row.audio_output}} if row.audio_output else {}
    named = {"user": row.user} if row.user else {}
    named |= {"service_tier": _tier(row)} if row.context and row.context != "batch" else {}
    return {"id": "chatcmpl-1", "created": int(row.time.timestamp()), "model": row.model, "usage": usage, **named}


def _tier(row: Request) -> str:
    return "scale" if row.context == "other" else row.context


def _bare(row: Request) -> int:
    """Anthropic's input: without what came from a cache or went to one."""
    return row.input - row.cached - row.written


def _lasting(row: Request) -> dict[str, int]:
    return {"ephemeral_5m_input_tokens": row.written - row.written_1h, "ephemeral_1h_input_tokens": row.written_1h}


def _iso(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _csv(table: Iterable[Sequence[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue().encode()


def _lines(values: Iterable[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


Writer = Callable[[Sequence[Request]], bytes]
