"""What one socket asks for beyond runs: a choice of its user's events, and streaming RPCs, no faster than the client reads."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from chassis import identity, status, telemetry
from gateway import delivery, entitlements, frames, router, subscriptions
from netra import errors, ids

TYPES = frozenset({"SUBSCRIBE", "UNSUBSCRIBE", "STREAM", "STREAM_CANCEL"})
MAX_STREAMS = 8
MAX_KINDS = 32
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")

Start = Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(frozen=True, slots=True)
class Method:
    """A server-streaming RPC that may be called from outside."""

    permission: str
    read: Callable[[dict[str, Any]], Message]
    call: Callable[[identity.Principal, Message], Any]
    show: Callable[[Message], dict[str, Any]]


class Streams:
    """Those there are, by their names."""

    def __init__(self, known: Mapping[str, Method] | None = None) -> None:
        self._known = known or {}

    def named(self, name: object) -> Method:
        """One of them. Raises `InvalidPayload` or `NotFound`."""
        if not isinstance(name, str) or not name:
            raise frames.wrong("payload.method", "is required and must be a string")
        found = self._known.get(name)
        if found is None:
            raise errors.NotFound(f"There is no such stream here. There are {', '.join(sorted(self._known))}.")
        return found


@dataclass(slots=True)
class _Open:
    """A stream that is open."""

    stream_id: str
    method: Method
    call: Any
    owed: delivery.Delivery
    until: float
    correlation_id: str
    task: asyncio.Task[None] | None = None

    def end(self, error: errors.NetraError | None) -> None:
        """Say that nothing more comes, and why."""
        told: dict[str, Any] = {"code": "OK", "message": ""} if error is None else frames.described(error, self.correlation_id)
        self.owed.stream(self.stream_id, frames.dump({"type": "stream_end", "stream_id": self.stream_id, **told}))


class Bridge:
    """SUBSCRIBE, UNSUBSCRIBE, STREAM and STREAM_CANCEL of one socket; whatever is open ends with it."""

    def __init__(self, streams: Streams, entitled: entitlements.Entitlements, start: Start) -> None:
        self._streams, self._entitled, self._start = streams, entitled, start
        self._open: dict[str, _Open] = {}
        self._closed: errors.NetraError | None = None

    def answer(self, who: identity.Principal, frame: frames.Frame, owed: delivery.Delivery) -> dict[str, Any]:
        """The `data` of the ack. Raises `NetraError`."""
        if frame.type == "SUBSCRIBE":
            return self._subscribe(frame, owed)
        if frame.type == "UNSUBSCRIBE":
            subscription_id = _required_id(frame, "subscription_id")
            owed.filter.remove(subscription_id)
            return {"subscription_id": subscription_id}
        return self._stream(who, frame, owed) if frame.type == "STREAM" else self._cancel(frame)

    def close(self, error: errors.NetraError) -> None:
        """End what is open, and open nothing more."""
        self._closed = error
        for stream in tuple(self._open.values()):
            self._stop(stream, error)

    def _subscribe(self, frame: frames.Frame, owed: delivery.Delivery) -> dict[str, Any]:
        wanted = subscriptions.Subscription(
            subscription_id=ids.uuid7(),
            thread_id=router.thread_of(frame.fields, frame.thread_id),
            run_id=frames.optional_id(frame.fields.get("run_id"), "payload.run_id"),
            types=_kinds(frame.fields.get("types")),
        )
        owed.filter.add(wanted)
        return {"subscription_id": wanted.subscription_id}

    def _stream(self, who: identity.Principal, frame: frames.Frame, owed: delivery.Delivery) -> dict[str, Any]:
        if self._closed is not None:
            raise self._closed
        name = frame.fields.get("method")
        method = self._streams.named(name)
        # the service decides; who may not call it is told before anything else is looked at
        self._entitled.require(str(name), method.permission, who)
        if len(self._open) >= MAX_STREAMS:
            raise errors.QuotaExceeded(f"A socket has at most {MAX_STREAMS} streams. STREAM_CANCEL one first.", limit=MAX_STREAMS)
        fields = frame.fields.get("request", {})
        if not isinstance(fields, dict):
            raise frames.wrong("payload.request", "must be an object")
        call = method.call(who, method.read(fields))
        stream = _Open(ids.uuid7(), method, call, owed, who.expires_at, telemetry.correlation_id())
        self._open[stream.stream_id] = stream
        stream.task = self._start(f"stream {stream.stream_id}", self._read(stream))
        # also when it is ended before it begins
        stream.task.add_done_callback(lambda _: call.cancel())
        return {"stream_id": stream.stream_id}

    def _cancel(self, frame: frames.Frame) -> dict[str, Any]:
        stream = self._open.get(_required_id(frame, "stream_id"))
        if stream is None:
            raise errors.NotFound("This socket has no such stream open.")
        self._stop(stream, errors.Cancelled("You cancelled this stream."))
        return {}

    def _stop(self, stream: _Open, error: errors.NetraError) -> None:
        del self._open[stream.stream_id]
        if stream.task is not None:
            stream.task.cancel()
        stream.end(error)

    async def _read(self, stream: _Open) -> None:
        error: errors.NetraError | None = None
        try:
            await self._pass_on(stream)
        except TimeoutError:
            error = errors.Unauthenticated("The token that this stream was opened with has ended. Open it again.")
        except Exception as problem:
            error = status.as_netra(problem)
        finally:
            known = self._open.pop(stream.stream_id, None)
        if known is not None:
            stream.end(error)

    async def _pass_on(self, stream: _Open) -> None:
        """One message at a time: while the client does not read, nothing is read of the call, and HTTP/2 holds it up."""
        seq = 0
        async with asyncio.timeout(max(stream.until - time.time(), 0)):
            async for message in stream.call:
                seq += 1
                frame = {"type": "stream_data", "stream_id": stream.stream_id, "seq": seq, "data": stream.method.show(message)}
                stream.owed.stream(stream.stream_id, frames.dump(frame))
                if not await stream.owed.room(stream.stream_id):
                    return


def _required_id(frame: frames.Frame, name: str) -> str:
    found = frames.optional_id(frame.fields.get(name), f"payload.{name}")
    if not found:
        raise frames.wrong(f"payload.{name}", "is required")
    return found


def _kinds(value: object) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or len(value) > MAX_KINDS or not all(isinstance(kind, str) and _KIND.fullmatch(kind) for kind in value):
        raise frames.wrong("payload.types", f"must be a list of at most {MAX_KINDS} types of events")
    return frozenset(value)
