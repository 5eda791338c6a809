"""What several ask while an answer is under way is asked together, next."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from chassis import log
from netra import deadline, errors

_log = log.get(__name__)
_TIMEOUT_S = 10.0
# whose time is over within the same one of these is told at its end: a timer for each would cost as much as the rest of `ask`
_TICK_S = 0.05
# where so many ask at the same time, others are about to: they are waited for, as PostgreSQL does by commit_siblings and commit_delay
_SIBLINGS, _DELAY_S = 3, 0.005
_One = TypeVar("_One")
_Answer = TypeVar("_Answer")


class Gathering(Generic[_One, _Answer]):
    """Asks for many at once: whoever comes while that is under way waits for the next time. `run` asks; it must run.

    Several who ask at the same time wait a moment for those who are about to; one or two do not.

    `put` answers all that it is given, in their order. An outage that it raises is the answer of all.
    """

    def __init__(self, put: Callable[[Sequence[_One]], Awaitable[Sequence[_Answer]]], most: int) -> None:
        self._put, self._most = put, most
        self._waiting: deque[tuple[_One, asyncio.Future[_Answer]]] = deque()
        self._wake = asyncio.Event()
        self._ends: dict[int, set[asyncio.Future[_Answer]]] = {}

    async def ask(self, one: _One) -> _Answer:
        """Its answer. Raises `Unavailable`; `DeadlineExceeded` when the caller's time is over, then it may have been done all the same.

        Of a caller who goes away before it is put, it is not put.
        """
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((one, answer))
        self._wake.set()
        ending = self._ending(deadline.timeout(_TIMEOUT_S) or _TIMEOUT_S)
        ending.add(answer)
        try:
            return await answer
        finally:
            ending.discard(answer)

    def _ending(self, seconds: float) -> set[asyncio.Future[_Answer]]:
        """Those who wait until the tick after so many seconds."""
        loop = asyncio.get_running_loop()
        tick = math.ceil((loop.time() + seconds) / _TICK_S)
        found = self._ends.get(tick)
        if found is None:
            found = self._ends[tick] = set()
            loop.call_at(tick * _TICK_S, self._over, tick)
        return found

    def _over(self, tick: int) -> None:
        for answer in self._ends.pop(tick):
            if not answer.done():
                answer.set_exception(errors.DeadlineExceeded("The database did not answer in time."))

    async def run(self) -> None:
        """Ask for those who wait, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                # those who are about to ask come along: it costs nothing when there are none
                await asyncio.sleep(0)
                if _SIBLINGS <= len(self._waiting) < self._most:
                    await asyncio.sleep(_DELAY_S)
                if batch := self._batch():
                    await self._answer(batch)

    def _batch(self) -> list[tuple[_One, asyncio.Future[_Answer]]]:
        batch: list[tuple[_One, asyncio.Future[_Answer]]] = []
        while self._waiting and len(batch) < self._most:
            one, answer = self._waiting.popleft()
            if not answer.done():
                batch.append((one, answer))
        return batch

    async def _answer(self, batch: Sequence[tuple[_One, asyncio.Future[_Answer]]]) -> None:
        try:
            answers = await self._put([one for one, _ in batch])
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    # one of its own for each: where an error was raised is written into it
                    answer.set_exception(_same(error))
            return
        for (_, answer), found in zip(batch, answers, strict=True):
            # who is gone by now is told nothing
            if not answer.done():
                answer.set_result(found)


def _same(error: Exception) -> errors.NetraError:
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded):
        return type(error)(error.message)
    _log.error("what several asked could not be answered", exc_info=error)
    return errors.Internal()
