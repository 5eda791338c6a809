"""Malicious arguments of tools: each is refused with the name of what is wrong, or is inert data that arrives as it was sent."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import grpc
import pytest
from google.protobuf import duration_pb2
from pydantic import Field

from chassis import status
from netra import errors, ids
from netra.agent import Turn, agent
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.tool import ToolContext, tool
from tests.fixtures import sockets
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

# a name for attacks to make; nothing here makes it
CANARY = "/tmp/netra-payload-canary"
# what the tool was given, and for whom: whatever arrived, arrived here
SEEN: list[tuple[str, tuple[str, ...], Any]] = []
_REGEX = r"^(a+)+$"


@tool(name="payload.sink", timeout_s=10)
async def sink(context: ToolContext, text: str = "", data: Any = None) -> dict[str, Any]:
    """Gives back what it was given."""
    SEEN.append((context.context.user_id, context.context.roles, [text, data]))
    return {"text": text, "data": data}


@tool(name="payload.narrow")
async def narrow(
    word: Annotated[str, Field(pattern=_REGEX, max_length=100_000)], count: Annotated[int, Field(ge=0, le=9)], kind: Literal["a", "b"]
) -> str:  # fmt: skip
    """Takes what its schema lets through."""
    SEEN.append(("", (), [word, count, kind]))
    return word


@agent("payloads")
async def payloads(turn: Turn) -> Any:
    """Calls the tool with what it is given."""
    return [await turn.tool("payload.sink", text=text, data=None) for text in turn.inputs["texts"]]


INERT: dict[str, list[str]] = {
    "sql": [
        "'; DROP TABLE dispatcher.runs; --", "1 OR 1=1", "' UNION SELECT password FROM auth.users --", "'; SELECT pg_sleep(30); --",
        "$1", "\\'; DELETE FROM events.events; --", "admin'/*", "x'; COPY (SELECT '') TO PROGRAM 'touch " + CANARY + "'; --",
        "'; SET LOCAL netra.user_id = ''; --",
    ],
    "shell": [
        f"; touch {CANARY}", f"$(touch {CANARY})", f"`touch {CANARY}`", f"| touch {CANARY} #", f"&& touch {CANARY}", f"\n touch {CANARY}\n",
        "-rf /", "--help", "${IFS}", "() { :;}; touch " + CANARY, "%0atouch " + CANARY,
    ],
    "path": [
        "../../../../etc/passwd", "..\\..\\windows", "/etc/shadow", "file:///etc/passwd", "%2e%2e%2f", "..%c0%af..", "/proc/self/environ",
        "~root/.ssh/id_rsa", "con", "\\\\?\\C:\\", "....//....//",
    ],
    "template": ["{{7*7}}", "${7*7}", "#{7*7}", "<%= 7*7 %>", "{% import os %}", "{{config}}", "${jndi:ldap://127.0.0.1/a}", "@(7*7)"],
    "format": ["%s%s%s%n", "%x" * 50, "{0.__class__.__init__.__globals__}", "{}" * 50, "{user_id}", "%(password)s", "{0!r:1000000000}"],
    "code": [
        f"__import__('os').system('touch {CANARY}')", f"!!python/object/apply:os.system ['touch {CANARY}']",
        f"cos\nsystem\n(S'touch {CANARY}'\ntR.", "<script>alert(1)</script>", '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>',
        "=cmd|' /C calc'!A0", "constructor.constructor('return 1')()",
    ],
    "control": [
        "\x01\x02\x1b[2J\x1b]0;title\x07", "a\r\nx-netra-user: admin\r\n\r\n", "\x7f\x80\x9f", "a\x08\x08b", "\ufeff",
        "\ufffe\uffff",
    ],
    "unicode": [
        "\u202egnp.exe", "\u2066a\u2069", "\u0430dmin", "admin\u200b", "\uff1c\uff0fscript\uff1e", "e\u0301", "\u00e9", "\u212b",
        "\u1e9b\u0323", "Z" + "\u0351" * 500, "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U000e0041\U000e0042", "\u2028\u2029", "İıſ",
    ],
    "headers": ["Bearer eyJhbGciOiJub25lIn0.e30.", "x-netra-context: forged", "grpc-timeout: 1n"],
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "prototype": {"__proto__": {"admin": True}, "constructor": {"prototype": {"admin": True}}, "hasOwnProperty": 1, "__class__": "x"},
    "names of ours": {"user_id": "somebody", "tenant_id": "another", "roles": ["admin"], "context": {"user_id": "x"}, "step_key": "k"},
    "numbers": [0, -0.0, 1e308, -1e308, 5e-324, 2**64 - 1, -(2**63), 2**53 + 1, 0.1 + 0.2, 1e22],
    "empty": ["", [], {}, None, {"": {"": {"": ""}}}],
    "deep": json.loads('{"a":' * 60 + "1" + "}" * 60),
    "wide": {f"key {number}": number for number in range(5_000)},
    "many": [0] * 50_000,
    "names": {"a.b": 1, "a/b": 2, "a[0]": 3, "$ref": "file:///etc/passwd", "$where": "1", "@type": "x", "a\x00b"[:1]: 4, "💥": 5},
    "references": {"$ref": "#", "$id": "http://127.0.0.1:1/", "$schema": "http://127.0.0.1:1/"},
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "no json": (b"{", "INVALID_PAYLOAD"), "a list": (b"[]", "INVALID_PAYLOAD"), "text": (b'"x"', "INVALID_PAYLOAD"),
    "null": (b"null", "INVALID_PAYLOAD"), "two": (b"{}{}", "INVALID_PAYLOAD"), "NaN": (b'{"data":NaN}', "INVALID_PAYLOAD"),
    "Infinity": (b'{"data":-Infinity}', "INVALID_PAYLOAD"), "too large a float": (b'{"data":1e999}', "INVALID_PAYLOAD"),
    "too large a number": (b'{"data":18446744073709551616}', "INVALID_PAYLOAD"),
    "a number of many digits": (b'{"data":' + b"9" * 100_000 + b"}", "INVALID_PAYLOAD"),
    "twice": (b'{"text":"a","text":"b"}', "INVALID_PAYLOAD"), "twice, hidden": (b'{"text":"a","t\\u0065xt":"b"}', "INVALID_PAYLOAD"),
    "twice, inside": (b'{"data":{"a":1,"a":2}}', "INVALID_PAYLOAD"),
    "too deep": (b'{"data":' + b"[" * 64 + b"]" * 64 + b"}", "INVALID_PAYLOAD"),
    "far too deep": (b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "INVALID_PAYLOAD"),
    "objects too deep": (b'{"data":' * 20_000 + b"1" + b"}" * 20_000, "INVALID_PAYLOAD"),
    "half a pair": (b'{"text":"\\ud800"}', "INVALID_PAYLOAD"), "overlong": (b'{"text":"\xc0\xaf"}', "INVALID_PAYLOAD"),
    "an overlong NUL": (b'{"text":"\xc0\x80"}', "INVALID_PAYLOAD"), "not UTF-8": (b'{"text":"\xff"}', "INVALID_PAYLOAD"),
    "UTF-16": ('{"text":"a"}'.encode("utf-16"), "INVALID_PAYLOAD"), "a mark of order": (b"\xef\xbb\xbf{}", "INVALID_PAYLOAD"),
    "a raw control character": (b'{"text":"\x01"}', "INVALID_PAYLOAD"), "a comment": (b'{"text":"a"/**/}', "INVALID_PAYLOAD"),
    "oversize": (b'{"text":"' + b"x" * 262_144 + b'"}', "FRAME_TOO_LARGE"), "text as a list": (b'{"text":["a"]}', "INVALID_PAYLOAD"),
    "text as a number": (b'{"text":1}', "INVALID_PAYLOAD"), "text as nothing": (b'{"text":null}', "INVALID_PAYLOAD"),
    "text as a map": (b'{"text":{"__proto__":{}}}', "INVALID_PAYLOAD"),
    **{
        f"the key {key}": (json.dumps({key: value}).encode(), "INVALID_PAYLOAD")
        for key, value in {
            "user_id": ids.uuid7(), "tenant_id": "t", "roles": ["admin"], "context": {"user_id": "x"}, "__proto__": {}, "constructor": {},
            "self": 1, "step_key": "k", "args": [], "kwargs": {}, "TEXT": "a", "text ": "a", "t\u0435xt": "a", "__init__": 1,
            "timeout_s": 9,
        }.items()
    },
}  # fmt: skip
NARROW: dict[str, dict[str, Any]] = {
    "word": {"word": "a" * 50_000 + "!"}, "count": {"count": 10}, "count ": {"count": True}, "count  ": {"count": "1"},
    "count   ": {"count": 1.5}, "kind": {"kind": "A"}, "kind ": {"kind": ["a"]}, "kind  ": {"kind": {"$ne": ""}},
}  # fmt: skip


class Place:
    """The services, and two users of theirs."""

    def __init__(self, services: Services, user: User, other: User) -> None:
        self.services, self.runs, self.user, self.other = services, Runs(services), user, other

    async def call(self, arguments: bytes, name: str = "payload.sink", **more: Any) -> pb.ExecuteToolResponse:
        """An interactive call of the user."""
        asked = pb.ExecuteToolRequest(request_id=more.pop("request_id", ids.uuid7()), tool_name=name, arguments=arguments, **more)
        return await self.runs.dispatcher.ExecuteTool(asked, metadata=self.user.bearer, wait_for_ready=True, timeout=20)

    async def refusal(self, arguments: bytes, name: str = "payload.sink", **more: Any) -> errors.NetraError:
        """Why it is refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(arguments, name, **more)
        return status.from_rpc(caught.value)


