"""A channel to several replicas of a service: each call goes to the next in turn, and to another one when that one is away."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from chassis import channel, replicas

# how long a replica may take to be connected to, before the next is asked
_CONNECT_S = 1.0


class Spread(channel.Chosen):
    """Calls of one request and one answer go round; one that a replica did not take is made at the next, in the time that it has.

    What a replica may have begun before it went is made again only where that changes nothing. A stream goes to the one that is next, and
    ends with it.
    """

    def __init__(self, known: replicas.Replicas, make: Callable[[str], grpc.aio.Channel], name: str) -> None:
        """`make` connects to one replica of the service `name`; somebody has to look up names of replicas: `replicas.follow`."""
        super().__init__(lambda: self.of(known.in_turn()[0]))
        service = descriptor_pool.Default().FindServiceByName(f"netra.{name}.v1.{name.capitalize()}Service")
        self._again = {f"/{service.full_name}/{method.name}" for method in service.methods if channel.repeatable(method)}
        self.replicas = known
        self._made: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()
        self._each = replicas.Each(known, lambda target: self._kept(make(target)))

    def _kept(self, made: grpc.aio.Channel) -> grpc.aio.Channel:
        self._made.add(made)
        return made

    def of(self, target: str) -> grpc.aio.Channel:
        """The channel to one replica."""
        return self._each.of(target)

    async def close(self, grace: float | None = None) -> None:
        """Close the channels to all of them."""
        await asyncio.gather(*(one.close(grace) for one in self._made))

    def unary_unary(self, *given: Any, **more: Any) -> Any:
        """A method of one request and one answer; `given` begins with its path."""
        return _Unary(self, given, more)

    async def ask(self, method: _Unary, request: Any, more: dict[str, Any]) -> Any:
        """What the first replica answers that answers. Raises what the last one said when none does."""
        ends = None if (timeout := more.get("timeout")) is None else time.monotonic() + timeout
        left, put_off = deque(self.replicas.in_turn()), set[str]()
        while True:
            target = left.popleft()
            if left and target not in put_off and not self.replicas.tried(target):
                put_off.add(target)
                left.append(target)
                continue
            if left and not await self._reached(target, method):
                continue
            if ends is not None:
                more = {**more, "timeout": max(ends - time.monotonic(), 0.001)}
            try:
                answer = await method.on(self.of(target))(request, **more)
            except grpc.aio.AioRpcError as error:
                if not self._goes_on(target, error) or not left or method.path not in self._again:
                    raise
            else:
                self.replicas.heard(target)
                return answer

    async def _reached(self, target: str, method: _Unary) -> bool:
        """Whether a replica can be asked. What may not be asked twice is asked only where there is a connection."""
        to = self.of(target)
        state = to.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            self.replicas.away(target)
            return False
        if state is grpc.ChannelConnectivity.READY or method.path in self._again:
            return True
        try:
            async with asyncio.timeout(_CONNECT_S):
                await to.channel_ready()
        except TimeoutError:
            self.replicas.away(target)
            return False
        return True

    def _goes_on(self, target: str, error: grpc.aio.AioRpcError) -> bool:
        """Whether to ask the next one; takes note of how this one is."""
        away = error.code() is grpc.StatusCode.UNAVAILABLE
        # one that says so itself is there: something behind it is not, or it stops
        if (away or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED) and not error.trailing_metadata():
            self.replicas.away(target)
        else:
            self.replicas.heard(target)
        return away


class _Unary:
    """One method of a `Spread`."""

    def __init__(self, spread: Spread, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        self.path: str = given[0]
        self._spread, self._given, self._more = spread, given, more
        # a channel keeps every method it was ever asked for
        self._known: weakref.WeakKeyDictionary[grpc.aio.Channel, Any] = weakref.WeakKeyDictionary()

    def on(self, to: grpc.aio.Channel) -> Any:
        """The method as a channel makes it."""
        if to not in self._known:
            self._known[to] = to.unary_unary(*self._given, **self._more)
        return self._known[to]

    def __call__(self, request: Any, **more: Any) -> Any:
        return self._spread.ask(self, request, more)
