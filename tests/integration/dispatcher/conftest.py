"""What integration tests of the dispatcher share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fixtures import queued
from tests.fixtures.stack import Standalone


@pytest.fixture
async def queue(stores: Standalone, database: str) -> AsyncIterator[queued.Queue]:
    """A queue with nothing in it."""
    async with queued.opened(stores, database) as found:
        yield found
