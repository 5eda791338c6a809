"""Tools that are registered from outside: read and vetted, decided on by their versions, kept, and seen by every dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import stamina
from google.protobuf.message import DecodeError

from chassis import log
from netra import declarations, errors
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.tool import ToolSpec
from services.dispatcher.tools import registry, schemas
from services.dispatcher.tools.sandbox import remote

MOST = 10_000
ACTIVE, REPLACED, REMOVED = "active", "replaced", "removed"
_DEFAULT_TIMEOUT_S = 5.0
_EVERY_S = 0.5
_AT_ONCE = 200
# so many are made ready before others have their turn
_IN_A_ROW = 20
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)
_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """One version of one tool, as it is kept. `document` is a `netra.dispatcher.v1.Tool`."""

    name: str
    version: str
    digest: str
    document: bytes
    state: str = ACTIVE
    registered_by: str = ""
    revision: int = 0


# is told what is kept of a name, and how many tools are active; True when the change is to be made. Raises what stands against it
Decide = Callable[[Sequence[Kept], int], bool]


class Rows(Protocol):
    """Where registrations are kept, for all dispatchers."""

    async def since(self, revision: int, most: int) -> list[Kept]:
        """What changed after a revision, oldest first: of each name the version that counts, or the one that was removed."""
        ...

    async def register(self, new: Kept, decide: Decide) -> bool:
        """Make this version the active one of its name, if `decide` says so; nobody else changes anything meanwhile."""
        ...

    async def deregister(self, name: str, by: str, decide: Decide) -> bool:
        """Have no active version of a name, if `decide` says so; nobody else changes anything meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class By:
    """Who changes something: an operator, who may change all of it, or a service, which may change what it registered."""

    actor: str
    operator: bool


class Registrations:
    """Keeps a registry equal to what is registered, for all dispatchers."""

    def __init__(self, rows: Rows, tools: registry.ToolRegistry) -> None:
        self._rows, self._tools = rows, tools
        self._seen = 0
        self._one = asyncio.Lock()

    async def register(self, tool: pb.Tool, by: By, *, replace: bool) -> tuple[registry.Registered, bool]:
        """Register a tool: as it is registered then, and whether that is new.

        Raises `InvalidPayload` and `TooLarge` naming the field, `AlreadyExists`, `PermissionDenied`, `ResourceExhausted`.
        """
        made = read(tool)
        name = made.spec.name
        if self._tools.own(name):
            raise errors.AlreadyExists(f"The tool {name} comes with the installation; give yours another name.", field="tool.name")
        document = made.shown.SerializeToString(deterministic=True)
        new = Kept(name, made.spec.version, made.digest, document, registered_by=by.actor)
        changed = await self._rows.register(new, lambda kept, active: _succeeds(new, kept, active, by, replace=replace))
        await self._catch_up()
        return made, changed

    async def deregister(self, name: str, by: By) -> bool:
        """Take a tool away; False when it was gone. Raises `NotFound` when it never was, `PermissionDenied`, `FailedPrecondition`."""
        if self._tools.own(name):
            raise errors.FailedPrecondition(f"The tool {name} comes with the installation: it cannot be taken away here.", field="name")
        changed = await self._rows.deregister(name, by.actor, lambda kept, _: _ends(name, kept, by))
        await self._catch_up()
        return changed

    async def _catch_up(self) -> None:
        try:
            await self.refresh()
        except _AWAY:
            # what is stored is stored: it is heard of at the next look
            _log.warning("a change of registered tools was stored, and is not seen here yet")

    async def prepare(self) -> None:
        """Know all that is registered; returns when the database could be asked."""
        async for attempt in stamina.retry_context(on=_AWAY, attempts=None, timeout=None, wait_initial=0.1, wait_max=1.0):
            with attempt:
                await self.refresh()

    async def refresh(self) -> None:
        """Take over what changed since the last time."""
        async with self._one:
            while found := await self._rows.since(self._seen, _AT_ONCE):
                for count, row in enumerate(found, 1):
                    self._take(row)
                    self._seen = row.revision
                    if count % _IN_A_ROW == 0:
                        await asyncio.sleep(0)

    async def follow(self) -> None:
        """Do so twice a second, for ever; through outages of the database."""
        away = False
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.refresh()
                away = False
            except _AWAY as error:
                if not away:
                    _log.warning("registered tools cannot be looked at; going on with those that are known", code=error.code)
                away = True

    def _take(self, row: Kept) -> None:
        if self._tools.own(row.name):
            _log.warning("a registered tool is not heard: one of its name comes with the installation", tool=row.name)
        elif row.state != ACTIVE:
            self._tools.remove(row.name)
        else:
            try:
                made = read(pb.Tool.FromString(row.document), row.digest)
            except (errors.NetraError, DecodeError) as error:
                # another release accepted it
                _log.error("a registered tool is left out: this release cannot use it", tool=row.name, reason=str(error))
                self._tools.remove(row.name)
            else:
                self._tools.put(made)


