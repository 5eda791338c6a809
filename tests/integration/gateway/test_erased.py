"""What the dispatcher keeps of a user goes with their data and with their threads, and nothing of anybody else; and is in their export."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from chassis import postgres
from netra import ids
from netra.agent import Turn, agent
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from standalone import prepare
from tests.fixtures import web
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.gateway.conftest import bearer
from tests.integration.gateway.test_waits import Edge

pytestmark = pytest.mark.multi_user
CANARY, OTHERS = "the-heron-nests-at-noon", "the-owl-sleeps-at-dawn"
_TABLES = "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname = 'dispatcher'"


@agent("listener", input_schema={"type": "object"})
async def listener(turn: Turn) -> dict[str, object]:
    """Hears one message."""
    await turn.wait_for_message()
    return {"message": "Heard."}


@agent("asker", input_schema={"type": "object"})
async def asker(turn: Turn) -> dict[str, object]:
    """Asks people what it was asked."""
    decision = await turn.approve(turn.request, quorum=int(turn.inputs.get("quorum", 1)))
    return {"message": decision.decision}


@pytest.fixture
async def edge(services: Services) -> AsyncIterator[Edge]:
    """All services, and the gateway before them."""
    await services.all(agents=[listener, asker])
    gateway = await services.gateway()
    async with web.client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=20, trust_env=False) as http:
        yield Edge(services, gateway, http)


class Kept:
    """What is in the schema of the dispatcher."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def having(self, words: str) -> dict[str, int]:
        """The tables with rows that have these words anywhere, and how many."""
        found = {}
        async with postgres.connection(self._address) as admin:
            for table in [row["name"] for row in await admin.fetch(_TABLES)]:
                # bytes are shown as hex
                query = f"SELECT count(*) FROM {table} AS t WHERE t::text LIKE $1 OR t::text LIKE $2"  # noqa: S608 - of the catalogue
                found[table.partition(".")[2]] = await admin.value(query, f"%{words}%", f"%{words.encode().hex()}%")
        return {table: many for table, many in found.items() if many}

    async def value(self, query: str, *arguments: object) -> Any:
        """What the database says."""
        async with postgres.connection(self._address) as admin:
            return await admin.value(query, *arguments)


@pytest.fixture
def kept(stores: Standalone, database: str) -> Kept:
    """What is in the schema of the dispatcher."""
    return Kept(prepare.on_database(stores.postgres_admin_url, database))


async def _had(edge: Edge, user: User, words: str, key: str = "") -> dict[str, Any]:
    """A run with these words that heard them, one that asked with them and was answered with them, and a call of a tool with them."""
    body = {"agent": "listener", "user_request": words, "inputs": {"note": words}}
    headers = {**bearer(user), "Idempotency-Key": key or ids.uuid7()}
    run = (await edge.http.post("/v1/runs", headers=headers, json=body)).json()
    await edge.is_(user, run["run_id"], "suspended")
    await edge.ask("POST", f"/v1/runs/{run['run_id']}:send", user, json={"message": words})
    await edge.is_(user, run["run_id"], "completed")
    asking = await edge.ask("POST", "/v1/runs", user, 202, json={**body, "agent": "asker"})
    approval = await edge.asked(user, asking["run_id"])
    await edge.ask("POST", f"/v1/approvals/{approval['approval_id']}:resolve", user, json={"decision": "approve", "comment": words})
    await edge.is_(user, asking["run_id"], "completed")
    stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(edge.services.channel("dispatcher"))
    wanted = dispatcher_pb2.ExecuteToolRequest(
        request_id=ids.uuid7(), tool_name="text_statistics", arguments=json.dumps({"text": words}).encode()
    )
    assert (await stub.ExecuteTool(wanted, metadata=user.bearer, timeout=20)).status == "success"
    return dict(run)


