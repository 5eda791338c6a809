"""Is a process ready: grpc.health.v1 for services, GET /readyz for the gateway."""

import asyncio
import contextlib
from typing import Any

from chassis import environment

TIMEOUT = 2.0


async def _port_open(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        return True
    return False


async def grpc_serving(host: str, port: int) -> bool:
    """True when the server as a whole says SERVING."""
    if not await _port_open(host, port):  # cheaper than a channel while nothing listens yet
        return False
    import grpc  # late: loads while the stores start
    from grpc_health.v1 import health_pb2

    async with channel(f"{host}:{port}") as to_service:
        check = to_service.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def channel(address: str) -> Any:
    """A channel to a service of this machine, with our certificate where there is one."""
    import grpc

    if not environment.get_environment().get("NETRA_TLS_CERT"):
        return grpc.aio.insecure_channel(address)
    from chassis import tls

    credentials, name = tls.probe()
    return grpc.aio.secure_channel(address, credentials, (("grpc.ssl_target_name_override", name),))


async def http_ready(host: str, port: int) -> bool:
    """True when GET /readyz answers 200."""
    request = f"GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request.encode())
                words = (await reader.readline()).split()
                return len(words) > 1 and words[1] == b"200"
            finally:
                writer.close()
    return False
