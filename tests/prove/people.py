"""Users of a system under proof, signed in for as long as it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from netra.auth.v1 import auth_pb2_grpc
from tests.fixtures import users

# a token lasts ten minutes
_RENEW_S, _RETRY_S = 240.0, 1.0


@dataclass(slots=True)
class Person:
    """A user, with a token that is good now."""

    user: users.User
    token: str

    @property
    def user_id(self) -> str:
        """Who it is."""
        return self.user.user_id

    @property
    def bearer(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata of their calls."""
        return (("authorization", f"Bearer {self.token}"),)


async def renew(stub: auth_pb2_grpc.AuthServiceStub, people: Sequence[Person]) -> None:
    """Sign them in again before their tokens end, for ever; through outages of what auth needs."""
    while True:
        await asyncio.sleep(_RENEW_S)
        for person in people:
            while True:
                try:
                    person.token = (await asyncio.to_thread(users.sign_in, stub, person.user.email, person.user.password)).access_token
                    break
                except grpc.RpcError:
                    await asyncio.sleep(_RETRY_S)
