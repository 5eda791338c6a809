"""Patience with a part of the platform that is away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from netra import errors

_T = TypeVar("_T")
AWAY = (errors.Unavailable, errors.DeadlineExceeded)
_FIRST_S = 0.05


async def patient(call: Callable[[], Awaitable[_T]], patience_s: float | None = None) -> _T:
    """The call's answer, asked for again while a part of the platform is away; for so long at most, or for ever."""
    began = time.monotonic()
    try:
        # what nearly always does: trying again has a price of its own, which a call should not pay
        return await call()
    except AWAY:
        left_s = None if patience_s is None else patience_s - (time.monotonic() - began) - _FIRST_S
        if left_s is not None and left_s <= 0:
            raise
    await asyncio.sleep(random.uniform(0.5, 1.0) * _FIRST_S)  # noqa: S311 - jitter
    async for attempt in stamina.retry_context(on=AWAY, attempts=None, timeout=left_s, wait_initial=2 * _FIRST_S, wait_max=1.0):
        with attempt:
            return await call()
    raise errors.Unavailable
