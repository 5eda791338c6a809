"""A system of the proof's own, with an outside provider to sign in with, and its people, signed in for as long as it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from netra.auth.v1 import auth_pb2_grpc
from tests.fixtures import oidc, own
from tests.prove import people
from tests.prove.isolation import settle, world
from tests.prove.isolation.examples_auth import PAGE


@dataclass(frozen=True, slots=True)
class Place:
    """The system, and its people."""

    system: own.Own
    world: world.World


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Place]:
    """On free ports, in a folder of its own; everybody has what they have."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netra-prove-")))
        providers = folder / "providers.json"
        system = own.Own(
            folder / "netra", {"auth": {"NETRA_OIDC_PROVIDERS": str(providers)}}, NETRA_TRUSTED_PROXIES="127.0.0.0/8",
            NETRA_CALLS_PER_ADDRESS="1000000", NETRA_SUCCESSES_PER_ACCOUNT="100000", NETRA_ANONYMOUS_PER_MINUTE="1000000",
        )  # fmt: skip
        callback = f"http://127.0.0.1:{system.ports['gateway']}/auth/oidc/callback"
        provider = stack.enter_context(oidc.provider(callback))
        oidc.write(providers, corp=provider.entry(create_users=True, tier="internal", redirects=[PAGE]))
        providers.chmod(0o600)
        await asyncio.to_thread(system.start)
        stack.push_async_callback(asyncio.to_thread, system.stop)
        found = await stack.enter_async_context(world.around(system, provider=provider))
        await settle.everybody(found)
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}"))
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(people.renew(auth_pb2_grpc.AuthServiceStub(channel), list(found.parties.values())))
            try:
                yield Place(system, found)
            finally:
                renewing.cancel()
