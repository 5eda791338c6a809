"""The calls of users that are under way: those of a session that ends are cut off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from chassis import identity, trust
from netra import errors

# no user's session ends it
_OF_NO_USER = contextlib.nullcontext()


class Calls:
    """What is under way in this process, and for whom."""

    def __init__(self, trusted: trust.Trust) -> None:
        self._trust = trusted
        self._open: dict[asyncio.Task[Any], identity.Principal] = {}
        self._cut: set[asyncio.Task[Any]] = set()
        trusted.on_revocation(lambda _: self._cut_off())

    def under_way(self, principal: identity.Principal | None) -> AbstractContextManager[None]:
        """Around one call. Raises `Unauthenticated` in it when the session ends, unless it is this very call that ends it."""
        task = asyncio.current_task()
        return _OF_NO_USER if principal is None or task is None else self._cut_with(principal, task)

    @contextlib.contextmanager
    def _cut_with(self, principal: identity.Principal, task: asyncio.Task[Any]) -> Iterator[None]:
        self._open[task] = principal
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            raise _ended() from None
        finally:
            del self._open[task]
            self._cut.discard(task)

    def check(self, principal: identity.Principal | None) -> None:
        """Raise `Unauthenticated` when the session has ended."""
        if principal is not None and self._trust.revoked(principal):
            raise _ended()

    def _cut_off(self) -> None:
        for task, principal in tuple(self._open.items()):
            if task is not asyncio.current_task() and task not in self._cut and self._trust.revoked(principal):
                self._cut.add(task)
                task.cancel()


def _ended() -> errors.Unauthenticated:
    return errors.Unauthenticated("The session has ended. Sign in again.")
