"""What an agent is: the @agent decorator and the Turn it is handed."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from netra.context import UserExecutionContext

_NAME = re.compile(r"[a-z][a-z0-9_.\-]{0,63}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
APPROVE, REJECT, EXPIRED = "approve", "reject", "expired"


@dataclass(frozen=True, slots=True)
class Message:
    """What a user said to a run that goes on."""

    text: str
    message_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What people decided: `approve`, `reject`, or `expired` when they did not in time; who they are, and what the last one said to it."""

    decision: str
    by: tuple[str, ...] = ()
    comment: str = ""

    @property
    def approved(self) -> bool:
        """Whether the agent may do what it asked for."""
        return self.decision == APPROVE


class Turn(Protocol):
    """What an agent may do. Its methods are steps, and the outcome of each is kept in the record.

    When the process dies, another one runs the agent again from its beginning: steps that are in the record are not taken a second time
    but return what they returned. So the agent must come to the same steps in the same order, by what steps returned and by nothing else.
    """

    @property
    def request(self) -> str:
        """What the user asks."""
        ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Named inputs of the run."""
        ...

    @property
    def context(self) -> UserExecutionContext:
        """For whom and in what frame the run executes."""
        ...

    async def think(self, reasoning: str, *, progress: float | None = None) -> None:
        """Show what the agent considers; `progress` is 0 to 100."""
        ...

    def delta(self, text: str) -> None:
        """Show text as it is produced to those who watch just now. It is not kept and may be dropped: put its sum into a step."""
        ...

    async def emit(self, kind: str, **data: object) -> None:
        """Tell something of the agent's own kind. Raises `InvalidPayload` for a kind of the platform's, and for data that is no JSON."""
        ...

    async def tool(self, name: str, /, **arguments: object) -> Any:
        """Call a tool and return its result. Raises `netra.errors.NetraError` when the call does not succeed."""
        ...

    async def model(self, prompt: str, **arguments: object) -> Any:
        """Ask the language model: a call of the tool `model`."""
        ...

    async def child(
        self,
        agent: str,
        *,
        request: str | None = None,
        tools: Sequence[str] | None = None,
        deadline_s: float | None = None,
        **inputs: object,
    ) -> Any:
        """Have another agent do a part of the work and return its result; its events are in this run's record, under its name.

        It gets this run's request and inputs; those given here win. With `tools` it can call no others, nor can its own children.
        Raises what the agent raises, and `DeadlineExceeded` when it did not finish within `deadline_s` of running time.
        """
        ...

    async def gather(self, *steps: Awaitable[Any]) -> list[Any]:
        """Take steps at the same time; their results in the order given. When one raises, the others are stopped."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait. A run that only waits takes no place of another."""
        ...

    async def wait_for_message(self, *, timeout_s: float | None = None) -> Message:
        """The next message that is sent to this run. Raises `DeadlineExceeded` when none comes in time; 7 days are the most."""
        ...

    async def approve(self, message: str, *, quorum: int = 1, timeout_s: float | None = None) -> Decision:
        """Ask people whether to go on: approved by as many users as `quorum`, rejected by the first who says so, or `expired`."""
        ...

    def now(self) -> datetime:
        """When the last step before this ended, UTC: the same time whenever the agent is run again."""
        ...

    def random(self) -> random.Random:
        """A source of chance that gives the same numbers whenever the agent is run again; each call gives another one."""
        ...

    def alive(self) -> None:
        """Say that the agent is at work. One that takes no step for 10 s and does not say so is taken for dead."""
        ...


AgentFunction = Callable[[Turn], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as the platform knows it. The deadline is in seconds of running time; the policy says which tiers have the feature.

    `tools` are the names of those it may call, itself and through its children; None is any. The schemas are JSON Schema 2020-12, of its
    inputs and of what it returns; None is any.
    """

    name: str
    version: str
    description: str
    function: AgentFunction = field(repr=False)
    deadline_s: float = 30.0
    feature: str = "basic_agents"
    tools: tuple[str, ...] | None = None
    input_schema: Mapping[str, Any] | None = field(default=None, repr=False)
    output_schema: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises `ValueError` naming what is wrong with the declaration."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"agent name {self.name!r} must match {_NAME.pattern}")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"agent {self.name}: version {self.version!r} must be MAJOR.MINOR.PATCH")
        if not inspect.iscoroutinefunction(self.function):
            raise ValueError(f"agent {self.name}: declare the function with `async def`")
        if isinstance(self.tools, str):
            raise ValueError(f"agent {self.name}: tools must be a list of names, not one text")


def agent(
    name: str, *, version: str = "1.0.0", deadline_s: float = 30.0, feature: str = "basic_agents", tools: Sequence[str] | None = None,
    input_schema: Mapping[str, Any] | None = None, output_schema: Mapping[str, Any] | None = None,
) -> Callable[[AgentFunction], AgentSpec]:  # fmt: skip
    """Make an agent of `async def run(turn: Turn)`; its docstring is the description, its return value the result."""

    def declare(function: AgentFunction) -> AgentSpec:
        allowed = tuple(tools) if tools is not None and not isinstance(tools, str) else tools
        description = inspect.getdoc(function) or ""
        return AgentSpec(name, version, description, function, deadline_s, feature, allowed, input_schema, output_schema)  # type: ignore[arg-type]

    return declare
