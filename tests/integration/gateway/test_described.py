"""GET /openapi.json is true: every route is called as it says, and answers what it says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from gateway import rpc
from netra import ids
from netra.agent import Turn, agent
from tests.fixtures import oidc, web
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.gateway.conftest import bearer

_PAGE = "https://app.netra.example/signed-in"
# what a gateway says that is about to stop or has lost a service
_NOT_CALLED = {("GET /readyz", "503")}


@agent("asker")
async def asker(turn: Turn) -> dict[str, object]:
    """Asks people, and then what they mean."""
    decision = await turn.approve("Go on?")
    return {"message": (await turn.wait_for_message()).text, "decision": decision.decision}


@dataclass(slots=True)
class Client:
    """Calls routes, and holds each call and its answer against the description."""

    http: httpx.AsyncClient
    described: dict[str, Any]
    user: User
    other: User
    seen: set[tuple[str, str]] = field(default_factory=set)
    kinds: set[tuple[str, str]] = field(default_factory=set)

    async def call(self, name: str, *, path: dict[str, str] | None = None, signed: bool = True, **more: Any) -> httpx.Response:
        """Call a route by its name in the table."""
        method, _, address = name.partition(" ")
        told = self.described["paths"][address][method.lower()]
        assert signed == (told.get("security") != []), name
        self._asked_as_told(name, told, path or {}, more)
        headers = more.pop("headers", {}) | (bearer(self.user) if signed else {})
        answer = await self.http.request(method, address.format(**(path or {})), headers=headers, **more)
        self._answered_as_told(name, told, answer)
        return answer

    def _asked_as_told(self, name: str, told: dict[str, Any], path: dict[str, str], more: dict[str, Any]) -> None:
        given = {("path", one) for one in path} | {("query", one) for one in more.get("params", {})}
        given |= {("header", one) for one in more.get("headers", {}) if one not in ("Accept", "Content-Type")}
        known = {(one["in"], one["name"]): one for one in told.get("parameters", ())}
        assert given <= set(known), name
        assert {where for where, one in known.items() if one["required"]} <= given, name
        if "json" in more:
            self._fits(told["requestBody"]["content"]["application/json"]["schema"], more["json"])
        elif "data" in more:
            self._fits(told["requestBody"]["content"]["application/x-www-form-urlencoded"]["schema"], more["data"])
        else:
            assert ("content" in more) == ("requestBody" in told), name

    def _answered_as_told(self, name: str, told: dict[str, Any], answer: httpx.Response) -> None:
        status = str(answer.status_code)
        assert status in told["responses"], (name, status, answer.text)
        self.seen.add((name, status))
        kinds = told["responses"][status].get("content", {})
        kind = answer.headers.get("content-type", "").partition(";")[0]
        assert bool(kinds) == bool(answer.content), (name, status)
        if kinds:
            assert {kind, "*/*"} & set(kinds), (name, kind)
            self.kinds.add((name, kind))
        if kind == "application/json" and kind in kinds:
            self._fits(kinds[kind]["schema"], answer.json())

    def _fits(self, schema: dict[str, Any], value: Any) -> None:
        jsonschema_rs.validate({**schema, "components": self.described["components"]}, value)


@pytest.fixture
async def client(services: Services, tmp_path: Path) -> AsyncIterator[tuple[Client, str]]:
    """The whole of Netra in this process, and an outside provider that knows it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with oidc.provider(f"{base}/auth/oidc/callback") as provider:
        entries = {"corp": provider.entry(create_users=True, redirects=[_PAGE])}
        await services.auth(oidc_providers=oidc.write(tmp_path / "oidc.json", **entries))
        await services.context()
        await services.events()
        await services.dispatcher(agents=[asker])
        await services.gateway(port=port)
        async with web.client(base_url=base, timeout=20, trust_env=False) as http:
            described = (await http.get("/openapi.json")).json()
            yield Client(http, described, await services.user(), await services.user()), f"{base}/auth/oidc/callback"


