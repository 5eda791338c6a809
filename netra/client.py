"""The Python client: start a run, follow its events, resume from a cursor by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websockets
from websockets.asyncio import client as socket_
from websockets.typing import Subprotocol

from netra import errors, ids, incoming, threads
from netra.api import TERMINAL, Api, Token, direct, error_of, error_of_response
from netra.files import Progress

__all__ = ["TERMINAL", "Api", "Client", "connect"]

_MAX_FRAME = 8 * 1024 * 1024
_MAX_SENT = 64 * 1024
_MAX_DEPTH = 32
# keys that the gateway refuses anywhere
_RESERVED = frozenset({"__proto__", "constructor", "prototype"})
_FINAL: dict[int, type[errors.NetraError]] = {
    4501: errors.Unauthenticated,
    4503: errors.PermissionDenied,
    4504: errors.FailedPrecondition,
    4509: errors.Unauthenticated,
    4529: errors.QuotaExceeded,
    4530: errors.RateLimited,
}
# what was sent cannot be read: sent again it would end the next connection, too
_UNREADABLE: dict[int, type[errors.NetraError]] = {
    1002: errors.InvalidPayload,
    1003: errors.InvalidPayload,
    1007: errors.InvalidPayload,
    1009: errors.TooLarge,
}


@dataclass(slots=True)
class _Request:
    """A frame that waits for its one answer; sent again, under the same id, after a reconnection."""

    text: str
    answer: asyncio.Future[dict[str, Any]]
    opens: incoming.Stream | None = None


class Client:
    """One user at one gateway: a socket that reconnects and resumes by itself, and the HTTP resources."""

    def __init__(self, api: Api, patience_s: float) -> None:
        self.api = api
        self.user_id = ""
        self.epoch = ""
        self.cursor: int | None = None
        self.patience_s = patience_s
        self._max_sent = _MAX_SENT
        self._alive_at = time.monotonic()
        self._client_id = ids.uuid7()
        self._socket: socket_.ClientConnection | None = None
        self._pending: dict[str, _Request] = {}
        self._followers: list[incoming.Run] = []
        self._streams: dict[str, incoming.Stream] = {}
        # the hole that is asked for on this socket: once, however many events come from behind it
        self._hole = ""
        self._changed = asyncio.Condition()
        self._failure: errors.NetraError | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def run(
        self, agent: str = "", *, user_request: str, inputs: Mapping[str, Any] | None = None, thread_id: str = "", **options: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Start a run and yield its events until the terminal one, through every reconnection. Leaving early does not stop it.

        Who reads slowly gets from the record what there was no room for here. Raises `FailedPrecondition` when events of the run are
        kept no longer, or the record was restored from a backup.
        """
        follower = incoming.Run(ids.uuid7(), self.cursor or 0)
        self._followers.append(follower)
        try:
            accepted = await self._start(follower.request_id, agent, user_request, inputs, thread_id, options)
            follower.run_id = accepted["run_id"]
            async with contextlib.aclosing(self._told(follower)) as told:
                async for event in told:
                    yield event
                    if event["type"] in TERMINAL:
                        return
        finally:
            self._followers.remove(follower)

    async def _told(self, follower: incoming.Run) -> AsyncGenerator[dict[str, Any], None]:
        """Each event of a run once and in order: those that came, and from the record those that had no room."""
        while True:
            event = await follower.take()
            if event is None:
                async for event in self._recorded(follower):
                    yield event
            elif follower.accept(event):
                yield event

    async def _recorded(self, follower: incoming.Run) -> AsyncIterator[dict[str, Any]]:
        # asked first: the record of a run that is over has its end
        over = (await self.api.get_run(follower.run_id))["ended_at"] is not None
        async for event in self.api.events(follower.run_id, follower.after):
            if follower.accept(event):
                yield event
        if over:
            raise incoming.gone(follower.run_id)

    async def start(
        self, agent: str = "", *, user_request: str, inputs: Mapping[str, Any] | None = None, thread_id: str = "", **options: Any
    ) -> dict[str, Any]:
        """Start a run; returns `run_id` and `thread_id`. Options: deadline_s, on_busy."""
        return await self._start(ids.uuid7(), agent, user_request, inputs, thread_id, options)

    async def _start(
        self, request_id: str, agent: str, user_request: str, inputs: Mapping[str, Any] | None, thread_id: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        payload = {"agent": agent, "user_request": user_request, "inputs": dict(inputs or {}), **options}
        frame = {"type": "START_AGENT", "id": request_id, "payload": payload}
        return await self._request({**frame, "thread_id": thread_id} if thread_id else frame)

    async def cancel(self, run_id: str) -> str:
        """Ask a run to stop; returns its state now."""
        return str((await self._request({"type": "CANCEL", "id": ids.uuid7(), "payload": {"run_id": run_id}}))["state"])

    async def send(self, run_id: str, message: str) -> dict[str, Any]:
        """Say something to a run of mine that goes on; returns `run_id`, `message_id`, `delivered` and the `state` it is in.

        Raises `FailedPrecondition` when the run has ended.
        """
        payload = {"run_id": run_id, "message": message}
        return await self._request({"type": "SEND", "id": ids.uuid7(), "payload": payload})

    async def approve(self, approval_id: str, decision: str = "approve", comment: str = "") -> str:
        """Say `approve` or `reject` to what a run of mine asked for; returns what became of it."""
        payload = {"approval_id": approval_id, "decision": decision, "comment": comment}
        return str((await self._request({"type": "APPROVE", "id": ids.uuid7(), "payload": payload}))["state"])

    async def approvals(self, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """What my runs asked for, newest first."""
        return await self.api.approvals(page_size, **filters)

    async def stream(self, method: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The answers of a streaming RPC, such as `netra.events.v1.EventsService/Subscribe`; 64-bit numbers come as text.

        Raises what it ends with, and `Unavailable` when the connection breaks, or when much more comes than is read: open it again from
        where it was.
        """
        payload, stream = {"method": method, "request": dict(request)}, incoming.Stream()
        try:
            await self._request({"type": "STREAM", "id": ids.uuid7(), "payload": payload}, stream)
            while True:
                told = await stream.take()
                if told["type"] == "stream_data":
                    yield told["data"]
                elif told["code"] == "OK":
                    return
                else:
                    raise error_of(told)
        finally:
            # also when it was cancelled in the moment in which it was opened
            if self._streams.pop(stream.stream_id, None) is not None and self._socket is not None:
                await _cancel(self._socket, stream.stream_id)

    def follow(self, thread_id: str, *, live: bool = True) -> AsyncIterator[dict[str, Any]]:
        """The events of all runs of a thread of mine, or one shared with me; until it is no longer, or without `live` up to now."""
        return threads.follow(self, thread_id, live=live)

    def events(self, run_id: str, after: int = 0, *, follow: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The record of a run after a cursor; with `follow` until the run has ended."""
        return self.api.events(run_id, after, follow=follow)

    async def runs(self, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """My runs, newest first."""
        return await self.api.runs(page_size, **filters)

    async def tools(self, **filters: str) -> list[dict[str, Any]]:
        """The tools I may call."""
        return await self.api.tools(**filters)

    async def upload(
        self, path: str | Path, *, name: str = "", media_type: str = "", thread_id: str = "", progress: Progress | None = None
    ) -> dict[str, Any]:
        """Keep a file; its `artifact_id` goes into the inputs of a run. In a thread it is seen by all who see that."""
        return await self.api.upload(path, name=name, media_type=media_type, thread_id=thread_id, progress=progress)

    async def download(self, artifact_id: str, to: str | Path, progress: Progress | None = None) -> dict[str, Any]:
        """Write an artifact to a file."""
        return await self.api.download(artifact_id, to, progress)

    async def artifacts(self, page_size: int = 50, **filters: str) -> list[dict[str, Any]]:
        """My files, newest first."""
        return await self.api.artifacts(page_size, **filters)

    async def delete_artifact(self, artifact_id: str) -> None:
        """Remove a file for good."""
        await self.api.delete_artifact(artifact_id)

    async def agents(self) -> list[dict[str, Any]]:
        """The agents I may start."""
        return await self.api.agents()

    async def login(self, email: str, password: str) -> dict[str, Any]:
        """Sign the same user in afresh and put the new token in force, on the open socket too."""
        tokens = await self.api.login(email, password)
        await self._request({"type": "AUTH", "id": ids.uuid7(), "payload": {"access_token": tokens["access_token"]}})
        return tokens

    async def _request(self, frame: dict[str, Any], opens: incoming.Stream | None = None) -> dict[str, Any]:
        """The `data` of the ack. What a part that restarts refuses is asked again, under the same id."""
        text = _written(frame, self._max_sent)
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return await self._asked(frame["id"], text, opens)
            except errors.Unavailable as error:
                if self._failure is not None or time.monotonic() > until:
                    raise
                await asyncio.sleep((error.retry_after_ms or 250) / 1000)

    async def _asked(self, frame_id: str, text: str, opens: incoming.Stream | None) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        request = self._pending[frame_id] = _Request(text, asyncio.get_running_loop().create_future(), opens)
        try:
            async with asyncio.timeout(self.patience_s):
                if self._socket is not None:
                    await _send(self._socket, text)
                return await request.answer
        except TimeoutError:
            raise self._unanswered() from None
        finally:
            self._pending.pop(frame_id, None)

    def _unanswered(self) -> errors.NetraError:
        if self._socket is None:
            return errors.Unavailable(f"{self.api.url} cannot be reached. Is the gateway running?")
        return errors.DeadlineExceeded(f"No answer came within {self.patience_s:g} s. Whether the request was accepted is not known.")

    # the socket

    async def ready(self) -> None:
        """Wait until the socket is open. Raises what keeps it from opening."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._socket is not None or self._failure is not None)
        if self._failure is not None:
            raise self._failure

    async def keep(self) -> None:
        """Keep the socket open until nothing more can be done about it."""
        pause = 0.05
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._converse()
                except errors.Unavailable:
                    # a first connection that fails is an answer; a later one is an interruption
                    if self.cursor is None or time.monotonic() - self._alive_at > self.patience_s:
                        raise
                pause = 0.05 if self._alive_at > began else min(pause * 2, 2.0)
                await asyncio.sleep(pause)
        except errors.NetraError as error:
            await self._fail(error)
        except Exception as error:
            # the token function is somebody else's; whatever it was, nobody may wait for ever
            await self._fail(errors.Internal(f"The connection was given up: {error!r}"))

    async def _converse(self) -> None:
        """One connection from opening to close. Raises when another one cannot or must not be tried."""
        try:
            async with await self._opened() as socket:
                with contextlib.suppress(websockets.ConnectionClosed):
                    await self._listen(socket)
                code = socket.close_code or 1006
                if code in _UNREADABLE:
                    self._refuse_pending(_UNREADABLE[code](socket.close_reason or f"The gateway closed the socket with {code}."))
        except (OSError, TimeoutError, websockets.WebSocketException) as error:
            raise errors.Unavailable(f"{self.api.url} cannot be reached. Is the gateway running?") from error
        if 4500 <= code <= 4999:
            raise _FINAL.get(code, errors.FailedPrecondition)(socket.close_reason or f"The gateway closed the socket with {code}.")

    async def _listen(self, socket: socket_.ClientConnection) -> None:
        try:
            async for text in socket:
                self._alive_at = time.monotonic()
                await self._read(socket, text)
        finally:
            if self._socket is socket:
                self._alive_at = time.monotonic()
                self._socket = None
                self._end_streams(errors.Unavailable("The connection broke."))

    async def _opened(self) -> socket_.ClientConnection:
        offered = ["netra.v1", f"client.{self._client_id}", *([f"resume.{self.cursor}"] if self.cursor is not None else [])]
        try:
            return await socket_.connect(
                f"ws{self.api.url.removeprefix('http')}/ws",
                subprotocols=[Subprotocol(entry) for entry in offered],
                additional_headers={"Authorization": f"Bearer {await self.api.token()}"},
                proxy=None if direct(self.api.url) else True,
                compression=None,
                max_size=_MAX_FRAME,
                open_timeout=10,
                close_timeout=2,
            )
        except websockets.InvalidStatus as refused:
            raise error_of_response(refused.response.status_code, bytes(refused.response.body or b"")) from refused

    async def _read(self, socket: socket_.ClientConnection, text: str | bytes) -> None:
        try:
            await self._take(socket, json.loads(text), len(text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise errors.Internal(f"The gateway sent a frame that cannot be read: {error!r}") from error

    async def _take(self, socket: socket_.ClientConnection, frame: dict[str, Any], size: int) -> None:
        kind = frame["type"]
        if "event_id" in frame:
            await self._event(socket, frame, size)
        elif kind in ("ack", "error"):
            await self._answered(socket, frame)
        elif kind in ("stream_data", "stream_end"):
            await self._streamed(socket, frame, size)
        elif kind == "connected":
            await self._greeted(socket, frame)
        elif kind == "auth_expiring":
            self._renewal = asyncio.get_running_loop().create_task(self._renew(socket))
        elif kind == "position":
            # what a filter passed over need not come again
            self.cursor = max(self.cursor or 0, int(frame["cursor"]))
        elif kind == "history_truncated":
            self._truncated(int(frame["oldest"]))
        elif kind == "resync":
            await self._resynced(frame["epoch"], frame["cursor"])

    async def _event(self, socket: socket_.ClientConnection, event: dict[str, Any], size: int) -> None:
        last = self.cursor or 0
        if event["cursor"] <= last:
            return
        if event["cursor"] > last + 1:
            # never happens while gateway and record keep their promise; the record fills the hole
            hole = f"hole.{last}"
            if self._hole != hole:
                self._hole = hole
                await _send(socket, json.dumps({"type": "RESUME", "id": hole, "payload": {"after": last}}))
            return
        self.cursor = event["cursor"]
        for follower in self._followers:
            if follower.wants(event):
                follower.put(event, size)

    def _truncated(self, oldest: int) -> None:
        if oldest - 1 > (self.cursor or 0):
            for follower in self._followers:
                follower.cut(oldest)
        self.cursor = oldest - 1

    async def _answered(self, socket: socket_.ClientConnection, frame: dict[str, Any]) -> None:
        if self._hole and frame.get("id") == self._hole:
            self._hole = ""
            if frame["type"] == "error":
                # the next socket asks for it
                await socket.close()
            return
        request, opened = self._pending.get(frame.get("id") or ""), (frame.get("data") or {}).get("stream_id", "")
        if request is None or request.answer.done():
            if opened:
                # whoever wanted it did not wait for it
                await _cancel(socket, opened)
            return
        if frame["type"] == "error":
            request.answer.set_exception(error_of(frame))
            return
        if opened and request.opens is not None:
            # its data comes next
            request.opens.stream_id = opened
            self._streams[opened] = request.opens
        request.answer.set_result(frame["data"])

    async def _streamed(self, socket: socket_.ClientConnection, frame: dict[str, Any], size: int) -> None:
        stream = self._streams.get(frame["stream_id"])
        if stream is None:
            return
        stream.put(frame, size)
        if stream.overrun:
            # nothing else is held up by it
            del self._streams[stream.stream_id]
            await _cancel(socket, stream.stream_id)

    async def _greeted(self, socket: socket_.ClientConnection, frame: dict[str, Any]) -> None:
        self.user_id = frame["user_id"]
        self._hole = ""
        self._max_sent = int(frame["limits"].get("max_frame_bytes", _MAX_SENT))
        if self.epoch and self.epoch != frame["epoch"]:
            await self._resynced(frame["epoch"], frame["cursor"])
        self.epoch = frame["epoch"]
        self.cursor = frame["cursor"] if self.cursor is None else self.cursor
        for request in list(self._pending.values()):
            await _send(socket, request.text)
        async with self._changed:
            self._socket = socket
            self._changed.notify_all()

    async def _resynced(self, epoch: str, cursor: int) -> None:
        """The record is another one (a backup was restored): runs that are followed cannot be followed on."""
        self.epoch, self.cursor = epoch, cursor
        for follower in self._followers:
            error = errors.FailedPrecondition("The record was restored from a backup. Ask for the run's events again.")
            follower.end(error, recorded=False)

    async def _renew(self, socket: socket_.ClientConnection) -> None:
        """Put a fresh token in force, when there is a way to get one; else the socket ends with the token."""
        with contextlib.suppress(errors.NetraError):
            payload = {"access_token": await self.api.token()}
            await _send(socket, json.dumps({"type": "AUTH", "id": ids.uuid7(), "payload": payload}))

    async def close(self, keeper: asyncio.Task[None]) -> None:
        """End the socket and whatever works for it."""
        working = [task for task in (keeper, self._renewal) if task is not None]
        for task in working:
            task.cancel()
        await asyncio.wait(working)

    async def _fail(self, error: errors.NetraError) -> None:
        self._failure = error
        self._refuse_pending(error)
        for follower in self._followers:
            follower.end(error)
        self._end_streams(error)
        async with self._changed:
            self._changed.notify_all()

    def _end_streams(self, error: errors.NetraError) -> None:
        ended, self._streams = self._streams, {}
        for stream in ended.values():
            stream.end(error)

    def _refuse_pending(self, error: errors.NetraError) -> None:
        for request in self._pending.values():
            if not request.answer.done():
                request.answer.set_exception(error)


async def _send(socket: socket_.ClientConnection, text: str) -> None:
    # a connection that is gone is noticed by its reader, and what is pending goes out on the next one
    with contextlib.suppress(websockets.ConnectionClosed):
        await socket.send(text)


async def _cancel(socket: socket_.ClientConnection, stream_id: str) -> None:
    # to a stream that has ended it says nothing
    await _send(socket, json.dumps({"type": "STREAM_CANCEL", "id": ids.uuid7(), "payload": {"stream_id": stream_id}}))


def _written(frame: dict[str, Any], limit: int) -> str:
    """A frame as it is sent. Raises what the gateway would answer: `InvalidPayload` naming the field, or `TooLarge`."""
    for name, value in frame.items():
        _check(name, value, _MAX_DEPTH - 1)
    text = json.dumps(frame, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    size = len(text.encode())
    if size > limit:
        raise errors.TooLarge(f"The request has {size} bytes; at most {limit} are allowed.", limit=limit)
    return text


def _check(field: str, value: Any, depth: int) -> None:
    """JSON that the gateway reads: UTF-8, numbers of 64 bits, and no abyss."""
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _wrong(field, "holds half a surrogate pair")
    elif isinstance(value, int | float):
        if not (math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**64):
            raise _wrong(field, "is a number out of range")
    elif isinstance(value, dict | list | tuple):
        if depth == 0:
            raise _wrong(field, f"is nested too deep: a frame has at most {_MAX_DEPTH} levels")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_key(field, key)
            _check(f"{field}.{key}", item, depth - 1)
    elif value is not None:
        raise _wrong(field, f"is of type {type(value).__name__}, which is not JSON")


def _check_key(field: str, key: Any) -> None:
    if not isinstance(key, str | int | float | None):
        raise _wrong(field, "has a key that is not text")
    if key in _RESERVED:
        raise _wrong(f"{field}.{key}", "is a key that is never accepted")
    _check(field, key, 0)


def _wrong(field: str, problem: str) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"{field} {problem}", field=field)


@contextlib.asynccontextmanager
async def connect(url: str, token: Token, *, patience_s: float = 30.0) -> AsyncIterator[Client]:
    """A client at a gateway. `token` is an access token, or a function that gives a fresh one.

    `patience_s` bounds an interruption, and the wait for the answer to a request.

    Raises `Unavailable` when the gateway cannot be reached, `Unauthenticated` when it refuses the token.
    """
    async with Api(url, token, patience_s=patience_s) as api:
        client = Client(api, patience_s)
        keeper = asyncio.get_running_loop().create_task(client.keep())
        try:
            await client.ready()
            yield client
        finally:
            await client.close(keeper)
