"""Tools that are registered over gRPC while dispatchers run: who may, what counts as the same, who sees them, that they last."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import channel, postgres, status
from netra import errors, ids, registration
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.dispatcher.v1 import dispatcher_pb2_grpc as grpc_
from netra.tool import tool
from services.dispatcher import wiring
from services.dispatcher.settings import DispatcherSettings
from standalone import prepare
from tests.fixtures.policies import Administrator
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User

SCHEMA = b'{"type":"object","properties":{"month":{"type":"string","pattern":"^[0-9-]+$"}},"required":["month"]}'


@tool(tags=("of-test",), category="of-test", min_tier="business")
async def of_business(text: str) -> int:
    """Counts, for users who pay."""
    return len(text)


@tool(tags=("of-test",), min_role="admin", enforcement="command", idempotent=True, deprecated="Use of_business.")
async def of_admins() -> int:
    """Looks at everything."""
    return 1


def declared(name: str = "remote.costs", version: str = "1.0.0", **more: Any) -> pb.Tool:
    """A tool of a worker."""
    return pb.Tool(**{"name": name, "version": version, "description": "Costs of a month.", "input_schema": SCHEMA, **more})


def stub(services: Services, port: int = 0) -> grpc_.DispatcherServiceAsyncStub:
    """A dispatcher of the test."""
    if not port:
        return grpc_.DispatcherServiceStub(services.channel("dispatcher"))
    to = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    services.stack.push_async_callback(to.close, None)
    return grpc_.DispatcherServiceStub(to)


@contextlib.asynccontextmanager
async def another(services: Services) -> AsyncIterator[grpc_.DispatcherServiceAsyncStub]:
    """One more dispatcher, for a while, once calls of it are welcome."""
    async with wiring.build(DispatcherSettings(**services.settings("dispatcher"))) as started:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{started.port}") as to, asyncio.timeout(20):
            health: Any = health_pb2_grpc.HealthStub(to)
            async for state in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                if state.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        yield stub(services, started.port)


async def register(
    to: grpc_.DispatcherServiceAsyncStub, by: channel.Metadata, new: pb.Tool, *, replace: bool = False
) -> pb.RegisterToolResponse:
    """Register a tool."""
    return await to.RegisterTool(pb.RegisterToolRequest(tool=new, replace=replace), metadata=by, wait_for_ready=True, timeout=20)


async def deregister(to: grpc_.DispatcherServiceAsyncStub, by: channel.Metadata, name: str) -> bool:
    """Take a tool away."""
    return (await to.DeregisterTool(pb.DeregisterToolRequest(name=name), metadata=by, timeout=20)).changed


async def names(to: grpc_.DispatcherServiceAsyncStub, who: User, **filters: Any) -> list[str]:
    """The tools that a user is shown, over all pages."""
    found: list[str] = []
    while True:
        page = await to.ListTools(pb.ListToolsRequest(**filters), metadata=who.bearer, wait_for_ready=True, timeout=20)
        found += [one.name for one in page.tools]
        if not page.next_page_token:
            return found
        filters["page_token"] = page.next_page_token


async def refused(call: Awaitable[Any]) -> tuple[str, str]:
    """Code and field of a refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = status.from_rpc(caught.value)
    return error.code, str(error.details.get("field", ""))


async def until(to: grpc_.DispatcherServiceAsyncStub, who: User, name: str, version: str) -> None:
    """Returns once a dispatcher shows a version of a tool; an empty one means that the tool is gone."""
    async with asyncio.timeout(20):
        while True:
            page = await to.ListTools(pb.ListToolsRequest(text=name), metadata=who.bearer, wait_for_ready=True)
            if [one.version for one in page.tools] == ([version] if version else []):
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def operator(services: Services) -> channel.Metadata:
    """Credentials of who runs the installation; auth and a dispatcher are there."""
    await services.auth()
    await services.dispatcher(tools=[of_business, of_admins])
    return (await Administrator(services).signed_in()).bearer


