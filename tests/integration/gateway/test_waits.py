"""Runs that wait, as clients see them: messages and approvals over frames, HTTP, the Python client and the command line; two requests on
one thread; several dispatchers behind one gateway."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import websockets

from gateway import wiring
from netra import client, errors, ids
from netra.agent import Turn, agent
from services.dispatcher import wiring as dispatchers
from services.dispatcher.settings import DispatcherSettings
from tests.fixtures import web
from tests.fixtures.sockets import Socket
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.gateway.conftest import bearer


@agent("listener")
async def listener(turn: Turn) -> dict[str, object]:
    """Repeats one message."""
    heard = await turn.wait_for_message()
    return {"message": f"Heard: {heard.text}"}


@agent("asker", tools=("text_statistics",), input_schema={"type": "object", "properties": {"quorum": {"type": "integer"}}})
async def asker(turn: Turn) -> dict[str, object]:
    """Asks people."""
    decision = await turn.approve("Go on?", quorum=int(turn.inputs.get("quorum", 1)))
    return {"message": decision.decision, "comment": decision.comment}


@agent("answerer")
async def answerer(turn: Turn) -> dict[str, object]:
    """Answers at once."""
    return {"message": f"To {turn.request}"}


@dataclasses.dataclass(slots=True)
class Edge:
    """The gateway and all services, as clients see them."""

    services: Services
    gateway: wiring.Service
    http: httpx.AsyncClient

    def socket(self, user: User) -> websockets.connect:
        """A socket."""
        return websockets.connect(f"ws://127.0.0.1:{self.gateway.port}/ws", additional_headers=bearer(user), proxy=None)

    async def ask(self, method: str, path: str, user: User, code: int = 200, *, grant: str = "", **more: Any) -> dict[str, Any]:
        """What a request is answered with, which has this status."""
        headers = bearer(user) | ({"X-Netra-Grant": grant} if grant else {})
        answer = await self.http.request(method, path, headers=headers, **more)
        assert answer.status_code == code, answer.text
        return dict(answer.json())

    async def start(self, user: User, name: str, **more: Any) -> dict[str, Any]:
        """A run."""
        return await self.ask("POST", "/v1/runs", user, 202, json={"agent": name, "user_request": "Some text.", **more})

    async def is_(self, user: User, run_id: str, state: str) -> dict[str, Any]:
        """A run once it is in a state."""
        async with asyncio.timeout(30):
            while True:
                run = await self.ask("GET", f"/v1/runs/{run_id}", user)
                if run["state"] == state:
                    return run
                await asyncio.sleep(0.02)

    async def asked(self, user: User, run_id: str) -> dict[str, Any]:
        """What a run of a user asks for, once it waits for that."""
        await self.is_(user, run_id, "suspended")
        (found,) = (await self.ask("GET", "/v1/approvals", user, params={"run_id": run_id}))["approvals"]
        return dict(found)

    async def granted(self, owner: User, thread_id: str, user: User, access: str) -> str:
        """Another user's grant token, once a thread is granted to them."""
        body = {"grantee_id": user.user_id, "access": access}
        await self.ask("POST", f"/v1/threads/{thread_id}/grants", owner, 201, json=body)
        return str((await self.ask("POST", f"/v1/threads/{thread_id}/token", user))["grant_token"])

    async def said(self, user: User, thread_id: str) -> list[tuple[str, str]]:
        """The messages of a thread."""
        page = await self.ask("GET", f"/v1/threads/{thread_id}/messages", user)
        return [(one["role"], one["content"]) for one in page["messages"]]


@pytest.fixture
async def edge(services: Services) -> AsyncIterator[Edge]:
    await services.all(agents=[listener, asker, answerer])
    gateway = await services.gateway()
    async with web.client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=20, trust_env=False) as http:
        yield Edge(services, gateway, http)


