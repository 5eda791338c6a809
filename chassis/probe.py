"""python -m chassis.probe TARGET: exit 0 when a gRPC server (HOST:PORT) is SERVING, or an http:// address answers 200."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 3.0


def _http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the operator's own address
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


def _grpc_serving(target: str) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with grpc.insecure_channel(target) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    target = sys.argv[1]
    sys.exit(0 if (_http_ok(target) if target.startswith("http://") else _grpc_serving(target)) else 1)
