"""Questions that several have at the same time are asked once, for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, TypeVar

from netra import errors

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


class _Batch:
    """Those who wait for one answer."""

    __slots__ = ("answer", "answered", "asked", "failure", "waiting")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.waiting = 0
        self.answered = False
        self.answer: Any = None
        self.failure: errors.NetraError | None = None


class Together:
    """Asks one thing at a time. Whoever asks is answered by what was asked after that, by them or by another who waits as well."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._next: dict[Hashable, _Batch] = {}

    async def ask(self, question: Hashable, asked: _Asked, put: Callable[[Sequence[_Asked]], Awaitable[_Answer]]) -> _Answer:
        """The answer to a question of what several asked; `put` is that of one of them. An outage is the answer of all, too."""
        batch = self._next.setdefault(question, _Batch())
        batch.asked.append(asked)
        batch.waiting += 1
        try:
            async with self._turn:
                if not batch.answered:
                    # those who were woken with this one are about to ask
                    await asyncio.sleep(0)
                    # what is asked from now on may be about what this answer does not know
                    self._leave(question, batch)
                    await self._put(batch, put)
        finally:
            batch.waiting -= 1
            if not batch.waiting:
                self._leave(question, batch)
        if batch.failure is not None:
            raise errors.Unavailable(batch.failure.message) from batch.failure
        answer: _Answer = batch.answer
        return answer

    async def _put(self, batch: _Batch, put: Callable[[Sequence[Any]], Awaitable[Any]]) -> None:
        # of whoever is cancelled meanwhile the next one takes the place
        try:
            batch.answer = await put(batch.asked)
        except (errors.Unavailable, errors.DeadlineExceeded) as failure:
            batch.failure = failure
        batch.answered = True

    def _leave(self, question: Hashable, batch: _Batch) -> None:
        if self._next.get(question) is batch:
            del self._next[question]