async def _erased(edge: Edge, method: str, path: str, user: User, key: str) -> dict[str, Any]:
    """The answer, once contexts of what has just ended are closed."""
    async with asyncio.timeout(20):
        while True:
            answer = await edge.http.request(method, path, headers={**bearer(user), "Idempotency-Key": key})
            if answer.status_code == 200:
                return dict(answer.json())
            assert answer.json()["code"] == "FAILED_PRECONDITION", answer.text
            await asyncio.sleep(0.1)


async def test_nothing_that_a_user_said_is_left_after_their_data_is_erased_and_all_of_others_is(edge: Edge, kept: Kept) -> None:
    user, other = await edge.services.user(), await edge.services.user()
    key = ids.uuid7()
    run = await _had(edge, user, CANARY, key)
    await _had(edge, other, OTHERS)
    # what the other one's runs heard of the user, on a thread of theirs; one has ended and one goes on
    heard = await edge.start(other, "listener")
    grant = await edge.granted(other, heard["thread_id"], user, "write")
    await edge.is_(other, heard["run_id"], "suspended")
    await edge.ask("POST", f"/v1/runs/{heard['run_id']}:send", user, grant=grant, json={"message": CANARY})
    await edge.is_(other, heard["run_id"], "completed")
    asks = await edge.start(other, "asker", thread_id=heard["thread_id"], inputs={"quorum": 2})
    approval = await edge.asked(other, asks["run_id"])
    vote = {"decision": "approve", "comment": CANARY}
    await edge.ask("POST", f"/v1/approvals/{approval['approval_id']}:resolve", user, grant=grant, json=vote)

    assert set(await kept.having(CANARY)) == {"runs", "messages", "approvals", "approval_votes"}
    before = await kept.having(OTHERS)
    lines = [json.loads(line) for line in (await edge.http.get("/v1/export", headers=bearer(user))).text.splitlines()]
    told = [line["kind"] for line in lines if CANARY in json.dumps(line)]
    assert {kind: told.count(kind) for kind in ("run", "run_message", "approval", "vote")} == {
        "run": 3, "run_message": 2, "approval": 1, "vote": 2,
    }  # fmt: skip
    assert OTHERS not in json.dumps(lines)

    mark = ids.uuid7()
    erased = await _erased(edge, "DELETE", "/v1/me/data", user, mark)
    assert erased["runs"] == 3
    assert await kept.having(CANARY) == {}
    assert await kept.having(OTHERS) == before
    assert await _erased(edge, "DELETE", "/v1/me/data", user, mark) == erased
    # what a request started is known for its day, and shown to nobody
    body = {"agent": "listener", "user_request": CANARY, "inputs": {"note": CANARY}}
    again = await edge.http.post("/v1/runs", headers={**bearer(user), "Idempotency-Key": key}, json=body)
    assert again.json()["run_id"] == run["run_id"]
    await edge.ask("GET", f"/v1/runs/{run['run_id']}", user, 404)
    assert (await edge.ask("GET", "/v1/runs", user))["runs"] == []
    # the run that waits goes on, and the vote counts
    await edge.ask("POST", f"/v1/approvals/{approval['approval_id']}:resolve", other, json={"decision": "approve"})
    await edge.is_(other, asks["run_id"], "completed")


async def test_what_a_thread_had_goes_with_it_and_other_threads_keep_theirs(edge: Edge, kept: Kept) -> None:
    user = await edge.services.user()
    run = await _had(edge, user, CANARY)
    query = "SELECT count(*) FROM dispatcher.runs WHERE request = $1"
    assert await kept.value(query, CANARY) == 2
    await _erased(edge, "POST", f"/v1/threads/{run['thread_id']}:erase", user, ids.uuid7())
    assert await kept.value(query, CANARY) == 1
    assert await kept.value("SELECT count(*) FROM dispatcher.messages WHERE thread_id = $1", run["thread_id"]) == 0
    assert len((await edge.ask("GET", "/v1/runs", user))["runs"]) == 2
