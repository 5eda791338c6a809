"""Replicas of one service: which one a key belongs to, which are away just now, and a stub for each."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from chassis import log
from netra import errors

_log = log.get(__name__)
_TARGET = re.compile(r"[^\s,:/]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_NAME = re.compile(r"dns:(?P<name>[^\s,:/]+):(?P<port>\d{1,5})")
_FIRST_S, _LONGEST_S, _RESOLVE_S = 1.0, 8.0, 5.0
# so long may one that was asked say nothing before the next is asked
SILENCE_S = 5.0
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)
Stub = TypeVar("Stub")
_T = TypeVar("_T")
# by target: how many may ask one at a time
Rooms = Mapping[str, contextlib.AbstractAsyncContextManager[object]]


@dataclass(slots=True)
class _Away:
    until: float
    for_s: float


class Replicas:
    """Where the replicas of a service listen: `host:port`, several with commas between, or `dns:name:port` for all addresses of a name.

    Rendezvous hashing: a key has the same order of replicas in every process, and one that goes takes only its own keys with it.
    """

    def __init__(self, targets: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ValueError` naming a target that is none."""
        given = [target.strip() for target in targets.split(",") if target.strip()]
        wrong = [target for target in given if not (_TARGET.fullmatch(target) or _NAME.fullmatch(target))]
        if wrong or not given:
            raise ValueError(f"{', '.join(wrong) or 'nothing'} is no target: give host:port, several with commas, or dns:name:port")
        self._names = [(found["name"], int(found["port"])) for target in given if (found := _NAME.fullmatch(target))]
        self._fixed = [target for target in given if not _NAME.fullmatch(target)]
        # until a name is resolved, grpc resolves it
        self.targets = tuple(dict.fromkeys([*self._fixed, *(f"{name}:{port}" for name, port in self._names)]))
        self._clock = clock
        self._away: dict[str, _Away] = {}
        self._turns = itertools.count()

    def ranked(self, key: str) -> list[str]:
        """All targets, those that are away last, each in the order they have for this key."""
        now = self._clock()
        order = sorted(self.targets, key=lambda target: hashlib.blake2b(f"{key}|{target}".encode(), digest_size=8).digest())
        return sorted(order, key=lambda target: self._is_away(target, now))

    def in_turn(self) -> list[str]:
        """All targets, those that are away last; each time the next one is first."""
        now, first = self._clock(), next(self._turns) % len(self.targets)
        return sorted((*self.targets[first:], *self.targets[:first]), key=lambda target: self._is_away(target, now))

    def first(self, key: str) -> str:
        """The target to ask about this key."""
        return self.ranked(key)[0]

    def away(self, target: str) -> None:
        """It did not answer: for a second it comes last, for longer each time until it is heard of."""
        before = self._away.get(target)
        for_s = _FIRST_S if before is None else min(before.for_s * 2, _LONGEST_S)
        self._away[target] = _Away(self._clock() + for_s, for_s)

    def tried(self, target: str) -> bool:
        """Whether to ask it now. One that is away is left alone; one that was is asked by one caller, until it is known how it is."""
        found = self._away.get(target)
        if found is None:
            return True
        if self._is_away(target, self._clock()):
            return False
        found.until = self._clock() + SILENCE_S
        return True

    def heard(self, target: str) -> None:
        """It answered."""
        self._away.pop(target, None)

    @property
    def reachable(self) -> bool:
        """Whether there is one that is not away."""
        now = self._clock()
        return any(not self._is_away(target, now) for target in self.targets)

    def _is_away(self, target: str, now: float) -> bool:
        found = self._away.get(target)
        return found is not None and now < found.until

    async def follow(self) -> None:
        """Look names up again and again, for ever; returns at once when there are none. Without an answer the last one holds."""
        while self._names:
            await self._resolve()
            await asyncio.sleep(_RESOLVE_S)

    async def _resolve(self) -> None:
        found = list(self._fixed)
        for name, port in self._names:
            try:
                addresses = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
            except OSError as error:
                _log.warning("a name could not be resolved; going on with what it was", name=name, error=str(error))
                return
            found += sorted(_shown(str(address[4][0]), port) for address in addresses)
        self.targets = tuple(dict.fromkeys(found))
        for gone in self._away.keys() - set(self.targets):
            del self._away[gone]


class Each(Generic[Stub]):
    """A stub per replica, made when it is first needed and kept for as long as there is the replica."""

    def __init__(self, replicas: Replicas, make: Callable[[str], Stub]) -> None:
        self.replicas, self._make = replicas, make
        self._stubs: dict[str, Stub] = {}
        self._known = replicas.targets

    def of(self, target: str) -> Stub:
        """The stub of one replica."""
        if self._known is not self.replicas.targets:
            # a call that still goes on keeps its connection until it ends
            self._known = self.replicas.targets
            self._stubs = {known: stub for known, stub in self._stubs.items() if known in self._known}
        if target not in self._stubs:
            self._stubs[target] = self._make(target)
        return self._stubs[target]

    async def ask(self, key: str, call: Callable[[Stub], Awaitable[_T]], rooms: Rooms | None = None) -> _T:
        """What the first replica says that says something, in the order of the key. For calls that may come twice.

        Each is asked in its room, when there are `rooms`. Raises what `call` raises; `Unavailable` or `DeadlineExceeded` only when
        every replica is away.
        """
        left, put_off = deque(self.replicas.ranked(key)), set[str]()
        while left:
            target = left.popleft()
            async with rooms[target] if rooms is not None else contextlib.nullcontext():
                if target not in put_off and not self.replicas.tried(target):
                    # those that are away come last, also when that was found out while there was no room
                    put_off.add(target)
                    left.append(target)
                    continue
                try:
                    answer = await call(self.of(target))
                except _AWAY:
                    self.replicas.away(target)
                    if not left:
                        raise
                except errors.NetraError:
                    self.replicas.heard(target)
                    raise
                else:
                    self.replicas.heard(target)
                    return answer
        raise errors.Unavailable


def _shown(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
