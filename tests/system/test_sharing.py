"""Sharing, leaving with one's data and having it erased, over HTTP: by the owner, by those a thread is granted to, and by others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from netra import ids
from tests.fixtures import web
from tests.fixtures.accounts import Accounts
from tests.fixtures.storage import Services
from tests.fixtures.users import User

CANARY = "canary-51ce"
ENDED = ("completed", "failed", "cancelled", "timed_out")
EVERYBODY = ("owner", "reader", "writer", "withdrawn", "stranger", "elsewhere")


@dataclass(slots=True)
class People:
    """Who asks: everybody over HTTP, with their own token."""

    services: Services
    users: dict[str, User]
    clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    async def ask(self, who: str, method: str, path: str, **more: Any) -> httpx.Response:
        """One request."""
        if method == "POST" and not {"json", "content"} & set(more):
            more["headers"] = {"Content-Length": "0", **more.get("headers", {})}
        return await self.clients[who].request(method, path, **more)

    async def told(self, who: str, method: str, path: str, code: int = 200, **more: Any) -> Any:
        """The answer to a request that must be answered so."""
        answer = await self.ask(who, method, path, **more)
        assert answer.status_code == code, (who, method, path, answer.text)
        return answer.json() if answer.content else None

    async def run(self, who: str, text: str = "Some text.", **more: Any) -> dict[str, Any]:
        """A run that has ended."""
        started: dict[str, Any] = await self.told(
            who, "POST", "/v1/runs", 202, json={"agent": "text-analyst", "user_request": text, **more}
        )
        url = f"/v1/runs/{started['run_id']}/events"
        async with self.clients[who].stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
            async for _ in stream.aiter_lines():
                pass
        # its state follows its last event; until then nothing of it can be erased
        async with asyncio.timeout(20):
            while True:
                if (await self.told(who, "GET", f"/v1/runs/{started['run_id']}"))["state"] in ENDED:
                    return started
                await asyncio.sleep(0.01)

    async def grant(self, who: str, thread_id: str, to: str, access: str) -> Any:
        """What the owner is told of a grant."""
        body = {"grantee_id": self.users[to].user_id, "access": access}
        return await self.told(who, "POST", f"/v1/threads/{thread_id}/grants", 201, json=body)


@pytest.fixture
async def people(accounts: Accounts) -> AsyncIterator[People]:
    """The whole of Netra in this process, and six people: five of one tenant and one of another."""
    services = accounts.services
    await services.context()
    await services.events()
    await services.dispatcher()
    gateway = await services.gateway()
    users = {name: await services.user() for name in EVERYBODY[:-1]} | {"elsewhere": await accounts.foreign_admin()}
    found = People(services, users)
    for name, user in users.items():
        headers = {"Authorization": f"Bearer {user.token}"}
        found.clients[name] = web.client(base_url=f"http://127.0.0.1:{gateway.port}", headers=headers, timeout=30, trust_env=False)
    yield found
    for client in found.clients.values():
        await client.aclose()


@dataclass(frozen=True, slots=True)
class Shared:
    """A thread of the owner with a run and a file, as it was granted to others."""

    people: People
    thread_id: str
    run_id: str
    artifact_id: str

    def path(self, template: str) -> str:
        """An address of it."""
        return template.format(thread=self.thread_id, run=self.run_id, artifact=self.artifact_id, nobody=ids.UserId.new())


@pytest.fixture
async def shared(people: People) -> Shared:
    """A run, and a file beside it."""
    run = await people.run("owner", f"A text with {CANARY} in it.")
    thread_id = run["thread_id"]
    path, kind = f"/v1/artifacts?name={CANARY}.txt&thread_id={thread_id}", {"Content-Type": "text/plain"}
    kept = await people.told("owner", "POST", path, 201, content=CANARY, headers=kind)
    assert kept["thread_id"] == thread_id
    for name, access in (("reader", "read"), ("writer", "write"), ("withdrawn", "write")):
        granted = await people.grant("owner", thread_id, name, access)
        assert (granted["grantee_id"], granted["access"], granted["withdrawn_at"]) == (people.users[name].user_id, access, None)
    gone = await people.told("owner", "DELETE", f"/v1/threads/{thread_id}/grants/{people.users['withdrawn'].user_id}")
    assert gone["withdrawn_at"] is not None
    return Shared(people, thread_id, run["run_id"], kept["artifact_id"])


SEES, WRITES, OWNS = (200, 200, 200), (201, 403, 201), (200, 403, 403)
# what owner, reader and writer are answered; everybody else gets 404
ROUTES: list[tuple[str, str, tuple[int, int, int], dict[str, Any]]] = [
    ("GET", "/v1/threads/{thread}", SEES, {}),
    ("GET", "/v1/threads/{thread}/messages", SEES, {}),
    ("GET", "/v1/artifacts?thread_id={thread}", SEES, {}),
    ("GET", "/v1/artifacts/{artifact}", SEES, {}),
    ("POST", "/v1/threads/{thread}/token", SEES, {}),
    ("POST", "/v1/artifacts?name=n&thread_id={thread}", WRITES, {"content": b"x"}),
    ("GET", "/v1/threads/{thread}/grants", OWNS, {}),
    ("POST", "/v1/threads/{thread}/grants", (404, 403, 403), {"json": {"email": "nobody@netra.example", "access": "read"}}),
    ("DELETE", "/v1/threads/{thread}/grants/{nobody}", (404, 403, 403), {}),
    ("DELETE", "/v1/artifacts/{artifact}", (0, 403, 403), {}),
    ("POST", "/v1/threads/{thread}:restore", (0, 403, 403), {}),
    ("POST", "/v1/threads/{thread}:erase", (0, 403, 403), {}),
    ("DELETE", "/v1/threads/{thread}", (200, 403, 403), {}),
]


async def test_what_owner_reader_writer_withdrawn_stranger_and_other_tenant_may(shared: Shared) -> None:
    for method, template, (owner, reader, writer), more in ROUTES:
        expected = {"reader": reader, "writer": writer, **dict.fromkeys(EVERYBODY[3:], 404), "owner": owner}
        for who, code in expected.items():
            if not code:
                continue
            answer = await shared.people.ask(who, method, shared.path(template), **more)
            assert answer.status_code == code, (who, method, template, answer.text)
            if code == 404:
                assert CANARY not in answer.text
    # what was deleted is there for nobody, until its owner restores it
    for who in EVERYBODY:
        await shared.people.told(who, "GET", f"/v1/threads/{shared.thread_id}", 404)
    await shared.people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:restore")
    assert (await shared.people.told("reader", "GET", f"/v1/threads/{shared.thread_id}"))["access"] == "read"


async def test_what_is_not_granted_is_answered_as_what_does_not_exist(shared: Shared) -> None:
    unknown = Shared(shared.people, ids.ThreadId.new(), ids.RunId.new(), ids.ArtifactId.new())
    for method, template, _, more in ROUTES:
        for who in ("stranger", "withdrawn", "elsewhere"):
            foreign, missing = [await shared.people.ask(who, method, one.path(template), **more) for one in (shared, unknown)]
            assert foreign.status_code == missing.status_code == 404
            assert {**foreign.json(), "correlation_id": ""} == {**missing.json(), "correlation_id": ""}, template


async def test_lists_of_threads_by_what_they_are_to_the_caller(shared: Shared) -> None:
    people, found = shared.people, {}
    for who in EVERYBODY:
        listed = {one: await people.told(who, "GET", f"/v1/threads?selection={one}") for one in ("own", "shared", "deleted")}
        found[who] = {
            one: [(thread["thread_id"], thread["access"], thread["owner_id"]) for thread in page["threads"]] for one, page in listed.items()
        }
    owner = people.users["owner"].user_id
    nothing: dict[str, list[tuple[str, str, str]]] = {"own": [], "shared": [], "deleted": []}
    assert found["owner"] == nothing | {"own": [(shared.thread_id, "own", owner)]}
    assert found["reader"] == nothing | {"shared": [(shared.thread_id, "read", owner)]}
    assert found["writer"] == nothing | {"shared": [(shared.thread_id, "write", owner)]}
    assert [found[who] for who in EVERYBODY[3:]] == [nothing] * 3
    await people.told("owner", "DELETE", f"/v1/threads/{shared.thread_id}")
    deleted = (await people.told("owner", "GET", "/v1/threads?selection=deleted"))["threads"]
    assert [(thread["thread_id"], bool(thread["deleted_at"])) for thread in deleted] == [(shared.thread_id, True)]
    assert (await people.told("reader", "GET", "/v1/threads?selection=shared"))["threads"] == []


async def test_a_writer_goes_on_with_the_thread_and_everybody_sees_it(shared: Shared) -> None:
    people, writer = shared.people, shared.people.users["writer"].user_id
    refusals = {
        who: (await _started(people, who, shared.thread_id)).status_code for who in ("reader", "withdrawn", "stranger", "elsewhere")
    }
    assert refusals == {"reader": 403, "withdrawn": 404, "stranger": 404, "elsewhere": 404}
    run = await people.run("writer", "More text.", thread_id=shared.thread_id)
    for who in ("owner", "reader", "writer"):
        page = await people.told(who, "GET", f"/v1/threads/{shared.thread_id}/messages")
        assert [(one["role"], one["user_id"] == writer) for one in page["messages"]] == [
            ("user", False), ("assistant", False), ("user", True), ("assistant", True),
        ]  # fmt: skip
        # runs of others are shown with the token of the thread alone
        token = await people.told(who, "POST", f"/v1/threads/{shared.thread_id}/token")
        grant, other = {"X-Netra-Grant": token["grant_token"]}, run if who != "writer" else {"run_id": shared.run_id}
        await people.told(who, "GET", f"/v1/runs/{other['run_id']}", 404)
        shown = await people.told(who, "GET", f"/v1/runs/{other['run_id']}", headers=grant)
        assert shown["thread_id"] == shared.thread_id
        listed = (await people.told(who, "GET", "/v1/runs", headers=grant))["runs"]
        assert [one["run_id"] for one in listed] == [run["run_id"], shared.run_id]
        assert [one["user_id"] for one in listed] == [writer, people.users["owner"].user_id]
        # a token is good for whom it was given to, and never in an address
        assert (await people.ask("stranger", "GET", f"/v1/runs/{run['run_id']}", headers=grant)).status_code == 401
        await people.told(who, "GET", f"/v1/runs?grant_token={token['grant_token']}", 400)


async def _started(people: People, who: str, thread_id: str) -> httpx.Response:
    body = {"agent": "text-analyst", "user_request": "Some text.", "thread_id": thread_id}
    return await people.ask(who, "POST", "/v1/runs", json=body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"access": "own", "email": "a@netra.example"}, "access"),
        ({"email": "a@netra.example"}, "access"),
        ({"access": ["read"], "email": "a@netra.example"}, "access"),
        ({"access": "read"}, "grantee_id"),
        ({"access": "read", "email": "a@netra.example", "grantee_id": ids.UserId.new()}, "grantee_id"),
        ({"access": "read", "grantee_id": "x"}, "grantee_id"),
        ({"access": "read", "email": 7}, "email"),
        ({"access": "read", "user_id": ids.UserId.new()}, "user_id"),
    ],
)  # fmt: skip
async def test_a_wrong_grant_is_refused_by_field(people: People, body: dict[str, Any], field: str) -> None:
    answer = await people.ask("owner", "POST", f"/v1/threads/{ids.ThreadId.new()}/grants", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["details"]["field"] == field


async def test_erasing_a_thread_takes_its_record_too_and_is_told_again(shared: Shared) -> None:
    people, key = shared.people, {"Idempotency-Key": ids.uuid7()}
    other = await people.run("owner", "Another thread.")
    erased = await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase", headers=key)
    assert (erased["messages"], erased["artifacts"], erased["runs"]) == (2, 1, 1)
    assert erased["events"] > 5
    assert await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase", headers=key) == erased
    for path in ("/v1/threads/{thread}", "/v1/threads/{thread}/messages", "/v1/artifacts/{artifact}"):
        for who in ("owner", "reader"):
            await people.told(who, "GET", shared.path(path), 404)
    export = (await people.ask("owner", "GET", "/v1/export")).text
    assert CANARY not in export
    assert other["run_id"] in export


async def test_what_is_left_in_the_record_of_a_thread_that_is_gone_is_erased_under_any_key(shared: Shared) -> None:
    people = shared.people
    # as if the gateway had died in between, or the time of a deleted thread had passed
    body = {"request_id": ids.uuid7(), "thread_id": shared.thread_id}
    assert (await people.told("owner", "POST", "/rpc/netra.context.v1.ContextService/EraseThread", json=body))["artifacts"] == "1"
    assert CANARY in (await people.ask("owner", "GET", "/v1/export")).text
    erased = await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase")
    assert (erased["messages"], erased["artifacts"], erased["runs"], erased["events"] > 5) == (0, 0, 1, True)
    assert CANARY not in (await people.ask("owner", "GET", "/v1/export")).text
    again = await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase")
    assert (again["runs"], again["events"]) == (1, 0)
    # of those who have nothing in it nothing is there
    for who in ("reader", "stranger", "elsewhere"):
        await people.told(who, "POST", f"/v1/threads/{shared.thread_id}:erase", 404)


async def test_what_is_recorded_after_an_erasure_that_failed_goes_with_it_when_it_is_asked_for_again(shared: Shared) -> None:
    people, key = shared.people, {"Idempotency-Key": ids.uuid7()}
    # as if the context service had refused it, because of a run of somebody else
    body = {"request_id": key["Idempotency-Key"], "thread_id": shared.thread_id}
    await people.told("owner", "POST", "/rpc/netra.events.v1.EventsService/EraseEvents", json=body)
    assert (await people.told("owner", "GET", f"/v1/threads/{shared.thread_id}"))["messages"] == 2
    await people.run("owner", "Later words.", thread_id=shared.thread_id)
    erased = await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase", headers=key)
    assert (erased["messages"], erased["runs"]) == (4, 2)
    export = (await people.ask("owner", "GET", "/v1/export")).text
    assert CANARY not in export
    assert "Later words." not in export
    assert await people.told("owner", "POST", f"/v1/threads/{shared.thread_id}:erase", headers=key) == erased


async def test_who_may_not_erase_a_thread_keeps_what_they_did_there(shared: Shared) -> None:
    people = shared.people
    await people.run("writer", "The writer's words.", thread_id=shared.thread_id)
    refused = await people.told("writer", "POST", f"/v1/threads/{shared.thread_id}:erase", 403)
    assert refused["code"] == "PERMISSION_DENIED"
    lines = [json.loads(line) for line in (await people.ask("writer", "GET", "/v1/export")).text.splitlines()]
    recorded = json.dumps([line for line in lines if line["kind"] == "event"])
    assert "The writer's words." in recorded
    assert '"erased"' not in recorded


async def test_an_export_has_everything_of_the_caller_and_nothing_of_others(shared: Shared) -> None:
    people = shared.people
    await people.run("writer", "The writer's words.", thread_id=shared.thread_id)
    kinds: dict[str, list[str]] = {}
    for who in ("owner", "writer", "stranger"):
        answer = await people.ask(who, "GET", "/v1/export")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
        lines = [json.loads(line) for line in answer.text.splitlines()]
        kinds[who] = [line["kind"] for line in lines]
        # one end for all of it, which says how many lines there are: nobody takes a part for the whole
        assert (lines[-1], kinds[who].count("end")) == ({"kind": "end", "lines": len(lines) - 1}, 1)
        assert (CANARY in answer.text) == (who == "owner")
    assert {"thread", "message", "artifact", "context", "audit", "event", "end"} <= set(kinds["owner"])
    assert {"message", "context", "event", "end"} <= set(kinds["writer"])
    assert not {"thread", "message", "artifact", "context", "event"} & set(kinds["stranger"])


async def test_erasing_everything_takes_what_all_services_keep_and_is_told_again(shared: Shared) -> None:
    people, key = shared.people, {"Idempotency-Key": ids.uuid7()}
    mine = await people.run("stranger", "Mine.")
    erased = await people.told("owner", "DELETE", "/v1/me/data", headers=key)
    assert {name: erased[name] for name in ("threads", "messages", "artifacts", "contexts", "runs")} == {
        "threads": 1, "messages": 2, "artifacts": 1, "contexts": 1, "runs": 1,
    }  # fmt: skip
    assert await people.told("owner", "DELETE", "/v1/me/data", headers=key) == erased
    export = (await people.ask("owner", "GET", "/v1/export")).text
    assert CANARY not in export
    assert not {"thread", "message", "artifact", "context", "event"} & {json.loads(line)["kind"] for line in export.splitlines()}
    assert (await people.told("owner", "GET", "/v1/threads"))["threads"] == []
    assert (await people.told("reader", "GET", "/v1/threads?selection=shared"))["threads"] == []
    # others keep theirs, and the account goes on
    assert (await people.told("stranger", "GET", f"/v1/runs/{mine['run_id']}"))["state"] == "completed"
    again = await people.run("owner", "A new beginning.")
    assert [thread["thread_id"] for thread in (await people.told("owner", "GET", "/v1/threads"))["threads"]] == [again["thread_id"]]


async def test_nothing_is_erased_while_a_run_goes_on(people: People) -> None:
    body = {"agent": "text-analyst", "user_request": "Some text.", "inputs": {"pace_s": 20}}
    run = await people.told("owner", "POST", "/v1/runs", 202, json=body)
    for method, path in (("DELETE", "/v1/me/data"), ("POST", f"/v1/threads/{run['thread_id']}:erase")):
        refused = await people.told("owner", method, path, 409)
        assert refused["code"] == "FAILED_PRECONDITION"
    assert (await people.told("owner", "GET", f"/v1/threads/{run['thread_id']}"))["messages"] >= 0
    await people.told("owner", "POST", f"/v1/runs/{run['run_id']}:cancel")


async def test_who_may_only_look_takes_their_data_along_and_erases_nothing(people: People) -> None:
    reader = await people.services.user(role="readonly")
    people.clients["readonly"] = people.clients["stranger"]
    headers = {"Authorization": f"Bearer {reader.token}"}
    assert (await people.ask("readonly", "GET", "/v1/export", headers=headers)).status_code == 200
    for method, path in (("DELETE", "/v1/me/data"), ("POST", f"/v1/threads/{ids.ThreadId.new()}:erase")):
        refused = await people.told("readonly", method, path, 403, headers=headers)
        assert (refused["code"], refused["details"]["permission"]) == ("PERMISSION_DENIED", "data:erase")


async def test_who_may_not_erase_the_record_erases_nothing_at_all(shared: Shared, accounts: Accounts) -> None:
    people = shared.people
    key = await accounts.api_key(people.users["owner"], "data:erase", "threads:read")
    headers = {"Authorization": f"Bearer {key}"}
    for method, path in (("DELETE", "/v1/me/data"), ("POST", f"/v1/threads/{shared.thread_id}:erase")):
        refused = await people.told("owner", method, path, 403, headers=headers)
        assert (refused["code"], refused["details"]["permission"]) == ("PERMISSION_DENIED", "events:erase")
    assert (await people.told("owner", "GET", f"/v1/threads/{shared.thread_id}"))["messages"] == 2


async def test_contexts_are_the_callers_and_audited_for_administrators(shared: Shared, accounts: Accounts) -> None:
    people, owner = shared.people, shared.people.users["owner"].user_id
    found = (await people.told("owner", "GET", f"/v1/contexts?thread_id={shared.thread_id}"))["contexts"]
    assert [(one["user_id"], one["run_id"], bool(one["closed_at"])) for one in found] == [(owner, shared.run_id, True)]
    path = f"/v1/contexts/{found[0]['context_id']}"
    assert await people.told("owner", "GET", path) == found[0]
    for who in EVERYBODY[1:]:
        await people.told(who, "GET", path, 404)
    for who in EVERYBODY[1:-1]:
        await people.told(who, "GET", f"{path}?user_id={owner}", 403)
    await people.told("elsewhere", "GET", f"{path}?user_id={owner}", 404)
    admin = {"Authorization": str(dict(await accounts.admin())["authorization"])}
    assert await people.told("stranger", "GET", f"{path}?user_id={owner}", headers=admin) == found[0]
    # the owner sees who looked
    entries = (await people.told("owner", "GET", f"/v1/contexts/audit?context_id={found[0]['context_id']}"))["entries"]
    assert [entry["action"] for entry in entries] == ["open", "close", "read"]
