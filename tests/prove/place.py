"""A running system to attack, with its people."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from netra.auth.v1 import auth_pb2_grpc
from tests.fixtures import users
from tests.fixtures.forge import Forge
from tests.fixtures.stack import Standalone, gateway_url
from tests.prove import ways


@dataclass(frozen=True, slots=True)
class Place:
    """The running system, and its people."""

    system: Standalone
    forge: Forge
    admin: str
    user: users.User
    other: users.User
    ways: ways.Ways

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return gateway_url(self.system)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Place]:
    """On free ports, in a folder of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="netra-prove-") as folder:
        system = Standalone(Path(folder), NETRA_TRUSTED_PROXIES="127.0.0.0/8")
        await asyncio.to_thread(system.start)
        try:
            async with contextlib.AsyncExitStack() as stack:
                admin, user, other = await asyncio.to_thread(_people, system)
                forge = await asyncio.to_thread(Forge.of, system, user.token)
                yield Place(system, forge, admin, user, other, ways.Ways(system, forge, stack))
        finally:
            await asyncio.to_thread(system.stop)


def _people(system: Standalone) -> tuple[str, users.User, users.User]:
    with grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}") as channel:
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
        user, other = (users.make_user(stub, admin, "user", "internal") for _ in range(2))
        return admin, user, other
