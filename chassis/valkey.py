"""How the process connects to Valkey; an importer of redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from chassis import lifecycle

# what a client raises when Valkey is away, or does not answer in time
FAILURES = (RedisError, OSError, TimeoutError)


class Pool(redis.BlockingConnectionPool):
    """Connections that may still be in use when all are closed, as by a call that is being cancelled: they are closed when given back."""

    _closed = False

    async def release(self, connection: Any) -> None:
        """Take one back."""
        await super().release(connection)
        if self._closed:
            await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        """Close all, and what is given back from now on."""
        self._closed = True
        await super().aclose()


def connect(dsn: str, patience_s: float) -> redis.Redis:
    """A client that waits this long for a connection, for a place in its pool and for an answer, and asks once."""
    pool = Pool.from_url(
        dsn, max_connections=16, timeout=patience_s, socket_timeout=patience_s, socket_connect_timeout=patience_s,
        retry=Retry(NoBackoff(), 0),
    )  # fmt: skip
    return redis.Redis(connection_pool=pool)


async def close(client: redis.Redis) -> None:
    """Close all connections. One that takes its leave too slowly is closed all the same, and is no error: redis-py raises it at the end."""
    with contextlib.suppress(*FAILURES), heeded():
        await client.aclose(close_connection_pool=True)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Around what a client is asked, and around any limit of time for it. Raises `CancelledError` in who was told to stop, and only there.

    The client may not pass a cancel on: it writes under `asyncio.wait_for`, which before Python 3.12 loses one that comes as the write
    ends, and a connection that breaks on a cancel may raise an error of its own in place of it. And it may pass on somebody else's: all
    who wait for one connection to close wait for the same future, which is cancelled with the first of them. That is a failure here.
    """
    try:
        yield
    except asyncio.CancelledError:
        _heed()
        raise RedisConnectionError("The connection was given up by somebody else.") from None
    except FAILURES:
        _heed()
        raise
    _heed()


def _heed() -> None:
    if lifecycle.told_to_stop():
        raise asyncio.CancelledError
