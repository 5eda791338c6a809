"""The one reader of the process environment; everything else asks here."""

from __future__ import annotations

import os
from collections.abc import Mapping


class IsolatedEnvironment:
    """A snapshot of variables. Values set here do not reach the process environment, so tests cannot leak into each other."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(os.environ if variables is None else variables)  # noqa: TID251 - the one reader

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of a variable; an empty one counts as absent."""
        return self._variables.get(name) or default

    def set(self, name: str, value: str) -> None:
        """Set a variable in this snapshot only."""
        self._variables[name] = value

    def all(self) -> dict[str, str]:
        """A copy of all variables."""
        return dict(self._variables)

    def subprocess_env(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a child process is given: this snapshot plus `extra`."""
        return {**self._variables, **(extra or {})}


def get_environment() -> IsolatedEnvironment:
    """A snapshot of the environment of this process as it is now."""
    return IsolatedEnvironment()
