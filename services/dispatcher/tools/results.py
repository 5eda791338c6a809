"""Results as they are told: whole, or by reference with a preview when they are large."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from netra import errors
from netra.tool import Artifact

INLINE_BYTES = 256 * 1024
MAX_BYTES = 64 * 1024 * 1024
PREVIEW_BYTES = 2048
MEDIA_TYPE = "application/json"
Keep = Callable[[str, str, bytes], Awaitable[Artifact]]


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool or an agent returned, and the artifact with its JSON when that is too large to be told whole."""

    value: Any
    artifact: Artifact | None = None
    preview: str = ""

    def told(self) -> dict[str, Any]:
        """Its fields in an event or a step."""
        if self.artifact is None:
            return {"result": self.value}
        return {"result_ref": reference(self.artifact), "preview": self.preview}


async def recorded(value: object, whose: str, name: str, keep: Keep, failure: type[errors.NetraError]) -> Result:
    """The result, kept as an artifact of this name when it is large.

    Raises `failure` when it is not JSON or larger than anything may be, and what `keep` raises.
    """
    try:
        text = orjson.dumps(value)
    except TypeError as error:
        raise failure(f"The result of {whose} cannot be written as JSON: {error}") from None
    if len(text) > MAX_BYTES:
        raise failure(f"{whose} returned {len(text)} bytes; a result may have at most {MAX_BYTES}.", limit=MAX_BYTES)
    if len(text) <= INLINE_BYTES:
        return Result(value)
    return Result(value, await keep(name, MEDIA_TYPE, text), preview_of(text))


def reference(kept: Artifact) -> dict[str, Any]:
    """An artifact as events and steps name it."""
    return {"artifact_id": kept.artifact_id, "bytes": kept.size, "sha256": kept.sha256, "media_type": kept.media_type}


def preview_of(text: bytes) -> str:
    """How a text in UTF-8 begins."""
    # a character that the cut goes through is left out
    return text[:PREVIEW_BYTES].decode(errors="ignore")
