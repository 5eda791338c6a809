"""What the handshake asks for, who may come from where, and how many."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import identity
from gateway import app, close_codes, problems, router, sockets
from gateway.settings import GatewaySettings
from netra import errors, ids
from netra.auth.v1 import auth_pb2

_TOKEN = "aaa.bbb.ccc"


def test_the_token_comes_as_a_subprotocol_or_a_header() -> None:
    offered = app.hello({}, ["netra.v1", f"bearer.{_TOKEN}", "resume.41", "client.tab-1"], "")
    assert offered == app.Hello(_TOKEN, "netra.v1", 41, "tab-1")
    assert app.hello({"authorization": f"Bearer {_TOKEN}"}, [], "") == app.Hello(_TOKEN, None, None, "")


@pytest.mark.parametrize(
    ("offered", "query"),
    [
        (["netra.v1", f"bearer.{_TOKEN}"], f"access_token={_TOKEN}"),
        (["netra.v2", f"bearer.{_TOKEN}"], ""),
        (["netra.v1", f"bearer.{_TOKEN}", "resume.-1"], ""),
        (["netra.v1", f"bearer.{_TOKEN}", "resume.1", "resume.2"], ""),
        (["netra.v1", f"bearer.{_TOKEN}", "resume." + "9" * 30], ""),
        (["netra.v1", f"bearer.{_TOKEN}", "client." + "x" * 65], ""),
    ],
)
def test_a_handshake_that_is_wrong_is_refused(offered: list[str], query: str) -> None:
    with pytest.raises(errors.InvalidPayload):
        app.hello({}, offered, query)


def test_no_token_is_unauthenticated() -> None:
    with pytest.raises(errors.Unauthenticated):
        app.hello({}, ["netra.v1"], "")


@pytest.mark.parametrize(
    ("env", "origin", "allowed"),
    [
        ("dev", "http://localhost:5173", True),
        ("dev", "http://127.0.0.1:80", True),
        ("dev", "http://localhost.evil.example", False),
        ("dev", "http://localhost:1/x", False),
        ("prod", "http://localhost:5173", False),
        ("prod", "https://app.example", True),
        ("prod", "https://app.example.evil.example", False),
        ("prod", "null", False),
    ],
)
def test_origins(env: str, origin: str, allowed: bool) -> None:
    settings = GatewaySettings.model_validate({"env": env, "allowed_origins": "https://app.example, https://two.example"})
    assert settings.allows(origin) is allowed


@pytest.mark.parametrize("name", ["token", "access_token", "Access_Token", "jwt"])
def test_tokens_are_refused_in_addresses(name: str) -> None:
    with pytest.raises(errors.InvalidPayload):
        problems.refuse_tokens_in([("a", "b"), (name, "x")])


def _principal(user: ids.UserId, session: str = "01890a5d-ac96-774b-bcce-b302099a8057") -> identity.Principal:
    return identity.Principal(user, ids.TenantId.new(), ids.SessionId(session), ("user",), "free", 0.0, "token")


@dataclass(eq=False)
class _Socket:
    principal: identity.Principal
    client_id: str = ""
    connection_id: ids.ConnectionId = field(default_factory=ids.ConnectionId.new)
    ended: list[close_codes.Close] = field(default_factory=list)

    def end(self, close: close_codes.Close) -> None:
        self.ended.append(close)

    def drain(self) -> None:
        self.end(close_codes.DRAINING)


async def test_a_user_has_a_few_sockets_and_others_are_not_counted() -> None:
    manager, user = sockets.UnifiedWebSocketManager(lambda _: 2), ids.UserId.new()
    for one in (_Socket(_principal(user)), _Socket(_principal(user)), _Socket(_principal(ids.UserId.new()))):
        await manager.admit(one)
    with pytest.raises(sockets.TooMany):
        await manager.admit(_Socket(_principal(user)))
    assert (len(manager), manager.open_for(user)) == (3, 2)


async def test_a_client_replaces_its_own_socket() -> None:
    manager, user = sockets.UnifiedWebSocketManager(lambda _: 1), ids.UserId.new()
    older, newer = _Socket(_principal(user), "tab"), _Socket(_principal(user), "tab")
    await manager.admit(older)
    await manager.admit(newer)
    assert (older.ended, newer.ended, len(manager)) == ([close_codes.REPLACED], [], 1)
    manager.remove(older)
    assert len(manager) == 1


class _Elsewhere:
    """What other gateways have."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits
        self.entered: list[tuple[str, int]] = []
        self.left: list[str] = []

    async def enter(self, user_id: ids.UserId, connection_id: str, client_id: str, most: int) -> bool:
        self.entered.append((client_id, most))
        return self.fits

    def leave(self, connection_id: str) -> None:
        self.left.append(connection_id)


