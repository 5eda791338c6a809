"""Replay from the store, then live, without a hole or a double in between; each user by that user's own token."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import jwt

from chassis import identity, lifecycle
from chassis import log as log_
from netra import errors
from netra.auth.v1 import auth_pb2
from netra.events.v1 import events_pb2
from services.events import fanout, feed, log

_log = log_.get(__name__)
_PERMISSION = "events:read"
_MAX_INBOX = 1024
_LOOK_AGAIN_S = 0.1
# streams are looked at every second, so something comes every two
_SILENCE_S = 1.0
# by user: who asks, and what the asker calls that
_Joining: TypeAlias = dict[str, tuple[identity.Principal, str]]


class Record(Protocol):
    """What is known of one user's runs."""

    async def end_of(self, user_id: str, run_id: str) -> int:
        """The cursor of the run's terminal event, 0 while it has none. Raises `NotFound`."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes out in one message: positions, then events, then what is not recorded. Without any it says that the stream is alive."""

    positions: Sequence[events_pb2.TailPosition]
    events: Sequence[log.Recorded]
    degraded: bool = False
    shown: Sequence[log.Transient] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """What a subscriber is told next: that the record begins later now, when it does, the events from there, what is not recorded."""

    events: Sequence[log.Recorded]
    truncated_to: int = 0
    shown: Sequence[log.Transient] = ()


class Tail:
    """The open streams of this replica."""

    def __init__(
        self, live: fanout.Fanout, record: Record, pages: feed.Pages, verifier: identity.Verifier, tasks: lifecycle.Tasks,
        unknown_run_s: float,
    ) -> None:  # fmt: skip
        self._live, self._record, self._pages, self._verifier, self._tasks = live, record, pages, verifier, tasks
        self._unknown_run_s = unknown_run_s
        self._calls: set[_Call] = set()
        self._closed = False

    def close(self) -> None:
        """End all streams; what they did not send lies in the record."""
        self._closed = True
        for call in self._calls:
            call.stream.end()

    def revoked(self, revocation: auth_pb2.Revocation) -> None:
        """Send nothing more on the word of this session, or of this user."""
        for call in tuple(self._calls):
            call.stream.revoke(revocation.session_id, revocation.user_id)

    @contextlib.contextmanager
    def _call(self) -> Iterator[_Call]:
        call = _Call(feed.Stream(self._live, self._pages, self._tasks), self._live, self._verifier)
        self._calls.add(call)
        if self._closed:
            call.stream.end()
        try:
            yield call
        finally:
            self._calls.discard(call)
            call.stream.close()

    async def follow(self, requests: AsyncIterator[events_pb2.TailRequest]) -> AsyncIterator[Batch]:
        """Many users live, each from the position that answers its join."""
        with self._call() as call:
            workers = [self._tasks.spawn(call.receive(requests), "tail-receive"), self._tasks.spawn(call.admit(), "tail-admit")]
            try:
                async for batch in self._batches(call.stream):
                    if batch is not None:
                        yield batch
                    elif call.idle:
                        return
            finally:
                for worker in workers:
                    worker.cancel()

    async def _batches(self, stream: feed.Stream) -> AsyncIterator[Batch | None]:
        """What there is to say, if only how things are after a while of silence; None in between."""
        told, told_at = None, 0.0
        async for events in stream.batches():
            said, shown, degraded, now = stream.take_said(), stream.take_shown(), self._live.degraded, time.monotonic()
            if said or events or shown or degraded is not told or now - told_at >= _SILENCE_S:
                told, told_at = degraded, now
                yield Batch(said, events, degraded, shown)
            else:
                yield None

    async def subscribe(self, principal: identity.Principal, after: int, run_id: str) -> AsyncIterator[Part]:
        """One user's events after a cursor, all or of one run up to its end. Raises `NotFound`, `FailedPrecondition`."""
        if run_id and 0 < await self._end_of(principal.user_id, run_id) <= after:
            return
        with self._call() as call:
            topic, position = (await self._live.join([principal.user_id]))[principal.user_id]
            # followed first: then it is let go of, whatever happens
            call.stream.follow(topic, after, behind=True, run_id=run_id).grant(principal)
            if self._verifier.trust.revoked(principal):  # while it was joined
                raise errors.Unauthenticated("The session has ended. Sign in again.")
            _check_range(after, position)
            async for events in call.stream.batches():
                part = Part(events, call.stream.take_truncated(), call.stream.take_shown())
                if part.truncated_to or events or part.shown:
                    yield part
                if run_id and await self._over(principal.user_id, run_id, part):
                    return
                for said in call.stream.take_said():
                    raise errors.Unauthenticated(said.reason)

    async def _over(self, user_id: str, run_id: str, part: Part) -> bool:
        """Whether nothing of the run can come after this: its end was in it, or is not in the record any more."""
        if part.events and part.events[-1].ends:
            return True
        if not part.truncated_to:
            return False
        try:
            return 0 < await self._record.end_of(user_id, run_id) < part.truncated_to
        except errors.NotFound:
            return True

    async def _end_of(self, user_id: str, run_id: str) -> int:
        # a run is accepted before it is opened here: whoever asks in between is made to wait a little
        give_up_at = time.monotonic() + self._unknown_run_s
        while True:
            try:
                return await self._record.end_of(user_id, run_id)
            except errors.NotFound:
                if time.monotonic() >= give_up_at or self._closed:
                    raise
                await asyncio.sleep(_LOOK_AGAIN_S)


