"""The append streams to the replicas of events: appends of all runs of this process, resent when a stream breaks or falls silent."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from chassis import lifecycle, log, replicas, telemetry
from netra import errors
from netra.events.v1 import events_pb2
from services.dispatcher import upstreams

_log = log.get(__name__)
_RESEND_S = 0.2
_LOOK_S = 0.25
_MAX_BYTES = 2 * 1024 * 1024
# what waits to be sent goes together, up to so much: a message costs the same whatever is in it
_TOGETHER, _TOGETHER_BYTES = 64, 256 * 1024
# an append that one replica cannot commit so often is tried at the next
_REFUSALS = 3
_MOST_SHOWN = 256
_waiting = telemetry.meter.create_gauge("netra.bridge.waiting", description="Appends that the record has not acknowledged.")
_unanswered = telemetry.meter.create_gauge("netra.bridge.unanswered_s", unit="s", description="Age of the oldest of them.")


@dataclass(frozen=True, slots=True)
class Health:
    """How it stands with the record: how many appends and bytes it has not acknowledged, and for how long."""

    reachable: bool
    waiting: int
    waiting_bytes: int
    unanswered_s: float


@dataclass(eq=False, slots=True)
class _Pending:
    """An append on its way. `sent_at` is when it was last given to a stream; `token` is what its context token, or that of the run
    that it opens, is by then.
    """

    request: events_pb2.AppendRequest
    user_id: str
    committed: asyncio.Future[None]
    since: float
    token: Callable[[], str] | None = None
    sent_at: float = 0.0
    refusals: int = 0

    def as_sent(self) -> events_pb2.AppendRequest:
        """The request as it goes out now: while it waited, its context token may have run out."""
        if self.token is not None:
            (self.request.open if self.request.HasField("open") else self.request).context_token = self.token()
        return self.request


class Appender:
    """Sends appends and tells when they are committed. Those of one user go to one replica, for as long as that answers.

    Resending is harmless, also to another replica: events acknowledges what it has, and of each run one append is on its way.
    """

    def __init__(self, records: upstreams.Records, silence_s: float = replicas.SILENCE_S) -> None:
        self._records, self._silence_s = records, silence_s
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._streams: dict[str, _Stream] = {}
        self._tasks = lifecycle.Tasks()
        # a stream is opened by whichever run comes first, and is not that run's: neither its deadline nor its name may stick to it
        self._nobodys = contextvars.copy_context()

    def append(self, request: events_pb2.AppendRequest, user_id: str, token: Callable[[], str] | None = None) -> asyncio.Future[None]:
        """Done when the append is committed; fails with the error it was refused with. `token` is asked each time it is sent."""
        request.append_id, request.takes_more = next(self._numbers), True
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if request.ByteSize() > _MAX_BYTES:
            # the stream would break on it, for every run, each time it is sent again
            committed.set_exception(errors.TooLarge(f"An append holds at most {_MAX_BYTES} bytes."))
            return committed
        self._pending[request.append_id] = pending = _Pending(request, user_id, committed, time.monotonic(), token)
        self._send(pending)
        return committed

    def show(self, request: events_pb2.AppendRequest, user_id: str) -> None:
        """Send what is not recorded, if there is somebody to send it to just now."""
        request.append_id = next(self._numbers)
        self._stream(self._records.replicas.first(user_id)).show(request)

    @property
    def reachable(self) -> bool:
        """Whether the record takes appends, as far as is known."""
        return self._records.replicas.reachable

    def health(self) -> Health:
        """How it stands with the record."""
        size = sum(pending.request.ByteSize() for pending in self._pending.values())
        return Health(self.reachable, len(self._pending), size, round(self._oldest_s(), 3))

    def _oldest_s(self) -> float:
        # in the order they came in
        oldest = next(iter(self._pending.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.since

    async def watch(self, tell: Callable[[bool], Awaitable[None]]) -> None:
        """Tell whether the record is reachable, now and whenever that changes, for ever."""
        told: bool | None = None
        while True:
            if told != (now := self.reachable):
                told = now
                await tell(now)
            await asyncio.sleep(_LOOK_S)

    async def run(self) -> None:
        """Look after the streams, for ever; they end with it."""
        try:
            while True:
                now = time.monotonic()
                for target in self._streams.keys() - set(self._records.replicas.targets):
                    self._leave(target)
                for stream in tuple(self._streams.values()):
                    self._look_after(stream, now)
                _waiting.set(len(self._pending))
                _unanswered.set(self._oldest_s())
                await asyncio.sleep(min(_LOOK_S, self._silence_s / 4))
        finally:
            await self._tasks.close()

    def _leave(self, target: str) -> None:
        """What is on its way to a replica that is none any more goes to others."""
        stream = self._streams.pop(target)
        for pending in stream.end():
            self._send(pending)

    def _look_after(self, stream: _Stream, now: float) -> None:
        late = [pending for pending in stream.pending.values() if now - pending.sent_at > self._silence_s]
        if late and now - stream.heard_at > self._silence_s:
            stream.give_up()
            return
        for pending in late:
            # the replica lives, yet not for this one: somebody holds what it needs there
            del stream.pending[pending.request.append_id]
            pending.refusals += _REFUSALS
            self._send(pending)

    def _send(self, pending: _Pending) -> None:
        if pending.request.append_id not in self._pending:
            return
        ranked = self._records.replicas.ranked(pending.user_id)
        self._stream(ranked[pending.refusals // _REFUSALS % len(ranked)]).send(pending)

    def _stream(self, target: str) -> _Stream:
        if target not in self._streams:
            self._streams[target] = stream = _Stream(target, self._records, self)
            stream.task = self._nobodys.run(self._tasks.spawn, stream.run(), name=f"append stream to {target}")
        return self._streams[target]

    def broken(self, target: str, pending: list[_Pending]) -> None:
        """A stream has ended with these unanswered: the next replica gets them."""
        self._records.replicas.away(target)
        for one in pending:
            self._send(one)

    def answered(self, target: str, pending: _Pending, answer: events_pb2.AppendResponse) -> None:
        """An append has its answer."""
        self._records.replicas.heard(target)
        if answer.error_code == errors.Unavailable.code:
            pending.refusals += 1
            asyncio.get_running_loop().call_later(_RESEND_S, self._send, pending)
            return
        del self._pending[answer.append_id]
        if pending.committed.done():
            return
        if answer.error_code:
            pending.committed.set_exception(errors.by_code(answer.error_code)(answer.error_message))
        else:
            pending.committed.set_result(None)


class _Stream:
    """The append stream to one replica, open while there is something to say and for as long as the replica keeps it."""

    def __init__(self, target: str, records: upstreams.Records, owner: Appender) -> None:
        self._target, self._records, self._owner = target, records, owner
        self.pending: dict[int, _Pending] = {}
        self.heard_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self._outbox: _Outbox | None = None
        self._wanted = asyncio.Event()
        self._call: grpc.aio.StreamStreamCall[events_pb2.AppendRequest, events_pb2.AppendResponse] | None = None

    def send(self, pending: _Pending) -> None:
        """Send an append; it is in `pending` until it is answered."""
        pending.sent_at = time.monotonic()
        self.pending[pending.request.append_id] = pending
        self._wanted.set()
        if self._outbox is not None:
            self._outbox.put(pending.as_sent())

    def show(self, request: events_pb2.AppendRequest) -> None:
        """Send what needs no answer, unless too much waits."""
        if self._outbox is not None and len(self._outbox) < _MOST_SHOWN:
            self._outbox.put(request)

    def give_up(self) -> None:
        """End the stream: nothing comes any more."""
        if self._call is not None:
            self._call.cancel()

    def end(self) -> list[_Pending]:
        """Close the stream for good; returns what it had not answered."""
        unanswered, self.pending = list(self.pending.values()), {}
        if self.task is not None:
            self.task.cancel()
        return unanswered

    async def run(self) -> None:
        """Keep the stream open, for ever."""
        while True:
            if not self.pending:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                reason = await self._converse()
            except (grpc.aio.AioRpcError, errors.NetraError) as error:
                reason = type(error).__name__
            unanswered, self.pending = list(self.pending.values()), {}
            _log.warning("an append stream ended; resending", target=self._target, pending=len(unanswered), reason=reason)
            self._owner.broken(self._target, unanswered)
            await asyncio.sleep(_RESEND_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    async def _converse(self) -> str:
        self._outbox = outbox = _Outbox()
        # nothing here may keep one that is answered: a run hangs on it
        for request in [pending.as_sent() for pending in self.pending.values()]:
            outbox.put(request)
        self._call = call = self._records.of(self._target).Append(outbox.messages())
        self.heard_at = time.monotonic()
        try:
            async for answers in call:
                self.heard_at, outbox.together = time.monotonic(), answers.takes_more
                for answer in answers.more or (answers,):
                    self._answered(answer)
            return "ended by the replica"
        except asyncio.CancelledError:
            if lifecycle.told_to_stop():
                raise
            return "nothing came"
        finally:
            self._outbox = self._call = None
            call.cancel()
            # grpc waits for the next request for as long as there may be one
            outbox.close()

    def _answered(self, answer: events_pb2.AppendResponse) -> None:
        if (asked := self.pending.pop(answer.append_id, None)) is not None:
            self._owner.answered(self._target, asked, answer)


class _Outbox:
    """What waits to be sent on one stream, in order; `together` when the replica takes several in one message."""

    def __init__(self) -> None:
        self.together = False
        self._waiting: deque[events_pb2.AppendRequest] = deque()
        self._some = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: events_pb2.AppendRequest) -> None:
        """Send it after all that came before."""
        self._waiting.append(request)
        self._some.set()

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        self._some.set()

    async def messages(self) -> AsyncIterator[events_pb2.AppendRequest]:
        """What goes over the wire, until it is closed."""
        while True:
            await self._some.wait()
            if self._closed:
                return
            yield self._message()

    def _message(self) -> events_pb2.AppendRequest:
        batch = [self._waiting.popleft()]
        size = batch[0].ByteSize()
        while self.together and self._waiting and len(batch) < _TOGETHER:
            if (size := size + self._waiting[0].ByteSize()) > _TOGETHER_BYTES:
                break
            batch.append(self._waiting.popleft())
        if not self._waiting:
            self._some.clear()
        return batch[0] if len(batch) == 1 else events_pb2.AppendRequest(more=batch, takes_more=True)