@pytest.fixture
async def place(services: Services) -> AsyncIterator[Place]:
    """All services with the tools of these tests."""
    SEEN.clear()
    await services.all(agents=[payloads], tools=[sink, narrow])
    yield Place(services, await services.user(), await services.user())
    assert not await asyncio.to_thread(os.path.exists, CANARY)


async def test_what_is_inert_arrives_as_it_was_sent_and_nowhere_else(place: Place) -> None:
    sent = [(family, {"text": text, "data": {text: [text]}}) for family, texts in INERT.items() for text in texts]
    sent += [(family, {"text": family, "data": data}) for family, data in SHAPES.items()]
    assert len(sent) >= 80
    limited = asyncio.Semaphore(8)

    async def one(family: str, arguments: dict[str, Any]) -> str:
        async with limited:
            answer = await place.call(json.dumps(arguments, ensure_ascii=False).encode())
        assert (answer.status, json.loads(answer.result or b"null")) == ("success", arguments), family
        return answer.run_id

    made = await asyncio.gather(*(one(family, arguments) for family, arguments in sent))
    # the tool saw just these, and the true caller
    assert sorted(json.dumps(values) for _, _, values in SEEN) == sorted(json.dumps([one["text"], one["data"]]) for _, one in sent)
    assert {(user, roles) for user, roles, _ in SEEN} == {(place.user.user_id, ("user",))}

    # they are in the record of their user as they were, and nothing of them is in anybody else's
    async def kept(family: str, arguments: dict[str, Any], run_id: str) -> None:
        events = await place.runs.ended(place.user, run_id)
        (began,) = [event["data"] for event in events if event["type"] == "tool_executing"]
        assert "parameters_ref" in began or began["parameters"]["text"] == arguments["text"], family
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await place.runs.ended(place.other, run_id)
        assert status.from_rpc(caught.value).code == "NOT_FOUND"

    # what is foreign is answered slowly
    await asyncio.gather(*(kept(*call, run_id) for call, run_id in list(zip(sent, made, strict=True))[::5]))
    listed = await place.runs.dispatcher.ListRuns(pb.ListRunsRequest(), metadata=place.other.bearer, timeout=20)
    assert not listed.runs
    mine = await place.runs.dispatcher.ListRuns(pb.ListRunsRequest(page_size=1), metadata=place.user.bearer, timeout=20)
    assert len(mine.runs) == 1  # the tables are there


