"""The probe that health checks of containers run, against a real gRPC server and a real HTTP one."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from chassis import probe

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(("status", "well"), [(SERVING, True), (NOT_SERVING, False)])
async def test_a_grpc_server_is_well_when_it_says_serving(status: int, well: bool) -> None:
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await servicer.set("", status)
    assert await asyncio.to_thread(probe.answers, f"127.0.0.1:{port}") is well
    await server.stop(0)
    assert not await asyncio.to_thread(probe.answers, f"127.0.0.1:{port}")


async def test_a_grpc_server_without_health_is_not_well() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert not await asyncio.to_thread(probe.answers, f"127.0.0.1:{port}")
    await server.stop(0)


@pytest.mark.parametrize(
    ("answer", "well"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"", False),
        (b"\x00\xff\r\n", False),
    ],
)
async def test_an_http_server_is_well_when_it_answers_200(answer: bytes, well: bool) -> None:
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(probe.answers, f"http://127.0.0.1:{port}/readyz") is well
    assert requests[0].startswith(b"GET /readyz HTTP/1.1\r\n")
