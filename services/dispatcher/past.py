"""What the record has of a run that an earlier owner began: its steps by their places, and what a replay has not asked for; pure."""

from __future__ import annotations

import bisect
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from netra import errors
from services.dispatcher import ledger

# keys of the engine's own begin with it; behind the key of a step it is what is kept beside its end
MARK = "~"
BEGIN = "~1"
MESSAGE = "wait_for_message"
GATHER = "gather"
# keys below a strand whose own place had become too long
_HASHED = re.compile(r"[0-9a-f]{32}/")


@dataclass(frozen=True, slots=True)
class Found:
    """A step as it is in the record: its result when it is over, and what is known of its begin."""

    over: Mapping[str, Any] | None = None
    begun: Mapping[str, Any] | None = None


_NOTHING = Found()


class Past:
    """The steps of the earlier owners of a run; of one that begins there are none."""

    def __init__(self, steps: Iterable[tuple[str, bytes]] = ()) -> None:
        reading = ledger.Reading()
        # what a call came to is kept once
        self._steps = {key: b"{}" if reading.add(result) else result for key, result in steps}
        self._keys = sorted(self._steps)
        self._unasked = {key for key in self._keys if not key.startswith(MARK)}
        self._skipped = False
        self._calls = reading.calls()

    @classmethod
    async def of(cls, steps: AsyncIterator[tuple[str, bytes]]) -> Past:
        """All of these."""
        return cls([step async for step in steps])

    @property
    def is_empty(self) -> bool:
        """Whether there are no steps at all."""
        return not self._keys

    def __contains__(self, key: str) -> bool:
        return key in self._steps

    def _among(self, prefix: str) -> Iterator[str]:
        first = bisect.bisect_left(self._keys, prefix)
        for place in range(first, len(self._keys)):
            if not self._keys[place].startswith(prefix):
                return
            yield self._keys[place]

    def _read(self, key: str) -> Mapping[str, Any] | None:
        if key not in self._steps:
            return None
        # steps of older processes have no result
        return orjson.loads(self._steps[key]) or {}

    def found(self, key: str) -> Found:
        """What there is under a key, whatever else is at its place."""
        return Found(self._read(key), self._read(f"{key}{BEGIN}")) if self._keys else _NOTHING

    def call(self, key: str) -> ledger.Call | None:
        """The call of this key. One that is over is not given a second time."""
        found = self._calls.get(key)
        return found if found is None or found.is_open else self._calls.pop(key)

    def open_calls(self) -> list[ledger.Call]:
        """The calls that began and of which the earlier owners left no end."""
        return [call for call in self._calls.values() if call.is_open]

    def numbered(self, name: str) -> int:
        """How many steps of the engine's own have this name and a number."""
        return sum(key[len(name) :].isdigit() for key in self._among(name))

    def heard(self) -> set[int]:
        """The numbers of the messages that the agent has taken."""
        results = (self._read(key) or {} for key in self._keys if key.endswith(f":{MESSAGE}"))
        return {result["number"] for result in results if "number" in result}

    def at(self, place: str, name: str) -> str:
        """The key of the step at a place, which is asked for by its name. Raises `NonDeterministicAgent` for another one."""
        key = f"{place}:{name}"
        if not self._keys:
            return key
        for other in self._among(f"{place}:"):
            if other != key and not other.startswith((f"{key}{MARK}", f"{key}/")):
                raise differs(other, key)
        for other in self._among(f"{place}."):
            raise differs(other, key)
        self._unasked.discard(key)
        self._unasked.difference_update(self._among(f"{key}{MARK}"))
        return key

    def gather(self, place: str) -> str:
        """The key for the end of the strands at a place. Raises `NonDeterministicAgent` when the record has a step there."""
        key = f"{place}:{GATHER}"
        if not self._keys:
            return key
        for other in self._among(f"{place}:"):
            if other != key:
                raise differs(other, key)
        self._unasked.discard(key)
        return key

    def skip(self, prefix: str) -> None:
        """What is below is not asked for: the strand that took these steps was stopped."""
        if self._keys:
            self._unasked.difference_update(self._among(prefix))
            self._skipped = True

    def unasked(self) -> str:
        """The first step that was not asked for, of an agent that has come to its end; empty when there is none."""
        # below a strand that was stopped there may be some whose key does not say so
        left = (key for key in self._unasked if not (self._skipped and _HASHED.match(key)))
        return min(left, default="")


def differs(recorded: str, asked: str) -> errors.NonDeterministicAgent:
    """The agent does not do what it did before."""
    message = f"When the agent was run again it asked for {asked}, where the record has {recorded}."
    return errors.NonDeterministicAgent(message, field="step", recorded=recorded, asked=asked)
