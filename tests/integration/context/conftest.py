"""What tests of the context service in this process share: files of users, put and got."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import channel, postgres, status
from netra import errors, ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User

CHUNK, PIECE = 1024 * 1024, 64 * 1024
Parts = AsyncIterator[context_pb2.PutArtifactRequest]


def content(size: int) -> bytes:
    """Bytes that are the same each time."""
    return random.Random(size).randbytes(size)


def header_of(**more: Any) -> context_pb2.PutArtifactRequest:
    """The first part of an upload."""
    told = {"request_id": ids.uuid7(), "name": "log.csv", "media_type": "text/csv"} | more
    return context_pb2.PutArtifactRequest(header=context_pb2.ArtifactHeader(**told))


async def parts_of(data: bytes, piece: int = PIECE, *, end: bool = True, **more: Any) -> Parts:
    """An upload."""
    yield header_of(**more)
    for at in range(0, len(data), piece):
        yield context_pb2.PutArtifactRequest(data=data[at : at + piece])
    if end:
        yield context_pb2.PutArtifactRequest(end=True)


class Artifacts:
    """Calls the context service, as users and as the dispatcher."""

    def __init__(self, services: Services, dispatcher: channel.Metadata) -> None:
        self.services, self._dispatcher = services, dispatcher
        to = channel.connect(f"127.0.0.1:{services.ports['context']}")
        services.stack.push_async_callback(to.close)
        self.stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to)

    async def within(self, user: User) -> tuple[channel.Metadata, str]:
        """Metadata of the dispatcher's calls in a new context of the user, and its run."""
        metadata, frame = await self.opened(user)
        return metadata, frame.run_id

    async def opened(self, user: User, thread_id: str = "") -> tuple[channel.Metadata, context_pb2.ExecutionContext]:
        """Metadata of the dispatcher's calls in a new context of the user, and the context."""
        request = context_pb2.OpenContextRequest(
            request_id=ids.uuid7(), run_id=ids.RunId.new(), access_token=user.token, agent_context=b"{}", thread_id=thread_id
        )
        opened = await self.stub.OpenContext(request, metadata=self._dispatcher, wait_for_ready=True)
        return (*self._dispatcher, ("x-netra-context", opened.context_token)), opened.context

    async def put(self, user: User, data: bytes, piece: int = PIECE, **more: Any) -> context_pb2.Artifact:
        """Upload as a user."""
        return (await self.stub.PutArtifact(parts_of(data, piece, **more), metadata=user.bearer)).artifact

    async def get(self, metadata: channel.Metadata, artifact_id: str, offset: int = 0) -> tuple[context_pb2.Artifact, bytes]:
        """Download."""
        request = context_pb2.GetArtifactRequest(artifact_id=artifact_id, offset=offset)
        parts = [part async for part in self.stub.GetArtifact(request, metadata=metadata)]
        assert all(part.WhichOneof("part") == "data" and 0 < len(part.data) <= PIECE for part in parts[1:])
        return parts[0].artifact, b"".join(part.data for part in parts[1:])

    async def listed(self, user: User, size: int = 0, page: str = "", thread_id: str = "") -> context_pb2.ListArtifactsResponse:
        """One page of a user's artifacts, or of a thread's."""
        wanted = context_pb2.ListArtifactsRequest(page_size=size, page_token=page, thread_id=thread_id)
        return await self.stub.ListArtifacts(wanted, metadata=user.bearer)

    async def delete(self, user: User, artifact_id: str) -> None:
        """Delete as a user."""
        await self.stub.DeleteArtifact(context_pb2.DeleteArtifactRequest(artifact_id=artifact_id), metadata=user.bearer)


Start = Callable[..., Awaitable[Artifacts]]


@pytest.fixture
def start(services: Services) -> Start:
    """Auth and context with these settings, serving."""

    async def start(**more: Any) -> Artifacts:
        await services.auth()
        await services.context(**more)
        health: Any = health_pb2_grpc.HealthStub(services.channel("context"))
        async with asyncio.timeout(10):
            async for answer in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        return Artifacts(services, await services.service_token("dispatcher"))

    return start


@pytest.fixture
async def artifacts(start: Start) -> Artifacts:
    """Auth and context, serving."""
    return await start()


@pytest.fixture
async def admin(stores: Standalone, database: str) -> AsyncIterator[postgres.Transaction]:
    """The database itself, past every wall."""
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as connection:
        yield connection


async def error_of(call: Awaitable[Any]) -> errors.NetraError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return status.from_rpc(caught.value)


async def until(found: Callable[[], Awaitable[bool]]) -> None:
    """Returns when something has come to hold."""
    async with asyncio.timeout(10):
        while not await found():  # noqa: ASYNC110 - of the database, nobody says when
            await asyncio.sleep(0.02)


async def nothing_left(admin: postgres.Transaction, complete: int = 0) -> None:
    """Waits until only complete files are stored, and no chunk of another one."""
    query = (
        "SELECT (SELECT count(*) FROM context.artifacts), (SELECT count(*) FROM context.artifacts WHERE state = 'complete'),"
        " (SELECT count(*) FROM context.artifact_chunks LEFT JOIN context.artifacts USING (artifact_id)"
        "   WHERE state IS DISTINCT FROM 'complete')"
    )

    async def found() -> bool:
        return tuple(await admin.row(query) or ()) == (complete, complete, 0)

    await until(found)
