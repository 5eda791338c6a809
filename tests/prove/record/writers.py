"""Writers: the dispatcher's own appender, in this process, with the dispatcher's credential and contexts of the users."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

from chassis import channel, replicas
from netra import errors, ids
from netra.auth.v1 import auth_pb2_grpc
from netra.context.v1 import context_pb2
from netra.events.v1 import events_pb2
from services.dispatcher import appender, upstreams
from tests.prove.record import book, place

_TRACE = "0af7651916cd43dd8448eb211c80319c"
_RETRY_S = 0.3


@dataclass(slots=True)
class Writers:
    """What all writers of this process share."""

    contexts: upstreams.Contexts
    records: upstreams.Records
    appender: appender.Appender
    found: book.Book

    async def write(self, user: place.Person, stop: asyncio.Event, chance: random.Random) -> None:
        """One run after the other for a user, each with its end, until told to stop; the one that has begun is ended."""
        while not stop.is_set():
            with contextlib.suppress(errors.NetraError):
                await self._run(user, stop, chance)
            await asyncio.sleep(chance.uniform(0, 0.2))

    async def _run(self, user: place.Person, stop: asyncio.Event, chance: random.Random) -> None:
        opened = await self._opened(user)
        run_id, seq, epoch = str(opened.context.run_id), 1, 1
        await self._own(run_id, user.user_id, epoch, opened.token)
        for part in range(chance.randint(2, 30)):
            last = stop.is_set() or part == 29
            if chance.random() < 0.03:
                epoch += 1
                seq = await self._own(run_id, user.user_id, epoch, opened.token)
            seq = await self._append(user, run_id, epoch, seq, chance, end=last)
            if last:
                return
            await asyncio.sleep(chance.uniform(0, 0.15))
        await self._append(user, run_id, epoch, seq, chance, end=True)

    async def _opened(self, user: place.Person) -> upstreams.Opened:
        request = context_pb2.OpenContextRequest(request_id=str(ids.uuid7()), access_token=user.token, run_id=ids.RunId.new())
        while True:
            try:
                return await self.contexts.open(request)
            except (errors.Unavailable, errors.DeadlineExceeded):
                await asyncio.sleep(_RETRY_S)

    async def _own(self, run_id: str, user_id: str, epoch: int, token: str) -> int:
        """Open the run; the seq that comes next. What is not answered is asked again at the same epoch, by whoever owns it."""
        while True:
            try:
                return (await self.records.open(run_id, user_id, epoch, token, _TRACE)).next_seq
            except (errors.Unavailable, errors.DeadlineExceeded):
                await asyncio.sleep(_RETRY_S)
            except errors.Fenced:
                epoch += 1

    async def _append(self, user: place.Person, run_id: str, epoch: int, seq: int, chance: random.Random, *, end: bool) -> int:
        events = [_event(chance) for _ in range(chance.randint(1, 16))]
        if end:
            events[-1].type = "agent_completed"
        request = events_pb2.AppendRequest(run_id=run_id, epoch=epoch, first_seq=seq, events=events, end=end)
        self.found.appended += len(events)
        try:
            await self.appender.append(request, user.user_id)
        except errors.NetraError as error:
            self.found.refused(error.code)
            raise
        entries = [book.Entry(run_id, seq + at, one.event_id, book.digest(json.loads(one.data))) for at, one in enumerate(events)]
        self.found.acknowledge(user.user_id, entries)
        return seq + len(events)


def _event(chance: random.Random) -> events_pb2.NewEvent:
    text = "x" * (20_000 if chance.random() < 0.01 else chance.randint(0, 300))
    return events_pb2.NewEvent(event_id=ids.EventId.new(), type="note", data=json.dumps({"number": chance.random(), "text": text}).encode())


@contextlib.asynccontextmanager
async def writing(where: place.Place, found: book.Book) -> AsyncIterator[Writers]:
    """Writers for the time of the block."""
    async with contextlib.AsyncExitStack() as stack:
        to_auth = channel.connect(where.target("auth"), name="auth")
        stack.push_async_callback(to_auth.close)
        secret = (where.system.secrets / "dispatcher" / "service").read_text().strip()
        credentials = channel.ServiceCredentials("dispatcher", secret, auth_pb2_grpc.AuthServiceStub(to_auth))
        to_context = channel.connect(where.target("context"), credentials, name="context")
        stack.push_async_callback(to_context.close)
        targets = ",".join(f"127.0.0.1:{one.port}" for one in where.behind)
        made: list[object] = []

        def connect(target: str) -> object:
            made.append(one := channel.connect(target, credentials, name="events"))
            return one

        records = upstreams.Records(replicas.Replicas(targets), connect)  # type: ignore[arg-type]
        appends = appender.Appender(records)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(appends.run())
            try:
                yield Writers(upstreams.Contexts(to_context), records, appends, found)
            finally:
                running.cancel()
