"""An answer that is kept for a moment, so that asking often costs no more than asking once."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Kept(Generic[_T]):
    """What `ask` said, at most so old. While one caller asks again, the others take what there is."""

    def __init__(self, ask: Callable[[], Awaitable[_T]], fresh_s: float) -> None:
        self._ask, self._fresh_s = ask, fresh_s
        self._known: _T | None = None
        self._until = 0.0

    async def __call__(self) -> _T:
        """The answer. Raises what `ask` raises."""
        now = time.monotonic()
        if self._known is not None and now < self._until:
            return self._known
        self._until = now + self._fresh_s
        self._known = await self._ask()
        return self._known
