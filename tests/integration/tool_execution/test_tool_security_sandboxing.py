"""Who may call what, what foreign code may do, and what happens when it tries more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis import status
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.tool import ToolContext, tool
from services.dispatcher.tools import code, means, workspace
from services.dispatcher.tools.sandbox import sandboxes
from services.dispatcher.tools.sandbox.python import Python
from tests.fixtures.dispatchers import House, house
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

ATTACK = "import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\n1"


@tool(name="admin.look", min_role="admin")
async def admin_look() -> str:
    """Looks at what is everybody's."""
    return "all"


@tool(name="of.business", min_tier="business")
async def of_business() -> str:
    """Is there for those who pay."""
    return "yes"


@tool(name="secret.use", enforcement="python", secrets=("crm_key",), timeout_s=30)
async def secret_use(context: ToolContext, program: str) -> Any:
    """Runs a program that is given a secret."""
    assert context.secret("crm_key") == "the key of the CRM"
    return await context.contained(code=program)


@tool(name="secret.other", enforcement="python", timeout_s=30)
async def secret_other(context: ToolContext) -> Any:
    """Asks for a secret that is not its own."""
    return context.secret("crm_key")


def granted(name: str, secret: str) -> str:
    """The operator granted one secret to one tool; and to another, which does not declare it."""
    if (name, secret) in (("secret.use", "crm_key"), ("secret.other", "crm_key")):
        return "the key of the CRM"
    return means.not_granted(name, secret)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[House]:
    """A process with the tier `python`, where the second violation of a user takes the tool from them."""
    spaces = workspace.Workspaces(tmp_path / "work", workspace.NoArtifacts(), 2)
    contained = sandboxes.Sandboxes({"python": Python(spaces.folder, concurrency=8, heartbeat_s=60.0)})
    await contained.start()

    async def ignore(_found: object) -> None:
        """Nobody is told."""

    try:
        await contained.probe(ignore)
        rules = means.Rules(violations=2)
        tools = [admin_look, code.run_python, secret_use, secret_other]
        async with house(tmp_path, tools, rules=rules, contained=contained, secrets=granted, spaces=spaces) as made:
            yield made
    finally:
        await contained.close()


async def execute(runs: Runs, user: User, name: str, **arguments: object) -> pb.ExecuteToolResponse:
    """An interactive call."""
    asked = pb.ExecuteToolRequest(request_id=ids.uuid7(), tool_name=name, arguments=json.dumps(arguments).encode())
    return await runs.dispatcher.ExecuteTool(asked, metadata=user.bearer, wait_for_ready=True, timeout=20)


