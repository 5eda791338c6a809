"""What the dispatchers of one process share: tools, sandboxes, and what is counted over all of their calls. Nothing of a user's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from chassis import resilience
from netra import errors
from netra.tool import ToolSpec
from services.dispatcher.tools import book, breakers, metrics, quarantine, registry
from services.dispatcher.tools.sandbox import sandboxes

_RETRY_MS = 1000
# a tool's secret, by the names of both. Raises `PermissionDenied` when the operator did not grant it
Secrets = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for calls in this process; times in seconds. See `DispatcherSettings`."""

    dispatchers_per_user: int = 10
    when_full: book.WhenFull = "evict"
    calls: int = 1000
    calls_per_user: int = 200
    waiting: int = 200
    failures: int = 5
    open_s: float = 30.0
    violations: int = 10
    violations_within_s: float = 3600.0


class Means:
    """Shared by all dispatchers of a process."""

    def __init__(self, tools: registry.ToolRegistry, contained: sandboxes.Sandboxes, rules: Rules, secrets: Secrets | None = None) -> None:
        self.tools, self.sandboxes, self.rules = tools, contained, rules
        self.secret: Secrets = secrets or not_granted
        self.book = book.Book(rules.dispatchers_per_user, rules.when_full)
        self.breakers = breakers.Breakers(rules.failures, rules.open_s, metrics.breaker)
        self.quarantine = quarantine.Quarantine(rules.violations, rules.violations_within_s)
        self._running: Counter[str] = Counter()
        self._total = 0
        self._places: dict[str, resilience.Places] = {}

    @property
    def running(self) -> int:
        """Calls that were let in and have not ended."""
        return self._total

    def enter(self, user: str) -> None:
        """Let a call of a user in. Raises what `require_room` does."""
        self.require_room(user)
        self._total += 1
        self._running[user] += 1
        metrics.runs(1)

    def require_room(self, user: str) -> None:
        """Raises `ResourceExhausted` with the time after which to come back, when there are too many calls just now."""
        if self._total >= self.rules.calls:
            _refuse("process", f"This process has {self.rules.calls} tool calls at hand, which is all it takes.", self.rules.calls)
        if self._running.get(user, 0) >= self.rules.calls_per_user:
            most = self.rules.calls_per_user
            _refuse("user", f"You have {most} tool calls at hand, which is all that one user may have.", most)

    def leave(self, user: str) -> None:
        """That call has ended."""
        self._total -= 1
        self._running[user] -= 1
        if not self._running[user]:
            del self._running[user]
        metrics.runs(-1)

    async def take(self, spec: ToolSpec, user: str) -> resilience.Places | None:
        """A place for a call of a tool that bears only so many; who has it gives it back. Raises `ResourceExhausted`."""
        if not spec.concurrency:
            return None
        places = self._places.get(spec.name)
        if places is None or places.most != spec.concurrency:
            # another version of the tool bears another number; those of the one before end by themselves
            places = self._places[spec.name] = resilience.Places(spec.concurrency, self.rules.waiting)
        if places.taken_at_once(user):
            return places
        metrics.waits(1, spec.name)
        try:
            await places.take(user)
        except resilience.Full:
            metrics.refused("tool")
            message = f"{spec.name} has {places.waiting} calls that wait for it, which is all it takes."
            raise exhausted(message, "waiting", places.waiting) from None
        finally:
            metrics.waits(-1, spec.name)
        return places


def _refuse(whose: str, message: str, most: int) -> None:
    metrics.refused(whose)
    raise exhausted(message, "tool_calls", most)


def exhausted(message: str, limit: str, most: int) -> errors.ResourceExhausted:
    """A refusal for want of room: when to come back is in it, for events as well."""
    error = errors.ResourceExhausted(f"{message} Try again in {_RETRY_MS / 1000:g} s.", retry_after_ms=_RETRY_MS, limit=limit, most=most)
    error.details["retry_after_ms"] = str(_RETRY_MS)
    return error


def not_granted(tool: str, name: str) -> str:
    """No secret is granted. Raises `PermissionDenied`."""
    raise errors.PermissionDenied(f"The secret {name} was not granted to the tool {tool} by the operator.", tool=tool, secret=name)
