"""The SQL that reads a log: from the text of its columns to times and counts, with a mark on each row that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from services.dispatcher.tools.spend import duck, reading, values
from services.dispatcher.tools.spend.columns import COUNTS, Column, Mapped, Role

_NOTHING = "CAST(NULL AS VARCHAR)"
# the whole of a time with its zone; the parts of an offset are groups
_OFFSET = "([+-])([0-9]{2}):?([0-9]{2})?$"


def raw(file: reading.Plain, layout: reading.Layout, mapped: Mapped) -> str:
    """Each row as text, one column per role; null is empty. Rows of a Parquet file have their number as `row`, from 1."""
    path = duck.text(str(file.path))
    if file.format == "csv":
        return f"SELECT {_roles(mapped, _csv_value)} FROM {_csv(path, layout)}"
    if file.format == "parquet":
        source = f"read_parquet({path}, file_row_number = true)"
        return f"SELECT {_roles(mapped, _parquet_value)}, file_row_number + 1 AS row FROM {source}"
    paths = list(dict.fromkeys(column.path for columns in mapped.roles.values() for column in columns))
    wanted = ", ".join(duck.text(_pointer(keys)) for keys in paths)
    source = f"read_ndjson_objects({path}, maximum_object_size = {reading.MAX_LINE_BYTES})"
    inner = f"SELECT json_extract_string(json, [{wanted}]) AS found FROM {source}"
    return f"SELECT {_roles(mapped, lambda column: f'found[{paths.index(column.path) + 1}]')} FROM ({inner})"


def usage(rows: str, mapped: Mapped, model: str, zone: str, *, more: str = "") -> str:
    """The normalised rows of `rows`, with `fault`, `zoned`, `filled` (the model was given) and a `late_ROLE` per unseen role."""
    number: dict[Role, str] = {role: f"n_{role}" if role in mapped.roles else "0" for role in COUNTS}
    counts = ", ".join(f"{_count(role)} AS n_{role}" for role in COUNTS if role in mapped.roles)
    texts = ", ".join(
        f"trim({duck.name(role)}) AS {role}_name" if role in mapped.roles else f"{_NOTHING} AS {role}_name"
        for role in (Role.MODEL, Role.USER)
    )
    late = "".join(f", {duck.name(role)} IS NOT NULL AS late_{role}" for role in unseen(mapped))
    typed = f"SELECT *, regexp_full_match(time, {duck.text(values.LOCAL)}) AS local, {counts}, {texts}{late} FROM ({rows})"
    timed = f"SELECT * EXCLUDE (time), {_moment(zone)} AS time FROM ({typed})"
    parts = _sum(number, Role.CACHE_WRITE_5M, Role.CACHE_WRITE_1H)
    write = f"CASE WHEN {number[Role.CACHE_WRITE]} = 0 THEN {parts} ELSE {number[Role.CACHE_WRITE]} END"
    read = _sum(number, Role.CACHED, Role.CACHE_READ)
    requests = "n_requests" if Role.REQUESTS in mapped.roles else "1"
    single = f"{requests} = 1" if mapped.one_request_per_row or Role.REQUESTS in mapped.roles else "false"
    whole = f"SELECT *, {number[Role.INPUT]} + {number[Role.CACHE_READ]} + ({write}) AS total FROM ({timed})"
    given = f"coalesce(nullif(model_name, ''), {duck.text(model)})" if model else "nullif(model_name, '')"
    return (
        f"SELECT time, {given} AS model, nullif(user_name, '') AS user, total AS input_tokens, {read} AS cached_input_tokens,"
        f" ({write}) AS cache_write_tokens, {number[Role.CACHE_WRITE_1H]} AS cache_write_1h_tokens, n_output AS output_tokens,"
        f" {requests} AS requests, {single} AS single, {_tier_tokens(mapped, single, requests)} AS tier_tokens,"
        f" NOT local AS zoned, nullif(model_name, '') IS NULL AS filled, ({_fault(mapped, number)}) AS fault"
        f"{''.join(f', late_{role}' for role in unseen(mapped))}{more} FROM ({whole})"
    )


def unseen(mapped: Mapped) -> list[Role]:
    """Roles that only later rows may have."""
    return [role for role, columns in mapped.roles.items() if not columns[0].seen]


def _roles(mapped: Mapped, value: Callable[[Column], str]) -> str:
    return ", ".join(f"{_first([value(column) for column in columns])} AS {duck.name(role)}" for role, columns in mapped.roles.items())


def _first(texts: Sequence[str]) -> str:
    there = [f"nullif({text}, '')" for text in texts]
    return there[0] if len(there) == 1 else f"coalesce({', '.join(there)})"


def _csv(path: str, layout: reading.Layout) -> str:
    # the header is skipped, not read: its names may be double or missing
    names = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(layout.columns)))
    return (
        f"read_csv({path}, auto_detect = false, header = false, skip = {layout.skip}, delim = {duck.text(layout.delimiter)},"
        f" quote = '\"', escape = '\"', strict_mode = true, columns = {{{names}}})"
    )


def _csv_value(column: Column) -> str:
    return column.path[0]


def _parquet_value(column: Column) -> str:
    return f"CAST({'.'.join(duck.name(key) for key in column.path)} AS VARCHAR)"


def _pointer(path: Sequence[str]) -> str:
    return "".join(f"/{key.replace('~', '~0').replace('/', '~1')}" for key in path)


def _count(role: Role) -> str:
    """The number; -1 for what is none; 0 for nothing, where something is not required."""
    column = duck.name(role)
    nothing = "-1" if role in (Role.INPUT, Role.OUTPUT) else "1" if role is Role.REQUESTS else "0"
    read = f"TRY_CAST({column} AS BIGINT)"
    return f"CASE WHEN {column} IS NULL THEN {nothing} WHEN regexp_full_match({column}, {duck.text(values.COUNT)}) THEN {read} ELSE -1 END"


def _moment(zone: str) -> str:
    """The moment in UTC, cut to microseconds; null for what is no time."""
    clock = f"TRY_CAST(regexp_replace(time, {duck.text(values.ZONE + '$')}, '') AS TIMESTAMP)"
    cases = [
        ("local", _in_utc("TRY_CAST(time AS TIMESTAMP)", zone)),
        # most logs with a zone are written like this; looking for an offset takes several times as long
        (f"regexp_full_match(time, {duck.text(values.LOCAL + 'Z')})", "TRY_CAST(left(time, length(time) - 1) AS TIMESTAMP)"),
        (f"regexp_full_match(time, {duck.text(values.ZONED)})", f"{clock} - {_offset()}"),
        (f"regexp_full_match(time, {duck.text(values.EPOCH)})", f"make_timestamp({_epoch_us()})"),
    ]
    return f"CASE {' '.join(f'WHEN {condition} THEN {moment}' for condition, moment in cases)} END"


def _in_utc(local: str, zone: str) -> str:
    if not zone:
        return local
    if zone[0] in "+-":
        minutes = int(zone[1:3]) * 60 + int(zone[-2:])
        return f"{local} - to_minutes({-minutes if zone[0] == '-' else minutes})"
    return f"timezone('UTC', timezone({duck.text(zone)}, {local}))"


def _offset() -> str:
    hours, minutes = (f"coalesce(TRY_CAST(regexp_extract(time, '{_OFFSET}', {group}) AS INTEGER), 0)" for group in (2, 3))
    sign = f"CASE WHEN regexp_extract(time, '{_OFFSET}', 1) = '-' THEN -1 ELSE 1 END"
    return f"to_minutes(CAST({sign} * ({hours} * 60 + {minutes}) AS BIGINT))"


def _epoch_us() -> str:
    whole = "length(split_part(time, '.', 1))"
    number = "TRY_CAST(time AS DECIMAL(38, 9))"
    # nobody logs the year 5000 or 1973: the digits tell seconds from milliseconds, microseconds and nanoseconds
    us = (
        f"CASE WHEN {whole} < 12 THEN {number} * 1000000 WHEN {whole} < 15 THEN {number} * 1000"
        f" WHEN {whole} < 18 THEN {number} ELSE {number} / 1000 END"
    )
    return f"CAST(floor({us}) AS BIGINT)"


def _sum(number: Mapping[Role, str], *roles: Role) -> str:
    return "(" + " + ".join(dict.fromkeys(number[role] for role in roles)) + ")"


def _tier_tokens(mapped: Mapped, single: str, requests: str) -> str:
    """The input tokens of one request: of several the mean, rounded up; 0, where nobody knows how many there were."""
    if Role.REQUESTS not in mapped.roles:
        return "total" if mapped.one_request_per_row else "0"
    return f"CASE WHEN {single} OR {requests} <= 0 THEN total ELSE (total + {requests} - 1) // {requests} END"


def _fault(mapped: Mapped, number: Mapping[Role, str]) -> str:
    wrong = ["time IS NULL", *(f"n_{role} < 0" for role in COUNTS if role in mapped.roles)]
    if Role.CACHED in mapped.roles:
        wrong.append("n_cached > n_input")
    if Role.CACHE_WRITE in mapped.roles:
        wrong.append(f"(n_cache_write > 0 AND {number[Role.CACHE_WRITE_1H]} > n_cache_write)")
    for role in (Role.MODEL, Role.USER):
        if role in mapped.roles:
            text = f"{role}_name"
            wrong.append(f"coalesce(length({text}) > {values.MAX_TEXT} OR regexp_matches({text}, {duck.text(values.CONTROL)}), false)")
    return " OR ".join(wrong)
