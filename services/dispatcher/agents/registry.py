"""AgentRegistry: finds agents by name, from entry points and built-ins."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from netra import errors
from netra.agent import AgentSpec
from services.dispatcher.agents import spend, text


class AgentRegistry:
    """The agents of this process, by name. A name is registered once."""

    def __init__(self, agents: Iterable[AgentSpec]) -> None:
        self._agents: dict[str, AgentSpec] = {}
        for spec in agents:
            if spec.name in self._agents:
                raise ValueError(f"two agents are named {spec.name}")
            self._agents[spec.name] = spec

    def get(self, name: str) -> AgentSpec:
        """The agent. Raises `NotFound` naming those there are."""
        try:
            return self._agents[name]
        except KeyError:
            known = ", ".join(sorted(self._agents))
            raise errors.NotFound(f"There is no agent {name!r}. There are: {known}.", field="agent") from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._agents)

    def all(self) -> list[AgentSpec]:
        """All agents, by name."""
        return [self._agents[name] for name in self.names()]


def built_in() -> list[AgentSpec]:
    """The agents that come with Netra."""
    specialists = [spend.triage, spend.data, spend.optimization, spend.actions, spend.reporting]
    return [spend.supervisor, spend.analyst, *specialists, text.analyst]


def installed() -> list[AgentSpec]:
    """The agents that installed packages offer under the entry-point group `netra.agents`."""
    return [point.load() for point in metadata.entry_points(group="netra.agents")]
