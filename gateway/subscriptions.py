"""What of a user's events one socket wants: everything, or the union of its subscriptions; pure."""

from __future__ import annotations

from dataclasses import dataclass

from netra import errors

MAX_SUBSCRIPTIONS = 16


@dataclass(frozen=True, slots=True)
class Subscription:
    """Events of one thread, of one run, of some types; what is empty does not restrict."""

    subscription_id: str
    thread_id: str = ""
    run_id: str = ""
    types: frozenset[str] = frozenset()

    def covers(self, run_id: str, thread_id: str, kind: str) -> bool:
        """Whether such an event is meant."""
        return (
            (not self.run_id or self.run_id == run_id)
            and (not self.thread_id or self.thread_id == thread_id)
            and (not self.types or kind in self.types)
        )


class Subscriptions:
    """Those of one socket. The first replaces everything of the user, removing the last restores it."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: tuple[Subscription, ...] = ()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, wanted: Subscription) -> None:
        """One more; one with the same id takes its place. Raises `QuotaExceeded`."""
        others = tuple(one for one in self._all if one.subscription_id != wanted.subscription_id)
        if len(others) >= MAX_SUBSCRIPTIONS:
            message = f"A socket has at most {MAX_SUBSCRIPTIONS} subscriptions. UNSUBSCRIBE one first."
            raise errors.QuotaExceeded(message, limit=MAX_SUBSCRIPTIONS)
        self._all = (*others, wanted)

    def remove(self, subscription_id: str) -> None:
        """One less. Raises `NotFound`."""
        others = tuple(one for one in self._all if one.subscription_id != subscription_id)
        if len(others) == len(self._all):
            raise errors.NotFound("This socket has no such subscription.")
        self._all = others

    def wants(self, run_id: str, thread_id: str, kind: str) -> bool:
        """Whether such an event is to be sent."""
        return not self._all or any(one.covers(run_id, thread_id, kind) for one in self._all)