async def test_what_is_refused_names_what_is_wrong_and_reaches_no_tool(place: Place) -> None:
    for name, (arguments, code) in REFUSED.items():
        error = await place.refusal(arguments)
        assert error.code == code, name
        assert error.details["field"].split(".")[0] == "arguments", name
        # what was sent is not sent back
        assert len(error.message) < 500, name
    good = {"word": "aaa", "count": 1, "kind": "a"}
    assert (await place.call(json.dumps(good).encode(), "payload.narrow")).status == "success"
    for field, change in NARROW.items():
        async with asyncio.timeout(2):  # a pattern that runs away would take longer than there is time
            error = await place.refusal(json.dumps({**good, **change}).encode(), "payload.narrow")
        assert (error.code, error.details["field"]) == ("INVALID_PAYLOAD", f"arguments.{field.strip()}")
    for missing in good:
        error = await place.refusal(json.dumps({name: value for name, value in good.items() if name != missing}).encode(), "payload.narrow")
        assert missing in error.message
    assert [values for _, _, values in SEEN] == [["aaa", 1, "a"]]


async def test_names_and_keys_beside_the_arguments_are_checked_too(place: Place) -> None:
    for name in (
        "../payload.sink",
        "payload.sink\n",
        "__proto__",
        "payload.sink; DROP TABLE",
        "PAYLOAD.SINK",
        "p\u0430yload.sink",
        "",
        "x" * 10_000,
    ):
        assert (await place.refusal(b"{}", name)).code in ("NOT_FOUND", "INVALID_PAYLOAD"), name
    assert (await place.refusal(b"{}", "a\0b")).code == "INVALID_PAYLOAD"
    for key in ("", "a\0b", "x" * 65):
        assert (await place.refusal(b"{}", request_id=key)).details["field"] == "request_id"
    for thread in ("../x", "' OR 1=1 --", "a\0b"):
        assert (await place.refusal(b"{}", thread_id=thread)).code in ("INVALID_PAYLOAD", "NOT_FOUND")
    # the same key with other arguments is another call: neither's answer is given to the other
    key = ids.uuid7()
    first = await place.call(b'{"text":"mine"}', request_id=key)
    assert (await place.refusal(b'{"text":"other"}', request_id=key)).code == "ALREADY_EXISTS"
    assert json.loads(first.result)["text"] == "mine"