async def test_a_message_is_sent_to_a_run_that_waits_for_one(edge: Edge) -> None:
    user = await edge.services.user()
    async with edge.socket(user) as connection:
        socket = Socket(connection)
        run_id = (await edge.start(user, "listener"))["run_id"]
        waits = await socket.until(type="agent_suspended", run_id=run_id)
        assert waits["data"]["waits_for"] == "message"
        assert (await edge.is_(user, run_id, "suspended"))["waits_for"] == "message"
        sent = await socket.ask("SEND", {"run_id": run_id, "message": "By region."}, id="one")
        assert sent["type"] == "ack"
        message_id = sent["data"].pop("message_id")
        assert (sent["data"].pop("state"), sent["data"]) == ("suspended", {"run_id": run_id, "delivered": True})
        # the same again is the same message, another one under its id is refused
        again = await socket.ask("SEND", {"run_id": run_id, "message": "By region."}, id="one")
        assert again["data"]["message_id"] == message_id
        assert (await socket.ask("SEND", {"run_id": run_id, "message": "By month."}, id="one"))["code"] == "ALREADY_EXISTS"
        events = await socket.ended(run_id)
    kinds = [event["type"] for event in events]
    assert kinds[kinds.index("agent_suspended") :] == [
        "agent_suspended", "agent_resumed", "message_created", "message_created", "agent_completed",
    ]  # fmt: skip
    assert [event["data"]["message_id"] for event in events if event["type"] == "message_created"][1] == message_id
    assert events[-1]["data"]["result"] == {"message": "Heard: By region."}
    late = await edge.ask("POST", f"/v1/runs/{run_id}:send", user, 409, json={"message": "Late."})
    assert late["code"] == "FAILED_PRECONDITION"


@pytest.mark.parametrize("kind", ["CHAT", "USER_MESSAGE"])
async def test_a_message_to_a_thread_goes_to_its_run_that_waits(edge: Edge, kind: str) -> None:
    user = await edge.services.user()
    async with edge.socket(user) as connection:
        socket = Socket(connection)
        run = await edge.start(user, "listener")
        await edge.is_(user, run["run_id"], "suspended")
        ack = await socket.ask(kind, {"text": "By region."}, thread_id=run["thread_id"])
        assert (ack["data"]["run_id"], ack["data"]["delivered"]) == (run["run_id"], True)
        await socket.ended(run["run_id"])
        # now none waits: it is a run of its own
        ack = await socket.ask(kind, {"text": "And now?", "agent": "answerer"}, thread_id=run["thread_id"])
        assert ack["data"]["delivered"] is False
        assert ack["data"]["run_id"] != run["run_id"]
        await socket.ended(ack["data"]["run_id"])
    assert len((await edge.ask("GET", "/v1/runs", user))["runs"]) == 2
    assert await edge.said(user, run["thread_id"]) == [
        ("user", "Some text."), ("user", "By region."), ("assistant", "Heard: By region."), ("user", "And now?"),
        ("assistant", "To And now?"),
    ]  # fmt: skip


async def test_what_a_run_asks_for_is_answered(edge: Edge) -> None:
    user, stranger = await edge.services.user(), await edge.services.user()
    run_id = (await edge.start(user, "asker"))["run_id"]
    found = await edge.asked(user, run_id)
    assert (found["state"], found["message"], found["quorum"], found["votes"]) == ("pending", "Go on?", 1, [])
    assert (found["run_id"], found["user_id"], found["tool_name"], found["parameters"]) == (run_id, user.user_id, None, None)
    path = f"/v1/approvals/{found['approval_id']}"
    assert await edge.ask("GET", path, user) == found
    for method, address in (("GET", path), ("POST", f"{path}:resolve")):
        assert (await edge.ask(method, address, stranger, 404, json={"decision": "approve"}))["code"] == "NOT_FOUND"
    assert (await edge.ask("GET", "/v1/approvals", stranger))["approvals"] == []
    async with edge.socket(user) as connection:
        socket = Socket(connection)
        ack = await socket.ask("APPROVE", {"approval_id": found["approval_id"], "decision": "reject", "comment": "Not today."})
        assert ack["data"] == {"approval_id": found["approval_id"], "state": "rejected"}
        events = await socket.ended(run_id)
        other = await socket.ask("APPROVE", {"approval_id": found["approval_id"], "decision": "approve"})
        assert other["code"] == "FAILED_PRECONDITION"
    assert events[-1]["data"]["result"] == {"message": "reject", "comment": "Not today."}
    resolved = next(event for event in events if event["type"] == "approval_resolved")
    assert (resolved["data"]["by"], resolved["data"]["comment"]) == (user.user_id, "Not today.")
    # the same word again changes nothing
    again = await edge.ask("POST", f"{path}:resolve", user, json={"decision": "reject"})
    assert (again["state"], [(vote["user_id"], vote["decision"]) for vote in again["votes"]]) == ("rejected", [(user.user_id, "reject")])
    listed = await edge.ask("GET", "/v1/approvals", user, params={"state": "rejected"})
    assert [one["approval_id"] for one in listed["approvals"]] == [found["approval_id"]]
    assert (await edge.ask("GET", "/v1/approvals", user, params={"state": "pending"}))["approvals"] == []


