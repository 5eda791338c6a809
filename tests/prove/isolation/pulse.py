"""A run of the owner's that goes on, in the thread that others name: it says something again and again, which only its owner may hear."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import httpx
import websockets

from netra import ids
from netra.events.v1 import events_pb2
from tests.fixtures import sockets
from tests.prove import ways
from tests.prove.isolation import tables
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party
from tests.prove.isolation.settle import granted
from tests.prove.isolation.world import World

BROKEN = (OSError, httpx.HTTPError, websockets.WebSocketException, grpc.aio.AioRpcError, TimeoutError, EOFError)
KIND = "note"
_EVENTS = "events.events"
# among somebody's things: a second run, which goes on
LIVE = "run_id#live"
_EVERY_S, _RETRY_S, _CALL_S = 0.2, 0.5, 10.0
# a stream is listened to until its owner has heard so many things that were said after it had its answer
_MARKS = 2
# a stopped database lasts nine seconds
_HELD_S, _BEGINS_S, _ENDS_S = 30.0, 60.0, 30.0


class Pulse:
    """What the owner's run says are marks, by seq. `heard` is the last one that each of the owner's own streams has heard, canary and all.

    While it is `beating`, `world.held` returns when all of them have heard what was said after it was called. No clock decides that: a
    stream that let somebody else in would have heard it, too.
    """

    def __init__(self, world: World, owner: Party, judge: Judge) -> None:
        self._world, self._owner, self._judge = world, owner, judge
        self.run_id = self._context_token = ""
        self._epoch = self._sent = self._cursor = 0
        # how many the record has
        self.recorded = 0
        self._listeners: dict[str, Callable[[], Awaitable[None]]] = {
            "Subscribe": self._subscribed, "FollowThread": self._followed, "Tail": self._tailed, "a socket": self._socket,
            "server-sent events": self._sse,
        }  # fmt: skip
        self.heard = dict.fromkeys(self._listeners, 0)
        self._moved, self._over = asyncio.Condition(), asyncio.Event()

    async def open(self) -> None:
        """Open the run in the owner's named thread; from now on it is among what others name."""
        opened = await self._world.run_opened(self._owner, thread_id=self._owner.things["thread_id"])
        self.run_id, self._context_token, self._epoch = opened.context.run_id, opened.context_token, 1
        self._owner.things.ids[LIVE] = self.run_id

    @contextlib.asynccontextmanager
    async def beating(self, *, quiet: bool = True) -> AsyncIterator[None]:
        """The run says something, and its owner hears it. `quiet`: nothing may keep them from it. In the end, all that was said is
        recorded."""
        self._over.clear()
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._again(self._beat))
            hearing = [group.create_task(self._again(one)) for one in self._listeners.values()]
            try:
                if not await self._passed(_BEGINS_S):
                    raise TimeoutError(f"the owner's own streams do not hear the owner's run: {self._deaf}")
                self._world.held = self._held if quiet else self._held_or_not
                yield
            finally:
                self._world.held = None
                self._over.set()
                await asyncio.wait({beat}, timeout=_ENDS_S)
                for task in (beat, *hearing):
                    task.cancel()

    async def _held(self) -> None:
        self._judge.findings.held += 1
        if not await self._passed(_HELD_S):
            self._judge.findings.wrong.append(f"nothing is shown of a stream: the owner's own did not hear for {_HELD_S} s: {self._deaf}")

    async def _held_or_not(self) -> None:
        """While processes die, the owner may hear nothing for long."""
        self._judge.findings.held += await self._passed(_HELD_S)

    async def _passed(self, within_s: float) -> bool:
        wanted = self._sent + _MARKS
        try:
            async with asyncio.timeout(within_s), self._moved:
                await self._moved.wait_for(lambda: min(self.heard.values()) >= wanted)
        except TimeoutError:
            return False
        return True

    @property
    def _deaf(self) -> str:
        return f"{self._sent} were said, heard were {self.heard}"

    async def _again(self, work: Callable[[], Awaitable[None]]) -> None:
        """Through outages."""
        while not self._over.is_set():
            # the last one is what grpc says to who writes to a call that has ended
            with contextlib.suppress(*BROKEN, ValueError, asyncio.InvalidStateError):
                await work()
            await asyncio.sleep(_RETRY_S)

    async def _beat(self) -> None:
        self._epoch += 1
        wanted = events_pb2.OpenRunRequest(run_id=self.run_id, epoch=self._epoch, context_token=self._context_token)
        opened = await self._world.events.OpenRun(wanted, metadata=self._world.service("dispatcher"), timeout=_CALL_S)
        # what was said and not answered may be in the record
        self.recorded = opened.next_seq - 1
        call = self._world.events.Append(metadata=self._world.service("dispatcher"))
        try:
            while not self._over.is_set():
                self._sent = self.recorded + 1
                async with asyncio.timeout(_CALL_S):
                    await call.write(self._said(self._sent))
                    answer = await call.read()
                if not isinstance(answer, events_pb2.AppendResponse) or answer.error_code:
                    return
                self.recorded, self._cursor = self._sent, max(self._cursor, answer.last_cursor)
                await asyncio.sleep(_EVERY_S)
        finally:
            call.cancel()

    def _said(self, seq: int) -> events_pb2.AppendRequest:
        said = json.dumps({"text": self._owner.canary}).encode()
        return events_pb2.AppendRequest(
            append_id=seq, run_id=self.run_id, epoch=self._epoch, first_seq=seq,
            events=[events_pb2.NewEvent(event_id=ids.EventId.new(), type=KIND, data=said)],
            transients=[events_pb2.Transient(type="agent_delta", data=said, after_seq=seq)],
        )  # fmt: skip

    async def _hear(self, name: str, run_id: str, kind: str, seq: int, said: bytes) -> None:
        if run_id == self.run_id and kind == KIND and self._owner.canary.encode() in said:
            async with self._moved:
                self.heard[name] = max(self.heard[name], seq)
                self._moved.notify_all()

    # the owner's own streams, of each kind one

    async def _subscribed(self) -> None:
        wanted = events_pb2.SubscribeRequest(after=self._cursor, run_id=self.run_id)
        async for part in self._world.events.Subscribe(wanted, metadata=self._owner.bearer):
            for event in part.events:
                await self._hear("Subscribe", event.run_id, event.type, event.seq, event.frame)

    async def _followed(self) -> None:
        position = events_pb2.RunPosition(run_id=self.run_id, seq=self.heard["FollowThread"])
        wanted = events_pb2.FollowThreadRequest(
            grant_token=await granted(self._world, self._owner), positions=[position], after_run_id=self.run_id
        )
        async for part in self._world.events.FollowThread(wanted, metadata=self._owner.bearer):
            for event in part.events:
                await self._hear("FollowThread", event.run_id, event.type, event.seq, event.frame)

    async def _tailed(self) -> None:
        call = self._world.events.Tail(metadata=self._world.service("gateway"))
        try:
            await call.write(events_pb2.TailRequest(join=events_pb2.JoinUser(access_token=self._owner.token, join_id="pulse")))
            while isinstance(part := await call.read(), events_pb2.TailResponse):
                if any(not one.joined for one in part.positions):
                    return  # the token has ended: again, with the one that is good now
                for event in part.events:
                    await self._hear("Tail", event.run_id, event.type, event.seq, event.frame)
        finally:
            call.cancel()

    async def _socket(self) -> None:
        chosen = {"run_id": self.run_id, "thread_id": self._owner.things["thread_id"], "types": [KIND]}
        who = {"additional_headers": ways.a_client(), "proxy": None}
        async with sockets.opened(self._world.system, self._owner.token, **who) as socket:
            await socket.ask("SUBSCRIBE", chosen)
            while True:
                frame = await socket.next(_HELD_S)
                await self._hear("a socket", frame.get("run_id", ""), frame["type"], frame.get("seq", 0), json.dumps(frame).encode())
                socket.frames.clear()

    async def _sse(self) -> None:
        headers = {**self._world.as_user(self._owner), "Accept": "text/event-stream", "Last-Event-ID": str(self._cursor)}
        async with self._world.http.stream("GET", f"/v1/runs/{self.run_id}/events", headers=headers) as response:
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    frame = json.loads(line.removeprefix("data:"))
                    said = line.encode()
                    await self._hear("server-sent events", frame.get("run_id", ""), frame.get("type", ""), frame.get("seq", 0), said)


def changed(before: dict[str, set[str]], after: dict[str, set[str]], recorded: int) -> list[str]:
    """The tables in which something of the owner's is another now, but for what the pulse has said: so many events, and one row that
    says how far its run is, or its owner's record, in each other table of the record."""
    found = tables.changed({name: rows for name, rows in before.items() if not name.startswith("events.")}, after, more=False)
    for name, rows in before.items():
        gone, new = len(rows - after.get(name, set())), len(after.get(name, set()) - rows)
        if name == _EVENTS:
            fine = (gone, new) == (0, recorded)
        elif name.startswith(_EVENTS):
            fine = gone == 0  # its parts: how many are new, all of it says
        else:
            fine = gone == new <= 1 or not name.startswith("events.")
        if not fine:
            found.append(f"{name}: {gone} of {len(rows)} rows are gone or others, {new} are new, {recorded} were said")
    return found