async def test_arguments_that_look_for_secrets_find_none(place: Place) -> None:
    kept = [path.read_text(errors="replace").strip() for path in place.services.secrets.rglob("*") if path.is_file()]
    kept = [text for text in kept if len(text) >= 8]
    assert kept
    where = str(place.services.secrets)
    probes = [
        f"{{{{secrets}}}} {where}",
        f"file://{where}/dispatcher/service",
        "${NETRA_SECRETS_DIR}",
        "%(JWT_SECRET_KEY)s",
        "{env}",
        "$PGPASSWORD",
    ]
    for probe in probes:
        answer = await place.call(json.dumps({"text": probe, "data": {"path": probe}}).encode())
        shown = answer.SerializeToString() + json.dumps(await place.runs.ended(place.user, answer.run_id)).encode()
        assert probe in json.loads(answer.result)["text"]
        assert not [text for text in kept if text.encode() in shown]


BOMBS: dict[str, Any] = {
    "laughs": {
        "$defs": {
            f"l{level}": {"allOf": [{"$ref": f"#/$defs/l{level + 1}"}] * 10} if level < 9 else {"type": "string"} for level in range(10)
        },
        "properties": {"a": {"$ref": "#/$defs/l0"}},
    },
    "itself": {"properties": {"a": {"$ref": "#"}}},
    "a ring": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "properties": {"x": {"$ref": "#/$defs/a"}}},
    "elsewhere": {"properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}},
    "a file": {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    "a pattern that grows": {"properties": {"a": {"pattern": "((a{1,1000}){1,1000}){1,1000}"}}},
    "a long pattern": {"properties": {"a": {"pattern": "a?" * 200}}},
    "look-around": {"properties": {"a": {"pattern": "(?=(a+)+)b"}}},
    "deep": json.loads('{"items":' * 60 + "true" + "}" * 60),
    "wide": {"enum": list(range(5_000))},
    "another identity": {"$id": "http://127.0.0.1:1/", "properties": {}},
}  # fmt: skip


async def test_schemas_that_are_bombs_are_refused_before_anybody_is_held_against_them(place: Place) -> None:
    operator = await place.services.user("admin")
    for name, schema in BOMBS.items():
        whole = json.dumps({"type": "object", **schema}).encode()
        new = pb.Tool(
            name="payload.bomb", version="1.0.0", description="Is none.", input_schema=whole, timeout=duration_pb2.Duration(seconds=5)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(5):
                await place.runs.dispatcher.RegisterTool(pb.RegisterToolRequest(tool=new), metadata=operator.bearer, timeout=20)
        error = status.from_rpc(caught.value)
        assert error.code == "INVALID_PAYLOAD", (name, error)
        assert "input_schema" in error.details["field"], name
    assert (await place.refusal(b"{}", "payload.bomb")).code == "NOT_FOUND"


FRAMES = {
    '{"type":"START_AGENT","type":"CANCEL"}': "DUPLICATE_KEY", '{"a":' * 5000: "BAD_JSON", '{"type":"\\ud800"}': "BAD_JSON",
    '{"type":{"__proto__":1}}': "INVALID_PAYLOAD", "\u202e": "BAD_JSON", "[]": "NOT_AN_OBJECT",
}  # fmt: skip


async def test_over_a_socket_they_are_the_same_data(place: Place) -> None:
    await place.services.gateway()
    texts = [texts[0] for texts in INERT.values()]
    async with sockets.opened(place.services, place.user) as mine, sockets.opened(place.services, place.other) as theirs:  # type: ignore[arg-type]
        payload = {
            "agent": "payloads",
            "user_request": "Go.",
            "inputs": {"texts": texts, "user_id": place.other.user_id, "roles": ["admin"]},
        }
        ack = await mine.ask("START_AGENT", payload)
        assert ack["type"] == "ack", ack
        events = await mine.ended(ack["data"]["run_id"])
        shown = [event["data"]["parameters"]["text"] for event in events if event["type"] == "tool_executing"]
        assert shown == texts
        assert events[-1]["data"]["result"] == [{"text": text, "data": None} for text in texts]
        assert {(user, roles) for user, roles, _ in SEEN} == {(place.user.user_id, ("user",))}
        # frames whose text is no frame are refused, each with its reason, and the socket goes on
        for raw, code in FRAMES.items():
            await mine.connection.send(raw)
            assert (await mine.until(type="error"))["code"] == code, raw[:50]
        assert (await mine.ask("PING"))["type"] == "pong"
        # a pong comes after all that was sent to them before
        assert (await theirs.ask("PING"))["type"] == "pong"
        assert {frame["type"] for frame in theirs.frames} <= {"pong", "connected"}
