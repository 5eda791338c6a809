"""Plain lines that tell how far a start has come and how long each step took."""

import sys
import time


class Progress:
    """Writes one line per step to `stream`; a quiet one (tests) writes nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._born = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._born

    def step(self, text: str, since: float | None = None) -> None:
        """A step that is done; `since` is the monotonic time at which it began."""
        took = f"{time.monotonic() - since:6.2f} s" if since is not None else " " * 8
        self.line(f"[{self.elapsed:6.2f}] {took}  {text}")

    def line(self, text: str = "") -> None:
        if not self._quiet:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def complain(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