def read(tool: pb.Tool, digest: str = "") -> registry.Registered:
    """A tool out of its message, vetted. Raises `InvalidPayload` and `TooLarge` naming the field."""
    if tool.enforcement not in ("", "remote"):
        raise _wrong("enforcement", "must be remote or empty: what is registered from outside is executed by a worker")
    if tool.reconciles:
        raise _wrong("reconciles", "must be unset: a worker cannot be asked what became of a call")
    input_schema, weight = schemas.received(tool.input_schema, "tool.input_schema")
    if input_schema.get("type") != "object":
        raise _wrong("input_schema", "must have the type object: arguments are a JSON object")
    output_schema: dict[str, Any] | None = None
    if tool.output_schema:
        output_schema, heavy = schemas.received(tool.output_schema, "tool.output_schema")
        weight = max(weight, heavy)
    try:
        spec = ToolSpec(
            name=tool.name, version=tool.version, description=tool.description, input_schema=input_schema, output_schema=output_schema,
            function=remote.absent, tags=tuple(tool.tags), category=tool.category, permission=tool.permission or "tools:execute",
            min_role=tool.min_role, min_tier=tool.min_tier, enforcement="remote", timeout_s=_timeout_s(tool), retries=tool.retries,
            concurrency=tool.concurrency, side_effects=tool.side_effects, idempotent=tool.idempotent, fallback=tool.fallback,
            deprecated=tool.deprecated,
        )  # fmt: skip
        return registry.registered(spec, digest or spec.digest, weight)
    except declarations.Misdeclared as error:
        raise errors.InvalidPayload(str(error), field=f"tool.{error.field.removesuffix('_s')}") from None
    except ValueError as error:
        raise errors.InvalidPayload(str(error), field="tool.input_schema") from None


def _timeout_s(tool: pb.Tool) -> float:
    return round(tool.timeout.seconds + tool.timeout.nanos / 1e9, 3) if tool.HasField("timeout") else _DEFAULT_TIMEOUT_S


def _wrong(field: str, problem: str) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"tool.{field} {problem}", field=f"tool.{field}")


def _succeeds(new: Kept, kept: Sequence[Kept], active: int, by: By, *, replace: bool) -> bool:
    """Whether the new one changes anything. Raises what stands against it."""
    current = next((row for row in kept if row.state == ACTIVE), None)
    if current is not None and current.digest == new.digest:
        return False
    if kept:
        latest = _latest(kept)
        _require_theirs(latest, by)
        # what was removed may come back as it was
        if current is not None or (latest.version, latest.digest) != (new.version, new.digest):
            registry.require_successor(new.name, latest.version, new.version, replace=replace or current is None)
    if current is None and active >= MOST:
        raise errors.ResourceExhausted(f"There are {MOST} registered tools: deregister some first.", limit="tools")
    return True


def _ends(name: str, kept: Sequence[Kept], by: By) -> bool:
    if not kept:
        raise errors.NotFound(f"There is no registered tool {name!r}.", field="name")
    _require_theirs(_latest(kept), by)
    return any(row.state == ACTIVE for row in kept)


def _latest(kept: Sequence[Kept]) -> Kept:
    return max(kept, key=lambda row: declarations.version_of(row.version))


def _require_theirs(row: Kept, by: By) -> None:
    if not by.operator and row.registered_by != by.actor:
        raise errors.PermissionDenied(f"The tool {row.name} was registered by {row.registered_by}; {by.actor} may not change it.")
