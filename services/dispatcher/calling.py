"""Interactive calls that this process executes, as those who asked for them see them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from netra import errors, ids
from services.dispatcher import admission

# so long a reader waits at most for what follows an answer
_LATE_S = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """One of them. Its `answer` is there once it is in the record; its row says so when its `task` is over."""

    run_id: ids.RunId
    digest: bytes
    answer: asyncio.Future[bytes]
    task: asyncio.Task[None]

    async def over(self) -> tuple[ids.RunId, bytes]:
        """Its run and its answer; it ends even when nobody waits for it. Raises `Unavailable` when this process had to let go of it."""
        either: set[asyncio.Future[Any]] = {self.task, self.answer}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self.answer.done():
            if self.task.cancelled():
                raise errors.Unavailable("The process that executed the call let go of it. Ask again for its outcome.")
            # what it failed with
            self.task.result()
        return self.run_id, await self.answer


class Calls:
    """All of them, by user and request id, until their rows say how they ended."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], Call] = {}

    def add(self, user_id: ids.UserId, wanted: admission.Wanted, call: Call) -> Call:
        """A call begins."""
        key = user_id, wanted.request_id
        self._calls[key] = call
        call.task.add_done_callback(lambda _over: self._calls.pop(key))
        return call

    def known(self, user_id: ids.UserId, wanted: admission.Wanted) -> tuple[ids.RunId, bytes] | None:
        """Run and answer of the same request, when it is answered and not forgotten yet. Raises `AlreadyExists`, and `Busy` until then."""
        call = self._calls.get((user_id, wanted.request_id))
        if call is None:
            return None
        admission.require_same(call.digest, wanted)
        if not call.answer.done():
            raise still_executes()
        return call.run_id, call.answer.result()

    async def stored(self, user_id: ids.UserId) -> None:
        """Returns when the rows of the user's calls that were answered here say how they ended, or a second later."""
        late = {call.task for (whose, _), call in self._calls.items() if whose == user_id and call.answer.done()}
        if late:
            await asyncio.wait(late, timeout=_LATE_S)


def still_executes() -> errors.Busy:
    """The error for a request that is under way."""
    return errors.Busy("The same request still executes. Ask again for its outcome.", retry_after_ms=1000)
