"""Netra with two replicas of events and of the gateway, proxies between them, and its users."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from netra.auth.v1 import auth_pb2_grpc
from standalone import processes
from tests.fixtures import own, proxy, users
from tests.prove import people

Person = people.Person
EVENTS, GATEWAYS = ("events", "events2"), ("gateway", "gateway2")
_REPLICAS = tuple(processes.replica(row, 2) for row in processes.TABLE if row.name in ("events", "gateway"))


@dataclass(frozen=True, slots=True)
class Place:
    """The running system. `fronts` are the proxies before the gateways; `behind` those between the services and events."""

    system: own.Own
    users: list[Person]
    fronts: list[proxy.Proxy]
    behind: list[proxy.Proxy]

    @property
    def events_targets(self) -> str:
        """Where the record listens, through the proxies."""
        return ",".join(f"127.0.0.1:{one.port}" for one in self.behind)

    def target(self, name: str) -> str:
        """Where a process listens, past the proxies."""
        return f"127.0.0.1:{self.system.ports[name]}"


@contextlib.asynccontextmanager
async def running(many: int) -> AsyncIterator[Place]:
    """On free ports, in a folder of its own, with so many users."""
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="netra-prove-"))
        behind = [await stack.enter_async_context(proxy.listening()) for _ in EVENTS]
        fronts = [await stack.enter_async_context(proxy.listening()) for _ in GATEWAYS]
        targets = ",".join(f"127.0.0.1:{one.port}" for one in behind)
        system = own.Own(Path(folder), extra=_REPLICAS, NETRA_LEASE_S="12", NETRA_EVENTS_TARGET=targets)
        for one, name in zip((*behind, *fronts), (*EVENTS, *GATEWAYS), strict=True):
            one.to = system.ports[name]
        await asyncio.to_thread(system.start)
        stack.push_async_callback(asyncio.to_thread, system.stop)
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}"))
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        found = await asyncio.to_thread(_people, stub, system, many)
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(people.renew(stub, found))
            yield Place(system, found, fronts, behind)
            renewing.cancel()


def _people(stub: auth_pb2_grpc.AuthServiceStub, system: own.Own, many: int) -> list[Person]:
    admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
    made = [users.make_user(stub, admin, "user", "internal") for _ in range(many)]
    return [Person(user, user.token) for user in made]
