"""The SQL that reads a log: from the text of its columns to times and counts, with a mark on each row that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from services.dispatcher.tools.spend import duck, reading, values
from services.dispatcher.tools.spend.columns import COUNTS, TEXTS, Column, Mapped, Role

_USUAL = ("standard", "default", "auto", "on_demand", "none", "null")
_BATCH = "true|t|yes|y|1|batch.*"
_NOTHING, _ZERO, _ONE = "CAST(NULL AS VARCHAR)", "CAST(0 AS BIGINT)", "CAST(1 AS BIGINT)"
# what was written to a cache and is not counted as input: the total, or what the parts by their time come to
_BESIDE = "CASE WHEN n_cache_write > 0 THEN n_cache_write WHEN n_written > 0 THEN 0 ELSE n_cache_write_5m + n_cache_write_1h END"
_DAY_US = 86_400_000_000
# the whole of a time with its zone; the parts of an offset are groups
_OFFSET = "([+-])([0-9]{2}):?([0-9]{2})?$"


def raw(file: reading.Plain, layout: reading.Layout, mapped: Mapped, later: Sequence[Column] = ()) -> str:
    """Each row as text, one column per role; null is empty. `late` says that a row may have one of the columns `later`.

    Rows of a Parquet file have their number as `row`, from 1.
    """
    path = duck.text(str(file.path))
    if file.format == "csv":
        return f"SELECT {_roles(mapped, _csv_value)}, false AS late FROM {_csv(path, layout)}"
    if file.format == "parquet":
        number, source = _numbered(path, layout)
        return f"SELECT {_roles(mapped, _parquet_value)}, false AS late, {number} AS row FROM {source}"
    read = list(dict.fromkeys(column.path for columns in mapped.roles.values() for column in columns))
    near, exact = _near(layout, later)
    places = [f"found[{place}] IS NOT NULL" for place in range(len(read) + 1, len(read) + len(exact) + 1)]
    found = f"SELECT {_extracted([*read, *exact])} AS found, {near} AS near FROM {_objects(path)}"
    late = " OR ".join(["near", *places])
    return f"SELECT {_roles(mapped, lambda column: f'found[{read.index(column.path) + 1}]')}, ({late}) AS late FROM ({found})"


def _near(layout: reading.Layout, later: Sequence[Column]) -> tuple[str, list[tuple[str, ...]]]:
    """Whether a row may have one of these columns, by their names in its text; and those whose name the first rows have elsewhere."""
    seen = {column.path[-1] for column in layout.columns}
    names = sorted({column.path[-1] for column in later} - seen)
    pattern = f'"({"|".join(map(re.escape, names))})"'
    # looking for a few names in the text takes a quarter of the time that looking for their paths does
    return f"regexp_matches(json, {duck.text(pattern)})" if names else "false", [one.path for one in later if one.path[-1] in seen]


def came(file: reading.Plain, later: Sequence[Column]) -> str:
    """For each of these columns of a JSONL file whether any row has it."""
    found = f"SELECT {_extracted([column.path for column in later])} AS found FROM {_objects(duck.text(str(file.path)))}"
    return f"SELECT {', '.join(f'bool_or(found[{place}] IS NOT NULL)' for place in range(1, len(later) + 1))} FROM ({found})"


def usage(rows: str, mapped: Mapped, model: str, zone: str, *, more: str = "") -> str:
    """The normalised rows of `rows`, with what only the loading of a log needs.

    `fault`, `zoned`, `bare` (a day, not a time), `filled` (the model was given), `tier` (that of context `other`) and `late`.
    """
    heard = "least(read, greatest(n_cached_audio, n_input_audio - (total - read - put)))" if Role.INPUT_AUDIO in mapped.roles else _ZERO
    known = f"SELECT *, {heard} AS heard, {_context(mapped)} AS context FROM ({_summed(_typed(rows, mapped), mapped, zone)})"
    given = f"coalesce(nullif(model_name, ''), {duck.text(model)})" if model else "nullif(model_name, '')"
    return (
        f"SELECT moment AS time, {_span(zone)} AS span, {given} AS model, nullif(user_name, '') AS user, context,"
        " total AS input_tokens, read AS cached_input_tokens, put AS cache_write_tokens, n_cache_write_1h AS cache_write_1h_tokens,"
        " n_output AS output_tokens, least(n_input_audio - heard, total - read - put) AS input_audio_tokens,"
        " heard AS cached_audio_tokens, n_output_audio AS output_audio_tokens, n_web_searches AS web_searches,"
        f" n_requests AS requests, single, {_tier_tokens(mapped)} AS tier_tokens, NOT local AS zoned, bare,"
        " nullif(model_name, '') IS NULL AS filled, CASE WHEN context = 'other' THEN lower(service_tier_name) END AS tier,"
        f" ({' OR '.join(_faults(mapped))}) AS fault, late{more} FROM ({known})"
    )


def _typed(rows: str, mapped: Mapped) -> str:
    """With the number of each count as `n_ROLE`, the text of each name as `ROLE_name`, and what kind of time there is."""
    absent = {role: _ONE if role is Role.REQUESTS else _ZERO for role in COUNTS}
    counts = ", ".join(f"{_count(role) if role in mapped.roles else absent[role]} AS n_{role}" for role in COUNTS)
    texts = ", ".join(f"{f'trim({duck.name(role)})' if role in mapped.roles else _NOTHING} AS {role}_name" for role in TEXTS)
    local = f"CASE WHEN substr(time, 5, 1) = '-' AND NOT suffix(time, 'Z') THEN {_matches('time', values.LOCAL)} ELSE false END"
    return f"SELECT *, {local} AS local, local AND length(time) = 10 AS bare, {counts}, {texts} FROM ({rows})"


def _summed(typed: str, mapped: Mapped, zone: str) -> str:
    """With the moments, all of the input, and what of it was read from and put into a cache."""
    until = _moment("end", zone) if Role.END in mapped.roles else "CAST(NULL AS TIMESTAMP)"
    timed = f"SELECT *, {_moment('time', zone)} AS moment, {until} AS until, {_BESIDE} AS beside FROM ({typed})"
    parts = "n_cached + n_cache_read AS read, n_written + beside AS put, n_input + n_cache_read + beside AS total"
    return f"SELECT *, {parts}, {_single(mapped)} AS single FROM ({timed})"


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


def _numbered(path: str, layout: reading.Layout) -> tuple[str, str]:
    """The number of a row of a Parquet file, and the rows."""
    if any(column.path[0].lower() == "file_row_number" for column in layout.columns):
        # the reader's own numbers would have the same name; these are slower, but in the order of the file too
        return "row_number() OVER ()", f"read_parquet({path})"
    return "file_row_number + 1", f"read_parquet({path}, file_row_number = true)"


def _parquet_value(column: Column) -> str:
    text = f"CAST({'.'.join(duck.name(key) for key in column.path)} AS VARCHAR)"
    return f"regexp_replace({text}, '\\.0+$', '')" if column.kind.startswith("DECIMAL") else text


def _objects(path: str) -> str:
    return f"read_ndjson_objects({path}, maximum_object_size = {reading.MAX_LINE_BYTES})"


def _extracted(paths: Sequence[Sequence[str]]) -> str:
    return f"json_extract_string(json, [{', '.join(duck.text(_pointer(keys)) for keys in paths)}])"


def _pointer(path: Sequence[str]) -> str:
    return "".join(f"/{key.replace('~', '~0').replace('/', '~1')}" for key in path)


def _count(role: Role) -> str:
    """The number; -1 for what is none; 0 for nothing, where something is not required."""
    column = duck.name(role)
    nothing = "-1" if role in (Role.INPUT, Role.OUTPUT) else "1" if role is Role.REQUESTS else "0"
    read = f"TRY_CAST({column} AS BIGINT)"
    return f"CASE WHEN {column} IS NULL THEN {nothing} WHEN regexp_full_match({column}, {duck.text(values.COUNT)}) THEN {read} ELSE -1 END"


def _moment(column: str, zone: str) -> str:
    """The moment in UTC, cut to microseconds; null for what is no time."""
    text = duck.name(column)
    local = "local" if column == "time" else _matches(text, values.LOCAL)
    clock = f"TRY_CAST(regexp_replace({text}, {duck.text(values.ZONE + '$')}, '') AS TIMESTAMP)"
    # each condition costs about as much as all the rest: what most logs have comes first
    return (
        f"CASE WHEN {local} THEN {_in_utc(f'TRY_CAST({text} AS TIMESTAMP)', zone)} WHEN substr({text}, 5, 1) = '-' THEN"
        f" CASE WHEN {_matches(text, values.IN_UTC)} THEN TRY_CAST(left({text}, length({text}) - 1) AS TIMESTAMP)"
        f" WHEN {_matches(text, values.ZONED)} THEN {clock} - {_offset(text)} END"
        f" WHEN {_matches(text, values.EPOCH)} THEN make_timestamp({_since_1970(text)}) END"
    )


def _matches(text: str, pattern: str) -> str:
    return f"regexp_full_match({text}, {duck.text(pattern)})"


def _in_utc(local: str, zone: str) -> str:
    if not zone:
        return local
    if zone[0] in "+-":
        minutes = int(zone[1:3]) * 60 + int(zone[-2:])
        return f"{local} - to_minutes({-minutes if zone[0] == '-' else minutes})"
    return f"timezone('UTC', timezone({duck.text(zone)}, {local}))"


def _offset(text: str) -> str:
    hours, minutes = (f"coalesce(TRY_CAST(regexp_extract({text}, '{_OFFSET}', {group}) AS INTEGER), 0)" for group in (2, 3))
    sign = f"CASE WHEN regexp_extract({text}, '{_OFFSET}', 1) = '-' THEN -1 ELSE 1 END"
    return f"to_minutes(CAST({sign} * ({hours} * 60 + {minutes}) AS BIGINT))"


def _since_1970(text: str) -> str:
    """Microseconds, in whole numbers throughout: a double rounds up to the next second, hour or day."""
    whole = f"TRY_CAST({text} AS BIGINT)"
    part = f"TRY_CAST(split_part({text}, '.', 1) || rpad(split_part({text}, '.', 2), 9, '0') AS HUGEINT)"
    (s, *_), (ms, *_), (us, *_), _ = values.UNITS
    billionths = " ".join(f"WHEN strpos({text}, '.') <= {digits} THEN {divisor}" for digits, _, divisor in values.UNITS)
    return (
        f"CASE WHEN contains({text}, '.') THEN CAST({part} // CASE {billionths} END AS BIGINT)"
        f" WHEN length({text}) < {s} THEN {whole} * 1000000 WHEN length({text}) < {ms} THEN {whole} * 1000"
        f" WHEN length({text}) < {us} THEN {whole} ELSE {whole} // 1000 END"
    )


def _single(mapped: Mapped) -> str:
    return "NOT bare AND n_requests = 1" if mapped.one_request_per_row else "false"


def _span(zone: str) -> str:
    """The microseconds that a row stands for; 0 for one request, null for a sum of which nobody knows."""
    day = str(_DAY_US)
    if zone and zone[0] not in "+-":  # the clocks may change on it
        day = f"epoch_us({_in_utc('TRY_CAST(time AS TIMESTAMP) + INTERVAL 1 DAY', zone)}) - epoch_us(moment)"
    return f"CASE WHEN until >= moment THEN epoch_us(until) - epoch_us(moment) WHEN bare THEN {day} WHEN single THEN 0 END"


def _context(mapped: Mapped) -> str:
    """One of `values.CONTEXTS`."""
    cases = []
    if Role.BATCH_ID in mapped.roles:
        cases.append(f"WHEN {Role.BATCH_ID} IS NOT NULL THEN 'batch'")
    if Role.BATCH in mapped.roles:
        cases.append(f"WHEN {_matches('lower(trim(batch))', _BATCH)} THEN 'batch'")
    if Role.TIER in mapped.roles:
        cases.append(f"WHEN {_matches('lower(service_tier_name)', 'batch.*')} THEN 'batch'")
    if Role.SPEED in mapped.roles:
        cases.append("WHEN lower(trim(speed)) = 'fast' THEN 'fast'")
    if Role.TIER in mapped.roles:
        usual, known = (", ".join(duck.text(name) for name in names) for names in (_USUAL, values.CONTEXTS))
        cases.append(f"WHEN lower(service_tier_name) IN ({known}) THEN lower(service_tier_name)")
        cases.append(f"WHEN lower(service_tier_name) NOT IN ({usual}) THEN 'other'")
    return f"CASE {' '.join(cases)} ELSE '' END" if cases else "''"


def _tier_tokens(mapped: Mapped) -> str:
    """The input tokens of one request: of several the mean, rounded up; 0, where nobody knows how many there were."""
    if Role.REQUESTS in mapped.roles:
        return "CASE WHEN n_requests <= 1 THEN total ELSE (total + n_requests - 1) // n_requests END"
    return "CASE WHEN bare THEN 0 ELSE total END" if mapped.one_request_per_row else _ZERO


def _faults(mapped: Mapped) -> Iterator[str]:
    begin, end = (f"make_timestamp({us})" for us in values.EPOCH_US)
    yield f"moment IS NULL OR substr(time, 5, 1) <> '-' AND (moment < {begin} OR moment >= {end})"
    yield from (f"n_{role} < 0" for role in COUNTS if role in mapped.roles)
    if Role.END in mapped.roles:
        yield f"({duck.name(Role.END)} IS NOT NULL AND (until IS NULL OR until < {begin} OR until >= {end}))"
    if Role.CACHED in mapped.roles or Role.WRITTEN in mapped.roles:
        yield "n_cached + n_written > n_input"
    if Role.CACHE_WRITE_5M in mapped.roles or Role.CACHE_WRITE_1H in mapped.roles:
        yield "n_cache_write_5m + n_cache_write_1h > put"
    if Role.INPUT_AUDIO in mapped.roles:
        yield "n_input_audio > total"
    if Role.CACHED_AUDIO in mapped.roles:
        yield "n_cached_audio > least(n_input_audio, read)"
    if Role.OUTPUT_AUDIO in mapped.roles:
        yield "n_output_audio > n_output"
    for role in TEXTS:
        if role in mapped.roles:
            text = f"{role}_name"
            yield f"coalesce(length({text}) > {values.MAX_TEXT} OR regexp_matches({text}, {duck.text(values.CONTROL)}), false)"
