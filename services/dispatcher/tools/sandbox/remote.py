"""The tier `remote`: tools that a worker elsewhere executes. There is no way to one yet, so each call is refused."""

from __future__ import annotations

from netra import errors
from services.dispatcher.tools.sandbox import tiers

_REASON = "no worker is connected"
_REMEDY = "Tools that are registered can be listed; calling them takes a worker that serves them, which this release cannot connect."


async def absent(**_arguments: object) -> object:
    """Stands for the function of a tool that a worker has. Raises `SandboxUnavailable`."""
    raise _unavailable()


def _unavailable() -> errors.SandboxUnavailable:
    return errors.SandboxUnavailable(f"The tier remote is not available: {_REASON}.", remedy=_REMEDY)


class Remote:
    """A `tiers.Sandbox` that has nobody to send a call to."""

    async def start(self) -> None:
        """Nothing is shared."""

    async def run(self, job: tiers.Job) -> tiers.Ended:
        """Raises `SandboxUnavailable`."""
        raise _unavailable()

    async def probe(self) -> tiers.Availability:
        """Not available."""
        return tiers.Availability("remote", "worker", available=False, reason=_REASON, remedy=_REMEDY)

    async def close(self) -> None:
        """Nothing is left."""
