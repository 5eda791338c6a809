"""Examples of the HTTP resources; those under /rpc are the RPCs' own."""

from __future__ import annotations

from typing import Any

from tests.prove import ways
from tests.prove.isolation.example import NOBODY, USER, Wanted, routes
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


def _plain(*names: str) -> None:
    for name in names:

        @routes(name, NOBODY)
        async def _(world: World, who: Party) -> Any:
            return Wanted()


_plain("GET /", "GET /healthz", "GET /readyz", "GET /metrics", "GET /.well-known/jwks.json", "GET /openapi.json")


@routes("POST /auth/login", NOBODY)
async def _(world: World, who: Party) -> Any:
    return Wanted(json={"email": who.email, "password": who.user.password})


@routes("POST /auth/refresh", NOBODY)
async def _(world: World, who: Party) -> Any:
    return Wanted(json={"refresh_token": (await world.signed_in(who.email, who.user.password)).refresh_token})


@routes("POST /auth/logout", USER, spare=True, signed_in=True)
async def _(world: World, who: Party) -> Any:
    return Wanted()


@routes("POST /auth/token", NOBODY)
async def _(world: World, who: Party) -> Any:
    token = (await world.signed_in(who.email, who.user.password)).refresh_token
    return Wanted(form={"grant_type": "refresh_token", "refresh_token": token})


@routes("GET /auth/oidc/start", NOBODY)
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"provider": "corp"})


@routes("GET /auth/oidc/callback", NOBODY, once=True)
async def _(world: World, who: Party) -> Any:
    began = await world.http.get("/auth/oidc/start", params={"provider": "corp"}, headers=ways.a_client())
    back = await world.back(began.headers["location"])
    cookie = began.headers["set-cookie"].partition(";")[0]
    world.http.cookies.clear()
    return Wanted(query=back, headers={"Cookie": cookie})


@routes("GET /v1/me", USER, shows="user_id tenant_id email")
async def _(world: World, who: Party) -> Any:
    return Wanted()


@routes("GET /v1/me/statistics", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted()


@routes("POST /v1/runs", USER, shows="thread_id")
async def _(world: World, who: Party) -> Any:
    body = {
        "agent": "text-analyst", "user_request": f"About {who.canary}.", "inputs": {"note": who.canary},
        "thread_id": who.things["thread_id"], "on_busy": "enqueue",
    }  # fmt: skip
    return Wanted(json=body, headers={"Idempotency-Key": who.once()})


@routes("GET /v1/runs", USER, long=True, shows="run_id", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200", "thread_id": who.things["thread_id"]})


@routes("GET /v1/runs/{run_id}", USER, shows="run_id thread_id", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"run_id": who.things["run_id"]})


@routes("POST /v1/runs/{run_id}:cancel", USER, shows="run_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"run_id": who.things["run_id"]})


@routes("POST /v1/runs/{run_id}:send", USER)
async def _(world: World, who: Party) -> Any:
    run_id, headers = await world.waiting(who), {"Idempotency-Key": who.once()}
    return Wanted(path={"run_id": run_id}, json={"message": f"About {who.canary}."}, headers=headers)


@routes("GET /v1/approvals", USER, shows="approval_id run_id canary", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200", "run_id": who.things["run_id"]})


@routes("GET /v1/approvals/{approval_id}", USER, shows="approval_id thread_id canary", reads="approval_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"approval_id": who.things["approval_id"]})


@routes("POST /v1/approvals/{approval_id}:resolve", USER, shows="approval_id canary")
async def _(world: World, who: Party) -> Any:
    body = {"decision": "approve", "comment": "Yes."}
    return Wanted(path={"approval_id": who.things["approval_id"]}, json=body)


@routes("GET /v1/runs/{run_id}/events", USER, shows="run_id event_id canary", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"run_id": who.things["run_id"]}, query={"limit": "200"})


# the same address answers with a stream
@routes("GET /v1/runs/{run_id}/events#stream", USER, shows="run_id event_id canary", live=True)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"run_id": who.things["run_id"]}, headers={"Accept": "text/event-stream", "Last-Event-ID": "0"})


@routes("GET /v1/threads", USER, long=True, shows="thread_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200"})


@routes("GET /v1/threads/{thread_id}/messages", USER, shows="message_id canary", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": who.things["thread_id"]}, query={"page_size": "200"})


@routes("POST /v1/artifacts", USER, shows="canary")
async def _(world: World, who: Party) -> Any:
    headers = {"Idempotency-Key": who.once(), "Content-Type": "text/plain"}
    return Wanted(query={"name": f"{who.canary}.txt"}, headers=headers, content=b"some text")


@routes("GET /v1/artifacts", USER, long=True, shows="artifact_id canary")
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200"})


@routes("GET /v1/artifacts/{artifact_id}", USER, shows="canary", reads="artifact_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"artifact_id": who.things["artifact_id"]}, headers={"Range": "bytes=0-"})


@routes("DELETE /v1/artifacts/{artifact_id}", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"artifact_id": (await world.kept(who)).artifact_id})


@routes("GET /v1/tools", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"text": "text"})


@routes("GET /v1/agents", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted()
