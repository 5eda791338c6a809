"""Patience with a part of the platform that is away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from netra import errors

_T = TypeVar("_T")
AWAY = (errors.Unavailable, errors.DeadlineExceeded)


async def patient(call: Callable[[], Awaitable[_T]], patience_s: float | None = None) -> _T:
    """The call's answer, asked for again while a part of the platform is away; for so long at most, or for ever."""
    async for attempt in stamina.retry_context(on=AWAY, attempts=None, timeout=patience_s, wait_initial=0.05, wait_max=1.0):
        with attempt:
            return await call()
    raise errors.Unavailable
