"""Rate limits (GCRA): one count for all processes in Valkey, and one in this process while Valkey is away; leases of a few places."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redis.exceptions import NoScriptError

from chassis import log, telemetry, valkey
from netra import errors

_log = log.get(__name__)
_refusals = telemetry.meter.create_counter("netra.limits.refusals", description="Calls refused by a rate limit, by kind.")
_local = telemetry.meter.create_gauge("netra.limits.local", description="1 while rate limits are counted by this process alone.")

# Times are microseconds and whole numbers, here and in `_gcra`. What is stored is when the key will have paid for everything it
# was given; `ARGV[5]` is a debt that the caller knows of from a time that this server may have forgotten.
_SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local interval, burst, need, ask, floor = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local paid_at = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now + floor)
local last = now + interval * burst
local fit = math.floor((last - paid_at) / interval)
if fit < need then
  return {paid_at + need * interval - last, paid_at - now, 0}
end
local given = math.min(ask, fit)
paid_at = math.max(paid_at + given * interval, now)
if paid_at > now then
  redis.call('SET', KEYS[1], string.format('%.0f', paid_at), 'PX', math.ceil((paid_at - now) / 1000))
elseif given < 0 then
  redis.call('DEL', KEYS[1])
end
return {0, paid_at - now, given}
"""
_DIGEST = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()
_MINUTE = 60_000_000
_KEPT = 50_000
_MAX_KEY = 64
# how long this process counts alone before it asks Valkey again
_PAUSE_S = 0.5
# A fast rate is taken in blocks of a tenth of a second's worth, so that not every call costs a round trip; what is left of a
# block lapses.
_BLOCKS_PER_MINUTE, _MAX_BLOCK, _BLOCK_S = 600, 100, 1.0