@pytest.mark.real_services
class TestToolSecuritySandboxing:
    """Permissions and walls."""

    async def test_permission_enforcement_for_regular_users(self, services: Services) -> None:
        await services.all(tools=[admin_look, of_business])
        runs = Runs(services)
        for role, tier, name, field in [
            ("user", "internal", "admin.look", "roles"), ("user", "free", "of.business", "tiers"),
            ("readonly", "internal", "text_statistics", "permission"),
        ]:  # fmt: skip
            who = await services.user(role, tier)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await execute(runs, who, name, text="a")
            refused = status.from_rpc(caught.value)
            assert (refused.code, field in refused.details) == ("PERMISSION_DENIED", True), name
        answer = await execute(runs, await services.user("user", "business"), "of.business")
        assert (answer.status, answer.attempts, json.loads(answer.enforcement)) == (
            "success", 1, {"tier": "trusted", "backend": "asyncio"},
        )  # fmt: skip

    async def test_admin_user_elevated_permissions(self, services: Services, place: House) -> None:
        await services.all(tools=[admin_look])
        answer = await execute(Runs(services), await services.user("admin"), "admin.look")
        assert json.loads(answer.result) == "all"
        # an admin works with what is everybody's by a dispatcher of that strategy alone
        boss = place.person("admin")
        async with place.open(boss) as plain, place.open(boss, strategy="admin") as mighty:
            assert [(await each.execute("admin.look", {})).status for each in (plain, mighty)] == ["denied", "success"]
            assert ["admin.look" in [found.spec.name for found in each.discover().tools] for each in (plain, mighty)] == [False, True]
        with pytest.raises(errors.PermissionDenied):
            await place.open(place.person("user"), strategy="admin").__aenter__()
        assert "tools of admins: permission_denied" in await place.recorded()

    async def test_user_context_isolation_prevents_privilege_escalation(self, place: House) -> None:
        # neither arguments nor a child context make an admin of a user
        who = place.person()
        child = who.context.child("sub-task", ids.uuid7())
        assert child.roles == who.context.roles
        who.context = child
        async with place.open(who) as tools:
            for arguments in ({}, {"roles": ["admin"]}, {"user_id": ids.uuid7(), "__class__": "admin"}):
                assert (await tools.execute("admin.look", arguments)).status == "denied"
            # what the sandbox runs finds nothing of the dispatcher, and a secret of another tool is not to be had
            ran = (await tools.execute("run_python", {"code": "import os\nsorted(os.environ)"})).unwrap()
            assert ran["result"] == []
            other = await tools.execute("secret.other", {})
            assert (other.status, "does not declare the secret crm_key" in str(other.error)) == ("denied", True)
            assert (await tools.execute("secret.use", {"program": "import os\nlen(os.environ['CRM_KEY'])"})).unwrap() == 18
            leaked = await tools.execute("secret.use", {"program": "import os\nraise ValueError(os.environ['CRM_KEY'])"})
            assert leaked.error is not None
            assert "the key of the CRM" not in f"{leaked.error.message} {leaked.error.details}"
            assert tools.metrics().permission_denials == 3

    async def test_security_violation_detection_and_response(self, place: House) -> None:
        who, other = place.person(), place.person()
        async with place.open(who) as tools, place.open(other) as theirs:
            outcome = await tools.execute("run_python", {"code": ATTACK})
            assert (outcome.status, outcome.error and outcome.error.code) == ("error", "SECURITY_VIOLATION")
            (event,) = [one for one in who.heard.events if one["type"] == "security_violation"]
            assert (event["violation"], event["details"]["tool_name"]) == ("SECURITY_VIOLATION", "run_python")
            assert tools.metrics().security_violations == 1
            assert await place.recorded() == ["tool run_python: security_violation"]
            # the second one takes the tool from this user, and from nobody else
            await tools.execute("run_python", {"code": ATTACK})
            refused = await tools.execute("run_python", {"code": "1"})
            assert (refused.status, refused.attempts) == ("denied", 0)
            assert refused.error is not None
            assert "quarantine" in refused.error.message
            assert (await theirs.execute("run_python", {"code": "1 + 1"})).unwrap()["result"] == 2
        who.heard.pairs()
        assert place.dispatchers.running == 0

    async def test_concurrent_security_context_isolation(self, place: House) -> None:
        """Many users run code at once: each finds its own folder and arguments, and what one leaves nobody finds."""
        program = (
            "import os, builtins\nfound = sorted(os.listdir('.')), getattr(builtins, 'left', None)\n"
            "open('mine', 'w').write(name)\nbuiltins.left = name\nresult = [name, *found]"
        )
        people = [place.person() for _ in range(12)]

        async def one(number: int) -> list[Any]:
            async with place.open(people[number]) as tools:
                asked = {"code": program, "arguments": {"name": f"user {number}"}}
                first, second = [(await tools.execute("run_python", asked)) for _ in range(2)]
                assert first.enforcement["tier"] == "python"
                assert "disk_quota" in first.enforcement
                return [first.unwrap()["result"], second.unwrap()["result"]]

        found = await asyncio.gather(*(one(number) for number in range(12)))
        assert found == [[[f"user {number}", [], None]] * 2 for number in range(12)]

    async def test_a_tier_that_is_not_available_refuses_and_nothing_weaker_stands_in(self, tmp_path: Path) -> None:
        spec = tool(name="needs.wall", enforcement="command", fallback="admin.look")(_glue)
        async with house(tmp_path, [spec, admin_look], contained=sandboxes.Sandboxes({})) as made:
            who = made.person("admin")
            async with made.open(who, strategy="admin") as tools:
                outcome = await tools.execute("needs.wall", {})
            assert (outcome.error and outcome.error.code, outcome.attempts, outcome.degraded) == ("SANDBOX_UNAVAILABLE", 0, None)
            assert outcome.error is not None
            assert outcome.error.details["remedy"]
            assert outcome.enforcement["tier"] == "command"


async def _glue(context: ToolContext) -> Any:
    """Runs a command."""
    return await context.contained(argv=["true"])
