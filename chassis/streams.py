"""Append, read and trim Redis Streams, publish and subscribe; an importer of redis."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import redis.asyncio as redis

from chassis import log, valkey
from netra import errors

_log = log.get(__name__)
Entry = tuple[str, str, dict[bytes, bytes]]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        with valkey.heeded():
            yield
    except valkey.FAILURES as error:
        raise errors.Unavailable(f"Valkey is not reachable just now ({type(error).__name__}).") from None


class Streams:
    """Streams and channels under one key prefix. What is in them may vanish at any moment."""

    def __init__(self, dsn: str, service: str, namespace: str = "") -> None:
        self._prefix = f"{service}:{namespace}:" if namespace else f"{service}:"
        # reads block, so they have connections of their own
        pool = valkey.Pool.from_url(
            dsn, max_connections=32, timeout=5, socket_timeout=10, socket_connect_timeout=2, health_check_interval=15
        )
        self._redis = redis.Redis(connection_pool=pool)

    async def append(self, entries: Sequence[tuple[str, Mapping[bytes | str, bytes | str | int]]], *, keep: int = 10_000) -> None:
        """Append entries to streams, in order, in one round trip; each stream keeps about `keep`. Raises `Unavailable`."""
        with _translated():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for stream, fields in entries:
                    pipeline.xadd(self._prefix + stream, dict(fields), maxlen=keep, approximate=True)  # type: ignore[arg-type]
                await pipeline.execute()

    async def ends(self, streams: Sequence[str]) -> dict[str, str]:
        """The id of the last entry of each stream; `0-0` for an empty one. Raises `Unavailable`."""
        with _translated():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for stream in streams:
                    pipeline.xrevrange(self._prefix + stream, count=1)
                found: Any = await pipeline.execute()
        return {stream: entries[0][0].decode() if entries else "0-0" for stream, entries in zip(streams, found, strict=True)}

    async def read(self, positions: Mapping[str, str], *, block_ms: int, count: int = 1000) -> list[Entry]:
        """Entries after the positions, waiting up to `block_ms` for the first. Raises `Unavailable`."""
        keys = {self._prefix + stream: position for stream, position in positions.items()}
        with _translated():
            found = await self._redis.xread(keys, count=count, block=block_ms)  # type: ignore[arg-type]
        pairs: Any = found.items() if isinstance(found, dict) else found or ()
        return [
            (key.decode()[len(self._prefix) :], identifier.decode(), fields)
            for key, entries in pairs
            for identifier, fields in _flat(entries)
        ]

    async def trim(self, streams: Sequence[str], *, older_than_s: int) -> None:
        """Drop entries that are older, by Valkey's own clock. Raises `Unavailable`."""
        with _translated():
            now_s: int = (await self._redis.time())[0]
            async with self._redis.pipeline(transaction=False) as pipeline:
                for stream in streams:
                    pipeline.xtrim(self._prefix + stream, minid=(now_s - older_than_s) * 1000, approximate=False)
                await pipeline.execute()

    async def generation(self) -> str:
        """A value that changes when Valkey has lost its data. Raises `Unavailable`."""
        key = self._prefix + "generation"
        with _translated():
            await self._redis.set(key, secrets.token_hex(8), nx=True)
            value: Any = await self._redis.get(key)
            return value.decode() if value else ""

    async def publish(self, channel: str, message: str) -> None:
        """Tell whoever listens just now. Raises `Unavailable`."""
        with _translated():
            await self._redis.publish(self._prefix + channel, message)

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Messages of a channel, for ever, through outages; what is said during one is lost."""
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    with valkey.heeded():
                        await pubsub.subscribe(self._prefix + channel)
                    while True:
                        with valkey.heeded():
                            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5.0)
                        if message is not None:
                            yield message["data"].decode()
            except valkey.FAILURES as error:
                _log.warning("Valkey is not reachable; listening again soon", error=type(error).__name__)
                await asyncio.sleep(0.5)

    async def close(self) -> None:
        """Close all connections."""
        await valkey.close(self._redis)


def _flat(entries: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    # RESP3 wraps the entries of a stream in one more list than RESP2
    if entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], tuple | list):
        return [entry for group in entries for entry in group]
    return list(entries)
