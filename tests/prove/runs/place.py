"""Netra with two dispatchers over one database, its users with their sockets, and what is outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx

from chassis import postgres
from netra.auth.v1 import auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from standalone import processes
from tests.fixtures import own, users, web
from tests.fixtures.stack import gateway_url
from tests.prove import pages, people
from tests.prove.runs import agents, clients, dispatcher, judge, outside

DISPATCHERS = ("dispatcher", "dispatcher2")
_COMMAND = (sys.executable, "-m", "tests.prove.runs.dispatcher")
_TABLE = tuple(dataclasses.replace(row, command=_COMMAND) if row.name == "dispatcher" else row for row in processes.TABLE)
_SECOND = next(processes.replica(row, 2) for row in _TABLE if row.name == "dispatcher")
_OWNERS = "SELECT run_id::text, state, coalesce(lease_owner, '') AS owner FROM dispatcher.runs WHERE run_id = ANY($1::uuid[])"
_HEADS = "SELECT run_id::text, next_seq FROM events.heads WHERE run_id = ANY($1::uuid[])"


class _System(own.Own):
    table = _TABLE


@dataclass(slots=True)
class User:
    """A user, their socket, and what their runs are marked with."""

    person: people.Person
    follower: clients.Follower
    canary: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def mark(self) -> str:
        """Of the next run."""
        return f"{self.canary}n{next(self.numbers)}"


@dataclass(frozen=True, slots=True)
class Started:
    """A run that was accepted, and at which gate it is held; empty for none."""

    user: User
    run: judge.Accepted
    hold: str = ""
    gate: str = ""

    @property
    def seen(self) -> list[judge.Frame]:
        """Its events, as its user's client has them."""
        return self.user.follower.by_run[self.run.run_id]

    @property
    def ended(self) -> bool:
        """Whether its user has seen it end."""
        return self.run.run_id in self.user.follower.ended


@dataclass(slots=True)
class Place:
    """The running system, and all that is known of its runs. `again` are keys of effects that a person let be made once more."""

    system: own.Own
    folder: Path
    http: httpx.AsyncClient
    stubs: list[dispatcher_pb2_grpc.DispatcherServiceAsyncStub]
    removed: contextlib.ExitStack
    users: list[User] = field(default_factory=list)
    started: dict[str, Started] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)

    def keep(self) -> Path:
        """Leave logs, stores and effects where they are when it is over."""
        self.removed.pop_all()
        return self.folder.parent

    @property
    def sockets_lost(self) -> int:
        """How often any user's socket was lost so far."""
        return sum(len(user.follower.lost_at) for user in self.users)

    async def start(self, desk: clients.Desk, user: User, agent: str, mark: str, hold: str = "", gate: str = "") -> Started | None:
        """Have one of the five agents run; None when that is refused for good."""
        inputs = {"folder": str(self.folder), "mark": mark, "hold": hold, "gate": gate}
        run_id = await desk.start(user.person, agent, inputs)
        if not run_id:
            return None
        run = judge.Accepted(run_id, user.person.user_id, agent, mark, agents.expected(agent, mark))
        self.started[run_id] = Started(user, run, hold, gate)
        return self.started[run_id]

    async def owners(self, run_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """State and owner of runs: the owner's process id, 0 for nobody."""
        async with postgres.connection(self.system.database_url) as database:
            rows = await database.fetch(_OWNERS, list(run_ids))
        return {row["run_id"]: (row["state"], int(row["owner"].split(":")[1]) if row["owner"] else 0) for row in rows}

    async def heads(self, run_ids: Sequence[str]) -> dict[str, int]:
        """How many events the record has of runs."""
        async with postgres.connection(self.system.database_url) as database:
            return {row["run_id"]: row["next_seq"] - 1 for row in await database.fetch(_HEADS, list(run_ids))}

    @contextlib.contextmanager
    def idle(self, name: str) -> Iterator[None]:
        """A dispatcher claims nothing for the time of the block."""
        file = self.folder / f"{outside.IDLE}{self.system.pid(name)}"
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    async def restart(self, name: str) -> None:
        """Ask a process to end, gently; returns when its successor serves."""
        await asyncio.to_thread(self.system.end, name)
        await asyncio.to_thread(self.system.restarted, name)

    async def ended(self, within_s: float) -> bool:
        """Whether the clients of all runs that were accepted see them end in time."""
        return await clients.until(lambda: all(one.ended for one in self.started.values()), within_s)

    async def evidence(self) -> judge.Evidence:
        """What is known, when all is over."""
        records = {user.person.user_id: await pages.whole(f"127.0.0.1:{self.system.ports['events']}", user.person) for user in self.users}
        # what the record has, the clients are given as well: but they may be a moment behind
        await clients.until(lambda: all(len(user.follower.frames) >= len(records[user.person.user_id]) for user in self.users), 30.0)
        seen = {user.person.user_id: list(user.follower.frames) for user in self.users}
        effects = outside.lines(self.folder, outside.EFFECTS)
        return judge.Evidence([one.run for one in self.started.values()], records, seen, effects, self.again)


@contextlib.asynccontextmanager
async def running(many: int, **settings: str) -> AsyncIterator[Place]:
    """On free ports, in a folder of its own, with so many users; `settings` on top of those of the proof."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="netra-prove-"))
        removed = stack.enter_context(contextlib.ExitStack())
        removed.callback(shutil.rmtree, folder, ignore_errors=True)
        whole = folder / "outside"
        whole.mkdir()
        told = {
            "NETRA_LEASE_S": "3", "NETRA_SANDBOX_TIERS": "", "NETRA_TOOL_WORKERS": "8", dispatcher.FOLDER: str(whole),
            "NETRA_CALLS_PER_ADDRESS": "1000000", "NETRA_ANONYMOUS_PER_MINUTE": "1000000",
        }  # fmt: skip
        system = _System(folder / "netra", {}, (_SECOND,), **{**told, **settings})
        await asyncio.to_thread(system.start)
        stack.push_async_callback(asyncio.to_thread, system.stop)
        http = await stack.enter_async_context(web.client(base_url=gateway_url(system), timeout=30, trust_env=False))
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[name]}")) for name in DISPATCHERS]
        where = Place(system, whole, http, [dispatcher_pb2_grpc.DispatcherServiceStub(channel) for channel in channels], removed)
        to_auth = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}"))
        stub = auth_pb2_grpc.AuthServiceStub(to_auth)
        where.users = await asyncio.to_thread(_people, stub, system, many)
        async with asyncio.TaskGroup() as group:
            working = [group.create_task(people.renew(stub, [user.person for user in where.users]))]
            working += [group.create_task(user.follower.follow(system.ports["gateway"])) for user in where.users]
            try:
                yield where
            finally:
                for task in working:
                    task.cancel()


def _people(stub: auth_pb2_grpc.AuthServiceStub, system: own.Own, many: int) -> list[User]:
    admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
    made = [users.make_user(stub, admin, "user", "internal") for _ in range(many)]
    found = [people.Person(user, user.token) for user in made]
    return [User(person, clients.Follower(person), f"kx{secrets.token_hex(6)}") for person in found]