async def test_the_sockets_at_other_gateways_count() -> None:
    full = _Elsewhere(fits=False)
    manager, one = sockets.UnifiedWebSocketManager(lambda _: 3, full), _Socket(_principal(ids.UserId.new()), "tab")
    with pytest.raises(sockets.TooMany):
        await manager.admit(one)
    assert (len(manager), full.entered, full.left) == (0, [("tab", 3)], [one.connection_id])


async def test_a_socket_that_was_replaced_elsewhere_is_closed() -> None:
    elsewhere = _Elsewhere(fits=True)
    manager, one, other = sockets.UnifiedWebSocketManager(lambda _: 3, elsewhere), *(_Socket(_principal(ids.UserId.new())) for _ in "ab")
    await manager.admit(one)
    await manager.admit(other)
    manager.replaced(one.connection_id)
    manager.replaced("unknown")
    assert (one.ended, other.ended, len(manager)) == ([close_codes.REPLACED], [], 1)
    assert elsewhere.left == [one.connection_id]


async def test_a_gateway_that_drains_admits_nobody_and_waits_for_the_last() -> None:
    manager = sockets.UnifiedWebSocketManager(lambda _: 3)
    one, other = _Socket(_principal(ids.UserId.new())), _Socket(_principal(ids.UserId.new()))
    await manager.admit(one)
    await manager.admit(other)
    async with asyncio.timeout(2), asyncio.TaskGroup() as group:
        draining = group.create_task(manager.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(errors.Unavailable):
            await manager.admit(_Socket(_principal(ids.UserId.new())))
        manager.remove(one)
        await asyncio.sleep(0)
        assert not draining.done()
        manager.remove(other)


async def test_a_revocation_closes_the_sockets_of_that_session_only() -> None:
    manager, user = sockets.UnifiedWebSocketManager(lambda _: 3), ids.UserId.new()
    gone, kept = _Socket(_principal(user)), _Socket(_principal(user, ids.SessionId.new()))
    await manager.admit(gone)
    await manager.admit(kept)
    manager.revoked(auth_pb2.Revocation(session_id=gone.principal.session_id))
    assert (gone.ended, kept.ended) == ([close_codes.REVOKED], [])


async def test_the_revocation_of_a_user_closes_the_sockets_that_were_there_before() -> None:
    manager, user = sockets.UnifiedWebSocketManager(lambda _: 3), ids.UserId.new()
    old, fresh, other = _Socket(_principal(user)), _Socket(_principal(user)), _Socket(_principal(ids.UserId.new()))
    old.principal, fresh.principal = replace(old.principal, issued_at=100.0), replace(fresh.principal, issued_at=300.0)
    for socket in (old, fresh, other):
        await manager.admit(socket)
    manager.revoked(auth_pb2.Revocation(user_id=user, revoked_at=Timestamp(seconds=200)))
    assert (old.ended, fresh.ended, other.ended) == ([close_codes.REVOKED], [], [])


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, "payload.user_request"),
        ({"user_request": "  "}, "payload.user_request"),
        ({"user_request": 7}, "payload.user_request"),
        ({"user_request": "a\x00b"}, "payload.user_request"),
        ({"user_request": "x", "inputs": []}, "payload.inputs"),
        ({"user_request": "x", "agent": 7}, "payload.agent"),
        ({"user_request": "x", "thread_id": "x"}, "payload.thread_id"),
        ({"user_request": "x", "on_busy": "undo"}, "payload.on_busy"),
        ({"user_request": "x", "deadline_s": 0}, "payload.deadline_s"),
        ({"user_request": "x", "deadline_s": True}, "payload.deadline_s"),
    ],
)
def test_start_agent_names_the_field_that_is_wrong(payload: dict[str, object], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        router.start_run(payload, "", "r1")
    assert caught.value.details["field"] == field


def test_start_agent_becomes_start_run() -> None:
    request = router.start_run({"user_request": "x", "inputs": {"a": 1}, "on_busy": "reject", "deadline_s": 1.5}, "", "r1", "c1")
    assert (request.request_id, request.agent, request.inputs, request.connection_id) == ("r1", "", b'{"a":1}', "c1")
    assert request.deadline.ToMilliseconds() == 1500


@pytest.mark.parametrize("name", ["message", "content", "text"])
def test_a_message_has_three_names_and_a_limit(name: str) -> None:
    assert router.message({name: "hello"}, "", "r1").user_request == "hello"
    with pytest.raises(errors.TooLarge):
        router.message({name: "x" * 8193}, "", "r1")
