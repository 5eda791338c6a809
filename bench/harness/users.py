"""Users of a measurement: signed in, of the tier that has the highest limits."""

from __future__ import annotations

import grpc

from chassis import channel
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from standalone import processes, supervise


async def signed_in(running: supervise.Stack, many: int) -> tuple[channel.Metadata, list[str]]:
    """The dispatcher's metadata, and access tokens of so many users."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.ports['auth']}") as to:
        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(to)

        async def token(request: auth_pb2.IssueTokenRequest) -> str:
            return (await auth.IssueToken(request, wait_for_ready=True)).tokens.access_token

        async def of(email: str, password: str) -> str:
            return await token(auth_pb2.IssueTokenRequest(password=auth_pb2.PasswordGrant(email=email, password=password)))

        def secret(service: str, name: str) -> str:
            return (running.place.secrets / service / name).read_text().strip()

        admin, people = channel.bearer(await of(processes.BOOTSTRAP_ADMIN, secret("auth", "bootstrap_admin"))), []
        for number in range(many):
            email, password = f"{number}@bench.example", "a good password of a bench"
            wanted = auth_pb2.CreateUserRequest(email=email, password=password, roles=["user"], tier="internal")
            await auth.CreateUser(wanted, metadata=admin)
            people.append(await of(email, password))
        mine = auth_pb2.ClientCredentialsGrant(client_id="dispatcher", client_secret=secret("dispatcher", "service"))
        return channel.bearer(await token(auth_pb2.IssueTokenRequest(client_credentials=mine))), people