@dataclass(frozen=True, slots=True)
class _Rate:
    """What is allowed: one unit every `interval` microseconds, and `burst` of them at once."""

    interval: int
    burst: int

    @classmethod
    def of(cls, per_minute: float, burst: int | None) -> _Rate:
        return cls(max(math.ceil(_MINUTE / per_minute), 1), burst if burst is not None else max(math.ceil(per_minute), 1))

    @property
    def block(self) -> int:
        return max(min(_MINUTE // self.interval // _BLOCKS_PER_MINUTE, self.burst // 10, _MAX_BLOCK), 1)


@dataclass(slots=True)
class _Known:
    """What this process knows of a key: when all is paid for (by its own clock), since which outage Valkey knows that too (0: not
    at all), and what is left of a block that was given ahead."""

    paid_at: int
    era: int
    ahead: int = 0
    ahead_until: float = 0.0


def _gcra(paid_at: int, now: int, rate: _Rate, need: int, ask: int) -> tuple[int, int]:
    """The time to wait, 0 when the units are given, and when all is paid for."""
    paid_at = max(paid_at, now)
    last = now + rate.interval * rate.burst
    fit = (last - paid_at) // rate.interval
    if fit < need:
        return paid_at + need * rate.interval - last, paid_at
    return 0, max(paid_at + min(ask, fit) * rate.interval, now)


class Limits:
    """Limits under one key prefix. They hold at every moment: without Valkey each process counts for itself, from what it knew."""

    def __init__(self, dsn: str, service: str, namespace: str = "", *, patience_s: float = 0.25) -> None:
        self._prefix = f"{service}:{namespace}:limit:" if namespace else f"{service}:limit:"
        self._patience_s = patience_s
        self._redis = valkey.connect(dsn, patience_s)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._away = False
        self._era = 1
        self._ask_again_at = 0.0

    @property
    def local(self) -> bool:
        """Whether this process counts alone just now."""
        return self._away

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Count `cost` units of a kind for a key. `burst` of them may come at once; by default a minute's worth.

        Raises `RateLimited`, which says when the same would be given, and counts nothing then; `QuotaExceeded` when none is allowed
        at all, or never so many at once.
        """
        rate, name = _checked(kind, per_minute, burst, cost), self._name(kind, key)
        if (known := self._given_ahead(name, cost)) is not None:
            known.ahead -= cost
        else:
            self._answer(kind, per_minute, await self._count(name, rate, cost, max(cost, rate.block)))

    async def check(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Raise what `take` would raise, and count nothing."""
        rate, name = _checked(kind, per_minute, burst, cost), self._name(kind, key)
        if self._given_ahead(name, cost) is None:
            self._answer(kind, per_minute, await self._count(name, rate, cost, 0))

    async def give_back(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        """Take back what `take` counted: it turned out to be none of the kind that is limited."""
        rate = _checked(kind, per_minute, burst, cost)
        # as many fit as were given: nothing is needed, less than nothing is asked for
        await self._count(self._name(kind, key), rate, -rate.burst, -cost)

    async def close(self) -> None:
        """Close all connections."""
        await valkey.close(self._redis)

    def _name(self, kind: str, key: str) -> str:
        known = key if len(key) <= _MAX_KEY else hashlib.sha256(key.encode()).hexdigest()
        return f"{self._prefix}{kind}:{known}"

    def _given_ahead(self, name: str, cost: int) -> _Known | None:
        known = self._known.get(name)
        return known if known is not None and known.ahead >= cost and known.ahead_until > time.monotonic() else None

    def _answer(self, kind: str, per_minute: float, wait: int) -> None:
        if wait:
            _refusals.add(1, {"kind": kind})
            message = f"Too many {kind.replace('_', ' ')}: {per_minute:g} a minute are allowed."
            raise errors.RateLimited(message, retry_after_ms=math.ceil(wait / 1000), limit=f"{per_minute:g}", kind=kind)

    async def _count(self, name: str, rate: _Rate, need: int, ask: int) -> int:
        if not self._away or time.monotonic() >= self._ask_again_at:
            # while one call tries, the others go on alone
            self._ask_again_at = time.monotonic() + _PAUSE_S
            try:
                with valkey.heeded():
                    return await self._shared(name, rate, need, ask)
            except valkey.FAILURES as error:
                await self._lost(error)
        return self._alone(name, rate, need, min(ask, max(need, 0)) if ask > 0 else ask)

    async def _shared(self, name: str, rate: _Rate, need: int, ask: int) -> int:
        now, before = _now(), self._known.get(name)
        # what was counted before an outage or in it, the server may have lost
        lost = before is not None and (self._away or before.era != self._era)
        floor = max(before.paid_at - now, 0) if before is not None and lost else 0
        arguments = (rate.interval, rate.burst, need, ask, floor)
        async with asyncio.timeout(self._patience_s):
            wait, debt, given = await self._run(name, arguments)
        self._found()
        # answers may come in another order than they were given
        latest = self._known.get(name) if ask >= 0 else None
        known = self._remember(name, max(now + debt, latest.paid_at if latest is not None else 0), self._era)
        if need > 0 and given > need:
            known.ahead, known.ahead_until = known.ahead + given - need, time.monotonic() + _BLOCK_S
        return wait

    async def _run(self, name: str, arguments: tuple[int, ...]) -> tuple[int, int, int]:
        try:
            answer = await self._redis.evalsha(_DIGEST, 1, name, *arguments)
        except NoScriptError:
            answer = await self._redis.eval(_SCRIPT, 1, name, *arguments)
        wait, debt, given = answer
        return int(wait), int(debt), int(given)

    def _alone(self, name: str, rate: _Rate, need: int, ask: int) -> int:
        before = self._known.get(name)
        wait, paid_at = _gcra(before.paid_at if before is not None else 0, _now(), rate, need, ask)
        self._remember(name, paid_at, 0)
        return wait

    def _remember(self, name: str, paid_at: int, era: int) -> _Known:
        known = self._known.setdefault(name, _Known(paid_at, era))
        known.paid_at, known.era = paid_at, era
        self._known.move_to_end(name)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return known

    async def _lost(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            _local.set(1)
            _log.warning("Valkey is not reachable; this process counts its limits alone", error=type(error).__name__)
            # connections that are still open would fail one by one, later
            with contextlib.suppress(*valkey.FAILURES), valkey.heeded():
                await self._redis.connection_pool.disconnect(inuse_connections=False)

    def _found(self) -> None:
        if self._away:
            self._away = False
            self._era += 1
            _local.set(0)
            _log.info("limits are counted for all processes again")


def _checked(kind: str, per_minute: float, burst: int | None, cost: int) -> _Rate:
    words = kind.replace("_", " ")
    if per_minute <= 0:
        raise errors.QuotaExceeded(f"You are allowed no {words}.", kind=kind, limit=0)
    rate = _Rate.of(per_minute, burst)
    if cost > rate.burst:
        raise errors.QuotaExceeded(f"You are allowed at most {rate.burst} {words} at once.", kind=kind, limit=rate.burst)
    return rate


def _now() -> int:
    return time.monotonic_ns() // 1000


# `ARGV[2]` is what the names of earlier holders begin with whose places this one takes. Answers 1 and who lost theirs, 0 when there
# is no place, -1 when a later holder has it.
_LEASE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local holder, group, most, lasts = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local others, replaced = 0, {}
for _, one in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if group ~= '' and one ~= holder and string.sub(one, 1, #group) == group then
    if one > holder then
      return {-1, {}}
    end
    replaced[#replaced + 1] = one
  elseif one ~= holder then
    others = others + 1
  end
end
if others >= most then
  return {0, {}}
end
for _, one in ipairs(replaced) do
  redis.call('ZREM', KEYS[1], one)
end
redis.call('ZADD', KEYS[1], now + lasts, holder)
redis.call('PEXPIRE', KEYS[1], lasts)
return {1, replaced}
"""
# each key with the holder at the same place
_RENEWAL = """
local clock = redis.call('TIME')
local until_ms = clock[1] * 1000 + math.floor(clock[2] / 1000) + tonumber(ARGV[#ARGV])
for at, key in ipairs(KEYS) do
  redis.call('ZADD', key, until_ms, ARGV[at])
  redis.call('PEXPIRE', key, ARGV[#ARGV])
end
return 0
"""
_LEASE_DIGEST = hashlib.sha1(_LEASE.encode(), usedforsecurity=False).hexdigest()
_AT_ONCE = 500
_T = TypeVar("_T")
Held = Sequence[tuple[str, str]]


class Superseded(Exception):
    """A later holder of the same group has the place."""


class Leases:
    """At most so many holders of a key at a time, in all processes together. A lease ends when it is given back, or not renewed."""

    def __init__(self, dsn: str, service: str, namespace: str = "", *, lasts_s: float = 8.0, patience_s: float = 0.25) -> None:
        self._prefix = f"{service}:{namespace}:lease:" if namespace else f"{service}:lease:"
        self._lasts_ms, self._patience_s = math.ceil(lasts_s * 1000), patience_s
        self._redis = valkey.connect(dsn, patience_s)
        self._ask_again_at = 0.0

    async def take(self, key: str, holder: str, most: int, group: str = "") -> list[str] | None:
        """A place among `most` for a holder; None when all are taken. Holders whose names begin with `group` lose theirs to this one,
        and are returned; raises `Superseded` when one of them is later by its name. Raises `Unavailable`: then nobody counts for all.
        """
        arguments = (self._prefix + key, holder, group, most, self._lasts_ms)
        given, replaced = await self._patiently(lambda: self._run(arguments))
        if given < 0:
            raise Superseded
        return [one.decode() for one in replaced] if given else None

    async def renew(self, held: Held) -> None:
        """Keep what is held for as long again; what was forgotten meanwhile is known again. Raises `Unavailable`."""
        for some in _parts(held):
            await self._patiently(functools.partial(self._renew, some))

    async def release(self, held: Held) -> None:
        """Give places back. Raises `Unavailable`: then they are free when they are over."""
        for some in _parts(held):
            await self._patiently(functools.partial(self._release, some))

    async def close(self) -> None:
        """Close all connections."""
        await valkey.close(self._redis)

    async def _patiently(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """One that fails is not followed by others that would, for a while."""
        try:
            if time.monotonic() < self._ask_again_at:
                raise TimeoutError
            with valkey.heeded():
                async with asyncio.timeout(self._patience_s):
                    return await work()
        except valkey.FAILURES as error:
            if time.monotonic() >= self._ask_again_at:
                self._ask_again_at = time.monotonic() + _PAUSE_S
            raise errors.Unavailable(f"Valkey is not reachable just now ({type(error).__name__}).") from None

    async def _run(self, arguments: tuple[str | int, ...]) -> tuple[int, list[bytes]]:
        try:
            answer = await self._redis.evalsha(_LEASE_DIGEST, 1, *arguments)
        except NoScriptError:
            answer = await self._redis.eval(_LEASE, 1, *arguments)
        return int(answer[0]), list(answer[1])

    async def _renew(self, held: Held) -> None:
        # one command for all: a process renews thousands of them every few seconds
        keys, holders = ([self._prefix + key for key, _ in held], [holder for _, holder in held])
        await self._redis.eval(_RENEWAL, len(keys), *keys, *holders, self._lasts_ms)

    async def _release(self, held: Held) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, holder in held:
                pipeline.zrem(self._prefix + key, holder)
            await pipeline.execute()


def _parts(held: Held) -> Iterator[Held]:
    return (held[start : start + _AT_ONCE] for start in range(0, len(held), _AT_ONCE))
