"""python -m chassis.probe TARGET: exit 0 when a gRPC server (HOST:PORT) is SERVING, or an http:// address answers 200."""

from __future__ import annotations

import http.client
import sys
import urllib.request
from typing import Any

_TIMEOUT_S = 3.0


def answers(target: str) -> bool:
    """Whether the process behind `target` says it is well."""
    return _http_ok(target) if target.startswith("http://") else _grpc_serving(target)


def _http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the operator's own address
            return bool(answer.status == http.HTTPStatus.OK)
    except (OSError, http.client.HTTPException):
        return False


def _grpc_serving(address: str) -> bool:
    # the probe of an HTTP address must not pay for loading gRPC
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with _channel(address) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _channel(address: str) -> Any:
    import grpc

    from chassis import environment

    if not environment.get_environment().get("NETRA_TLS_CERT"):
        return grpc.insecure_channel(address)
    # loaded only where it is used: the probe must stay light
    from chassis import tls

    credentials, name = tls.probe()
    return grpc.secure_channel(address, credentials, (("grpc.ssl_target_name_override", name),))


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) else 1)
