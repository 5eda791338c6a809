"""The record of access through the gateway: read it, verify it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from netra.api import Api

_AUTH = "netra.auth.v1.AuthService"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many entries fit, the first position that does not (0: all fit), the last that does and its hash."""

    verified: int
    broken_at: int
    position: int
    head: bytes


async def entries(api: Api, most: int, filters: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of the caller's tenant, newest first. Raises `PermissionDenied` without `audit:read`."""
    found: list[dict[str, Any]] = (await api.rpc(f"{_AUTH}/QueryAudit", {**filters, "page_size": most}))["entries"]
    return found


async def verify(api: Api, after: tuple[int, bytes], told: Callable[[Verdict], None]) -> Verdict:
    """Verify the record after a place in it, (0, b"") for all of it, part by part; `told` hears of each part but the last.

    Raises `PermissionDenied` without `audit:export`, `InvalidPayload` when `after` cannot be a place.
    """
    (position, head), verified = after, 0
    while True:
        wanted = {"after_position": position, "after_hash": base64.b64encode(head).decode()}
        part = await api.rpc(f"{_AUTH}/VerifyAudit", wanted)
        position, head = int(part["position"]), base64.b64decode(part["head"])
        verified += int(part["verified"])
        found = Verdict(verified, int(part["broken_at"]), position, head)
        if found.broken_at or part["complete"]:
            return found
        told(found)