def _check_range(after: int, position: log.Position) -> None:
    if after > position.last:
        message = f"The record ends at cursor {position.last}; nothing can be after {after}."
        raise errors.FailedPrecondition(message, last=position.last)
    if 0 < after < position.oldest - 1:
        message = f"The record begins at cursor {position.oldest}; what was between {after} and it is gone."
        raise errors.FailedPrecondition(message, oldest=position.oldest)


class _Call:
    """One Tail call: who joins, who leaves, what is said about it."""

    def __init__(self, stream: feed.Stream, live: fanout.Fanout, verifier: identity.Verifier) -> None:
        self.stream = stream
        self._live, self._verifier = live, verifier
        self._inbox: deque[events_pb2.TailRequest] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._no_more = self._busy = False

    @property
    def idle(self) -> bool:
        """Whether nothing can ever come: nobody is followed, nobody can join."""
        return self._no_more and not self._busy and not self._inbox and not self.stream.followers

    async def receive(self, requests: AsyncIterator[events_pb2.TailRequest]) -> None:
        """Take requests in, a bounded number."""
        try:
            async for request in requests:
                await self._room.wait()
                if not isinstance(request, events_pb2.TailRequest):
                    raise errors.InvalidPayload("The request is not a valid protobuf message of this method.")
                self._inbox.append(request)
                if len(self._inbox) >= _MAX_INBOX:
                    self._room.clear()
                self._arrived.set()
        except errors.NetraError as error:
            self.stream.fail(error)
        except Exception as error:
            _log.info("a tail broke", error=type(error).__name__)
            self.stream.fail(errors.Unavailable())
        finally:
            self._no_more = True
            self.stream.wake()

    async def admit(self) -> None:
        """Do what was asked, everything that waits at once."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._busy = True
            taken, self._inbox = self._inbox, deque()
            self._room.set()
            joining: _Joining = {}
            for request in taken:
                if request.WhichOneof("action") == "leave":
                    await self._join(joining)
                    joining = {}
                    self.stream.leave(request.leave.user_id)
                elif request.HasField("join") and (principal := await self._verified(request.join)) is not None:
                    joining = await self._noted(joining, principal, request.join.join_id)
            await self._join(joining)
            self._busy = False
            self.stream.wake()

    async def _noted(self, joining: _Joining, principal: identity.Principal, join_id: str) -> _Joining:
        if principal.user_id in joining:  # two sessions of one user: the second renews what the first began
            await self._join(joining)
            joining = {}
        return {**joining, principal.user_id: (principal, join_id)}

    async def _verified(self, join: events_pb2.JoinUser) -> identity.Principal | None:
        try:
            principal = await self._verifier.principal(join.access_token)
            identity.require(self._verifier.trust, principal, _PERMISSION)
        except errors.NetraError as refused:
            user_id = _claimed_user(join.access_token)
            joined = user_id in self.stream.followers
            self.stream.say(events_pb2.TailPosition(user_id=user_id, joined=joined, reason=refused.message, join_id=join.join_id))
            return None
        return principal

    async def _join(self, joining: _Joining) -> None:
        new = [user for user in joining if user not in self.stream.followers]
        try:
            joined = await self._live.join(new) if new else {}
        except (errors.Unavailable, errors.DeadlineExceeded) as error:
            # said is only what is true of a token; whoever gets no answer asks again
            _log.info("users cannot be joined just now", users=len(new), code=error.code)
            joined = {}
        for user, (topic, position) in joined.items():
            self.stream.follow(topic, max(topic.last, position.last))
            self._say_joined(*joining[user], position.oldest)
        for user in joining.keys() - set(new):
            self._say_joined(*joining[user], 0)

    def _say_joined(self, principal: identity.Principal, join_id: str, oldest: int) -> None:
        follower = self.stream.followers.get(principal.user_id)
        if follower is None:  # its last token ended in between
            self.stream.dismiss(principal.user_id, "The token has expired.", join_id)
            return
        if self._verifier.trust.revoked(principal):
            if not follower.grants:
                self.stream.dismiss(principal.user_id, "The session has ended.", join_id)
            return
        follower.grant(principal)
        follower.oldest = oldest or follower.oldest
        self.stream.say(
            events_pb2.TailPosition(
                user_id=principal.user_id,
                cursor=follower.sent_to,
                oldest=follower.oldest,
                epoch=self._live.generation,
                joined=True,
                join_id=join_id,
            )
        )


def _claimed_user(token: str) -> str:
    # not believed, only echoed: the asker must know which join was refused
    try:
        return str(jwt.decode(token, options={"verify_signature": False}).get("sub", ""))[:64]
    except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError):
        return ""
