"""Context tokens last an hour, and runs longer: whoever executes a run has its token renewed, and anybody those of runs that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from chassis import log
from netra import errors, ids
from services.dispatcher import running, upstreams
from services.dispatcher.patience import AWAY

_log = log.get(__name__)
_AT_ONCE = 100


class Kept(Protocol):
    """Where the context tokens of runs are kept."""

    async def old_tokens(self, most: int, passed_over: int) -> list[tuple[ids.RunId, int, str]]:
        """Run, epoch and context token of runs that wait and whose token is to be renewed and can be, oldest first, behind so many."""
        ...

    async def token_renewed(self, run_id: ids.RunId, epoch: int, token: str) -> None:
        """Keep the fresh context token of a run."""
        ...


class Renewals:
    """Looks every so many seconds which tokens are old; `mine` are the runs that this process executes."""

    def __init__(self, contexts: upstreams.Contexts, kept: Kept, mine: Callable[[], Sequence[running.Running]], every_s: float) -> None:
        self._contexts, self._kept, self._mine, self._every_s = contexts, kept, mine, every_s

    async def run(self) -> None:
        """Renew what is old, for ever."""
        while True:
            try:
                await self.look()
            except AWAY:
                _log.warning("context tokens could not be looked at")
            await asyncio.sleep(self._every_s)

    async def look(self) -> None:
        """Renew all that are old by now. Raises `Unavailable` or `DeadlineExceeded`."""
        for one in self._mine():
            if one.token_old:
                one.token = await self._renewed(one.claim.order.run_id, one.claim.epoch, one.token)
        # those that cannot be renewed stay the oldest: they must not keep the others from it
        failed = 0
        while batch := await self._kept.old_tokens(_AT_ONCE, failed):
            for run_id, epoch, token in batch:
                failed += await self._renewed(run_id, epoch, token) == token
            if len(batch) < _AT_ONCE:
                return

    async def _renewed(self, run_id: ids.RunId, epoch: int, token: str) -> str:
        """The fresh token; the same one when it is not renewed any more."""
        try:
            fresh = await self._contexts.renew(token)
        except AWAY:
            raise
        except errors.NetraError as error:
            _log.warning("a context could not be renewed", run_id=run_id, code=error.code)
            return token
        await self._kept.token_renewed(run_id, epoch, fresh)
        return fresh
