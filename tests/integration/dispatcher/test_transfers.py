"""Artifacts in and out of the dispatcher while the context service is not at its best."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis import channel
from netra import errors
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.dispatcher import upstreams

CONTENT = random.Random(7).randbytes(2_500_000)
PIECE = 64 * 1024


class Failing(context_pb2_grpc.ContextServiceServicer):
    """A context service that goes away in the middle of its first `failures` calls."""

    def __init__(self, failures: int, sha256: str) -> None:
        self._failures = failures
        self._told = sha256 or hashlib.sha256(CONTENT).hexdigest()
        self.offsets: list[int] = []
        self.uploads: list[tuple[str, bytes]] = []

    async def GetArtifact(self, request: context_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[context_pb2.GetArtifactResponse]:
        """The content, or the first part of it."""
        self.offsets.append(request.offset)
        told = context_pb2.Artifact(artifact_id="a", name="log.csv", media_type="text/csv", size=len(CONTENT), sha256=self._told)
        yield context_pb2.GetArtifactResponse(artifact=told)
        for at in range(request.offset, len(CONTENT), PIECE):
            if len(self.offsets) <= self._failures and at > request.offset + 1_200_000:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield context_pb2.GetArtifactResponse(data=CONTENT[at : at + PIECE])

    async def PutArtifact(self, request_iterator: Any, context: Any) -> context_pb2.PutArtifactResponse:
        """Take it, or some of it."""
        content, request_id = b"", ""
        async for part in request_iterator:
            request_id = request_id or part.header.request_id
            content += part.data
            if len(self.uploads) < self._failures and len(content) > 1_200_000:
                self.uploads.append((request_id, content))
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        self.uploads.append((request_id, content))
        return context_pb2.PutArtifactResponse(artifact=context_pb2.Artifact(artifact_id="a", size=len(content)))


@contextlib.asynccontextmanager
async def artifacts(failures: int, *, sha256: str = "") -> AsyncIterator[tuple[Failing, upstreams.Artifacts]]:
    """Such a service, and the dispatcher's side of it."""
    service = Failing(failures, sha256)  # type: ignore[abstract]
    server = grpc.aio.server()
    context_pb2_grpc.add_ContextServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with channel.connect(f"127.0.0.1:{port}") as connected:
            yield service, upstreams.Artifacts(connected)
    finally:
        await server.stop(None)


async def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async with artifacts(2) as (service, ours):
        found = await ours.fetch("token", "a", tmp_path / "log")
    assert (_read(tmp_path / "log") == CONTENT, found.size) == (True, len(CONTENT))
    assert service.offsets[0] == 0
    assert service.offsets == sorted(set(service.offsets))
    assert len(service.offsets) == 3


async def test_what_did_not_come_whole_is_not_left_behind(tmp_path: Path) -> None:
    async with artifacts(0, sha256="0" * 64) as (_, ours):
        with pytest.raises(errors.Internal, match="as it was kept"):
            await ours.fetch("token", "a", tmp_path / "log")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("from_file", [True, False])
async def test_an_upload_is_sent_again_as_the_same_request(tmp_path: Path, from_file: bool) -> None:
    content: Path | bytes = _written(tmp_path / "log") if from_file else CONTENT
    async with artifacts(2) as (service, ours):
        kept = await ours.keep("token", "r-1", "log.csv", "text/csv", content)
    assert kept.size == len(CONTENT)
    assert {request_id for request_id, _ in service.uploads} == {"r-1"}
    assert [content == CONTENT for _, content in service.uploads] == [False, False, True]


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _written(path: Path) -> Path:
    path.write_bytes(CONTENT)
    return path
