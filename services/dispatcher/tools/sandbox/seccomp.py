"""libseccomp, as the package pyseccomp has it; where the library is not installed, that is said when a filter is made, and not before."""

from __future__ import annotations

import errno
from typing import Any

try:
    import pyseccomp  # type: ignore[import-untyped]
except (ImportError, OSError, RuntimeError):  # it looks for the library when it is imported
    pyseccomp = None


def __getattr__(name: str) -> Any:
    """What pyseccomp has of that name. Raises `OSError` where there is no libseccomp."""
    if pyseccomp is None:
        raise OSError(errno.ENOENT, "libseccomp is not installed")
    return getattr(pyseccomp, name)
