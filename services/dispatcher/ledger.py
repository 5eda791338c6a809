"""What the steps of a run say of its tool calls, and what a successor of their owner does with each; pure.

The record is the ledger. With its `tool_executing` a call leaves a step that says so, the intent; with its `tool_completed` one that
keeps its outcome. A tool that changes something is called only after its intent is in the record: so what has none there never began.
"""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from netra.tool import Settled, ToolSpec

# the one step of a run that is an interactive call
INTERACTIVE = "call"
_CALL = "tool_call"
# the most that a call may have, and what stands around it
_MAX_BYTES = 260 * 1024


class State(enum.StrEnum):
    """Where a call is: told, in the record and so perhaps under way, over, or over without anybody knowing how."""

    INTENT = "intent"
    STARTED = "started"
    COMMITTED = "committed"
    UNKNOWN = "unknown"


class Way(enum.StrEnum):
    """What a successor does with a call.

    `RETURN` its outcome is known; `REPEAT` run it again, under the same key; `ASK` the tool's `reconcile`; `DROP` it changed nothing
    and cannot be repeated: an error; `REPORT` nobody knows: it ends as unknown.
    """

    RETURN = "return"
    REPEAT = "repeat"
    ASK = "ask"
    DROP = "drop"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Intent:
    """That a call begins. `attempt` counts the owners that began it; `whole` is false when secrets were left out of its arguments."""

    key: str
    tool: str
    version: str
    tool_call_id: str
    arguments: Mapping[str, Any]
    whole: bool = True
    attempt: int = 1

    def step(self) -> tuple[str, bytes]:
        """Key and result of the step that keeps it. Arguments that are larger than any call may have are left out."""
        about = {
            "key": self.key, "state": State.INTENT, "attempt": self.attempt, "tool": self.tool, "version": self.version,
            "tool_call_id": self.tool_call_id, "arguments": self.arguments, "whole": self.whole,
        }  # fmt: skip
        kept = orjson.dumps({_CALL: about})
        if len(kept) > _MAX_BYTES:
            kept = orjson.dumps({_CALL: {**about, "arguments": {}, "whole": False}})
        return f"{self.key}~{self.attempt}", kept


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the record knows it. `kept` is its outcome, when it has one: status, with a result or an error."""

    key: str
    state: State
    tool: str
    version: str
    tool_call_id: str
    attempts: int = 1
    arguments: Mapping[str, Any] | None = None
    whole: bool = False
    execution_time_ms: float = 0.0
    kept: Mapping[str, Any] | None = None
    # how what gave the outcome was contained, and which tool it was when it was another
    enforcement: Mapping[str, Any] | None = None
    answered_by: str = ""
    # whoever waited for it stopped it; and when it was over, in seconds since 1970
    stopped: bool = False
    at: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it began and nothing says how it went."""
        return self.state in (State.INTENT, State.STARTED)


def effect_key(run_id: str, step_key: str) -> str:
    """The key of a call for what is outside: the same for all attempts and owners, another for each call."""
    return str(uuid.uuid5(uuid.UUID(run_id), step_key))


def unlabelled(tool: str, tool_call_id: str) -> Call:
    """A call that began, of which the record has no intent: nothing can be done for it."""
    return Call("", State.STARTED, tool, "", tool_call_id)


def committed(
    key: str, kept: Mapping[str, Any], *, tool: str, version: str, tool_call_id: str, attempts: int, execution_time_ms: float,
    enforcement: Mapping[str, Any], answered_by: str = "", stopped: bool = False, at: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """The result of the step that keeps an outcome: status, result and error as they are, and of which call."""
    state = State.UNKNOWN if kept["status"] == "unknown" else State.COMMITTED
    about = {
        "key": key, "state": state, "attempts": attempts, "tool": tool, "version": version, "tool_call_id": tool_call_id,
        "execution_time_ms": execution_time_ms, "enforcement": dict(enforcement), "answered_by": answered_by, "at": at,
        **({"stopped": True} if stopped else {}),
    }  # fmt: skip
    return {**kept, _CALL: about}


class Reading:
    """The calls of a run by their keys, out of all of its steps in any order; of all calls, or of those with these ids (`wanted`).

    Nothing is kept of other calls and other steps, however many there are.
    """

    def __init__(self, wanted: Container[str] | None = None) -> None:
        self._wanted = wanted
        self._begun: dict[str, Call] = {}
        self._over: dict[str, Call] = {}

    def add(self, result: bytes) -> bool:
        """Take note of a step, by its result. Whether it is one of a call."""
        found = orjson.loads(result)
        about = found.get(_CALL) if isinstance(found, dict) else None
        if not isinstance(about, dict) or "state" not in about:
            return False
        if self._wanted is not None and about["tool_call_id"] not in self._wanted:
            return True
        if about["state"] != State.INTENT:
            self._over[about["key"]] = _over(about, found)
        elif about["key"] not in self._begun or self._begun[about["key"]].attempts < about["attempt"]:
            self._begun[about["key"]] = _begun(about)
        return True

    def calls(self) -> dict[str, Call]:
        """What was found."""
        return self._begun | {key: _with(self._begun.get(key), call) for key, call in self._over.items()}


def read(steps: Iterable[tuple[str, bytes]]) -> dict[str, Call]:
    """All calls in these steps, by their keys."""
    reading = Reading()
    for _, result in steps:
        reading.add(result)
    return reading.calls()


def _begun(about: Mapping[str, Any]) -> Call:
    # it is in the record, so whatever waited for that may have happened
    return Call(
        about["key"], State.STARTED, about["tool"], about["version"], about["tool_call_id"], about["attempt"], about["arguments"],
        about["whole"],
    )  # fmt: skip


def _over(about: Mapping[str, Any], found: Mapping[str, Any]) -> Call:
    kept = {name: value for name, value in found.items() if name != _CALL}
    return Call(
        about["key"], State(about["state"]), about["tool"], about["version"], about["tool_call_id"], about["attempts"],
        execution_time_ms=about["execution_time_ms"], kept=kept, enforcement=about["enforcement"], answered_by=about["answered_by"],
        stopped=about.get("stopped", False), at=about.get("at", 0.0),
    )  # fmt: skip


def _with(intent: Call | None, call: Call) -> Call:
    return call if intent is None else dataclasses.replace(call, arguments=intent.arguments, whole=intent.whole)


def way(call: Call, spec: ToolSpec | None, *, again: bool = True) -> Way:
    """What is done with a call that an earlier owner left. `spec` is None when the tool is gone; nothing is run unless `again`."""
    if not call.is_open:
        return Way.RETURN
    if spec is None:
        return Way.REPORT
    if not spec.side_effects:
        return Way.REPEAT if again and call.whole else Way.DROP
    if spec.reconcile is not None:
        return Way.ASK
    return _perhaps_made(call, spec, again=again)


def asked(call: Call, spec: ToolSpec, settled: Settled | None, *, again: bool = True) -> Way:
    """What is done with a call after its tool was asked, which may not know either."""
    if settled is None:
        return _perhaps_made(call, spec, again=again)
    if settled.done:
        return Way.RETURN
    return Way.REPEAT if again and call.whole else Way.DROP


def _perhaps_made(call: Call, spec: ToolSpec, *, again: bool) -> Way:
    return Way.REPEAT if spec.idempotent and again and call.whole else Way.REPORT
