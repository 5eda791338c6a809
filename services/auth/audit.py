"""The record of access: what an entry is, how it is chained to the one before, who may read it, whether it still fits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from chassis import log, postgres
from netra import errors, ids

_log = log.get(__name__)
# what the first entry is chained to; as in the migration
GENESIS = hashlib.sha256(b"netra audit").digest()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_AT_ONCE = 500
# so that one call takes about two seconds
_VERIFIED_AT_ONCE = 50_000
_MAX_DETAIL = 2000
_WORD = re.compile(r"[a-z][a-z0-9_ ]{0,63}", re.ASCII)
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_SERVICE = r"service:[a-z][a-z0-9\-]{0,31}"
# not `auth` or `netra`: what those did is recorded here, by auth itself
_ACTOR = re.compile(rf"anonymous|user:{_UUID}|{_SERVICE}( for user:{_UUID})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Told:
    """What somebody wants recorded; ids that are not known are empty."""

    tenant_id: str
    user_id: str
    actor: str
    action: str
    outcome: str
    detail: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the record."""

    position: int
    at: datetime
    told: Told
    hash: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """Where the record ends: what was noted when it was written, and what is there."""

    position: int
    hash: bytes
    last_position: int


@dataclass(frozen=True, slots=True)
class Filter:
    """What to look for in the record of a tenant; what is empty does not narrow."""

    tenant_id: str
    user_id: str = ""
    action: str = ""
    outcome: str = ""
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads; the read is recorded."""

    user_id: str
    actor: str


@dataclass(frozen=True, slots=True)
class Link:
    """A place in the chain: a position and the hash of the entry there."""

    position: int
    hash: bytes


START = Link(0, GENESIS)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many entries fit, the first position that does not (0: all fit), the last one that does, and whether it is the end."""

    verified: int
    broken_at: int
    last: Link
    complete: bool


class Kept(Protocol):
    """Where the record is kept."""

    async def append(self, entries: Sequence[Told]) -> None:
        """Add entries, in this order."""
        ...

    async def note(self, reader: Reader, action: str, detail: str) -> None:
        """Record that somebody reads."""
        ...

    async def find(self, wanted: Filter, before: int, most: int, reader: Reader) -> list[Entry]:
        """Entries, newest first, older than `before` when it is not 0; the read is recorded."""
        ...

    async def entries(self, after: int, upto: int, most: int) -> list[Entry]:
        """Entries of all tenants in their order."""
        ...

    async def head(self) -> Head:
        """The end."""
        ...


def entry_hash(before: bytes, entry: Entry) -> bytes:
    """The hash of an entry, given that of the entry before: SHA-256 over it and each field as text after its length in bytes."""
    told = entry.told
    microseconds = (entry.at - _EPOCH) // _MICROSECOND
    fields = (
        str(entry.position), str(microseconds), told.tenant_id, told.user_id, told.actor, told.action, told.outcome, told.detail,
        told.correlation_id,
    )  # fmt: skip
    written = [field.encode() for field in fields]
    return hashlib.sha256(before + b"".join(len(field).to_bytes(4, "big") + field for field in written)).digest()


