"""What a time and a count look like: the patterns that DuckDB reads a log by, and the same for one value at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from services.dispatcher.tools.spend.columns import COUNTS, REQUIRED, Role

MAX_TEXT = 512
# both regular expression engines read these the same way
COUNT = r"[ \t]*[0-9]{1,12}(\.0*)?[ \t]*"
_DATE = r"(19[7-9][0-9]|2[0-9]{3})-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,9})?)?"
ZONE = r" ?(Z|UTC|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)"
LOCAL = f"{_DATE}({_CLOCK})?"
ZONED = f"{_DATE}{_CLOCK}{ZONE}"
EPOCH = r"[0-9]{9,19}(\.[0-9]{1,9})?"
CONTROL = r"[\x00-\x1f\x7f]"
TIME_FORMS = "ISO 8601, such as 2024-05-01T12:00:00Z, or the seconds, milliseconds, microseconds or nanoseconds since 1970"


_IS_COUNT, _IS_LOCAL, _IS_EPOCH = re.compile(COUNT).fullmatch, re.compile(LOCAL).fullmatch, re.compile(EPOCH).fullmatch
_IS_TIME, _CONTROLS = re.compile(f"{LOCAL}|{ZONED}").fullmatch, re.compile(CONTROL).search


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
    if role is Role.TIME:
        return "" if _is_time(value) else f"{_shown(value)} cannot be read as a time; write {TIME_FORMS}"
    if role in (Role.MODEL, Role.USER):
        return _wrong_text(value)
    return _wrong_count(value, "requests" if role is Role.REQUESTS else "tokens")


def _wrong_text(value: str) -> str:
    if len(value.strip(" ")) > MAX_TEXT:
        return f"is longer than {MAX_TEXT} characters"
    return "has control characters" if _CONTROLS(value.strip(" ")) else ""


def _wrong_count(value: str, unit: str) -> str:
    if _IS_COUNT(value):
        return ""
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


def _is_time(value: str) -> bool:
    return bool(_IS_EPOCH(value) or (_IS_TIME(value) and _is_day(value[:10])))


@functools.lru_cache(maxsize=4096)
def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _contradiction(counts: Mapping[Role, int]) -> Fault | None:
    if counts[Role.CACHED] > counts[Role.INPUT]:
        return Fault(
            Role.CACHED, f"{counts[Role.CACHED]} cached tokens are more than the {counts[Role.INPUT]} input tokens they are a part of"
        )
    if (write := counts[Role.CACHE_WRITE]) and counts[Role.CACHE_WRITE_1H] > write:
        return Fault(Role.CACHE_WRITE_1H, f"{counts[Role.CACHE_WRITE_1H]} tokens are more than the {write} cache writes they are a part of")
    return None


def _number(value: str | None) -> int:
    return int(value.split(".")[0]) if value and value.strip() else 0


def _shown(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:40] + "…")
