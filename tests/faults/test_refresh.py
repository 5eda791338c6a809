"""Twenty race for each of fifty refresh tokens, also while auth is killed: one child each; one used again ends the session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable

import grpc
import httpx
import pytest

from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User, sign_in

TOKENS, RACERS, USERS = 50, 20, 5
SESSION_REVOKED = 4509
_AWAY = (502, 503, 504)
Refresh = Callable[[str], Awaitable[str]]
# runs where auth has its settings and secrets: how many tokens the sessions have, and how many of them are not used
_COUNT = """
import asyncio, json, sys
from chassis import postgres
from services.auth.settings import AuthSettings
async def count(users):
    settings = AuthSettings.load()
    async with postgres.connection(settings.postgres_dsn("netra_auth_system", "postgres_system")) as database:
        rows = await database.fetch(
            "SELECT count(*) AS every, count(*) FILTER (WHERE used_at IS NULL) AS unused"
            " FROM auth.refresh_tokens WHERE user_id = ANY($1::uuid[]) GROUP BY session_id", users)
    print(json.dumps([[row["every"], row["unused"]] for row in rows]))
"""


def _kept(system: System, users: Iterable[User]) -> list[list[int]]:
    """Per session: all its refresh tokens, and those of them that are not used."""
    found: list[list[int]] = json.loads(system.python("auth", f"{_COUNT}\nasyncio.run(count({[user.user_id for user in users]!r}))"))
    return found


def _sessions(system: System, users: Iterable[User], each: int) -> list[str]:
    """Refresh tokens of so many sessions of each user."""
    with grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}") as channel:
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        return [sign_in(stub, user.email, user.password).refresh_token for user in users for _ in range(each)]


async def _asked(client: httpx.AsyncClient, token: str) -> httpx.Response:
    """The answer of auth, once it is there."""
    answer = await client.post("/auth/refresh", json={"refresh_token": token})
    while answer.status_code in _AWAY:
        answer = await client.post("/auth/refresh", json={"refresh_token": token})
    return answer


def _over_http(client: httpx.AsyncClient) -> Refresh:
    async def refresh(token: str) -> str:
        answer = await _asked(client, token)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["refresh_token"])

    return refresh


def _over_rpc(channel: grpc.aio.Channel) -> Refresh:
    stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(channel)

    async def refresh(token: str) -> str:
        request = auth_pb2.RefreshTokenRequest(refresh_token=token)
        while True:
            try:
                return (await stub.RefreshToken(request, wait_for_ready=True, timeout=30)).tokens.refresh_token
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    return refresh


async def _race(tokens: list[str], ways: list[Refresh]) -> dict[str, set[str]]:
    """For each token the children that its racers were given."""

    async def one(token: str) -> tuple[str, set[str]]:
        return token, set(await asyncio.gather(*(ways[racer % len(ways)](token) for racer in range(RACERS))))

    # ten tokens at a time: two hundred racers
    found: dict[str, set[str]] = {}
    for start in range(0, len(tokens), 10):
        found |= dict(await asyncio.gather(*(one(token) for token in tokens[start : start + 10])))
    return found


@pytest.mark.parametrize("killed", [False, True], ids=["in peace", "while auth is killed"])
async def test_of_twenty_racers_for_each_of_fifty_tokens_all_get_its_one_child(system: System, new_user: NewUser, killed: bool) -> None:
    users = [await asyncio.to_thread(new_user) for _ in range(USERS)]
    tokens = await asyncio.to_thread(_sessions, system, users, TOKENS // USERS)
    limits = httpx.Limits(max_connections=60, keepalive_expiry=2.0)
    async with (
        web.client(base_url=gateway_url(system), limits=limits, timeout=60) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['auth']}") as channel,
        asyncio.TaskGroup() as group,
    ):
        racing = group.create_task(_race(tokens, [_over_http(client), _over_rpc(channel)]))
        if killed:
            await asyncio.to_thread(system.kill, "auth")
            await asyncio.to_thread(system.restarted, "auth")
        children = await racing
    assert {len(each) for each in children.values()} == {1}
    assert len(set.union(*children.values())) == TOKENS
    # of each session the one that was raced for, and its one child; the user's first session was in no race
    assert sorted(await asyncio.to_thread(_kept, system, users)) == [[1, 1]] * USERS + [[2, 1]] * TOKENS


async def test_one_used_again_after_a_kill_is_refused_and_ends_the_session(system: System, new_user: NewUser) -> None:
    user = await asyncio.to_thread(new_user)
    async with web.client(base_url=gateway_url(system), timeout=60) as client, sockets.opened(system, user) as socket:
        refresh = _over_http(client)
        child = await refresh(user.refresh_token)
        last = await refresh(child)
        await asyncio.to_thread(system.kill, "auth")
        await asyncio.to_thread(system.restarted, "auth")
        for token in (user.refresh_token, child, last):
            answer = await _asked(client, token)
            assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")
        # by whatever it was known before
        assert await socket.closed() == SESSION_REVOKED
        me = await client.get("/v1/me", headers={"Authorization": f"Bearer {user.token}"})
        assert (me.status_code, me.json()["code"]) == (401, "UNAUTHENTICATED")
