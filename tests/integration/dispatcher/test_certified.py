"""All services with certificates: a run goes its whole way over mutual TLS, and nobody without a certificate comes in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis import channel, tls
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures.certificates import Authority
from tests.fixtures.storage import ADMIN, Services


async def test_a_run_goes_its_whole_way_over_mutual_tls(services: Services, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    services.own = {name: dict(authority.issue(name).settings()) for name in ("auth", "context", "events", "dispatcher")}
    await services.all()
    files = authority.issue("gateway")
    shown = tls.Certificates(files.cert, files.key, files.ca)
    async with contextlib.AsyncExitStack() as stack:

        async def to(name: str) -> Any:
            opened = channel.connect(f"127.0.0.1:{services.ports[name]}", certificates=shown, name=name)
            return await stack.enter_async_context(opened)

        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(await to("auth"))
        dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(await to("dispatcher"))
        events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(await to("events"))
        password = (services.secrets / "auth" / "bootstrap_admin").read_text().strip()
        grant = auth_pb2.PasswordGrant(email=ADMIN, password=password)
        tokens = (await auth.IssueToken(auth_pb2.IssueTokenRequest(password=grant))).tokens
        mine = channel.bearer(tokens.access_token)
        wanted = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="text-analyst", user_request="Some text.")
        run = await dispatcher.StartRun(wanted, metadata=mine, wait_for_ready=True, timeout=20)
        seen = []
        async with asyncio.timeout(30):
            async for batch in events.Subscribe(events_pb2.SubscribeRequest(run_id=run.run_id), metadata=mine):
                seen += [json.loads(event.frame)["type"] for event in batch.events]
        assert (seen[0], seen[-1]) == ("agent_started", "agent_completed")
    for name, port in services.ports.items():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
            stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(bare)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetKeys(auth_pb2.GetKeysRequest(), timeout=5)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, name
