"""The execution contexts of calls that belong to no thread: one for those of a session, and in it a frame of its own for each call."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson

from chassis import identity, log, telemetry
from netra import context, errors, ids
from netra.context.v1 import context_pb2
from services.dispatcher import upstreams

_log = log.get(__name__)
_CALLS = orjson.dumps(context.CALLS)
# seconds in which calls begin in the same one: what withdraws a session ends it at once, what erases its thread does not wait for its token
_LASTS_S = 300.0
_MOST = 10_000
_Whose = tuple[object, ...]


class Contexts(Protocol):
    """Where contexts are kept."""

    async def open(self, request: context_pb2.OpenContextRequest) -> upstreams.Opened:
        """Open a context."""
        ...

    async def rest(self, opened: upstreams.Opened) -> None:
        """Say that nothing is to wait for a context."""
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    opened: upstreams.Opened
    until: float


class CallContexts:
    """Those of this process. None is ever two sessions', nor that of a session with other rights than its caller's by now."""

    def __init__(self, contexts: Contexts, clock: Callable[[], float] = time.monotonic) -> None:
        self._contexts, self._clock = contexts, clock
        self._kept: OrderedDict[_Whose, _Kept] = OrderedDict()

    async def of(self, user: identity.Principal, request_id: str) -> upstreams.Opened:
        """The frame of a call that the user makes now, and the token of the context that it is in.

        Raises what opening it raises: `Unauthenticated` when the session was withdrawn meanwhile, `Unavailable`.
        """
        whose = (user.user_id, user.tenant_id, user.session_id, user.roles, user.tier, user.scope, user.actor)
        kept = self._kept.get(whose)
        if kept is None or kept.until <= self._clock():
            # several that come at once open one each: all of them are good, and the last one is kept
            kept = self._kept[whose] = _Kept(await self._opened(user), self._clock() + _LASTS_S)
            self._kept.move_to_end(whose)
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        frame = kept.opened.context.of_call(ids.RunId.new(), request_id, telemetry.correlation_id() or ids.CorrelationId.new())
        return dataclasses.replace(kept.opened, context=frame, stored=frame.to_proto().SerializeToString(deterministic=True))

    async def _opened(self, user: identity.Principal) -> upstreams.Opened:
        opened = await self._contexts.open(
            context_pb2.OpenContextRequest(
                request_id=f"calls:{ids.uuid7()}",
                access_token=user.token,
                run_id=ids.RunId.new(),
                correlation_id=telemetry.correlation_id(),
                agent_context=_CALLS,
            )
        )
        try:
            # it outlives its calls, each of which has a row that an erasure waits for
            await self._contexts.rest(opened)
        except errors.NetraError as error:
            _log.warning("a context of calls holds up erasures until its token ends", code=error.code)
        return opened

    def forget(self, user_id: ids.UserId) -> None:
        """Let the user's next call begin in another one: what is kept of them is erased."""
        for whose in [whose for whose in self._kept if whose[0] == user_id]:
            del self._kept[whose]
