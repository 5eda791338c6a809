"""The tiers of this process: started, probed, and handed out; what is not available refuses, and nothing weaker stands in for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from chassis import log, telemetry
from netra import errors
from netra.tool import Tier
from services.dispatcher.tools.sandbox import allowances, guardian, tiers, workers

_log = log.get(__name__)
_available = telemetry.meter.create_gauge(
    "netra.sandbox.available", description="1 when the tier contains calls here, by tier and backend."
)
_OFF = "it is switched off"
_REMEDY_OFF = "Name it in NETRA_SANDBOX_TIERS, and start the dispatcher again."
_PROBE_S = 60.0
_SLOW_REMEDY = "Look at the load of the machine and at the log, and start the dispatcher again."


class Sandboxes:
    """What contains calls. Until a tier is probed, who asks for it waits; from then on it is there or refused, as it was found."""

    def __init__(
        self, parts: Mapping[Tier, tiers.Sandbox] | None = None, *, limits: allowances.Allowances | None = None,
        guard: guardian.Guardian | None = None, warm: workers.Workers | None = None,
    ) -> None:  # fmt: skip
        self._parts = dict(parts or {})
        self.limits = limits or allowances.Allowances()
        self.guard, self._warm = guard, warm
        self._found: dict[Tier, tiers.Availability] = {}
        self._probed = {name: asyncio.Event() for name in self._parts}

    async def start(self) -> None:
        """Start what calls share. What does not start is not available, with its reason; the process goes on without it."""
        if self._warm is not None:
            await self._warm.start()
        await asyncio.gather(*(self._start(name, part) for name, part in self._parts.items()))

    async def _start(self, name: Tier, part: tiers.Sandbox) -> None:
        try:
            await part.start()
        except (errors.NetraError, OSError) as error:
            reason, remedy = _said(error)
            self._take(tiers.Availability(name, "none", available=False, reason=reason, remedy=remedy))

    async def probe(self, tell: Callable[[tiers.Availability], Awaitable[None]]) -> None:
        """Attack each tier that was started, one after the other, and tell of all of them what was found."""
        for name, part in self._parts.items():
            if name not in self._found:
                self._take(await _probed(name, part))
            await tell(self._found[name])

    def _take(self, found: tiers.Availability) -> None:
        self._found[found.tier] = found
        _available.set(int(found.available), {"tier": found.tier, "backend": found.backend})
        if found.available:
            _log.info("a tier contains calls here", tier=found.tier, backend=found.backend, facts=dict(found.facts))
        else:
            _log.warning("a tier is not available here: its tools are refused", tier=found.tier, reason=found.reason, remedy=found.remedy)
        self._probed[found.tier].set()

    def availability(self, tier: Tier) -> tiers.Availability:
        """What was found of a tier, as far as is known now."""
        if tier not in self._parts:
            return tiers.Availability(tier, "none", available=False, reason=_OFF, remedy=_REMEDY_OFF)
        waits = tiers.Availability(tier, "none", available=False, reason="it is being probed", remedy="Try again in a moment.")
        return self._found.get(tier, waits)

    async def tier(self, name: Tier) -> tiers.Sandbox:
        """The tier; waits for its probe. Raises `SandboxUnavailable` with the reason and what to do."""
        if name in self._parts:
            await self._probed[name].wait()
        self.availability(name).require()
        return self._parts[name]

    @property
    def warm(self) -> workers.Workers:
        """Processes for plain functions. Raises `SandboxUnavailable` when there are none here."""
        if self._warm is None:
            raise errors.SandboxUnavailable("There are no worker processes here.", remedy=_REMEDY_OFF)
        return self._warm

    def apart(self) -> workers.Workers:
        """Processes that nobody else gets, each for one call; who asked closes them. Raises `SandboxUnavailable`."""
        if self.guard is None:
            raise errors.SandboxUnavailable("There are no worker processes here.", remedy=_REMEDY_OFF)
        return workers.Workers(2, self.guard, calls=1)

    async def close(self) -> None:
        """End them, and every call in them."""
        for part in self._parts.values():
            await part.close()
        if self._warm is not None:
            await self._warm.close()
        if self.guard is not None:
            await self.guard.close()


async def _probed(name: Tier, part: tiers.Sandbox) -> tiers.Availability:
    try:
        async with asyncio.timeout(_PROBE_S):
            return await part.probe()
    except TimeoutError:
        reason, remedy = f"its probe did not end within {_PROBE_S:g} s", _SLOW_REMEDY
    except (errors.NetraError, OSError) as error:
        reason, remedy = _said(error)
    return tiers.Availability(name, "none", available=False, reason=reason, remedy=remedy)


def _said(error: Exception) -> tuple[str, str]:
    if isinstance(error, errors.NetraError):
        return error.message, str(error.details.get("remedy", ""))
    return str(error), _SLOW_REMEDY
