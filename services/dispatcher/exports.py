"""What is kept of a user's runs, as lines of JSON in their own hands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from google.protobuf import json_format

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb

# what is told after the runs and the messages to them, in this order: what the user said to runs of others, what the user's runs asked
# for, the votes on that, and the user's own on what those of others did
KINDS = ("run_message", "approval", "vote", "vote elsewhere")
# lines are sent together until they have so many bytes
_TOGETHER = 64 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """What is told of one thing, and its place among those of its kind."""

    place: tuple[object, ...]
    fields: Mapping[str, Any]


class Kept(Protocol):
    """The rows of one user."""

    async def runs(self, user_id: ids.UserId, after: tuple[object, ...]) -> list[Line]:
        """The next runs, in the order of their ids."""
        ...

    async def messages(self, user_id: ids.UserId, run_ids: Sequence[str], after: tuple[object, ...]) -> list[Line]:
        """The next messages to some of the user's runs, whoever sent them."""
        ...

    async def lines(self, user_id: ids.UserId, kind: str, after: tuple[object, ...]) -> list[Line]:
        """The next of one of `KINDS`."""
        ...


class Exports:
    """Reads runs out."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def of(self, user_id: ids.UserId) -> AsyncIterator[bytes]:
        """Whole lines, one JSON object each, with its `kind`."""
        waiting = bytearray()
        async for line in self._lines(user_id):
            waiting += line
            if len(waiting) >= _TOGETHER:
                yield bytes(waiting)
                waiting.clear()
        if waiting:
            yield bytes(waiting)

    async def _lines(self, user_id: ids.UserId) -> AsyncIterator[bytes]:
        after: tuple[object, ...] = ()
        while page := await self._kept.runs(user_id, after):
            for line in page:
                more = {"inputs": _json(line.fields["inputs"]), "outcome": _outcome(line.fields["outcome"])}
                yield _written("run", {**line.fields, **more})
            async for message in self._messages(user_id, [line.fields["run_id"] for line in page]):
                yield message
            after = page[-1].place
        for kind in KINDS:
            after = ()
            while page := await self._kept.lines(user_id, kind, after):
                for line in page:
                    yield _written(kind.partition(" ")[0], line.fields)
                after = page[-1].place

    async def _messages(self, user_id: ids.UserId, run_ids: Sequence[str]) -> AsyncIterator[bytes]:
        after: tuple[object, ...] = ()
        while page := await self._kept.messages(user_id, run_ids, after):
            for line in page:
                yield _written("run_message", line.fields)
            after = page[-1].place


def _written(kind: str, fields: Mapping[str, Any]) -> bytes:
    if "parameters" in fields:
        fields = {**fields, "parameters": orjson.loads(fields["parameters"])}
    return orjson.dumps({"kind": kind, **fields}, option=orjson.OPT_APPEND_NEWLINE)


def _json(text: bytes) -> Any:
    """What JSON says, on one line; what is none as it is."""
    try:
        return orjson.loads(text) if text else None
    except orjson.JSONDecodeError:
        return text.decode(errors="replace")


def _outcome(kept: bytes) -> dict[str, Any] | None:
    """What a call of a tool was answered; of an agent it is in the record."""
    if not kept:
        return None
    answer = pb.ExecuteToolResponse.FromString(kept)
    shown: dict[str, Any] = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    return {**shown, "result": _json(answer.result), "enforcement": _json(answer.enforcement)}
