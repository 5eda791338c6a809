"""The gateway's HTTP resources and the ways into the socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import websockets

from netra import ids
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User


def _client(system: System, user: User | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {user.token}"} if user else {}
    return web.client(base_url=gateway_url(system), headers=headers, timeout=20)


async def test_login_refresh_and_logout(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with _client(system) as client:
        tokens = (await client.post("/auth/login", json={"email": user.email, "password": user.password})).json()
        assert (tokens["token_type"], tokens["user_id"], tokens["expires_in"] > 60) == ("Bearer", user.user_id, True)
        renewed = (await client.post("/auth/refresh", json={"refresh_token": tokens["refresh_token"]})).json()
        assert renewed["refresh_token"] != tokens["refresh_token"]
        headers = {"Authorization": f"Bearer {renewed['access_token']}"}
        assert (await client.get("/v1/me", headers=headers)).json()["user_id"] == user.user_id
        assert (await client.post("/auth/logout", headers=headers)).status_code in (200, 204)
        gone = await client.post("/auth/refresh", json={"refresh_token": renewed["refresh_token"]})
        assert gone.status_code == 401


async def test_logout_closes_the_sockets_of_the_session_and_leaves_its_runs(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with _client(system, user) as client, sockets.opened(system, user) as socket:
        run = await socket.run("Some text.", inputs={"pace_s": 0.5})
        await client.post("/auth/logout")
        assert await socket.closed() == 4509
        tokens = (await client.post("/auth/login", json={"email": user.email, "password": user.password})).json()
    async with sockets.opened(system, tokens["access_token"], "resume.0") as again:
        assert (await again.ended(run["run_id"]))[-1]["type"] == "agent_completed"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"email": "nobody@netra.example", "password": "wrong-password"}, 401, "UNAUTHENTICATED"),
        ({"email": "x"}, 400, "INVALID_PAYLOAD"),
        ({}, 400, "INVALID_PAYLOAD"),
        ([], 400, "NOT_AN_OBJECT"),
    ],
)
async def test_a_wrong_login_is_a_problem_document(system: System, body: Any, status: int, code: str) -> None:
    async with _client(system) as client:
        answer = await client.post("/auth/login", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"code", "message", "correlation_id"} <= set(answer.json())


async def test_a_run_over_http(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        key = {"Idempotency-Key": ids.uuid7()}
        body = {"agent": "text-analyst", "user_request": "Some text."}
        started = (await client.post("/v1/runs", json=body, headers=key)).json()
        assert (await client.post("/v1/runs", json=body, headers=key)).json() == started
        events = []
        url = f"/v1/runs/{started['run_id']}/events"
        async with client.stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))
                if line.startswith("id:"):
                    assert int(line[3:]) > 0
        assert events[-1]["type"] == "agent_completed"
        page = (await client.get(url, params={"after": 2, "limit": 3}, headers={"Accept": "application/json"})).json()
        assert [event["cursor"] for event in page["events"]] == [3, 4, 5]
        assert page["next_after"] == 5
        resumed = []
        async with client.stream("GET", url, headers={"Accept": "text/event-stream", "Last-Event-ID": "5"}) as stream:
            resumed = [json.loads(line[5:]) async for line in stream.aiter_lines() if line.startswith("data:")]
        assert resumed == events[5:]
        ahead = await client.get(url, headers={"Accept": "text/event-stream", "Last-Event-ID": str(events[-1]["cursor"] + 1)})
        assert (ahead.status_code, ahead.json()["code"]) == (409, "FAILED_PRECONDITION")


async def test_lists_and_catalogues(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        tools = (await client.get("/v1/tools")).json()["tools"]
        names = [tool["name"] for tool in tools]
        assert names == sorted(names)
        assert {"text_keywords", "text_statistics", "usage_load", "cost_breakdown", "spend_chart"} <= set(names)
        assert {tool["input_schema"]["type"] for tool in tools} == {"object"}
        agents = [agent["name"] for agent in (await client.get("/v1/agents")).json()["agents"]]
        assert {"supervisor", "spend-analyst", "text-analyst"} <= set(agents)
        found = (await client.get("/v1/tools", params={"text": "frequent words"})).json()["tools"]
        assert found == [tools[names.index("text_keywords")]]
        takes_text = [tool for tool in tools if "text" in tool["input_schema"].get("properties", {})]
        paged: list[dict[str, Any]] = []
        token = ""
        while len(paged) < len(takes_text):
            asked = {"parameter": "text", "page_size": "1", **({"page_token": token} if token else {})}
            page = (await client.get("/v1/tools", params=asked)).json()
            paged, token = paged + page["tools"], page["next_page_token"]
        assert (paged, token, len(paged) > 1) == (takes_text, "", True)
        assert (await client.get("/v1/tools", params={"page_size": "201"})).json()["details"]["field"] == "query.page_size"
        assert (await client.get("/v1/tools", params={"tier": "gold"})).json()["details"]["field"] == "tier"
        assert (await client.get("/v1/runs")).json()["runs"] == []


async def test_probes_and_keys_need_no_token(system: System) -> None:
    async with _client(system) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert "# HELP" in (await client.get("/metrics")).text
        keys = (await client.get("/.well-known/jwks.json")).json()["keys"]
    assert len(keys) >= 2
    assert {(key["kty"], key["crv"]) for key in keys} == {("OKP", "Ed25519")}


@pytest.mark.parametrize("path", ["/v1/me", "/v1/runs", "/v1/tools", "/v1/agents", "/v1/threads"])
async def test_everything_else_does(system: System, path: str) -> None:
    async with _client(system) as client:
        answer = await client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")


async def test_an_unknown_path_is_a_problem_document(system: System) -> None:
    async with _client(system) as client:
        answer = await client.get("/v1/nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")


class TestHandshake:
    """Who may open a socket."""

    async def _refused(self, system: System, path: str = "/ws", **more: Any) -> int:
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with websockets.connect(f"ws://127.0.0.1:{system.ports['gateway']}{path}", **more):
                pass
        return caught.value.response.status_code

    async def test_nobody_without_a_token(self, system: System) -> None:
        assert await self._refused(system) == 401

    async def test_nobody_with_a_wrong_one(self, system: System) -> None:
        assert await self._refused(system, additional_headers={"Authorization": "Bearer x.y.z"}) == 401

    async def test_no_page_of_another_site(self, system: System, new_user: NewUser) -> None:
        headers = {"Authorization": f"Bearer {new_user().token}"}
        assert await self._refused(system, additional_headers=headers, origin="https://attacker.example") == 403

    async def test_no_token_in_the_address(self, system: System, new_user: NewUser) -> None:
        assert await self._refused(system, f"/ws?access_token={new_user().token}") == 400

    async def test_the_token_is_not_echoed(self, system: System, new_user: NewUser) -> None:
        async with sockets.opened(system, new_user()) as socket:
            assert socket.connection.subprotocol == "netra.v1"
            greeting = socket.frames[0]
        assert {"connection_id", "user_id", "cursor", "epoch", "heartbeat_s", "limits", "server_time"} <= set(greeting)
