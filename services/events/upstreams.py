"""Typed stubs of the services this one calls: auth, for whom to trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from chassis import channel, tls
from netra.auth.v1 import auth_pb2_grpc

if TYPE_CHECKING:
    from netra.auth.v1.auth_pb2_grpc import AuthServiceAsyncStub


class Auth:
    """The auth service."""

    def __init__(self, target: str, certificates: tls.Certificates | None = None) -> None:
        self._channel: grpc.aio.Channel = channel.connect(target, certificates=certificates, name="auth")
        self.stub: AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
