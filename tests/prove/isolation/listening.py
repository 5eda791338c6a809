"""Listens to what goes on by itself: until it has ended, has said what is wanted, or could have been heard by its owner meanwhile."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine
from typing import Any

# returns when whoever may hear it has heard something that was said after it was called
Held = Callable[[], Coroutine[Any, Any, object]]


class Heard(enum.Enum):
    """What the next part is: it says nothing yet, there may be more, what was wanted has come, or it is over."""

    NOTHING, MORE, ENOUGH, ENDED = range(4)


async def listen(read: Callable[[], Coroutine[Any, Any, Heard]], first_s: float, then_s: float, held: Held | None = None) -> bool:
    """`read` takes the next part. Silence of `first_s` at first, and of `then_s` after that, is a silence.

    A stream that should say nothing looks as one that has nothing to say yet: with `held` it is listened to after that, too, until
    something has been said that its owner has heard. Returns whether there was only silence. Raises what `read` raises.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()

    def reading() -> asyncio.Task[Heard]:
        # never cancelled before the end: a stream that is not read on is broken off by some
        task = loop.create_task(read())
        tasks.add(task)
        return task

    try:
        part, patience_s, silent = reading(), first_s, True
        while (await asyncio.wait({part}, timeout=patience_s))[0]:
            said, silent = part.result(), False
            if said is Heard.ENDED:
                return False
            part, patience_s = reading(), patience_s if said is Heard.NOTHING else then_s
            if said is Heard.ENOUGH:
                break
        if held is not None:
            holding = loop.create_task(held())
            tasks.add(holding)
            while not holding.done():
                await asyncio.wait({part, holding}, return_when=asyncio.FIRST_COMPLETED)
                if part.done():
                    silent = False
                    if part.result() is Heard.ENDED:
                        return False
                    part = reading()
        return silent
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
