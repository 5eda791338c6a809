"""Keeps tools from being called whose code tried what is forbidden; pure."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

from netra import errors
from netra.tool import ToolSpec

_MOST = 10_000


class Quarantine:
    """Counts violations, for all dispatchers of the process.

    Where the code is the tool's own (a plain function in the sandbox), `most` violations within `within_s` seconds take it from everybody;
    where it comes with the call, they take the tool from the user who sent it, and from nobody else. It ends `within_s` after the last
    of them, or with the process. 0 means never.
    """

    def __init__(self, most: int, within_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most, self._within_s, self._now = most, within_s, now
        self._seen: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def require(self, spec: ToolSpec, user: str) -> None:
        """Raises `PermissionDenied` while the tool is in quarantine for this user."""
        if not self._seen:
            return
        times = self._seen.get(_key(spec, user))
        if times is None or len(times) < self._most:
            return
        left_s = times[-1] + self._within_s - self._now()
        if left_s > 0:
            raise errors.PermissionDenied(
                f"The tool {spec.name} is in quarantine for {left_s:.0f} s: what it ran tried what is forbidden {self._most} times.",
                tool=spec.name, quarantine="true", retry_after_ms=round(left_s * 1000),
            )  # fmt: skip

    def violated(self, spec: ToolSpec, user: str) -> bool:
        """Take note of a violation; whether the tool is in quarantine from now on."""
        if not self._most:
            return False
        key, now = _key(spec, user), self._now()
        times = self._seen.setdefault(key, deque(maxlen=self._most))
        self._seen.move_to_end(key)
        while times and times[0] + self._within_s <= now:
            times.popleft()
        times.append(now)
        if len(self._seen) > _MOST:
            self._seen.popitem(last=False)
        return len(times) == self._most


def _key(spec: ToolSpec, user: str) -> tuple[str, str]:
    return spec.name, "" if spec.backend == "sandbox" else user
