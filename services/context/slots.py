"""How many files may move at once: in all, which bounds memory, and for one user, who must not take all."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from netra import errors, ids

_PATIENCE_S = 10.0


class Slots:
    """One slot for each upload or download that is going on."""

    def __init__(self, total: int, per_user: int, patience_s: float = _PATIENCE_S) -> None:
        self._total, self._per_user, self._patience_s = total, per_user, patience_s
        self._taken: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def one(self, user_id: ids.UserId) -> AsyncIterator[None]:
        """A slot of the user, waited for a while. Raises `RateLimited`."""
        await self._take(user_id)
        try:
            yield
        finally:
            self._taken[user_id] -= 1
            self._taken += Counter()  # drops users without a slot
            async with self._changed:
                self._changed.notify_all()

    async def _take(self, user_id: ids.UserId) -> None:
        try:
            async with asyncio.timeout(self._patience_s), self._changed:
                await self._changed.wait_for(lambda: self._free(user_id))
                self._taken[user_id] += 1
        except TimeoutError:
            message = f"Too many files move at once; one user may move {self._per_user}. Wait for one to end."
            raise errors.RateLimited(message, retry_after_ms=1000) from None

    def _free(self, user_id: ids.UserId) -> bool:
        return self._taken.total() < self._total and self._taken[user_id] < self._per_user
