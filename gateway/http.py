"""The HTTP resources and server-sent events."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, identity, status
from gateway import (
    approvals,
    artifacts,
    contexts,
    frames,
    kept,
    me,
    openapi,
    privacy,
    problems,
    requests,
    router,
    rpc,
    session,
    sign_in,
    sse,
    threads,
    upstreams,
    views,
)
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_answer = problems.answer
# how old what the services say of themselves may be, and the published keys
_SERVING_S, _KEYS_S = 1.0, 5.0


class Api:
    """One method per resource: read, call in the caller's name, show."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge = edge
        self._services = services
        self._events = sse.Events(edge, services)
        self._artifacts = artifacts.Artifacts(edge, services)
        self._sign_in = sign_in.SignIn(edge, services)
        self._rpc = rpc.Rpc(edge, services)
        self._me = me.Me(edge, services)
        self._threads = threads.Threads(edge, services)
        self._contexts = contexts.Contexts(edge, services)
        self._privacy = privacy.Privacy(edge, services)
        self._approvals = approvals.Approvals(edge, services)
        self._serving = kept.Kept(services.serving, _SERVING_S)
        self._keys = kept.Kept(self._published, _KEYS_S)
        self._document = b""

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [
            ("GET", "/", self.index),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.metrics),
            ("GET", "/.well-known/jwks.json", self.jwks),
            ("GET", "/ws", self.socket),
            ("GET", "/openapi.json", self.openapi),
            *self._sign_in.routes(),
            *self._rpc.routes(),
            *self._me.routes(),
            ("POST", "/v1/runs", self.start_run),
            ("GET", "/v1/runs", self.list_runs),
            ("POST", "/v1/runs/{run_id}:cancel", self.cancel_run),
            ("POST", "/v1/runs/{run_id}:send", self.send_message),
            ("GET", "/v1/runs/{run_id}/events", self.run_events),
            ("GET", "/v1/runs/{run_id}", self.get_run),
            *self._approvals.routes(),
            *self._threads.routes(),
            *self._contexts.routes(),
            *self._privacy.routes(),
            ("POST", "/v1/artifacts", self.put_artifact),
            ("GET", "/v1/artifacts", self.list_artifacts),
            ("GET", "/v1/artifacts/{artifact_id}", self.get_artifact),
            ("DELETE", "/v1/artifacts/{artifact_id}", self.delete_artifact),
            ("GET", "/v1/tools", self.list_tools),
            ("GET", "/v1/agents", self.list_agents),
        ]

    async def _caller(self, request: Request) -> identity.Principal:
        return await self._edge.callers.of(request)

    async def index(self, request: Request) -> Response:
        """What there is."""
        await self._edge.callers.nobody(request)
        endpoints = [f"{method} {path}" for method, path, _ in self.routes() if path != "/ws"]
        return _answer({"name": "netra", "socket": "GET /ws (subprotocols netra.v1, bearer.<access token>)", "endpoints": endpoints})

    async def openapi(self, request: Request) -> Response:
        """All of this, for programs (OpenAPI 3.1)."""
        await self._edge.callers.nobody(request)
        self._document = self._document or orjson.dumps(openapi.document(self.routes(), rpc.methods()))
        return Response(self._document, 200, {"Cache-Control": "public, max-age=300"}, "application/json")

    async def socket(self, _request: Request) -> Response:
        """A plain GET of the socket's address."""
        raise errors.FailedPrecondition("This is a WebSocket. Connect with the subprotocols netra.v1 and bearer.<access token>.")

    async def healthz(self, _request: Request) -> Response:
        """Alive."""
        return _answer({"status": "alive"})

    async def readyz(self, _request: Request) -> Response:
        """Whether every upstream serves, keys are known, and new sockets are welcome."""
        parts = await self._serving() | {"trust": self._edge.verifier.trust.ready, "accepting": not self._edge.open.draining.is_set()}
        ready = all(parts.values())
        # without them events come late, but they come
        parts |= {"tail": self._edge.tail.connected, "live": self._edge.tail.live}
        return _answer({"ready": ready, "parts": parts}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        await self._edge.callers.nobody(request)
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def jwks(self, request: Request) -> Response:
        """The published keys."""
        await self._edge.callers.nobody(request)
        return _answer(views.jwks(await self._keys()), headers={"Cache-Control": "public, max-age=60"})

    async def _published(self) -> auth_pb2.GetKeysResponse:
        with status.translated():
            return await self._services.auth.GetKeys(auth_pb2.GetKeysRequest())

    async def start_run(self, request: Request) -> Response:
        """START_AGENT over HTTP; the idempotency key is the request id."""
        received_at = time.time()
        who = await self._caller(request)
        payload = await problems.body_of(request, self._edge.settings.max_body_bytes)
        frames.refuse_identity(payload, "payload.")
        wanted = router.accepted(router.start_run(payload, "", requests.key(request)), received_at)
        with status.translated():
            answer = await self._services.dispatcher.StartRun(wanted, metadata=channel.bearer(who.token))
        found = {"run_id": answer.run_id, "thread_id": answer.thread_id, "message_id": answer.message_id}
        return _answer(found, 202, {"Location": f"/v1/runs/{answer.run_id}"})

    async def list_runs(self, request: Request) -> Response:
        """The caller's runs, or all of the thread of a grant token; newest first."""
        who, query = await self._caller(request), request.query_params
        wanted_state = views.state_named(query.get("state", ""))
        if query.get("state") and not wanted_state:
            raise frames.wrong("query.state", "is not a state of a run")
        wanted = dispatcher_pb2.ListRunsRequest(
            **requests.page(query),
            thread_id=requests.in_query(query, "thread_id"),
            state=wanted_state or dispatcher_pb2.RUN_STATE_UNSPECIFIED,
            grant_token=requests.grant(request),
        )
        with status.translated():
            found = await self._services.dispatcher.ListRuns(wanted, metadata=channel.bearer(who.token))
        return _answer({"runs": [views.run(one) for one in found.runs], "next_page_token": found.next_page_token})

    async def get_run(self, request: Request) -> Response:
        """One run of the caller, or of the thread of a grant token."""
        who = await self._caller(request)
        wanted = dispatcher_pb2.GetRunRequest(run_id=requests.in_path(request, "run_id", ids.RunId), grant_token=requests.grant(request))
        with status.translated():
            found = await self._services.dispatcher.GetRun(wanted, metadata=channel.bearer(who.token))
        return _answer({**views.run(found.run), "stages": views.stages(found.run)})

    async def cancel_run(self, request: Request) -> Response:
        """Ask a run to stop."""
        who = await self._caller(request)
        run_id = requests.in_path(request, "run_id", ids.RunId)
        with status.translated():
            wanted = dispatcher_pb2.CancelRunRequest(run_id=run_id, grant_token=requests.grant(request))
            found = await self._services.dispatcher.CancelRun(wanted, metadata=channel.bearer(who.token))
        return _answer({"run_id": run_id, "state": views.state(found.state)})

    async def send_message(self, request: Request) -> Response:
        """SEND over HTTP: say something to a run that goes on; the idempotency key is the request id."""
        who = await self._caller(request)
        payload = await problems.body_of(request, self._edge.settings.max_body_bytes)
        frames.refuse_identity(payload, "payload.")
        run_id = requests.in_path(request, "run_id", ids.RunId)
        wanted = router.sent(payload, run_id, requests.key(request), requests.grant(request))
        return _answer(await self._edge.calls.send(who, wanted))

    async def run_events(self, request: Request) -> Response:
        """The record of one run: server-sent events, or one page."""
        who = await self._caller(request)
        run_id = requests.in_path(request, "run_id", ids.RunId)
        if "text/event-stream" in request.headers.get("accept", ""):
            return await self._events.stream(who, run_id, self._last_seen(request))
        after = problems.number(request.query_params, "after", 0, 2**62, 0)
        size = problems.number(request.query_params, "limit", 1, 1000, 100)
        page = await self._events.page(who, run_id, after, size)
        sse.check_kept(after, page)
        found = [orjson.Fragment(event.frame) for event in page.events]
        return _answer({"events": found, "next_after": page.next_after or after, "last": page.last, "oldest": max(page.oldest, 1)})

    def _last_seen(self, request: Request) -> int:
        last = request.headers.get("last-event-id", "")
        if last:
            return problems.number({"Last-Event-ID": last}, "Last-Event-ID", 0, 2**62, 0)
        return problems.number(request.query_params, "after", 0, 2**62, 0)

    async def put_artifact(self, request: Request) -> Response:
        """Keep the body as a file; the idempotency key is the request id."""
        found = await self._artifacts.put(await self._caller(request), request)
        return _answer(views.artifact(found), 201, {"Location": f"/v1/artifacts/{found.artifact_id}"})

    async def get_artifact(self, request: Request) -> Response:
        """The bytes of a file of the caller, or of a thread they may read."""
        who = await self._caller(request)
        return await self._artifacts.get(who, requests.in_path(request, "artifact_id", ids.ArtifactId), request)

    async def list_artifacts(self, request: Request) -> Response:
        """The caller's files, or those of a thread; newest first."""
        who, query = await self._caller(request), request.query_params
        wanted = context_pb2.ListArtifactsRequest(**requests.page(query), thread_id=requests.in_query(query, "thread_id"))
        with status.translated():
            found = await self._services.context.ListArtifacts(wanted, metadata=channel.bearer(who.token))
        return _answer(views.artifacts(found))

    async def delete_artifact(self, request: Request) -> Response:
        """Remove a file of the caller for good."""
        who = await self._caller(request)
        wanted = context_pb2.DeleteArtifactRequest(artifact_id=requests.in_path(request, "artifact_id", ids.ArtifactId))
        with status.translated():
            await self._services.context.DeleteArtifact(wanted, metadata=channel.bearer(who.token))
        return Response(status_code=204, headers={"Cache-Control": "no-store"})

    async def list_tools(self, request: Request) -> Response:
        """The tools the caller may call, by name."""
        who, query = await self._caller(request), request.query_params
        filters = {name: query.get(name, "") for name in views.TOOL_FILTERS}
        wanted = dispatcher_pb2.ListToolsRequest(**requests.page(query), **filters)
        with status.translated():
            found = await self._services.dispatcher.ListTools(wanted, metadata=channel.bearer(who.token))
        return _answer({"tools": [views.tool(one) for one in found.tools], "next_page_token": found.next_page_token})

    async def list_agents(self, request: Request) -> Response:
        """The agents the caller may start."""
        who = await self._caller(request)
        with status.translated():
            found = await self._services.dispatcher.ListAgents(dispatcher_pb2.ListAgentsRequest(), metadata=channel.bearer(who.token))
        return _answer({"agents": [views.agent(one) for one in found.agents]})
