"""Which calls are made again when a connection breaks: those that may be, out of all RPCs of Netra."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from chassis import channel
from chassis import server as server_
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures import proxy

SERVICES = {"auth": auth_pb2, "context": context_pb2, "dispatcher": dispatcher_pb2, "events": events_pb2}
# once made, they may have changed something that a second time would change again
ONCE = {
    "IssueToken", "RefreshToken", "CreateUser", "CreateApiKey", "CreateResetToken", "StartOidc", "FinishOidc", "ChangePassword",
    "ResetPassword", "UpdateUser", "UpdatePolicy", "RevertPolicy", "AppendAudit", "OpenRun", "PublishKey",
}  # fmt: skip
AGAIN = {"StartRun", "ExecuteTool", "OpenContext", "DeriveContext", "AppendMessage", "GetRun", "ListUsers", "QueryAudit", "VerifyToken"}


def rpcs() -> list[Any]:
    """Every RPC with one request, and the service it belongs to."""
    found = [
        (name, method)
        for name, module in SERVICES.items()
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if not method.client_streaming
    ]
    return [pytest.param(*one, id=one[1].name) for one in found]


class Broken(grpc.GenericRpcHandler):
    """Takes every call and breaks off, as a server does that is killed meanwhile."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def fails(_request: bytes, context: Any) -> None:
            self.calls[handler_call_details.method.rpartition("/")[2]] += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")

        return grpc.unary_unary_rpc_method_handler(fails)


@pytest.fixture
async def broken() -> AsyncIterator[tuple[Broken, str]]:
    handler, server = Broken(), grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield handler, f"127.0.0.1:{port}"
    await server.stop(None)


async def _called(to: grpc.aio.Channel, method: MethodDescriptor) -> grpc.StatusCode:
    request = message_factory.GetMessageClass(method.input_type)()
    kind: Any = to.unary_stream if method.server_streaming else to.unary_unary
    call = kind(f"/{method.containing_service.full_name}/{method.name}", type(request).SerializeToString)(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(20):
            await (call.read() if method.server_streaming else call)
    return caught.value.code()


@pytest.mark.parametrize(("name", "method"), rpcs())
async def test_a_call_is_made_again_only_where_that_changes_nothing(
    broken: tuple[Broken, str], name: str, method: MethodDescriptor
) -> None:
    handler, target = broken
    async with channel.connect(target, name=name) as to:
        assert await _called(to, method) is grpc.StatusCode.UNAVAILABLE
    harmless = "request_id" in method.input_type.fields_by_name or method.name.startswith(("Get", "List", "Query", "Verify", "Watch"))
    assert (handler.calls[method.name] > 1) is harmless
    assert not (method.name in ONCE and harmless)
    assert not (method.name in AGAIN and not harmless)


def test_the_lists_above_name_what_there_is() -> None:
    names = {param.values[1].name for param in rpcs()}
    assert names >= ONCE | AGAIN


async def test_nothing_is_made_again_at_a_service_that_was_not_named(broken: tuple[Broken, str]) -> None:
    handler, target = broken
    async with channel.connect(target) as to:
        await _called(to, dispatcher_pb2.DESCRIPTOR.services_by_name["DispatcherService"].methods_by_name["GetRun"])
    assert handler.calls == {"GetRun": 1}


class Silent(grpc.GenericRpcHandler):
    """Streams of which nothing comes."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def waits(_request: bytes, context: Any) -> AsyncIterator[bytes]:
            await context.send_initial_metadata(())
            self.open.set()
            await asyncio.Event().wait()
            yield b""

        return grpc.unary_stream_rpc_method_handler(waits)


async def test_a_peer_that_is_slow_to_greet_is_away_to_nobody(broken: tuple[Broken, str]) -> None:
    handler, target = broken
    async with proxy.listening() as line, line.delayed(0.5):
        line.to = int(target.rpartition(":")[2])
        async with channel.connect(f"127.0.0.1:{line.port}") as to:
            call: Any = to.unary_unary("/s/S", None, None)(b"")  # type: ignore[arg-type]
            with pytest.raises(grpc.aio.AioRpcError, match="broken off"):
                await call
    assert handler.calls == {"S": 1}


async def test_a_peer_that_is_stopped_is_found_out_by_who_only_listens() -> None:
    silent, behind = Silent(), grpc.aio.server(options=server_._OPTIONS)
    behind.add_generic_rpc_handlers((silent,))
    async with proxy.listening() as line:
        line.to = behind.add_insecure_port("127.0.0.1:0")
        await behind.start()
        to = channel.connect(f"127.0.0.1:{line.port}")
        call: Any = to.unary_stream("/s/S", None, None)(b"")  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(15):
                await silent.open.wait()
                # as of a process that is stopped: nothing comes, and nothing is closed
                async with line.stalled():
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await to.close()
            await behind.stop(None)