async def _open_to_all(client: Client) -> None:
    for name in ("GET /", "GET /healthz", "GET /readyz", "GET /metrics", "GET /.well-known/jwks.json", "GET /openapi.json"):
        await client.call(name, signed=False)


async def _runs(client: Client) -> None:
    key = {"Idempotency-Key": ids.uuid7()}
    body = {"agent": "text-analyst", "user_request": "Some text.", "inputs": {}, "on_busy": "enqueue", "deadline_s": 20.5}
    run = (await client.call("POST /v1/runs", json=body, headers=key)).json()
    mine, events = {"run_id": run["run_id"]}, "GET /v1/runs/{run_id}/events"
    await client.call(events, path=mine, headers={"Accept": "text/event-stream", "Last-Event-ID": "0"})
    await client.call(events, path=mine, params={"after": 1, "limit": 3})
    await client.call("GET /v1/runs/{run_id}", path=mine)
    await client.call("POST /v1/runs/{run_id}:cancel", path=mine)
    await client.call("GET /v1/runs", params={"page_size": 1, "thread_id": run["thread_id"], "state": "completed"})
    await client.call("GET /v1/threads/{thread_id}/messages", path={"thread_id": run["thread_id"]}, params={"page_size": 5})
    await client.call("GET /v1/contexts", params={"page_size": 2, "run_id": run["run_id"], "thread_id": run["thread_id"], "open": "false"})
    found = (await client.call("GET /v1/contexts")).json()["contexts"]
    await client.call("GET /v1/contexts/{context_id}", path={"context_id": found[0]["context_id"]}, params={"user_id": client.user.user_id})
    await client.call("GET /v1/contexts/audit", params={"context_id": found[0]["context_id"], "page_size": 3})
    await _threads(client, {"thread_id": run["thread_id"]}, mine)
    await client.call("GET /v1/tools", params={"text": "words", "tag": "", "parameter": "text", "page_size": "1"})
    await client.call("GET /v1/agents")
    await client.call("GET /v1/me")
    await client.call("GET /v1/me/statistics")


async def _waits(client: Client) -> None:
    run_id = (await client.call("POST /v1/runs", json={"agent": "asker", "user_request": "Some text."})).json()["run_id"]
    approvals = "/v1/approvals/{approval_id}"
    async with asyncio.timeout(20):
        while True:
            asked = {"run_id": run_id, "state": "pending", "page_size": 1}
            if found := (await client.call("GET /v1/approvals", params=asked)).json()["approvals"]:
                break
    mine = {"approval_id": found[0]["approval_id"]}
    await client.call(f"GET {approvals}", path=mine)
    await client.call(f"POST {approvals}:resolve", path=mine, json={"decision": "approve", "comment": "Yes."})
    key = {"Idempotency-Key": ids.uuid7()}
    await client.call("POST /v1/runs/{run_id}:send", path={"run_id": run_id}, json={"message": "By region."}, headers=key)
    # it has ended: what follows erases everything
    events = {"Accept": "text/event-stream", "Last-Event-ID": "0"}
    await client.call("GET /v1/runs/{run_id}/events", path={"run_id": run_id}, headers=events)
    async with asyncio.timeout(20):
        while True:
            if (await client.call("GET /v1/runs/{run_id}", path={"run_id": run_id})).json()["state"] == "completed":
                return