async def worker(services: Services, stores: Standalone, folder: Path) -> channel.Metadata:
    """Starts auth with a service `worker`; its credentials."""
    shutil.copytree(stores.secrets / "auth", folder / "auth")
    known = folder / "auth" / "services.json"
    known.chmod(0o600)
    known.write_text(json.dumps({**json.loads(known.read_text()), "worker": hashlib.sha256(b"of the worker").hexdigest()}))
    services.own["auth"] = {"secrets_dir": folder / "auth"}
    await services.auth()
    auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))
    grant = auth_pb2.ClientCredentialsGrant(client_id="worker", client_secret="of the worker")
    issued = await auth.IssueToken(auth_pb2.IssueTokenRequest(client_credentials=grant), wait_for_ready=True)
    return channel.bearer(issued.tokens.access_token)


class TestToolRegistrationDiscovery:
    """Tools must be discoverable for agents."""

    async def test_tool_registration_with_real_dispatcher(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher, user = stub(services), await services.user()
        answer = await register(dispatcher, operator, declared(tags=["costs"], timeout={"seconds": 2}))
        assert (answer.changed, answer.tool.enforcement, answer.tool.permission) == (True, "remote", "tools:execute")
        shown = (await dispatcher.GetTool(pb.GetToolRequest(name="remote.costs"), metadata=user.bearer)).tool
        assert shown == answer.tool
        assert (shown.digest, shown.input_schema, shown.timeout.seconds) == (answer.tool.digest, SCHEMA, 2)
        # default deny: a user without the permission, and a service that the rule does not name
        for other in (user.bearer, await services.service_token("dispatcher"), await services.service_token("gateway")):
            assert (await refused(register(dispatcher, other, declared("theirs"))))[0] == "PERMISSION_DENIED"
            assert (await refused(deregister(dispatcher, other, "remote.costs")))[0] == "PERMISSION_DENIED"

    async def test_a_worker_registers_and_changes_its_own_alone(
        self, services: Services, stores: Standalone, tmp_path: Path
    ) -> None:  # fmt: skip
        by_worker = await worker(services, stores, tmp_path)
        await services.dispatcher()
        dispatcher, operator = stub(services), (await Administrator(services).signed_in()).bearer
        assert (await register(dispatcher, by_worker, declared("of.worker"))).changed
        assert (await register(dispatcher, operator, declared("of.operator"))).changed
        new = declared("of.operator", "2.0.0")
        assert (await refused(register(dispatcher, by_worker, new, replace=True)))[0] == "PERMISSION_DENIED"
        assert (await refused(deregister(dispatcher, by_worker, "of.operator")))[0] == "PERMISSION_DENIED"
        # what is declared in the same way is no change, whoever did it first
        assert not (await register(dispatcher, by_worker, declared("of.operator"))).changed
        assert (await register(dispatcher, by_worker, declared("of.worker", "1.1.0"), replace=True)).changed
        assert await deregister(dispatcher, operator, "of.worker")

    async def test_tool_discovery_with_registry_integration(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher = stub(services)
        free, business = await services.user(tier="free"), await services.user(tier="business")
        boss, reader = await services.user(role="admin", tier="business"), await services.user(role="readonly", tier="business")
        await register(dispatcher, operator, declared())
        await register(dispatcher, operator, declared("remote.secret", permission="users:write"))
        mine = {"of_business", "of_admins", "remote.costs", "remote.secret"}
        seen = [mine & set(await names(dispatcher, who)) for who in (free, business, boss, reader)]
        assert seen == [{"remote.costs"}, {"remote.costs", "of_business"}, mine, set()]
        # that there is one is not told either
        for name in ("of_admins", "nothing"):
            assert await refused(dispatcher.GetTool(pb.GetToolRequest(name=name), metadata=business.bearer)) == ("NOT_FOUND", "tool_name")
        shown = (await dispatcher.GetTool(pb.GetToolRequest(name="of_admins"), metadata=boss.bearer)).tool
        assert shown == registration.message(of_admins)
        assert (shown.min_role, shown.enforcement, shown.deprecated) == ("admin", "command", "Use of_business.")

    async def test_tool_registration_persistence_across_sessions(self, services: Services, operator: channel.Metadata) -> None:
        first, user = stub(services), await services.user()
        await register(first, operator, declared())
        await register(first, operator, declared("remote.gone"))
        await deregister(first, operator, "remote.gone")
        # a dispatcher that starts later has it at once, and what happens then is seen by both, whoever is asked
        async with another(services) as second:
            found = await names(second, user, text="remote.")
            assert found == ["remote.costs"]
            await register(second, operator, declared(version="1.1.0", description="More costs."), replace=True)
            await until(first, user, "remote.costs", "1.1.0")
            await deregister(first, operator, "remote.costs")
            await until(second, user, "remote.costs", "")
            await register(second, operator, declared(version="1.1.0", description="More costs."))
        async with another(services) as third:
            shown = await third.GetTool(pb.GetToolRequest(name="remote.costs"), metadata=user.bearer, wait_for_ready=True, timeout=20)
            assert (shown.tool.version, shown.tool.description) == ("1.1.0", "More costs.")
            # versions are remembered as well
            assert await refused(register(third, operator, declared())) == ("ALREADY_EXISTS", "name")

    async def test_tool_registration_duplicate_handling(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher = stub(services)
        first = await register(dispatcher, operator, declared())
        again = await register(dispatcher, operator, declared(digest="not read", enforcement="remote"))
        assert (first.changed, again.changed, again.tool) == (True, False, first.tool)
        other = {"description": "Otherwise."}
        exists = ("ALREADY_EXISTS", "version")
        assert await refused(register(dispatcher, operator, declared(**other))) == ("ALREADY_EXISTS", "name")
        assert await refused(register(dispatcher, operator, declared(version="2.0.0", **other))) == ("ALREADY_EXISTS", "name")
        assert await refused(register(dispatcher, operator, declared(**other), replace=True)) == exists
        assert await refused(register(dispatcher, operator, declared(version="0.9.0"), replace=True)) == exists
        assert (await register(dispatcher, operator, declared(version="1.10.0", **other), replace=True)).changed
        # versions are numbers, and none is given twice
        assert await refused(register(dispatcher, operator, declared(version="1.9.0"), replace=True)) == exists
        assert await refused(register(dispatcher, operator, declared(), replace=True)) == exists
        assert await deregister(dispatcher, operator, "remote.costs")
        assert not await deregister(dispatcher, operator, "remote.costs")
        assert await refused(register(dispatcher, operator, declared())) == exists
        assert (await register(dispatcher, operator, declared(version="1.10.0", **other))).changed
        assert await refused(deregister(dispatcher, operator, "never")) == ("NOT_FOUND", "name")
        # tools of the installation are not for others
        assert await refused(register(dispatcher, operator, declared("of_business"), replace=True)) == ("ALREADY_EXISTS", "tool.name")
        assert (await refused(deregister(dispatcher, operator, "of_business")))[0] == "FAILED_PRECONDITION"

    async def test_one_of_many_who_register_at_once_is_first(self, services: Services, operator: channel.Metadata) -> None:
        async with another(services) as second:
            both = (stub(services), second)
            await register(both[0], operator, declared())
            calls = [
                register(both[n % 2], operator, declared(version=f"1.{1 + n // 2}.0", description=f"{n}"), replace=True) for n in range(8)
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            won = {answer.tool.version: answer.tool.description for answer in answers if isinstance(answer, pb.RegisterToolResponse)}
            assert won
            assert {status.from_rpc(one).code for one in answers if isinstance(one, grpc.aio.AioRpcError)} <= {"ALREADY_EXISTS"}
            user = await services.user()
            highest = max(won)
            for dispatcher in both:
                await until(dispatcher, user, "remote.costs", highest)
                shown = await dispatcher.GetTool(pb.GetToolRequest(name="remote.costs"), metadata=user.bearer)
                assert shown.tool.description == won[highest]

    async def test_tool_discovery_with_filtering_capabilities(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher, boss = stub(services), await services.user(role="admin", tier="internal")
        await register(dispatcher, operator, declared(tags=["costs"], category="money"))
        everything = await names(dispatcher, boss)
        assert everything == sorted(everything)
        searches: list[tuple[dict[str, str], list[str]]] = [
            ({"text": "USERS WHO PAY"}, ["of_business"]), ({"tag": "of-test"}, ["of_admins", "of_business"]),
            ({"category": "money"}, ["remote.costs"]), ({"enforcement": "command", "tag": "of-test"}, ["of_admins"]),
            ({"enforcement": "remote", "parameter": "month"}, ["remote.costs"]), ({"parameter": "text", "tag": "of-test"}, ["of_business"]),
            ({"tier": "free", "tag": "of-test"}, ["of_admins"]), ({"permission": "users:write"}, []), ({"tag": "of-tes"}, []),
        ]  # fmt: skip
        for filters, wanted in searches:
            assert await names(dispatcher, boss, **filters) == wanted, filters
        assert await names(dispatcher, boss, page_size=1) == await names(dispatcher, boss, page_size=3) == everything
        mistakes: list[tuple[dict[str, Any], str]] = [
            ({"tier": "gold"}, "tier"), ({"enforcement": "none"}, "enforcement"), ({"page_size": 201}, "page_size"),
            ({"page_size": -1}, "page_size"), ({"page_token": "x"}, "page_token"),
        ]  # fmt: skip
        for wrong, field in mistakes:
            assert await refused(names(dispatcher, boss, **wrong)) == ("INVALID_PAYLOAD", field)

    async def test_what_is_wrong_with_a_declaration_is_named(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher = stub(services)
        mistakes: list[tuple[dict[str, Any], str]] = [
            ({"name": "No name"}, "name"), ({"version": "1"}, "version"), ({"enforcement": "trusted"}, "enforcement"),
            ({"reconciles": True}, "reconciles"), ({"input_schema": b'{"type":"array"}'}, "input_schema"),
            ({"input_schema": b'{"type":"object","type":"object"}'}, "input_schema"), ({"output_schema": b'{"$ref":"#"}'}, "output_schema"),
            ({"input_schema": b'{"type":"object","properties":{"a":{"pattern":"(?=a)"}}}'}, "input_schema"),
            ({"timeout": {"seconds": -1}}, "timeout"), ({"retries": 1}, "retries"), ({"description": "\x1b[2J"}, "description"),
        ]  # fmt: skip
        for wrong, field in mistakes:
            assert await refused(register(dispatcher, operator, declared(**wrong))) == ("INVALID_PAYLOAD", f"tool.{field}"), wrong
        assert (await refused(register(dispatcher, operator, declared(input_schema=b" " * 70_000))))[0] == errors.TooLarge.code

    async def test_a_registered_tool_cannot_be_called_while_no_worker_serves_it(
        self, services: Services, operator: channel.Metadata
    ) -> None:  # fmt: skip
        await services.context()
        await services.events()
        async with another(services) as dispatcher:
            user = await services.user()
            await register(dispatcher, operator, declared())
            asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="remote.costs", arguments=b'{"month":"2026-11"}')
            answer = await dispatcher.ExecuteTool(asked, metadata=user.bearer, timeout=20)
            assert (answer.status, answer.error.code) == ("error", "SANDBOX_UNAVAILABLE")
            wrong = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="remote.costs", arguments=b'{"month":"now"}')
            assert await refused(dispatcher.ExecuteTool(wrong, metadata=user.bearer)) == ("INVALID_PAYLOAD", "arguments.month")

    async def test_who_registered_what_is_on_record(self, services: Services, operator: channel.Metadata) -> None:
        dispatcher = stub(services)
        answer = await register(dispatcher, operator, declared())
        await register(dispatcher, operator, declared())
        await deregister(dispatcher, operator, "remote.costs")
        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))
        async with asyncio.timeout(20):
            while True:
                found = [
                    entry.detail
                    for action in ("register_tool", "deregister_tool")
                    for entry in (await auth.QueryAudit(auth_pb2.QueryAuditRequest(action=action), metadata=operator)).entries
                ]
                if len(found) >= 2:
                    break
                await asyncio.sleep(0.05)
        assert found == [f"dispatcher: remote.costs 1.0.0, {answer.tool.digest}", "dispatcher: remote.costs"]

    async def test_no_more_versions_are_kept_than_are_needed(
        self, services: Services, operator: channel.Metadata, stores: Standalone, database: str
    ) -> None:  # fmt: skip
        dispatcher = stub(services)
        for patch in range(104):
            await register(dispatcher, operator, declared(version=f"1.0.{patch}"), replace=True)
        query = "SELECT state, count(*) AS number, min(revision) AS first FROM dispatcher.tools GROUP BY state ORDER BY state"
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            rows = await admin.fetch(query)
        assert [(row["state"], row["number"]) for row in rows] == [("active", 1), ("replaced", 100)]
        assert await refused(register(dispatcher, operator, declared(version="1.0.0"), replace=True)) == ("ALREADY_EXISTS", "version")