class Record:
    """Reads and verifies the record, and adds what other services tell."""

    def __init__(self, rows: Kept) -> None:
        self._rows = rows

    async def append(self, service: str, entries: Sequence[Told]) -> None:
        """Add what a service tells. Raises `InvalidPayload` naming the field that is wrong."""
        if len(entries) > _AT_ONCE:
            raise errors.TooLarge(f"entries must be at most {_AT_ONCE}", field="entries")
        await self._rows.append([_completed(service, told, f"entries[{at}]") for at, told in enumerate(entries)])

    async def read(self, reader: Reader, action: str, detail: str) -> None:
        """Note that an administrator reads what is kept elsewhere."""
        await self._rows.note(reader, action, detail)

    async def find(self, wanted: Filter, before: int, most: int, reader: Reader) -> list[Entry]:
        """Entries of a tenant, newest first. Raises `InvalidPayload` naming the field that is wrong."""
        if wanted.user_id:
            ids.UserId(wanted.user_id)
        for name, text in (("action", wanted.action), ("outcome", wanted.outcome)):
            if text:
                _check_word(text, name)
        return await self._rows.find(wanted, before, most, reader)

    async def export(self, from_position: int, reader: Reader) -> AsyncIterator[list[Entry]]:
        """The whole record up to now, in its order. That it is exported is in it."""
        if from_position < 0:
            raise errors.InvalidPayload("from_position must not be negative", field="from_position")
        await self._rows.note(reader, "export_audit", f"from position {max(from_position, 1)}")
        end, after = (await self._rows.head()).position, max(from_position, 1) - 1
        while found := await self._rows.entries(after, end, _AT_ONCE):
            yield found
            after = found[-1].position

    async def verify(self, reader: Reader, after: Link = START) -> Verdict:
        """Compute the chain again after an entry whose hash was kept, towards its end as it is now.

        Raises `InvalidPayload` when `after` cannot be a place in a chain.
        """
        if after.position < 0 or (after.position == 0 and after.hash != GENESIS):
            raise errors.InvalidPayload("after_position must be that of the entry whose hash after_hash is", field="after_position")
        if len(after.hash) != len(GENESIS):
            raise errors.InvalidPayload(f"after_hash must be {len(GENESIS)} bytes", field="after_hash")
        verdict = await self._verified(after, await self._rows.head())
        outcome = f"{verdict.verified} entries fit" + (f"; position {verdict.broken_at} does not" if verdict.broken_at else "")
        try:
            await self._rows.note(reader, "verify_audit", outcome)
        except postgres.Conflict:
            _log.error("nothing can be added to the record of access: somebody added to it by hand", position=verdict.broken_at)
        return verdict

    async def _verified(self, after: Link, end: Head) -> Verdict:
        upto = min(end.position, after.position + _VERIFIED_AT_ONCE)
        last = after
        while found := await self._rows.entries(last.position, upto, _AT_ONCE):
            for entry in found:
                if entry.position != last.position + 1 or entry.hash != entry_hash(last.hash, entry):
                    return Verdict(last.position - after.position, last.position + 1, last, False)
                last = Link(entry.position, entry.hash)
        return Verdict(last.position - after.position, _broken_at(last, upto, end), last, last.position >= end.position)


def _broken_at(last: Link, upto: int, end: Head) -> int:
    """Where a chain breaks in which every entry fits the one before: it is cut short, has another end than was noted, or goes on."""
    if last.position < upto:
        return last.position + 1
    if last.position > end.position or (last.position == end.position and last.hash != end.hash):
        return last.position
    return last.position + 1 if last.position == end.position < end.last_position else 0


def _check_word(text: str, place: str) -> None:
    if not _WORD.fullmatch(text):
        raise errors.InvalidPayload(f"{place} must be a word of lower-case letters", field=place)


def _completed(service: str, told: Told, place: str) -> Told:
    if told.actor and not _ACTOR.fullmatch(told.actor):
        raise errors.InvalidPayload(f"{place}.actor must be anonymous, user:<id>, service:<name> or empty", field=f"{place}.actor")
    for name, text in (("action", told.action), ("outcome", told.outcome)):
        _check_word(text, f"{place}.{name}")
    if len(told.detail) > _MAX_DETAIL or "\0" in told.detail:
        raise errors.InvalidPayload(f"{place}.detail must be a text of at most {_MAX_DETAIL} characters", field=f"{place}.detail")
    for each in filter(None, (told.tenant_id, told.user_id)):
        ids.Id(each)
    correlation_id = told.correlation_id if ids.is_correlation_id(told.correlation_id) else ""
    return Told(
        told.tenant_id, told.user_id, told.actor or f"service:{service}", told.action, told.outcome,
        f"{service}: {told.detail}" if told.detail else service, correlation_id,
    )  # fmt: skip
