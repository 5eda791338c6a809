"""Every frame gets exactly one answer, and a wrong one says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import websockets

from netra import ids
from tests.fixtures import sockets
from tests.fixtures.stack import System
from tests.fixtures.users import NewUser

WRONG: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ("{", "BAD_JSON"),
    "nothing": ("", "BAD_JSON"),
    "NaN": ('{"type":"PING","id":"a","payload":NaN}', "BAD_JSON"),
    "Infinity": ('{"type":"PING","id":"a","payload":-Infinity}', "BAD_JSON"),
    "a list": ("[]", "NOT_AN_OBJECT"),
    "a text": ('"PING"', "NOT_AN_OBJECT"),
    "a key twice": ('{"type":"PING","id":"a","id":"b"}', "DUPLICATE_KEY"),
    "a key twice inside": ('{"type":"PING","id":"a","payload":{"x":1,"x":2}}', "DUPLICATE_KEY"),
    "binary": (b'{"type":"PING"}', "BINARY_NOT_SUPPORTED"),
    "too large": (json.dumps({"type": "PING", "id": "a", "payload": "x" * 70_000}), "FRAME_TOO_LARGE"),
    "a number out of range": ('{"type":"PING","id":"a","payload":18446744073709551616}', "BAD_JSON"),
    "half a surrogate pair": ('{"type":"PING","id":"a","payload":"\\ud800"}', "BAD_JSON"),
    "too deep": ('{"type":"PING","id":"a","payload":' + "[" * 40 + "]" * 40 + "}", "INVALID_PAYLOAD"),
    "no type": ('{"id":"a"}', "INVALID_PAYLOAD"),
    "unknown type": ('{"type":"DANCE","id":"a"}', "UNKNOWN_TYPE"),
    "type is a number": ('{"type":7,"id":"a"}', "INVALID_PAYLOAD"),
    "id is a number": ('{"type":"PING","id":7}', "INVALID_PAYLOAD"),
    "id too long": (json.dumps({"type": "PING", "id": "x" * 65}), "INVALID_PAYLOAD"),
    "payload is a list": ('{"type":"START_AGENT","id":"a","payload":[]}', "INVALID_PAYLOAD"),
    "no request": ('{"type":"START_AGENT","id":"a","payload":{}}', "INVALID_PAYLOAD"),
    "blank request": ('{"type":"START_AGENT","id":"a","payload":{"user_request":"  "}}', "INVALID_PAYLOAD"),
    "request is a number": ('{"type":"START_AGENT","id":"a","payload":{"user_request":7}}', "INVALID_PAYLOAD"),
    "a foreign user": ('{"type":"START_AGENT","id":"a","payload":{"user_request":"x","user_id":"me"}}', "INVALID_PAYLOAD"),
    "a role": ('{"type":"START_AGENT","id":"a","payload":{"user_request":"x","roles":["admin"]}}', "INVALID_PAYLOAD"),
    "unknown agent": ('{"type":"START_AGENT","id":"a","payload":{"user_request":"x","agent":"nobody"}}', "NOT_FOUND"),
    "unknown run": (json.dumps({"type": "CANCEL", "id": "a", "payload": {"run_id": ids.uuid7()}}), "NOT_FOUND"),
    "no run": ('{"type":"CANCEL","id":"a","payload":{}}', "INVALID_PAYLOAD"),
    "unknown thread": (
        json.dumps({"type": "CHAT", "id": "a", "thread_id": ids.uuid7(), "payload": {"text": "x"}}),
        "NOT_FOUND",
    ),
    "empty message": ('{"type":"CHAT","id":"a","payload":{"text":""}}', "INVALID_PAYLOAD"),
    "negative cursor": ('{"type":"RESUME","id":"a","payload":{"after":-1}}', "INVALID_PAYLOAD"),
    "a key of prototypes": ('{"type":"PING","id":"a","payload":{"__proto__":{}}}', "INVALID_PAYLOAD"),
    "a subscription to nothing": ('{"type":"SUBSCRIBE","id":"a","payload":{"types":"all"}}', "INVALID_PAYLOAD"),
    "no such subscription": (json.dumps({"type": "UNSUBSCRIBE", "id": "a", "payload": {"subscription_id": ids.uuid7()}}), "NOT_FOUND"),
    "no such method": ('{"type":"STREAM","id":"a","payload":{"method":"x"}}', "NOT_FOUND"),
    "no such stream": (json.dumps({"type": "STREAM_CANCEL", "id": "a", "payload": {"stream_id": ids.uuid7()}}), "NOT_FOUND"),
    "a bad token": ('{"type":"AUTH","id":"a","payload":{"access_token":"x"}}', "UNAUTHENTICATED"),
}


def _usable_id(text: str | bytes) -> str | None:
    # written anew: what a client that sent this would look for
    if isinstance(text, bytes) or '"id":"a","id":"b"' in text:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and len(found) <= 64 else None


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_frame_is_answered_and_harms_nothing(system: System, new_user: NewUser, name: str) -> None:
    text, code = WRONG[name]
    async with sockets.opened(system, new_user()) as socket:
        await socket.connection.send(text)
        error = await socket.next()
        # one answer and no other: whatever was said of the frame is there before the pong of a later one
        pong = await socket.ask("PING", {"still": "here"})
        assert pong["payload"] == {"still": "here"}
        assert socket.frames[1:] == [error, pong]
        assert (error["type"], error["code"], error["id"]) == ("error", code, _usable_id(text)), error
        assert error["message"]
        assert len(error["correlation_id"]) == 32


@pytest.mark.parametrize("kind", ["start_agent", "START_AGENT", "execute_agent"])
async def test_types_are_accepted_in_either_case_and_aliases_are_warned_of(system: System, new_user: NewUser, kind: str) -> None:
    async with sockets.opened(system, new_user()) as socket:
        ack = await socket.ask(kind, {"agent": "text-analyst", "user_request": "Some text."})
        assert ack["type"] == "ack", ack
        await socket.ended(ack["data"]["run_id"])
    warned = any(frame["type"] == "warning" for frame in socket.frames)
    assert warned == (kind == "execute_agent")


async def test_the_same_frame_twice_is_one_run(system: System, new_user: NewUser) -> None:
    frame: dict[str, Any] = {"agent": "text-analyst", "user_request": "Some text."}
    async with sockets.opened(system, new_user()) as socket:
        first = await socket.ask("START_AGENT", frame, id="same")
        again = await socket.ask("START_AGENT", frame, id="same")
        other = await socket.ask("START_AGENT", {**frame, "user_request": "Other text."}, id="same")
    assert first["data"]["run_id"] == again["data"]["run_id"]
    assert (other["type"], other["code"]) == ("error", "ALREADY_EXISTS")


async def test_a_frame_without_an_id_gets_one(system: System, new_user: NewUser) -> None:
    async with sockets.opened(system, new_user()) as socket:
        await socket.connection.send('{"type":"PING","payload":1}')
        assert (await socket.until(type="pong"))["id"]


async def test_one_socket_too_many_is_closed_with_its_code(system: System, new_user: NewUser) -> None:
    user = new_user(tier="free")
    async with sockets.opened(system, user), sockets.opened(system, user), sockets.opened(system, user):
        url = f"ws://127.0.0.1:{system.ports['gateway']}/ws"
        async with websockets.connect(url, additional_headers={"Authorization": f"Bearer {user.token}"}) as fourth:
            assert await sockets.Socket(fourth).closed() == 4529


async def test_a_newer_socket_of_the_same_client_replaces_the_old(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with sockets.opened(system, user, "client.tab1") as old, sockets.opened(system, user, "client.tab1"):
        assert await old.closed() == 4504
