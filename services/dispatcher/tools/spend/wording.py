"""How amounts, counts and times are put into words for people."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def usd(amount: float) -> str:
    """Cents; more digits, at most six, of what is less than ten of them."""
    exact = Decimal(str(amount))
    if exact == 0:
        return "$0.00"
    places = 2 if abs(exact) >= Decimal("0.1") else 4 if abs(exact) >= Decimal("0.001") else 6
    return f"{'-' if exact < 0 else ''}${abs(exact):,.{places}f}"


def share(part: float, whole: float) -> str:
    """A part in per cent of the whole."""
    if not whole:
        return "0 %"
    percent = Decimal(str(part)) * 100 / Decimal(str(whole))
    return "under 1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def times(number: int, noun: str) -> str:
    """`1 request`, `2,000 requests`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def moment(written: str) -> datetime:
    """The time of a figure, such as `2023-11-16T18:00:00Z` or `2023-11-16`."""
    return datetime.fromisoformat(written if "T" in written else f"{written}T00:00:00Z")


def day(time: datetime) -> str:
    """`16 Nov`, in no language's order but that of English."""
    return f"{time.day} {_MONTHS[time.month - 1]}"


def minute(time: datetime) -> str:
    """`2023-11-16 18:15`."""
    return time.isoformat(" ", "minutes")[:16]


def stamp(time: datetime) -> str:
    """`2023-11-16T18:15:00Z`."""
    return f"{time.isoformat(timespec='seconds')[:19]}Z"
