"""Leaves tools alone that fail again and again; pure. A user's own failures keep that user away, and never alone all others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from chassis import resilience
from netra import errors

# users and tools that are remembered for failing; the one that failed longest ago is forgotten first
_MOST = 10_000
# how many users must see a tool fail until it is left alone for all
_USERS = 2


@dataclass(slots=True)
class _Pass:
    """A call that was let through: by which breakers, and what it brings back to them."""

    tickets: list[tuple[resilience.Breaker, int, str]] = field(default_factory=list)


class Breakers:
    """One breaker for each tool, and one for each user of a tool that failed lately; for all dispatchers of the process.

    `failures` in a row open that of the user; as many, of at least two users, that of the tool. 0 switches them off. `changed` is told
    the tool, for whom (`all` or `user`), and whether it is open now.
    """

    def __init__(self, failures: int, open_s: float, changed: Callable[[bool, str, str], None] = lambda *_: None) -> None:
        self._failures, self._open_s, self._changed = failures, open_s, changed
        self._tools: dict[str, resilience.Breaker] = {}
        self._users: OrderedDict[tuple[str, str], resilience.Breaker] = OrderedDict()

    def state(self, tool: str, user: str = "") -> resilience.State:
        """How the breaker of a tool is, or the one that a user has with it."""
        found = self._users.get((tool, user)) if user else self._tools.get(tool)
        return "closed" if found is None else found.state

    def enter(self, tool: str, user: str) -> _Pass:
        """Let a call through. Raises `Unavailable`, with the time after which it may be tried again."""
        known = [(breaker, whom) for breaker, whom in ((self._tools.get(tool), "all"), (self._users.get((tool, user)), "user")) if breaker]
        for breaker, _whom in known:
            if (left_s := breaker.refused_for_s()) > 0:
                message = f"{tool} failed {breaker.failed_before} times in a row; it is left alone for {max(left_s, 0.1):.1f} s."
                wait_ms = max(1, round(left_s * 1000))
                raise errors.Unavailable(message, retry_after_ms=wait_ms, tool=tool, breaker="open")
        return _Pass([(breaker, breaker.enter(), whom) for breaker, whom in known])

    def succeeded(self, passed: _Pass, tool: str, user: str) -> None:
        """The tool did its work."""
        for breaker, ticket, whom in passed.tickets:
            if breaker.succeeded(ticket):
                self._changed(False, tool, whom)
        # a clean one need not be remembered
        if (mine := self._users.get((tool, user))) is not None and mine.state == "closed" and not mine.failed_before:
            del self._users[tool, user]

    def failed(self, passed: _Pass, tool: str, user: str) -> None:
        """The tool did not do its work, and that was no fault of who called it."""
        if not self._failures:
            return
        before = {id(breaker): ticket for breaker, ticket, _ in passed.tickets}
        for breaker, whom in ((self._of_tool(tool), "all"), (self._of_user(tool, user), "user")):
            # one that was made meanwhile, by another call that failed: it counts this one as well
            ticket = before.get(id(breaker), breaker.generation)
            was = breaker.state
            if breaker.failed(ticket, user) and was == "closed":
                self._changed(True, tool, whom)

    def left(self, passed: _Pass) -> None:
        """The call ended without a word about the tool."""
        for breaker, ticket, _ in passed.tickets:
            breaker.left(ticket)

    def _of_tool(self, tool: str) -> resilience.Breaker:
        if tool not in self._tools:
            self._tools[tool] = resilience.Breaker(self._failures, self._open_s, sources=_USERS)
        return self._tools[tool]

    def _of_user(self, tool: str, user: str) -> resilience.Breaker:
        key = tool, user
        if key not in self._users:
            self._users[key] = resilience.Breaker(self._failures, self._open_s)
        self._users.move_to_end(key)
        if len(self._users) > _MOST:
            (gone, _user), breaker = self._users.popitem(last=False)
            if breaker.state != "closed":
                self._changed(False, gone, "user")
        return self._users[key]
