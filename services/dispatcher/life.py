"""What all turns of a run share while it is in this process: its past, where its strands wait, and whom they ask."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from netra import errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher import approvals, ledger, parking, past, runs
from services.dispatcher.tools import calls

_LONGEST_S = 604_800.0


class Outside(Protocol):
    """What people say to runs. While that cannot be reached it is asked for again: a run that waits can wait for that as well."""

    async def mail(self, run_id: ids.RunId, after: int) -> list[runs.Mail]:
        """What was sent to the run, with a greater number, oldest first."""
        ...

    async def ask(self, wanted: approvals.Wanted, context: UserExecutionContext) -> approvals.Approval:
        """Ask for an approval, once per id; it is returned as it is now."""
        ...

    async def approval(self, run_id: ids.RunId, approval_id: str) -> approvals.Approval:
        """An approval of the run as it is now; expired when its time is over."""
        ...


class Heart(Protocol):
    """Who is told that an agent is alive: it has steps under way, or says so."""

    def step_began(self, *, counts: bool = True) -> None:
        """A step is under way."""
        ...

    def step_over(self) -> None:
        """It is over."""
        ...

    def beat(self) -> None:
        """The agent lives."""
        ...


class _Unheard:
    """Nobody listens."""

    def step_began(self, *, counts: bool = True) -> None:
        """See `Heart`."""

    def step_over(self) -> None:
        """See `Heart`."""

    def beat(self) -> None:
        """See `Heart`."""


class Settle(Protocol):
    """Brings a call to its end that an earlier owner left open: `settlement.Settlement.settle`, for a run that goes on."""

    async def __call__(
        self, left: ledger.Call, *, ask: Callable[[ledger.Call], Awaitable[bool]], only: frozenset[str] | None
    ) -> calls.Outcome:  # fmt: skip
        """What became of it."""
        ...


async def _unsettled(left: ledger.Call, **_: object) -> NoReturn:
    raise errors.Internal


async def _unread(_: Mapping[str, Any]) -> NoReturn:
    raise errors.Internal


@dataclass(slots=True)
class Life:
    """What all turns of a run share while it is in this process, and what they took.

    `whole` reads what is kept as an artifact, `ran_s` tells how long the run has run, `longest_s` is the most that a wait may take.
    `differs` is set when the agent does not do what it did before: whatever it makes of that, its run fails by it; `notice` says so.
    """

    past: past.Past = field(default_factory=past.Past)
    root: parking.Strand = field(default_factory=parking.Strand)
    parking: parking.Parking | None = None
    outside: Outside | None = None
    settle: Settle = _unsettled
    whole: Callable[[Mapping[str, Any]], Awaitable[Any]] = _unread
    ran_s: Callable[[], float] = time.monotonic
    heart: Heart = field(default_factory=_Unheard)
    longest_s: float = _LONGEST_S
    heard: set[int] = field(default_factory=set)
    check_inputs: Callable[[AgentSpec, Mapping[str, Any]], None] = lambda _spec, _inputs: None
    check_result: Callable[[AgentSpec, object], None] = lambda _spec, _result: None
    notice: Callable[[], None] = lambda: None
    differs: errors.NonDeterministicAgent | None = None
    steps: int = 0
    thoughts: int = 0
    calls: int = 0

    @property
    def heard_until(self) -> int:
        """Up to this number all messages were taken."""
        number = 0
        while number + 1 in self.heard:
            number += 1
        return number