async def _threads(client: Client, named: dict[str, str], run: dict[str, str]) -> None:
    thread, grants = "/v1/threads/{thread_id}", "/v1/threads/{thread_id}/grants"
    await client.call("GET /v1/threads", params={"page_size": 1, "page_token": "", "selection": "own"})
    await client.call(f"GET {thread}", path=named)
    for whom in ({"grantee_id": client.other.user_id}, {"email": client.other.email}):
        given = await client.call(f"POST {grants}", path=named, json={**whom, "access": "write"}, headers={"Idempotency-Key": ids.uuid7()})
    await client.call(f"GET {grants}", path=named, params={"page_size": 1, "withdrawn": "true"})
    token = (await client.call(f"POST {thread}/token", path=named)).json()["grant_token"]
    for route in ("GET /v1/runs/{run_id}", "POST /v1/runs/{run_id}:cancel"):
        await client.call(route, path=run, headers={"X-Netra-Grant": token})
    await client.call("GET /v1/runs", headers={"X-Netra-Grant": token})
    await client.call(f"DELETE {grants}/{{grantee_id}}", path={**named, "grantee_id": given.json()["grantee_id"]})
    await client.call("GET /v1/artifacts", params={"thread_id": named["thread_id"]})
    await client.call(f"DELETE {thread}", path=named)
    await client.call("GET /v1/threads", params={"selection": "deleted"})
    await client.call(f"POST {thread}:restore", path=named)
    await client.call(f"POST {thread}:erase", path=named, headers={"Idempotency-Key": ids.uuid7()})


async def _everything(client: Client) -> None:
    lines = (await client.call("GET /v1/export")).text.splitlines()
    assert json.loads(lines[-1]) == {"kind": "end", "lines": len(lines) - 1}
    await client.call("DELETE /v1/me/data", headers={"Idempotency-Key": ids.uuid7()})


async def _artifacts(client: Client) -> None:
    key = {"Idempotency-Key": ids.uuid7(), "Content-Type": "text/csv"}
    kept = (await client.call("POST /v1/artifacts", params={"name": "a.csv"}, content=b"a,b\n1,2\n", headers=key)).json()
    mine = {"artifact_id": kept["artifact_id"]}
    await client.call("GET /v1/artifacts", params={"page_size": 1})
    assert (await client.call("GET /v1/artifacts/{artifact_id}", path=mine)).content == b"a,b\n1,2\n"
    part = await client.call("GET /v1/artifacts/{artifact_id}", path=mine, headers={"Range": "bytes=4-", "If-Range": f'"{kept["sha256"]}"'})
    assert (part.status_code, part.content) == (206, b"1,2\n")
    await client.call("DELETE /v1/artifacts/{artifact_id}", path=mine)


async def _outside(client: Client, callback: str) -> None:
    for redirect in ({"redirect_uri": _PAGE}, {}):
        began = await client.call("GET /auth/oidc/start", signed=False, params={"provider": "corp", **redirect})
        back = await oidc.sign_in(began.headers["location"], "ada", callback)
        await client.call("GET /auth/oidc/callback", signed=False, params=back)


async def _sign_in_and_out(client: Client) -> None:
    body = {"email": client.user.email, "password": client.user.password}
    tokens = (await client.call("POST /auth/login", signed=False, json=body)).json()
    tokens = (await client.call("POST /auth/refresh", signed=False, json={"refresh_token": tokens["refresh_token"]})).json()
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    await client.call("POST /auth/token", signed=False, data=form)
    await client.call("POST /auth/logout")


async def test_every_route_answers_what_is_said_of_it(client: tuple[Client, str]) -> None:
    one, callback = client
    await _outside(one, callback)
    for step in (_open_to_all, _runs, _waits, _artifacts, _everything, _sign_in_and_out):
        await step(one)
    remote = {method.path for method in rpc.methods()}
    routes = {f"{method.upper()} {path}": told for path, found in one.described["paths"].items() for method, told in found.items()}
    said = {(name, status) for name, told in routes.items() for status in told["responses"]}
    said = {(name, status) for name, status in said if status != "default" and name.partition(" ")[2] not in remote}
    # nothing is said that no call saw, and the other way round
    assert one.seen == said - _NOT_CALLED
    events = {kind for name, kind in one.kinds if name == "GET /v1/runs/{run_id}/events"}
    assert events == {"application/json", "text/event-stream"}
