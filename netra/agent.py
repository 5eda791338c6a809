"""What an agent is: the @agent decorator and the Turn it is handed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from netra.context import UserExecutionContext

_NAME = re.compile(r"[a-z][a-z0-9_.\-]{0,63}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Turn(Protocol):
    """What an agent may do. Each method but `delta` is a step; its outcome is kept in the record."""

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

    async def tool(self, name: str, /, **arguments: object) -> Any:
        """Call a tool and return its result. Raises `netra.errors.NetraError` when the call does not succeed."""
        ...

    async def child(self, agent: str, *, request: str | None = None, **inputs: object) -> Any:
        """Have another agent do a part of the work and return its result; its events are in this run's record, under its name.

        It gets this run's request and inputs; those given here win. Raises what the agent raises.
        """
        ...

    async def gather(self, *steps: Awaitable[Any]) -> list[Any]:
        """Take steps at the same time; their results in the order given. When one raises, the others are stopped."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


AgentFunction = Callable[[Turn], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as the platform knows it. The deadline is in seconds of running time; the policy says which tiers have the feature."""

    name: str
    version: str
    description: str
    function: AgentFunction = field(repr=False)
    deadline_s: float = 30.0
    feature: str = "basic_agents"

    def __post_init__(self) -> None:
        """Raises `ValueError` naming what is wrong with the declaration."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"agent name {self.name!r} must match {_NAME.pattern}")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"agent {self.name}: version {self.version!r} must be MAJOR.MINOR.PATCH")
        if not inspect.iscoroutinefunction(self.function):
            raise ValueError(f"agent {self.name}: declare the function with `async def`")


def agent(
    name: str, *, version: str = "1.0.0", deadline_s: float = 30.0, feature: str = "basic_agents"
) -> Callable[[AgentFunction], AgentSpec]:
    """Make an agent of `async def run(turn: Turn)`; its docstring is the description, its return value the result."""

    def declare(function: AgentFunction) -> AgentSpec:
        return AgentSpec(name, version, inspect.getdoc(function) or "", function, deadline_s, feature)

    return declare
