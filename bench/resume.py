"""A client was away during very many events: does it get all of them, in order and once, how fast, and what does the gateway hold?

python bench/resume.py [events]

The whole system runs as `make run` starts it. A client connects and goes; 8 runs of its user are
written by Append, as a dispatcher does; the client comes back with `resume.<cursor>` and reads until it has the last event. One more,
written then, must come live.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
import uvloop
import websockets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, report, stores
from chassis import channel
from netra import ids
from netra.auth.v1 import auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from standalone import processes, supervise
from tests.fixtures import users

EVENTS, RUNS, PER_APPEND = 100_000, 8, 250
DATA = json.dumps({"parameters": "x" * 320}).encode()
PATIENCE_S = 300.0


@dataclass(slots=True)
class Writer:
    """Runs of one user, appended to over one stream, one append of each on its way."""

    stub: events_pb2_grpc.EventsServiceAsyncStub
    runs: list[str]
    seqs: dict[str, int] = field(default_factory=dict)

    async def write(self, events: int) -> None:
        """Returns when so many were acknowledged."""
        free: asyncio.Queue[str | None] = asyncio.Queue()
        for run_id in self.runs:
            free.put_nowait(run_id)

        async def appends() -> AsyncIterator[events_pb2.AppendRequest]:
            for start in range(0, events, PER_APPEND):
                run_id = await free.get()
                if run_id is None:
                    return
                yield self._append(run_id, min(PER_APPEND, events - start))

        async for answer in self.stub.Append(appends()):
            assert not answer.error_code, answer
            free.put_nowait(self.runs[answer.append_id])

    def _append(self, run_id: str, many: int) -> events_pb2.AppendRequest:
        first = self.seqs.get(run_id, 1)
        self.seqs[run_id] = first + many
        made = [events_pb2.NewEvent(event_id=ids.uuid7(), type="tool_executing", data=DATA) for _ in range(many)]
        return events_pb2.AppendRequest(append_id=self.runs.index(run_id), run_id=run_id, epoch=1, first_seq=first, events=made)


def _person(target: str, password: str) -> users.User:
    with grpc.insecure_channel(target) as opened:
        stub = auth_pb2_grpc.AuthServiceStub(opened)
        admin = users.sign_in(stub, processes.BOOTSTRAP_ADMIN, password).access_token
        return users.make_user(stub, admin, "user", "internal")


@contextlib.asynccontextmanager
async def _writer(stack: supervise.Stack, user: users.User) -> AsyncIterator[Writer]:
    def target(name: str) -> str:
        return f"127.0.0.1:{stack.ports[name]}"

    async with contextlib.AsyncExitStack() as opened:
        to_auth = channel.connect(target("auth"), name="auth")
        opened.push_async_callback(to_auth.close)
        secret = (stack.place.secrets / "dispatcher" / "service").read_text().strip()
        credentials = channel.ServiceCredentials("dispatcher", secret, auth_pb2_grpc.AuthServiceStub(to_auth))
        to_context, to_events = (channel.connect(target(name), credentials, name=name) for name in ("context", "events"))
        opened.push_async_callback(to_context.close)
        opened.push_async_callback(to_events.close)
        contexts: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to_context)
        stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(to_events)
        runs = []
        for _ in range(RUNS):
            request = context_pb2.OpenContextRequest(request_id=ids.uuid7(), access_token=user.token, run_id=ids.RunId.new())
            token = (await contexts.OpenContext(request)).context_token
            runs.append(str(request.run_id))
            await stub.OpenRun(events_pb2.OpenRunRequest(run_id=request.run_id, epoch=1, context_token=token))
        yield Writer(stub, runs)


def _connected(port: int, user: users.User, after: int) -> websockets.connect:
    protocols: Any = ["netra.v1", f"bearer.{user.token}", f"resume.{after}"]
    address = f"ws://127.0.0.1:{port}/ws"
    return websockets.connect(address, subprotocols=protocols, max_size=None, compression=None, ping_interval=None, proxy=None)


async def _events(socket: websockets.ClientConnection) -> AsyncIterator[int]:
    """The cursors of events as they come. What says that something is missing ends it."""
    async for message in socket:
        frame = orjson.loads(message)
        assert frame["type"] not in ("resync", "history_truncated", "error"), frame
        if "seq" in frame:
            yield frame["cursor"]


@dataclass(slots=True)
class Found:
    """What came of it."""

    write_s: float = 0.0
    first_s: float = 0.0
    resume_s: float = 0.0
    gateway_cpu_s: float = 0.0
    rss: dict[str, float] = field(default_factory=dict)
    received: int = 0
    last: int = 0
    gaps: int = 0
    doubles: int = 0
    live: bool = False

    def take(self, cursor: int) -> None:
        """Note an event."""
        self.received += 1
        self.gaps += max(0, cursor - self.last - 1)
        self.doubles += cursor <= self.last
        self.last = max(self.last, cursor)


async def _watched(pid: int, rss: dict[str, float]) -> None:
    while True:
        rss["highest"] = max(rss.get("highest", 0.0), child.rss_kib(pid))
        await asyncio.sleep(0.05)


async def _resumed(stack: supervise.Stack, user: users.User, writer: Writer, events: int, found: Found) -> None:
    pid = stack.pid("gateway")
    began, cpu = time.perf_counter(), child.cpu_s(pid)
    async with _connected(stack.ports["gateway"], user, after=0) as socket, asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        watching = group.create_task(_watched(pid, found.rss))
        cursors = _events(socket)
        async for cursor in cursors:
            found.first_s = found.first_s or time.perf_counter() - began
            found.take(cursor)
            if cursor >= events:
                break
        found.resume_s, found.gateway_cpu_s = time.perf_counter() - began, child.cpu_s(pid) - cpu
        await writer.write(1)
        found.take(await anext(cursors))
        found.live = found.last == events + 1
        watching.cancel()


async def _measured(events: int) -> Found:
    found = Found()
    async with stores.stack(*processes.SERVICES, "gateway") as stack:
        password = (stack.place.secrets / "auth" / "bootstrap_admin").read_text().strip()
        user = await asyncio.to_thread(_person, f"127.0.0.1:{stack.ports['auth']}", password)
        async with _writer(stack, user) as writer:
            async with _connected(stack.ports["gateway"], user, after=0) as socket:
                greeted = orjson.loads(await socket.recv())
                assert greeted["type"] == "connected", greeted
            found.rss["before"] = child.rss_kib(stack.pid("gateway"))
            began = time.perf_counter()
            await writer.write(events)
            found.write_s = time.perf_counter() - began
            await _resumed(stack, user, writer, events, found)
            await asyncio.sleep(1.0)
            found.rss["after"] = child.rss_kib(stack.pid("gateway"))
    return found


def main(events: int = EVENTS) -> int:
    """Returns the exit code: 1 when the client is not complete."""
    stores.set_up()
    found = uvloop.run(_measured(events))
    rows = [("written", events, found.write_s), ("resumed", found.received - found.live, found.resume_s)]
    report.table(("what", "events", "seconds", "events_per_s"), [(n, e, f"{s:.1f}", f"{e / s:.0f}") for n, e, s in rows])
    report.table(("state", "gateway_rss_kib"), [(name, f"{rss:.0f}") for name, rss in found.rss.items()])
    whole = found.live and found.received == events + 1 and not found.gaps and not found.doubles
    return report.verdict(
        "resume", whole, "complete", f"{found.last - 1 if found.live else found.last} of {events}, {events / found.resume_s:.0f}/s",
        gaps=found.gaps, doubles=found.doubles, live=found.live, seconds=round(found.resume_s, 2), first_event_s=round(found.first_s, 3),
        gateway_cpu_us_per_event=round(found.gateway_cpu_s / events * 1e6, 1),
        gateway_rss_growth_mib=round((found.rss["highest"] - found.rss["before"]) / 1024, 1),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
