"""Typed stubs of the services this one calls: auth."""

from __future__ import annotations

from chassis import channel, status, tls
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_PUBLISH_TIMEOUT_S = 5.0
_RESOLVE_TIMEOUT_S = 5.0


class Auth:
    """The auth service, called with this process's own service token."""

    def __init__(self, target: str, secret: str, certificates: tls.Certificates | None = None) -> None:
        self._channel = channel.connect(target, certificates=certificates, name="auth")
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self._channel)
        self.credentials = channel.ServiceCredentials("context", secret, self.stub)

    async def publish(self, kid: str, public_key: bytes) -> None:
        """Have a verification key published. Raises `NetraError`."""
        request = auth_pb2.PublishKeyRequest(kid=kid, public_key=public_key)
        with status.translated():
            await self.stub.PublishKey(request, metadata=await self.credentials(), timeout=_PUBLISH_TIMEOUT_S)

    async def resolve(self, tenant_id: ids.TenantId, user_id: str, email: str) -> ids.UserId:
        """An active user of a tenant by id or e-mail address. Raises `NotFound`, the same for all that are none, and `Unavailable`."""
        request = auth_pb2.ResolveUserRequest(tenant_id=tenant_id)
        if user_id:
            request.user_id = user_id
        else:
            request.email = email
        with status.translated():
            answer = await self.stub.ResolveUser(request, metadata=await self.credentials(), timeout=_RESOLVE_TIMEOUT_S)
        return ids.UserId(answer.user_id)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