async def test_approvals_are_paged_newest_first(edge: Edge) -> None:
    user = await edge.services.user()
    made = [(await edge.asked(user, (await edge.start(user, "asker"))["run_id"]))["approval_id"] for _ in range(3)]
    first = await edge.ask("GET", "/v1/approvals", user, params={"page_size": 2})
    rest = await edge.ask("GET", "/v1/approvals", user, params={"page_size": 2, "page_token": first["next_page_token"]})
    assert [[one["approval_id"] for one in page["approvals"]] for page in (first, rest)] == [[made[2], made[1]], [made[0]]]
    assert rest["next_page_token"] == ""


async def test_who_may_write_to_a_thread_answers_for_its_runs(edge: Edge) -> None:
    owner, writer, reader = [await edge.services.user() for _ in range(3)]
    run = await edge.start(owner, "asker", inputs={"quorum": 2})
    thread_id = run["thread_id"]
    writing, reading = [await edge.granted(owner, thread_id, user, access) for user, access in ((writer, "write"), (reader, "read"))]
    approval_id = (await edge.asked(owner, run["run_id"]))["approval_id"]
    path = f"/v1/approvals/{approval_id}"
    for user, token in ((writer, writing), (reader, reading)):
        assert (await edge.ask("GET", path, user, grant=token))["approval_id"] == approval_id
        assert len((await edge.ask("GET", "/v1/approvals", user, grant=token))["approvals"]) == 1
        assert (await edge.ask("GET", path, user, 404))["code"] == "NOT_FOUND"
    assert (await edge.ask("POST", f"{path}:resolve", reader, 403, grant=reading, json={"decision": "approve"}))[
        "code"
    ] == "PERMISSION_DENIED"
    # a token is of one user alone
    assert (await edge.ask("POST", f"{path}:resolve", reader, 401, grant=writing, json={"decision": "approve"}))[
        "code"
    ] == "UNAUTHENTICATED"
    async with edge.socket(writer) as connection:
        ack = await Socket(connection).ask("APPROVE", {"approval_id": approval_id, "decision": "approve", "grant_token": writing})
        assert ack["data"]["state"] == "pending"
    assert (await edge.ask("POST", f"{path}:resolve", owner, json={"decision": "approve"}))["state"] == "approved"
    await edge.is_(owner, run["run_id"], "completed")

    waits = await edge.start(owner, "listener", thread_id=thread_id)
    await edge.is_(owner, waits["run_id"], "suspended")
    send = f"/v1/runs/{waits['run_id']}:send"
    assert (await edge.ask("POST", send, reader, 403, grant=reading, json={"message": "No."}))["code"] == "PERMISSION_DENIED"
    assert (await edge.ask("POST", send, writer, 404, json={"message": "No."}))["code"] == "NOT_FOUND"
    assert (await edge.ask("POST", send, writer, grant=writing, json={"message": "Yes."}))["delivered"] is True
    await edge.is_(owner, waits["run_id"], "completed")
    assert (await edge.said(owner, thread_id))[-1] == ("assistant", "Heard: Yes.")
    # whose words they are is known to the thread
    messages = (await edge.ask("GET", f"/v1/threads/{thread_id}/messages", owner))["messages"]
    assert [(one["user_id"], one["content"]) for one in messages][-2] == (writer.user_id, "Yes.")


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
async def test_a_new_request_ends_the_one_before_it(edge: Edge, on_busy: str) -> None:
    user = await edge.services.user()
    first = await edge.start(user, "listener")
    await edge.is_(user, first["run_id"], "suspended")
    async with edge.socket(user) as connection:
        socket = Socket(connection)
        payload = {"agent": "answerer", "user_request": "Something else.", "on_busy": on_busy}
        ack = await socket.ask("START_AGENT", payload, thread_id=first["thread_id"])
        assert ack["data"]["thread_id"] == first["thread_id"]
        ended = await socket.until(type="agent_cancelled", run_id=first["run_id"])
        assert ended["data"]["by"] == "user"
        await socket.ended(ack["data"]["run_id"])
    await edge.is_(user, first["run_id"], "cancelled")
    left = [("user", "Something else."), ("assistant", "To Something else.")]
    assert await edge.said(user, first["thread_id"]) == ([] if on_busy == "rollback" else [("user", "Some text.")]) + left


