"""What a time and a count look like: the patterns that DuckDB reads a log by, and the same for one value at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from services.dispatcher.tools.spend.columns import COUNTS, REQUIRED, TEXTS, TIMES, Role

MAX_TEXT = 512
# both regular expression engines read these the same way. Three zeros after a point may be thousands: nobody can tell
COUNT = r"[ \t]*([0-9]{1,12}(\.(0{0,2}|0{4,}))?|[0-9]{4,12}\.000)[ \t]*"
_DATE = r"(19[7-9][0-9]|2[0-9]{3})-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,9})?)?"
ZONE = r" ?(Z|UTC|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)"
LOCAL = f"{_DATE}({_CLOCK})?"
ZONED = f"{_DATE}{_CLOCK}{ZONE}"
IN_UTC = f"{_DATE}{_CLOCK}Z"
EPOCH = r"[0-9]{9,19}(\.[0-9]{1,9})?"
# how a request was processed, where that may change its price; "" is as usual, `other` what no list has a price for
CONTEXTS = ("", "batch", "flex", "priority", "fast", "other")
CONTROL = r"[\x00-\x1f\x7f]"
TIME_FORMS = "ISO 8601, such as 2024-05-01T12:00:00Z, or the seconds, milliseconds, microseconds or nanoseconds since 1970"
# the digits of a number since 1970 tell its unit: fewer than these, and what a microsecond is in billionths of it
UNITS = ((12, "seconds", 10**3), (15, "milliseconds", 10**6), (18, "microseconds", 10**9), (20, "nanoseconds", 10**12))
EPOCH_US = (946_684_800_000_000, 4_102_444_800_000_000)  # 2000 and 2100: nobody logs what is outside


_IS_COUNT, _IS_LOCAL, _IS_EPOCH = re.compile(COUNT).fullmatch, re.compile(LOCAL).fullmatch, re.compile(EPOCH).fullmatch
_IS_TIME, _CONTROLS = re.compile(f"{LOCAL}|{ZONED}").fullmatch, re.compile(CONTROL).search
_IS_THOUSANDS = re.compile(r"[0-9]{1,3}(\.000)+").fullmatch


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one value of a row."""

    role: Role
    what: str


def fault(row: Mapping[Role, str | None]) -> Fault | None:
    """The first thing that is wrong with a row, in the order of the roles; None stands for an empty value."""
    for role in Role:
        if role in row and (what := _wrong(role, row[role])):
            return Fault(role, what)
    return _contradiction({role: _number(row.get(role)) for role in COUNTS})


def zoned(time: str | None) -> bool:
    """Whether a time that can be read says by itself which moment it is."""
    return _IS_LOCAL(time or "") is None


def _wrong(role: Role, value: str | None) -> str:
    if value is None:
        return "is empty" if role in REQUIRED else ""
    if role in TIMES:
        return _wrong_epoch(value) if _IS_EPOCH(value) else "" if _is_time(value) else _unreadable(value)
    if role in TEXTS:
        return _wrong_text(value)
    if role in COUNTS:
        return _wrong_count(value, {Role.REQUESTS: "requests", Role.WEB_SEARCHES: "searches"}.get(role, "tokens"))
    return ""


def _wrong_text(value: str) -> str:
    if len(value.strip(" ")) > MAX_TEXT:
        return f"is longer than {MAX_TEXT} characters"
    return "has control characters" if _CONTROLS(value.strip(" ")) else ""


def _wrong_count(value: str, unit: str) -> str:
    if _IS_COUNT(value):
        return ""
    if _IS_THOUSANDS(value.strip()):
        return f"{_shown(value)} may be thousands or a fraction; write a number of {unit} without a point"
    try:
        number = float(value)
    except ValueError:
        return f"{_shown(value)} is not a number of {unit}"
    if number != number or number in (float("inf"), float("-inf")):
        return f"{_shown(value)} is not a number of {unit}"
    if number < 0:
        return f"{_shown(value)} is negative; a number of {unit} is not"
    if not number.is_integer():
        return f"{_shown(value)} is not a whole number of {unit}"
    return f"{_shown(value)} must be written with at most 12 digits and nothing else"


def _wrong_epoch(value: str) -> str:
    whole, _, part = value.partition(".")
    unit, divisor = next((name, divisor) for digits, name, divisor in UNITS if len(whole) < digits)
    us = (int(whole) * 10**9 + int(part.ljust(9, "0"))) // divisor
    if EPOCH_US[0] <= us < EPOCH_US[1]:
        return ""
    year = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).year
    return f"{_shown(value)} would be {unit} since 1970, in the year {year}; write {TIME_FORMS}"


def _unreadable(value: str) -> str:
    return f"{_shown(value)} cannot be read as a time; write {TIME_FORMS}"


def _is_time(value: str) -> bool:
    return bool(_IS_TIME(value) and _is_day(value[:10]))


@functools.lru_cache(maxsize=4096)
def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _contradiction(counts: Mapping[Role, int]) -> Fault | None:
    for role, part, whole, parts, of in _parts(counts):
        if part > whole:
            return Fault(role, f"{part} {parts} are more than the {whole} {of} they are a part of")
    return None


def _parts(n: Mapping[Role, int]) -> Iterator[tuple[Role, int, int, str, str]]:
    """What is counted as a part of something else: where it stands, how much of it, of how much, and what both are called."""
    lasting = n[Role.CACHE_WRITE_5M] + n[Role.CACHE_WRITE_1H]
    beside = n[Role.CACHE_WRITE] or (0 if n[Role.WRITTEN] else lasting)
    total, read = n[Role.INPUT] + n[Role.CACHE_READ] + beside, n[Role.CACHED] + n[Role.CACHE_READ]
    yield Role.CACHED, n[Role.CACHED], n[Role.INPUT], "cached tokens", "input tokens"
    yield Role.WRITTEN, n[Role.CACHED] + n[Role.WRITTEN], n[Role.INPUT], "cached and written tokens", "input tokens"
    longest = Role.CACHE_WRITE_1H if n[Role.CACHE_WRITE_1H] else Role.CACHE_WRITE_5M
    yield longest, lasting, n[Role.WRITTEN] + beside, "tokens", "cache writes"
    yield Role.INPUT_AUDIO, n[Role.INPUT_AUDIO], total, "audio tokens", "input tokens"
    yield Role.CACHED_AUDIO, n[Role.CACHED_AUDIO], min(n[Role.INPUT_AUDIO], read), "cached audio tokens", "audio or cached tokens"
    yield Role.OUTPUT_AUDIO, n[Role.OUTPUT_AUDIO], n[Role.OUTPUT], "audio tokens", "output tokens"


def _number(value: str | None) -> int:
    return int(value.split(".")[0]) if value and value.strip() else 0


def _shown(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:40] + "…")
