"""What tests of the gateway in this process share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.fixtures.users import User


async def until(holds: Callable[[], object]) -> None:
    """Returns when something has come to hold."""
    async with asyncio.timeout(20):
        while True:
            if holds():
                return
            await asyncio.sleep(0.002)


def bearer(user: User) -> dict[str, str]:
    """Headers of a user's requests."""
    return {"Authorization": f"Bearer {user.token}"}
