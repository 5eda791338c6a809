"""How much time the caller at hand has left, for whatever is done for it."""

from __future__ import annotations

import time
from contextvars import ContextVar

# kept back from a forwarded deadline, so that the answer of a late callee still reaches the caller
_MARGIN_S = 0.05
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def bind(remaining_s: float | None) -> None:
    """Give the current task the time that its caller has left; what it waits for gets no more."""
    _deadline.set(None if remaining_s is None else time.monotonic() + remaining_s)


def timeout(wanted_s: float | None) -> float | None:
    """The wanted timeout, or what the caller's deadline leaves, less a margin, whichever is shorter."""
    deadline = _deadline.get()
    if deadline is None:
        return wanted_s
    left = max(deadline - time.monotonic() - _MARGIN_S, 0.001)
    return left if wanted_s is None else min(wanted_s, left)
