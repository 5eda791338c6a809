"""Namespaced, expiring values on Valkey, each of one user; what is written is never read stale once the writer was answered."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from opentelemetry import metrics
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from chassis import log, valkey
from netra import errors

_log = log.get(__name__)
_reads = metrics.get_meter("netra").create_counter("netra.cache.reads", description="Values asked for, by kind and what was found.")
_USER = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_KIND = re.compile(r"[a-z][a-z_]{0,39}")
_PLAIN = re.compile(r"[0-9A-Za-z_.@-]{1,100}")
MAX_TTL_S = 24 * 3600.0
MAX_BYTES = 256 * 1024
# longer than any transaction lasts, with a process that was stopped in the middle of it: then the server ends it after 15 s
FENCE_S = 30.0
# after a failure reads leave Valkey alone for so long
_PAUSE_S = 0.5

# A value is a hash of what it was valid under and its bytes. It is valid under: this run of the server (one that comes back may know
# what was forgotten since), and the generations of its user and its kind, which another one replaces when all are forgotten. Without
# a generation nothing is valid, so one that was evicted brings nothing back. A fence is a sorted set of who writes, until when.
_BEGIN = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function fenced(fence) return redis.call('ZCOUNT', fence, now, '+inf') > 0 end
local function known(user, kind)
  local found = redis.call('MGET', user, kind)
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  return run .. ':' .. (found[1] or '') .. ':' .. (found[2] or ''), found
end
"""
# KEYS of one value: value, generation of the user, of the kind, fence, lease. ARGV: who wants the lease (or nobody), for how long.
# Whoever has it gets it again: an answer that was lost is asked for once more.
_READ = """
if fenced(KEYS[4]) then return {'fenced', ''} end
local under, found = known(KEYS[2], KEYS[3])
local held = redis.call('HMGET', KEYS[1], 'under', 'value')
if found[1] and found[2] and held[1] == under then return {'hit', held[2]} end
if ARGV[1] == '' then return {'miss', under} end
if redis.call('SET', KEYS[5], ARGV[1], 'NX', 'PX', ARGV[2]) or redis.call('GET', KEYS[5]) == ARGV[1] then return {'yours', under} end
return {'miss', under}
"""
# ARGV: holder of the lease and what it saw (or nothing), ttl, ttl of generations, a new generation, the value
_FILL = """
if fenced(KEYS[4]) then return 0 end
local under, found = known(KEYS[2], KEYS[3])
if ARGV[1] ~= '' and (redis.call('GET', KEYS[5]) ~= ARGV[1] or under ~= ARGV[2]) then return 0 end
for at = 1, 2 do redis.call('SET', KEYS[1 + at], found[at] or ARGV[5], 'PX', ARGV[4]) end
redis.call('DEL', KEYS[1], KEYS[5])
redis.call('HSET', KEYS[1], 'under', (known(KEYS[2], KEYS[3])), 'value', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
# ARGV: ttl, ttl of generations
_EXTEND = """
local under, found = known(KEYS[2], KEYS[3])
if fenced(KEYS[4]) or not (found[1] and found[2]) or redis.call('HGET', KEYS[1], 'under') ~= under then return 0 end
for at = 1, 2 do redis.call('PEXPIRE', KEYS[1 + at], ARGV[2]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
# KEYS of each value: value, fence, lease. ARGV: who writes, how long at most (0: no more)
_WRITE = """
for at = 1, #KEYS, 3 do
  redis.call('DEL', KEYS[at], KEYS[at + 2])
  redis.call('ZREMRANGEBYSCORE', KEYS[at + 1], '-inf', now)
  if ARGV[2] == '0' then
    redis.call('ZREM', KEYS[at + 1], ARGV[1])
  else
    redis.call('ZADD', KEYS[at + 1], now + ARGV[2], ARGV[1])
    redis.call('PEXPIRE', KEYS[at + 1], ARGV[2])
  end
end
return 0
"""
_RENEW = "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 0"
_COUNT = """
local n = redis.call('INCRBY', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return n
"""
Load = Callable[[], Awaitable[bytes | None]]


class Cache:
    """Values under one key prefix, reached user by user: there is no call that takes a key, so nobody reads another user's."""

    def __init__(self, dsn: str, service: str, namespace: str = "", *, patience_s: float = 0.25) -> None:
        self._prefix = f"{service}:{namespace}:" if namespace else f"{service}:"
        self._patience_s = patience_s
        self._ask_again_at = 0.0
        self._redis = valkey.connect(dsn, patience_s)

    def of(self, user_id: str) -> UserCache:
        """The values of one user. Raises `ValueError` for what is no user id."""
        if not _USER.fullmatch(user_id):
            raise ValueError("no user id")
        # of one user, however it is written
        return UserCache(self, self._prefix, user_id.lower())

    async def close(self) -> None:
        """Close all connections."""
        await valkey.close(self._redis)

    @property
    def resting(self) -> bool:
        """Whether Valkey failed a moment ago: reads do without it."""
        return asyncio.get_running_loop().time() < self._ask_again_at

    async def run(self, script: str, keys: list[str], *arguments: str | int | bytes) -> Any:
        """What a script of this module answers. Raises `Unavailable`."""
        text = script if script is _RELEASE else _BEGIN + script
        try:
            with valkey.heeded():
                async with asyncio.timeout(self._patience_s):
                    try:
                        return await self._answer(text, keys, arguments)
                    except (RedisConnectionError, OSError):
                        # of a server that was restarted every open connection is dead; to do all but this one twice does no harm
                        if script is _COUNT:
                            raise
                        await self._redis.connection_pool.disconnect(inuse_connections=False)
                        return await self._answer(text, keys, arguments)
        except valkey.FAILURES as error:
            if not self.resting:
                _log.warning("Valkey is not reachable; values are read from where they come from", error=type(error).__name__)
            self._ask_again_at = asyncio.get_running_loop().time() + _PAUSE_S
            raise errors.Unavailable(f"Valkey is not reachable just now ({type(error).__name__}).") from None

    async def _answer(self, text: str, keys: list[str], arguments: tuple[str | int | bytes, ...]) -> Any:
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        try:
            return await self._redis.evalsha(digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return await self._redis.eval(text, len(keys), *keys, *arguments)


class UserCache:
    """The values of one user, by kind and id. They may vanish at any moment; none outlives its time to live."""

    def __init__(self, cache: Cache, prefix: str, user_id: str) -> None:
        self._cache = cache
        self._prefix, self._user_id = prefix, user_id

    async def get(self, kind: str, id_: str) -> bytes | None:
        """A value, when it is there and Valkey answers."""
        if self._cache.resting:
            return _counted(kind, "away")
        try:
            found, value = await self._cache.run(_READ, self._keys(kind, id_), "", 0)
        except errors.Unavailable:
            return _counted(kind, "away")
        return _counted(kind, found.decode(), value if found == b"hit" else None)

    async def put(self, kind: str, id_: str, value: bytes, ttl_s: float) -> bool:
        """Keep a value that comes from nowhere else; whether it is kept (not while somebody writes what is behind it)."""
        return await self._fill(self._keys(kind, id_), value, ttl_s, "", "")

    async def extend(self, kind: str, id_: str, ttl_s: float) -> bool:
        """Keep a value for so long from now; whether it is there."""
        try:
            return bool(await self._cache.run(_EXTEND, self._keys(kind, id_), _ms(ttl_s), _ms(MAX_TTL_S)))
        except errors.Unavailable:
            return False

    async def forget(self, kind: str, id_: str) -> None:
        """Have a value no more. Raises `Unavailable`: then it may still be there."""
        keys = self._keys(kind, id_)
        await self._cache.run(_WRITE, [keys[0], keys[3], keys[4]], "", "0")

    async def forget_all(self, kind: str | None = None) -> None:
        """Have no value of a kind any more, or none at all; one command, however many there are. Raises `Unavailable`."""
        key = self._generation(_checked(kind)) if kind is not None else self._generation()
        await self._cache.run(_RENEW, [key], secrets.token_hex(8), _ms(MAX_TTL_S))

    async def count(self, kind: str, id_: str, by: int, ttl_s: float) -> int:
        """Add to a counter that begins at 0 and ends so long after its first use; returns what it says then. Raises `Unavailable`."""
        key = f"{self._prefix}cache-count:{self._user_id}:{_checked(kind)}:{_safe(id_)}"
        return int(await self._cache.run(_COUNT, [key], by, _ms(ttl_s)))

    async def read(self, kind: str, id_: str, load: Load, ttl_s: float, *, wait_s: float = 1.0, lease_s: float = 3.0) -> bytes | None:
        """A value, or else what `load` reads from where it comes from, kept for so long. Of those who miss it at the same time one
        loads, and the others wait for it, `wait_s` at most. Without Valkey each loads.

        Raises what `load` raises. `None` is not kept.
        """
        keys, holder = self._keys(kind, id_), secrets.token_hex(8)
        until = asyncio.get_running_loop().time() + wait_s
        while not self._cache.resting:
            try:
                answer, value = await self._cache.run(_READ, keys, holder, _ms(lease_s))
            except errors.Unavailable:
                break
            found = answer.decode()
            if found == "hit":
                return _counted(kind, found, value)
            if found == "yours":
                return _counted(kind, found, await self._loaded(keys, load, ttl_s, holder, value.decode()))
            if found == "fenced" or asyncio.get_running_loop().time() >= until:
                return _counted(kind, found, await load())
            await asyncio.sleep(random.uniform(0.01, 0.02))  # noqa: S311 - no secret
        return _counted(kind, "away", await load())

    async def _loaded(self, keys: list[str], load: Load, ttl_s: float, holder: str, seen: str) -> bytes | None:
        """Load and fill, if nobody wrote or forgot meanwhile: what a slow reader read may be what a writer has replaced."""
        filled = False
        try:
            value = await load()
            filled = value is not None and await self._fill(keys, value, ttl_s, holder, seen)
        finally:
            if not filled and not self._cache.resting:
                with contextlib.suppress(errors.Unavailable):
                    await self._cache.run(_RELEASE, [keys[4]], holder)
        return value

    async def _fill(self, keys: list[str], value: bytes, ttl_s: float, holder: str, seen: str) -> bool:
        if len(value) > MAX_BYTES:
            return False
        # a time to live must not be longer than that of what makes values invalid
        ttl_ms = min(_ms(ttl_s), _ms(MAX_TTL_S))
        arguments = (holder, seen, ttl_ms, _ms(MAX_TTL_S) + 60_000, secrets.token_hex(8), value)
        try:
            return bool(await self._cache.run(_FILL, keys, *arguments))
        except errors.Unavailable:
            return False

    @contextlib.asynccontextmanager
    async def writing(self, *values: tuple[str, str]) -> AsyncIterator[None]:
        """Around the transaction that changes what is behind values, of (kind, id) each: they are gone before it begins, and nobody
        keeps them anew before it is over. A reader who asks after this has ended never gets what was before.

        Raises `Unavailable` before the transaction when Valkey cannot be told; after it, when that cannot be said to be over:
        then it is written, and the same request again answers so once Valkey is back.
        """
        writer, keys = secrets.token_hex(8), list[str]()
        for kind, id_ in values:
            value, _, _, fence, lease = self._keys(kind, id_)
            keys += [value, fence, lease]
        await self._cache.run(_WRITE, keys, writer, _ms(FENCE_S))
        try:
            yield
        except (errors.Unavailable, errors.DeadlineExceeded):
            # nobody knows what becomes of it: values stay away until the fence runs out
            raise
        except Exception:
            with contextlib.suppress(errors.Unavailable):
                await self._cache.run(_WRITE, keys, writer, "0")
            raise
        await self._cache.run(_WRITE, keys, writer, "0")

    def _keys(self, kind: str, id_: str) -> list[str]:
        """Of a value: the value, the generations of its user and its kind, the fence, the lease."""
        name = f"{self._user_id}:{_checked(kind)}:{_safe(id_)}"
        value, fence, lease = (f"{self._prefix}cache{part}:{name}" for part in ("", "-fence", "-lease"))
        return [value, self._generation(), self._generation(kind), fence, lease]

    def _generation(self, kind: str = "") -> str:
        return f"{self._prefix}cache-generation:{self._user_id}:{kind}"


def _counted(kind: str, found: str, value: bytes | None = None) -> bytes | None:
    _reads.add(1, {"kind": kind, "found": "miss" if found == "yours" else found})
    return value


def _checked(kind: str) -> str:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"no kind of value: {kind!r}")
    return kind


def _safe(id_: str) -> str:
    """The id as a part of a key; two ids never give the same."""
    return id_ if _PLAIN.fullmatch(id_) else f"={hashlib.sha256(id_.encode()).hexdigest()}"


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)
