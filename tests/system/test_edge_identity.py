"""Signing in, calling RPCs and showing who one is, over the gateway's HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import grpc
import httpx
import pytest

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

_AUTH = "/rpc/netra.auth.v1.AuthService"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"


@pytest.fixture
def secret(system: System) -> str:
    """The secret of the service `dispatcher`."""
    code = "from chassis.settings import ProcessSettings as P; print(P.load().secret('service').get_secret_value())"
    return system.python("dispatcher", code).strip()


def _client(system: System, user: User | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {user.token}"} if user else {}
    return web.client(base_url=gateway_url(system), headers=headers, timeout=20)


async def _admin(system: System, client: httpx.AsyncClient) -> dict[str, str]:
    body = {"email": system.admin_email, "password": system.admin_password()}
    return {"Authorization": f"Bearer {(await client.post('/auth/login', json=body)).json()['access_token']}"}


async def test_an_admin_makes_a_user_who_signs_in_and_is_disabled(system: System) -> None:
    async with _client(system) as client:
        admin = await _admin(system, client)
        email, password = f"{ids.uuid7()}@netra.example", "a long enough password"
        wanted = {"email": email, "password": password, "roles": ["user"], "tier": "early"}
        made = await client.post(f"{_AUTH}/CreateUser", json=wanted, headers=admin)
        assert made.status_code == 200, made.text
        user_id = made.json()["user_id"]
        tokens = (await client.post("/auth/login", json={"email": email, "password": password})).json()
        mine = {"Authorization": f"Bearer {tokens['access_token']}"}
        me = (await client.get("/v1/me", headers=mine)).json()
        assert (me["user_id"], me["email"], me["roles"], me["tier"], me["scope"]) == (user_id, email, ["user"], "early", None)
        assert me["usage"] == {"sockets": 0, "concurrent_runs": 0, "queued_runs": 0}
        assert me["limits"]["monthly_cost_usd"] > 0
        assert (await client.post(f"{_AUTH}/CreateUser", json=wanted, headers=mine)).status_code == 403
        answer = await client.post(f"{_AUTH}/DisableUser", json={"userId": user_id}, headers=admin)
        assert answer.status_code == 200, answer.text
        async with asyncio.timeout(5):
            while (await client.get("/v1/me", headers=mine)).status_code != 401:
                pass


async def test_usage_counts_sockets_and_runs(system: System, new_user: NewUser) -> None:
    user = new_user(tier="internal")
    async with _client(system, user) as client, sockets.opened(system, user) as socket:
        run = await socket.run("Some text.", inputs={"pace_s": 1.0})
        await socket.until(type="agent_started")
        assert (await client.get("/v1/me")).json()["usage"] == {"sockets": 1, "concurrent_runs": 1, "queued_runs": 0}
        await client.post(f"/v1/runs/{run['run_id']}:cancel")


async def test_an_api_key_is_a_bearer_narrowed_to_its_scope_until_it_is_revoked(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with _client(system, user) as client:
        made = await client.post(f"{_AUTH}/CreateApiKey", json={"name": "ci", "scopes": ["session:read", "runs:read", "events:read"]})
        assert made.status_code == 200, made.text
        key = {"Authorization": f"Bearer {made.json()['api_key']}"}
        me = (await client.get("/v1/me", headers=key)).json()
        assert (me["user_id"], me["scope"]) == (user.user_id, ["events:read", "runs:read", "session:read"])
        assert (await client.get("/v1/runs", headers=key)).status_code == 200
        denied = await client.post("/v1/runs", json={"user_request": "Some text."}, headers=key)
        assert (denied.status_code, denied.json()["details"]["permission"]) == (403, "runs:write")
        async with sockets.opened(system, made.json()["api_key"]) as socket:
            renewed = await socket.ask("AUTH", {"access_token": made.json()["api_key"]})
            assert renewed["type"] == "ack"
            await client.post(f"{_AUTH}/RevokeApiKey", json={"key_id": made.json()["key"]["key_id"]})
            assert await socket.closed() == 4509
        assert (await client.get("/v1/me", headers=key)).status_code == 401
        assert (await client.get("/v1/me")).status_code == 200


class TestTokenEndpoint:
    """POST /auth/token, as RFC 6749 and RFC 8693 describe it."""

    async def test_a_service_signs_in_with_a_form_or_with_basic(self, system: System, secret: str) -> None:
        basic = base64.b64encode(f"dispatcher:{secret}".encode()).decode()
        async with _client(system) as client:
            form = {"grant_type": "client_credentials", "client_id": "dispatcher", "client_secret": secret}
            first = await client.post("/auth/token", data=form)
            second = await client.post(
                "/auth/token", data={"grant_type": "client_credentials"}, headers={"Authorization": f"Basic {basic}"}
            )
            both = await client.post("/auth/token", data=form, headers={"Authorization": f"Basic {basic}"})
            wrong = await client.post("/auth/token", data={**form, "client_secret": "x"})
        for answer in (first, second):
            assert (answer.status_code, answer.json()["token_type"]) == (200, "Bearer")
            assert set(answer.json()) == {"access_token", "token_type", "expires_in"}
            assert answer.headers["cache-control"] == "no-store"
        assert (both.status_code, both.json()["error"]) == (400, "invalid_request")
        assert (wrong.status_code, wrong.json()["error"], wrong.json()["code"]) == (401, "invalid_client", "UNAUTHENTICATED")
        assert wrong.headers["www-authenticate"].startswith("Basic")

    async def test_a_refresh_token_is_exchanged(self, system: System, new_user: NewUser) -> None:
        user = new_user()
        async with _client(system) as client:
            found = await client.post("/auth/token", data={"grant_type": "refresh_token", "refresh_token": user.refresh_token})
            wrong = await client.post("/auth/token", data={"grant_type": "refresh_token", "refresh_token": f"nrt_{'x' * 43}"})
        assert {"access_token", "refresh_token", "token_type", "expires_in", "user_id"} <= set(found.json())
        assert (wrong.status_code, wrong.json()["error"]) == (400, "invalid_grant")

    async def test_a_service_gets_a_narrow_token_on_behalf_of_a_user(self, system: System, new_user: NewUser, secret: str) -> None:
        form = {
            "grant_type": _EXCHANGE, "subject_token": new_user().token, "subject_token_type": _ACCESS_TOKEN, "client_id": "dispatcher",
            "client_secret": secret, "scope": "runs:read session:read",
        }  # fmt: skip
        async with _client(system) as client:
            found = await client.post("/auth/token", data=form)
            wide = await client.post("/auth/token", data={**form, "scope": "users:write"})
            stolen = await client.post("/auth/token", data={**form, "client_secret": "x"})
            at_the_edge = await client.get("/v1/me", headers={"Authorization": f"Bearer {found.json().get('access_token')}"})
        assert found.status_code == 200, found.text
        assert (found.json()["issued_token_type"], found.json()["scope"]) == (_ACCESS_TOKEN, "runs:read session:read")
        assert found.json()["expires_in"] <= 60
        assert wide.status_code in (400, 403), wide.text
        assert (stolen.status_code, stolen.json()["error"]) == (401, "invalid_client")
        assert at_the_edge.status_code == 401

    async def test_a_service_starts_a_run_on_behalf_of_a_user_within_the_scope(
        self, system: System, new_user: NewUser, secret: str
    ) -> None:
        form = {
            "grant_type": _EXCHANGE, "subject_token": new_user().token, "client_id": "dispatcher", "client_secret": secret,
            "scope": "runs:write tools:execute",
        }  # fmt: skip
        async with _client(system) as client:
            token = (await client.post("/auth/token", data=form)).json()["access_token"]
        metadata = (("authorization", f"Bearer {token}"),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['dispatcher']}") as channel:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(channel)
            wanted = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="text-analyst", user_request="Some text.")
            assert (await stub.StartRun(wanted, metadata=metadata)).run_id
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            ("grant_type=password&username=x&password=y", "unsupported_grant_type"),
            ("", "invalid_request"),
            ("grant_type=refresh_token", "invalid_request"),
            ("grant_type=refresh_token&grant_type=client_credentials", "invalid_request"),
            ("grant_type=refresh_token&refresh_token=%ff", "invalid_request"),
            ("grant_type=refresh_token&refresh_token=a%00b", "invalid_request"),
            ("&".join(f"a{index}=1" for index in range(100)), "invalid_request"),
        ],
    )
    async def test_a_form_that_is_wrong_is_refused(self, system: System, body: str, error: str) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with _client(system) as client:
            answer = await client.post("/auth/token", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (400, error)

    async def test_json_is_no_form(self, system: System) -> None:
        async with _client(system) as client:
            answer = await client.post("/auth/token", json={"grant_type": "refresh_token"})
        assert (answer.status_code, answer.json()["details"]["field"]) == (400, "Content-Type")


async def test_an_outside_sign_in_with_nobody_known_is_refused(system: System) -> None:
    async with _client(system) as client:
        unknown = await client.get("/auth/oidc/start", params={"provider": "nobody"})
        missing = await client.get("/auth/oidc/start")
        twice = await client.get("/auth/oidc/start?provider=a&provider=b")
        forged = await client.get("/auth/oidc/callback", params={"state": "x", "code": "y"})
    assert unknown.status_code in (400, 404), unknown.text
    assert "set-cookie" not in unknown.headers
    assert [answer.status_code for answer in (missing, twice)] == [400, 400]
    assert forged.status_code == 401, forged.text


async def test_forwarded_addresses_are_not_believed_by_default(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with _client(system) as client:
        body = {"email": user.email, "password": user.password}
        tokens = (await client.post("/auth/login", json=body, headers={"X-Forwarded-For": "203.0.113.77"})).json()
        bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
        listed: list[dict[str, Any]] = (await client.post(f"{_AUTH}/ListSessions", json={}, headers=bearer)).json()["sessions"]
    current = next(session for session in listed if session["current"])
    assert current["address"] not in ("", "203.0.113.77")
    assert current["device"].startswith("python-httpx")


async def test_pages_of_other_sites_are_told_nothing(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        ours = await client.options(f"{_AUTH}/GetPermissions", headers={"Origin": "http://localhost:5173", **ask})
        theirs = await client.options(f"{_AUTH}/GetPermissions", headers={"Origin": "https://attacker.example", **ask})
        simple = await client.get("/v1/me", headers={"Origin": "https://attacker.example"})
    assert (ours.status_code, ours.headers["access-control-allow-origin"]) == (200, "http://localhost:5173")
    assert theirs.status_code == 400
    assert not any("access-control-allow-origin" in answer.headers for answer in (theirs, simple))
    assert not any("access-control-allow-credentials" in answer.headers for answer in (ours, theirs, simple))


async def test_the_description_is_served(system: System) -> None:
    async with _client(system) as client:
        found = (await client.get("/openapi.json")).json()
        assert found["openapi"] == "3.1.0"
        # whoever follows it calls what there is
        path = next(path for path in found["paths"] if path.endswith("AuthService/GetKeys"))
        keys = (await client.post(path, json={})).json()["keys"]
    assert json.dumps(keys)
    assert {key["issuer"] for key in keys} >= {"auth"}
