"""A second user sees nothing of the first, over any route."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

CANARY = "canary-7f3a"


class Ours:
    """A finished run and a file of the owner, and a stranger."""

    def __init__(self, owner: User, stranger: User, run: dict[str, Any], artifact_id: str) -> None:
        self.owner, self.stranger = owner, stranger
        self.run_id, self.thread_id, self.artifact_id = run["run_id"], run["thread_id"], artifact_id


@pytest.fixture
async def ours(system: System, new_user: NewUser) -> Ours:
    """A run and a file that hold the canary."""
    owner, stranger = new_user(), new_user()
    async with sockets.opened(system, owner) as socket:
        run = await socket.run(f"A text with a {CANARY} in it.")
        await socket.ended(run["run_id"])
    async with web.client(base_url=gateway_url(system), headers={"Authorization": f"Bearer {owner.token}"}) as client:
        kept = await client.post(f"/v1/artifacts?name={CANARY}.txt", content=CANARY.encode(), headers={"Content-Type": "text/plain"})
    return Ours(owner, stranger, run, kept.json()["artifact_id"])


ROUTES = [
    ("GET", "/v1/runs/{run_id}", 404),
    ("POST", "/v1/runs/{run_id}:cancel", 404),
    ("GET", "/v1/runs/{run_id}/events", 404),
    ("GET", "/v1/threads/{thread_id}/messages", 404),
    ("GET", "/v1/artifacts/{artifact_id}", 404),
    ("HEAD", "/v1/artifacts/{artifact_id}", 404),
    ("DELETE", "/v1/artifacts/{artifact_id}", 404),
    ("GET", "/v1/artifacts", 200),
    ("GET", "/v1/runs", 200),
    ("GET", "/v1/threads", 200),
    ("GET", "/v1/me", 200),
]


@pytest.mark.parametrize(("method", "path", "code"), ROUTES)
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_no_http_route_shows_a_foreign_thing(system: System, ours: Ours, method: str, path: str, code: int, accept: str) -> None:
    path = path.format(run_id=ours.run_id, thread_id=ours.thread_id, artifact_id=ours.artifact_id)
    headers = {"Authorization": f"Bearer {ours.stranger.token}", "Accept": accept}
    async with web.client(base_url=gateway_url(system), timeout=20) as client:
        answer = await client.request(method, path, headers=headers)
        mine = await client.request(method, path, headers={**headers, "Authorization": f"Bearer {ours.owner.token}"})
    assert answer.status_code == code, answer.text
    for trace in (CANARY, ours.run_id, ours.thread_id, ours.artifact_id, ours.owner.user_id):
        # problem+json repeats the path asked for, and nothing else
        assert trace not in answer.text.replace(path, "")
        assert trace not in str(answer.headers)
    # the positive control: the same request by the owner succeeds
    assert mine.status_code == (204 if method == "DELETE" else 200), mine.text


async def test_a_file_of_somebody_else_can_neither_be_read_nor_replaced_nor_removed(system: System, ours: Ours) -> None:
    path, key = f"/v1/artifacts/{ours.artifact_id}", {"Idempotency-Key": "a-key-that-both-use", "Content-Type": "text/plain"}
    async with web.client(base_url=gateway_url(system), timeout=20) as client:
        theirs = {"Authorization": f"Bearer {ours.stranger.token}"}
        mine = {"Authorization": f"Bearer {ours.owner.token}"}
        for asked in ({}, {"Range": "bytes=0-3"}, {"Range": "bytes=999-"}, {"If-Range": '"x"'}):
            answer = await client.get(path, headers=theirs | asked)
            assert answer.status_code == 404
            missing = await client.get(f"/v1/artifacts/{ours.stranger.user_id}", headers=theirs | asked)
            assert {**missing.json(), "correlation_id": ""} == {**answer.json(), "correlation_id": ""}
        # the same key and name make a file of the stranger's own, and leave the owner's as it was
        put = [(await client.post("/v1/artifacts?name=n", content=who["Authorization"], headers=who | key)) for who in (mine, theirs)]
        assert [answer.status_code for answer in put] == [201, 201]
        assert put[0].json()["artifact_id"] != put[1].json()["artifact_id"]
        assert (await client.delete(path, headers=theirs)).status_code == 404
        listed = (await client.get("/v1/artifacts", headers=theirs)).json()["artifacts"]
        assert [found["artifact_id"] for found in listed] == [put[1].json()["artifact_id"]]
        # the positive control
        assert (await client.get(path, headers=mine)).text == CANARY
        assert (await client.delete(path, headers=mine)).status_code == 204
        assert (await client.get(path, headers=mine)).status_code == 404


async def test_no_frame_reaches_a_foreign_thing(system: System, ours: Ours) -> None:
    async with sockets.opened(system, ours.stranger, "resume.0") as socket:
        cancel = await socket.ask("CANCEL", {"run_id": ours.run_id})
        chat = await socket.ask("CHAT", {"text": "hello"}, thread_id=ours.thread_id)
        start = await socket.ask("START_AGENT", {"user_request": "hello"}, thread_id=ours.thread_id)
        resume = await socket.ask("RESUME", {"after": 0})
        await socket.ask("PING")
    assert [answer.get("code") for answer in (cancel, chat, start)] == ["NOT_FOUND"] * 3
    assert resume["type"] == "ack"
    assert CANARY not in json.dumps(socket.frames)
    assert socket.events == []


async def test_a_foreign_token_cannot_take_over_a_socket(system: System, ours: Ours) -> None:
    async with sockets.opened(system, ours.stranger) as socket:
        answer = await socket.ask("AUTH", {"access_token": ours.owner.token})
    assert (answer["type"], answer["code"]) in {("error", "PERMISSION_DENIED"), ("error", "UNAUTHENTICATED")}


async def test_events_while_they_happen_reach_their_user_alone(system: System, new_user: NewUser) -> None:
    users = [new_user() for _ in range(5)]

    async def watch(user: User) -> list[dict[str, Any]]:
        async with sockets.opened(system, user) as socket:
            runs = [await socket.run(f"Text of {user.user_id}.") for _ in range(3)]
            for run in runs:
                await socket.ended(run["run_id"])
            return socket.events

    for user, events in zip(users, await asyncio.gather(*map(watch, users)), strict=True):
        assert {event["user_id"] for event in events} == {user.user_id}
        others = [other.user_id for other in users if other is not user]
        assert not any(other in json.dumps(events) for other in others)


async def test_no_rpc_shows_a_foreign_thing(system: System, ours: Ours) -> None:
    def channel(name: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[name]}")

    async with channel("dispatcher") as to_dispatcher, channel("context") as to_context, channel("events") as to_events:
        dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(to_dispatcher)
        context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(to_context)
        events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(to_events)
        calls: list[tuple[Any, Any]] = [
            (dispatcher.GetRun, dispatcher_pb2.GetRunRequest(run_id=ours.run_id)),
            (dispatcher.CancelRun, dispatcher_pb2.CancelRunRequest(run_id=ours.run_id)),
            (context.ListMessages, context_pb2.ListMessagesRequest(thread_id=ours.thread_id)),
            (context.DeleteArtifact, context_pb2.DeleteArtifactRequest(artifact_id=ours.artifact_id)),
            (events.ListEvents, events_pb2.ListEventsRequest(run_id=ours.run_id)),
        ]
        for call, request in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request, metadata=ours.stranger.bearer)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND, request
        wanted = context_pb2.GetArtifactRequest(artifact_id=ours.artifact_id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(context.GetArtifact(wanted, metadata=ours.stranger.bearer)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert (await anext(aiter(context.GetArtifact(wanted, metadata=ours.owner.bearer)))).artifact.artifact_id == ours.artifact_id
        nothing = await context.ListArtifacts(context_pb2.ListArtifactsRequest(), metadata=ours.stranger.bearer)
        assert list(nothing.artifacts) == []
        everything = await events.ListEvents(events_pb2.ListEventsRequest(), metadata=ours.stranger.bearer)
        assert list(everything.events) == []
        spoofed = (*ours.stranger.bearer, ("x-user-id", ours.owner.user_id))
        assert list((await events.ListEvents(events_pb2.ListEventsRequest(), metadata=spoofed)).events) == []


@pytest.mark.parametrize(
    ("service", "method", "request_"),
    [
        ("events", "OpenRun", events_pb2.OpenRunRequest()),
        ("context", "OpenContext", context_pb2.OpenContextRequest()),
        ("context", "AppendMessage", context_pb2.AppendMessageRequest()),
    ],
)
async def test_what_only_services_may_do_is_denied_to_users(
    system: System, new_user: NewUser, service: str, method: str, request_: Any
) -> None:
    stubs = {"events": events_pb2_grpc.EventsServiceStub, "context": context_pb2_grpc.ContextServiceStub}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[service]}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stubs[service](channel), method)(request_, metadata=new_user(role="admin").bearer)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
