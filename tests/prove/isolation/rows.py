"""What is tried on one table in somebody's name, and what policies let them see there all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World

# the columns that say whose a row is
WHOSE = ("user_id", "owner_id", "grantee_id")
# what else of a user, or of what users do, is in a table
_PERSONAL = (*WHOSE, "tenant_id", "email", "session_id", "thread_id", "run_id", "context_id", "message_id", "artifact_id")
# What a transaction says beside whom it is about, and what that opens of the thread that it names: in which tables all rows of it are
# seen; and which columns of it are written, where they are.
OPENED: Mapping[str, frozenset[str]] = {
    "thread_id": frozenset(f"dispatcher.{name}" for name in ("runs", "messages", "approvals", "approval_votes"))
    | {"events.heads", "events.events"},
    "owned_thread_id": frozenset(),
    "written_thread_id": frozenset(),
}
_OF_RUNS = frozenset(("dispatcher.runs", name) for name in ("cancelled_at", "woken_at", "rolled_back_at"))
_WRITTEN = {
    "owned_thread_id": _OF_RUNS,
    "written_thread_id": _OF_RUNS | {("dispatcher.approvals", "outcome"), ("dispatcher.approvals", "resolved_at")},
}


@dataclass(frozen=True, slots=True)
class Table:
    """One table, as one role may read and write it."""

    schema: str
    name: str
    walled: bool
    columns: tuple[str, ...]
    readable: tuple[str, ...]
    writable: tuple[str, ...]

    @property
    def whose(self) -> list[str]:
        """The columns that say whose a row is."""
        return [name for name in WHOSE if name in self.columns]

    @property
    def personal(self) -> list[str]:
        """The columns that have to do with users."""
        return [name for name in _PERSONAL if name in self.columns]


@dataclass(frozen=True, slots=True)
class Name:
    """In whose name a transaction asks, and of which thread it says that it is about."""

    name: str
    party: Party | None
    settings: Mapping[str, str]


NOBODY = Name("nobody", None, {})


def of(who: Party) -> Name:
    """In a user's name, and no more."""
    return Name(who.name, who, {"user_id": who.user_id})


def names(world: World, victim: Party, settings: Sequence[str]) -> Iterator[Name]:
    """B, C, nobody; B and nobody with the thread of the victim in each setting, and in all; and with what is no thread."""
    yield from (of(world["B"]), of(world["C"]), NOBODY)
    if not settings:
        return
    thread_id, whoever = victim.things["thread_id"], (of(world["B"]), NOBODY)
    for some in [*((one,) for one in settings), *([tuple(settings)] if len(settings) > 1 else [])]:
        for who in whoever:
            name = f"{who.name} with A's thread in {' and '.join(some)}"
            yield Name(name, who.party, {**who.settings, **dict.fromkeys(some, thread_id)})
    for wrong in ("*", "", f"{thread_id} or true"):
        yield Name(f"B with {wrong!r} in all", world["B"], {**whoever[0].settings, **dict.fromkeys(settings, wrong)})


def opened(table: Table, who: Name, row: Mapping[str, Any]) -> bool:
    """Whether a row is of the thread that a setting opens."""
    return any(table.name in OPENED.get(name, ()) and row.get("thread_id") == value for name, value in who.settings.items())


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL; `shown` is what of it the policies let through: FROM and WHERE of a query, empty for nothing at all."""

    text: str
    verb: str
    shown: str = ""


def statements(table: Table, who: Name, victim: Party) -> Iterator[Statement]:
    """All that is tried on a table."""
    seen = next((value for name, value in who.settings.items() if table.name in OPENED.get(name, ())), "")
    ours = f"AND NOT ({' OR '.join(f'{one} = {_quoted(who.party.user_id)}' for one in table.whose)})" if who.party is not None else ""
    if table.readable:
        shown = f"FROM {table.name} WHERE thread_id = {_quoted(seen)} {ours}" if _names_one(victim, seen) else ""
        yield Statement(f"SELECT {', '.join(table.readable)} FROM {table.name}", "SELECT", shown)  # noqa: S608 - out of the catalogue
    if who.party is None:
        # nothing is read for this: the policies for writing stand alone
        yield from _written(table, who, victim, "")
    for column in table.whose:
        mine = f" WHERE {column} = '{victim.user_id}'"
        if column in table.readable:
            shown = f"FROM {table.name}{mine} AND thread_id = {_quoted(seen)}" if _names_one(victim, seen) else ""
            yield Statement(f"SELECT {', '.join({column, *_thread(table)})} FROM {table.name}{mine}", "SELECT", shown)  # noqa: S608
        yield from _written(table, who, victim, mine, seen=bool(seen))
    yield from _made(table, who, victim)


def _names_one(victim: Party, value: str) -> bool:
    return value == victim.things["thread_id"]


def _thread(table: Table) -> list[str]:
    return ["thread_id"] if "thread_id" in table.readable else []


def _written(table: Table, who: Name, victim: Party, mine: str, *, seen: bool = True) -> Iterator[Statement]:
    """Each column made empty, and everything deleted. With a WHERE, what is not seen is not written either."""
    for column in table.writable:
        of_thread = next((value for name, value in who.settings.items() if (table.name, column) in _WRITTEN.get(name, ())), "")
        shown = ""
        if _names_one(victim, of_thread) and seen:
            shown = f"FROM {table.name}{mine or ' WHERE true'} AND thread_id = {_quoted(of_thread)}"
        yield Statement(f"UPDATE {table.name} SET {column} = NULL{mine}", "UPDATE", shown)  # noqa: S608 - out of the catalogue
    yield Statement(f"DELETE FROM {table.name}{mine}", "DELETE")  # noqa: S608


def _made(table: Table, who: Name, victim: Party) -> Iterator[Statement]:
    """Rows as if by the victim, and as if in the victim's thread."""
    for column in table.whose:
        values = {column: victim.user_id}
        if who.party is not None:
            values |= {other: who.party.user_id for other in table.whose if other != column}
        if "thread_id" in table.columns:
            values["thread_id"] = victim.things["thread_id"]
        yield _insert(table, {column: victim.user_id})
        # what is one's own may be given to anybody
        if column != "grantee_id":
            yield _insert(table, values)


def _insert(table: Table, values: Mapping[str, str]) -> Statement:
    said = ", ".join(map(_quoted, values.values()))
    return Statement(f"INSERT INTO {table.name} ({', '.join(values)}) VALUES ({said})", "INSERT")  # noqa: S608 - out of the catalogue


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