@pytest.mark.parametrize(
    ("kind", "payload", "field"),
    [
        ("SEND", {"message": "x"}, "payload.run_id"),
        ("SEND", {"run_id": "x", "message": "x"}, "payload.run_id"),
        ("SEND", {"run_id": "RUN", "message": " "}, "payload.message"),
        ("SEND", {"run_id": "RUN", "message": "x" * 8193}, "payload.message"),
        ("SEND", {"run_id": "RUN", "message": "x", "grant_token": 7}, "payload.grant_token"),
        ("APPROVE", {"decision": "approve"}, "payload.approval_id"),
        ("APPROVE", {"approval_id": "RUN"}, "payload.decision"),
        ("APPROVE", {"approval_id": "RUN", "decision": "maybe"}, "payload.decision"),
        ("APPROVE", {"approval_id": "RUN", "decision": "approve", "comment": "x" * 2001}, "payload.comment"),
    ],
)
async def test_a_frame_that_is_wrong_names_the_field(edge: Edge, kind: str, payload: dict[str, Any], field: str) -> None:
    user, some = await edge.services.user(), ids.uuid7()
    async with edge.socket(user) as connection:
        answer = await Socket(connection).ask(kind, {name: some if value == "RUN" else value for name, value in payload.items()})
    assert answer["type"] == "error"
    assert answer["details"]["field"] == field


async def test_the_client_and_the_command_line_speak_to_runs(edge: Edge) -> None:
    user, address = await edge.services.user(), f"http://127.0.0.1:{edge.gateway.port}"
    variables = {"NETRA_URL": address, "NETRA_TOKEN": user.token, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "COLUMNS": "200"}

    def command(*words: str) -> str:
        called = [sys.executable, "-m", "netra.cli", *words]
        return subprocess.run(called, env=variables, capture_output=True, text=True, timeout=60, check=True).stdout

    async with client.connect(address, user.token) as connected:
        run_id = (await connected.start("listener", user_request="Some text."))["run_id"]
        await edge.is_(user, run_id, "suspended")
        assert (await connected.send(run_id, "By region."))["delivered"] is True
        await edge.is_(user, run_id, "completed")
        with pytest.raises(errors.FailedPrecondition):
            await connected.send(run_id, "Late.")
        asking = (await connected.start("asker", user_request="Some text."))["run_id"]
        await edge.is_(user, asking, "suspended")
        (found,) = await connected.approvals(state="pending")
        assert await connected.approve(found["approval_id"], comment="Yes.") == "approved"
        assert (await edge.is_(user, asking, "completed"))["waits_for"] is None

    run_id = (await edge.start(user, "listener"))["run_id"]
    await edge.is_(user, run_id, "suspended")
    assert (await asyncio.to_thread(command, "send", run_id, "By region.")).strip() == "suspended"
    await edge.is_(user, run_id, "completed")
    approval_id = (await edge.asked(user, (await edge.start(user, "asker"))["run_id"]))["approval_id"]
    assert approval_id in await asyncio.to_thread(command, "approvals")
    assert (await asyncio.to_thread(command, "approve", approval_id, "--reject", "--comment", "No.")).strip() == "rejected"
    assert (await edge.ask("GET", f"/v1/approvals/{approval_id}", user))["votes"][0]["comment"] == "No."


async def test_agents_show_what_they_take_and_may(edge: Edge) -> None:
    user = await edge.services.user()
    shown = {one["name"]: one for one in (await edge.ask("GET", "/v1/agents", user))["agents"]}
    found = shown["asker"]
    assert (found["version"], found["deadline_s"], found["tools"]) == ("1.0.0", 30.0, ["text_statistics"])
    assert (found["input_schema"]["properties"], found["output_schema"]) == ({"quorum": {"type": "integer"}}, None)
    assert shown["answerer"]["tools"] is None
    wrong = await edge.ask("POST", "/v1/runs", user, 400, json={"agent": "asker", "user_request": "x", "inputs": {"quorum": "two"}})
    assert wrong["details"]["field"] == "inputs.quorum"
    assert (await edge.ask("GET", f"/v1/runs/{(await edge.start(user, 'asker'))['run_id']}", user))["agent_version"] == "1.0.0"


async def test_calls_go_round_two_dispatchers_and_on_when_one_goes(edge: Edge) -> None:
    services, user = edge.services, await edge.services.user()
    settings = DispatcherSettings(**services.settings("dispatcher"))
    both = [services.ports["dispatcher"]]
    async with web.client(timeout=20, trust_env=False) as http:
        async with dispatchers.build(settings, agents=[answerer]) as second:
            await second.trust.awaited()
            both.append(second.port)
            target = ",".join(f"127.0.0.1:{port}" for port in both)
            gateway = await services.gateway(dispatcher_target=target)
            http.base_url = httpx.URL(f"http://127.0.0.1:{gateway.port}")
            around = Edge(services, gateway, http)
            for _ in range(4):
                run = await around.start(user, "answerer")
                await around.is_(user, run["run_id"], "completed")
            assert (await around.http.get("/readyz")).json()["parts"]["dispatcher"] is True
        # one of them is gone; nobody who asks hears of it
        for _ in range(6):
            run = await around.start(user, "answerer")
            await around.is_(user, run["run_id"], "completed")
        assert (await around.http.get("/readyz")).status_code == 200
