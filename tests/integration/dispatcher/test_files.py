"""Tools that work on files, in processes of their own; results that are kept as files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from chassis import postgres
from netra import errors, ids
from netra.agent import Turn, agent
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import kinds_pb2
from netra.tool import ToolContext, tool
from services.dispatcher.tools.sandbox import process
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.fixtures.worker import ended
from tests.integration.conftest import Runs, types

WORKER = "tests.fixtures.worker"
FOLDERS: dict[str, Path] = {}
MADE: dict[str, asyncio.Event] = {}
LARGE = {"rows": [{"number": number, "text": "é" * 20} for number in range(20_000)]}


@tool(backend="process", timeout_s=60)
async def work(context: ToolContext, mark: str, request: dict[str, Any]) -> Any:
    """Has the worker of the tests do something."""
    folder = FOLDERS[mark] = context.workspace
    if not (folder / "ready").exists():
        os.mkfifo(folder / "ready")
    MADE.setdefault(mark, asyncio.Event()).set()
    return await process.run(WORKER, request, cwd=folder)


@tool()
async def copy(context: ToolContext, artifact_id: str) -> dict[str, object]:
    """Makes an artifact of an artifact, by way of the run's folder."""
    there = context.workspace / "copy"
    found = await context.fetch(artifact_id, there)
    first = await context.keep("copy of " + found.name, found.media_type, there)
    again = await context.keep("copy of " + found.name, found.media_type, there)
    return {"found": [found.name, found.size, found.sha256], "made": first.artifact_id, "again": again.artifact_id}


@tool()
async def small(context: ToolContext, content: str) -> dict[str, object]:
    """Keeps a text."""
    kept = await context.keep("text.txt", "text/plain", content.encode())
    return {"artifact_id": kept.artifact_id, "sha256": kept.sha256}


@tool()
async def large() -> dict[str, Any]:
    """Returns much."""
    return LARGE


@tool()
async def excessive() -> str:
    """Returns more than anything may have."""
    return "x" * 64 * 1024 * 1024


@agent("caller")
async def caller(turn: Turn) -> object:
    """Calls one tool."""
    return await turn.tool(turn.inputs["tool"], **turn.inputs.get("arguments", {}))


@agent("crowd")
async def crowd(turn: Turn) -> object:
    """Calls one tool many times at once."""
    return await turn.gather(*(turn.tool("work", mark=turn.inputs["mark"], request={"do": "alone"}) for _ in range(4)))


@agent("measurer")
async def measurer(turn: Turn) -> object:
    """Counts what a tool returns."""
    return {"message": "Counted.", "rows": len((await turn.tool("large"))["rows"])}


@agent("wordless")
async def wordless(turn: Turn) -> object:
    """Returns much, and no message."""
    return LARGE


@agent("family")
async def family(turn: Turn) -> object:
    """Has another agent measure."""
    await turn.think("Somebody else can do that.")
    return await turn.child("measurer")


WORDS = "é" * 150_000


@agent("wordy")
async def wordy(turn: Turn) -> object:
    """Hands a tool more than it may take, and says more than a message may have."""
    try:
        await turn.tool("copy", artifact_id=WORDS)
    except errors.TooLarge:
        return {"message": WORDS}
    return "taken"


AGENTS = [caller, crowd, measurer, wordless, family, wordy]
TOOLS = [work, copy, small, large, excessive]


@pytest.fixture
async def running(services: Services, tmp_path: Path) -> Runs:
    """All services, with the agents and tools above."""
    await services.all(agents=AGENTS, tools=TOOLS, work_dir=tmp_path / "work", tool_processes=1)
    return Runs(services)


class Files:
    """Artifacts of a user, as the user sees them."""

    def __init__(self, services: Services, user: User) -> None:
        self._user = user
        self._stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))

    async def put(self, name: str, content: bytes) -> str:
        """Upload one; returns its id."""
        header = context_pb2.ArtifactHeader(request_id=ids.uuid7(), name=name, media_type="text/csv", size=len(content))
        parts = [context_pb2.PutArtifactRequest(header=header)]
        parts += [context_pb2.PutArtifactRequest(data=content[at : at + 65536]) for at in range(0, len(content), 65536)]
        return (await self._stub.PutArtifact(iter(parts), metadata=self._user.bearer)).artifact.artifact_id

    async def get(self, artifact_id: str) -> bytes:
        """Download one."""
        request = context_pb2.GetArtifactRequest(artifact_id=artifact_id)
        return b"".join([part.data async for part in self._stub.GetArtifact(request, metadata=self._user.bearer)])


def mark() -> str:
    """A name for what one test does."""
    name = ids.uuid7()
    MADE[name] = asyncio.Event()
    return name


async def call(running: Runs, user: User, name: str, **arguments: object) -> dict[str, Any]:
    """What became of one call: its `tool_completed`, and the run's end."""
    started = await running.start(user, "caller", inputs={"tool": name, "arguments": arguments})
    events = await running.ended(user, started.run_id)
    done = next(event["data"] for event in events if event["type"] == "tool_completed")
    return {**done, "end": events[-1]}


async def hanging(running: Runs, user: User) -> tuple[str, str, list[int]]:
    """A run whose tool hangs in a process that has a child: its mark and id, and both processes."""
    name = mark()
    started = await running.start(user, "caller", inputs={"tool": "work", "arguments": {"mark": name, "request": {"do": "hang"}}})
    await asyncio.wait_for(MADE[name].wait(), 20)
    text = await asyncio.wait_for(asyncio.to_thread((FOLDERS[name] / "ready").read_text), 20)
    return name, started.run_id, [int(pid) for pid in text.split()]


async def test_a_tool_in_a_process_answers_and_says_so(running: Runs) -> None:
    name, user = mark(), await running.services.user()
    done = await call(running, user, "work", mark=name, request={"echo": [1, "two"]})
    assert (done["status"], done["result"]) == ("success", [1, "two"])
    assert done["enforcement"] == {"tier": "trusted", "backend": "process"}
    assert done["end"]["type"] == "agent_completed"
    assert not FOLDERS[name].exists()


async def test_an_error_of_the_process_is_the_error_of_the_run(running: Runs) -> None:
    problem = {"code": "INVALID_PAYLOAD", "message": "Line 3: no number.", "details": {"line": 3, "column": "tokens", "field": "file"}}
    name, user = mark(), await running.services.user()
    done = await call(running, user, "work", mark=name, request={"error": problem})
    expected = {"code": "INVALID_PAYLOAD", "message": "Line 3: no number.", "details": {"line": "3", "column": "tokens", "field": "file"}}
    assert (done["status"], done["error"]) == ("error", expected)
    assert (done["end"]["type"], done["end"]["data"]["error"]) == ("agent_failed", expected)
    assert not FOLDERS[name].exists()


async def test_a_process_that_is_killed_is_told_as_that(running: Runs) -> None:
    user = await running.services.user()
    name, run_id, (worker, _) = await hanging(running, user)
    os.kill(worker, 9)
    events = await running.ended(user, run_id)
    assert [event["type"] for event in events[-2:]] == ["tool_completed", "agent_failed"]
    assert {event["data"]["error"]["code"] for event in events[-2:]} == {"TOOL_FAILED"}
    assert "SIGKILL" in events[-1]["data"]["message"]
    assert not FOLDERS[name].exists()


async def test_a_cancel_is_told_when_the_process_and_its_children_are_gone(running: Runs) -> None:
    user = await running.services.user()
    name, run_id, pids = await hanging(running, user)
    assert [ended(pid) for pid in pids] == [False, False]
    await running.dispatcher.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=run_id), metadata=user.bearer)
    events = await running.until(user, run_id, "agent_cancelled")
    assert [ended(pid) for pid in pids] == [True, True]
    assert not FOLDERS[name].exists()
    assert (types(events)[-2:], events[-2]["data"]["status"]) == (["tool_completed", "agent_cancelled"], "cancelled")
    assert [stopped["confirmed"] for stopped in events[-1]["data"]["tools_stopped"]] == [True]


async def test_processes_wait_for_their_turn(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "crowd", inputs={"mark": mark()})).run_id)
    assert types(events)[-1] == "agent_completed"


async def test_a_file_goes_through_a_tool_and_back(running: Runs) -> None:
    user, content = await running.services.user(), random.Random(1).randbytes(3_000_001)
    files = Files(running.services, user)
    done = await call(running, user, "copy", artifact_id=await files.put("log.csv", content))
    assert done["result"]["found"] == ["log.csv", len(content), hashlib.sha256(content).hexdigest()]
    assert await files.get(done["result"]["made"]) == content
    assert done["result"]["again"] == done["result"]["made"]


async def test_small_and_empty_contents_are_kept(running: Runs) -> None:
    user = await running.services.user()
    for content in ("", "é"):
        done = await call(running, user, "small", content=content)
        assert await Files(running.services, user).get(done["result"]["artifact_id"]) == content.encode()


async def test_a_foreign_file_is_not_there(running: Runs) -> None:
    owner, other = await running.services.user(), await running.services.user()
    artifact_id = await Files(running.services, owner).put("log.csv", b"mine")
    done = await call(running, other, "copy", artifact_id=artifact_id)
    assert (done["status"], done["error"]["code"]) == ("error", "NOT_FOUND")


async def test_a_large_result_of_a_tool_is_told_by_reference_and_whole_to_the_agent(
    running: Runs, stores: Standalone, database: str
) -> None:
    user = await running.services.user()
    run_id = (await running.start(user, "measurer")).run_id
    events = await running.ended(user, run_id)
    done = next(event["data"] for event in events if event["type"] == "tool_completed")
    text = await Files(running.services, user).get(done["result_ref"]["artifact_id"])
    assert "result" not in done
    assert (json.loads(text), len(text)) == (LARGE, done["result_ref"]["bytes"])
    assert (hashlib.sha256(text).hexdigest(), done["result_ref"]["media_type"]) == (done["result_ref"]["sha256"], "application/json")
    assert text.decode().startswith(done["preview"])
    assert 2044 < len(done["preview"].encode()) <= 2048
    json_format.ParseDict(done, kinds_pb2.ToolCompleted())
    assert events[-1]["data"]["result"] == {"message": "Counted.", "rows": len(LARGE["rows"])}
    query = "SELECT result FROM events.steps WHERE run_id = $1 AND key = '1:tool:large'"
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        kept = json.loads(await admin.value(query, run_id))
    assert (kept["tool_call"]["state"], kept.pop("tool_call")["tool_call_id"]) == ("committed", done["tool_call_id"])
    assert kept == {"status": "success", "result_ref": done["result_ref"], "preview": done["preview"]}


async def test_a_large_result_of_an_agent_is_told_by_reference(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "wordless")).run_id)
    end = events[-1]["data"]
    json_format.ParseDict(end, kinds_pb2.AgentCompleted())
    assert (types(events)[-1], "result" in end) == ("agent_completed", False)
    assert json.loads(await Files(running.services, user).get(end["result_ref"]["artifact_id"])) == LARGE
    said = next(event["data"]["content"] for event in events if event["type"] == "message_created" and event["data"]["role"] == "assistant")
    assert end["result_ref"]["artifact_id"] in said


async def test_arguments_over_the_cap_are_not_kept_and_a_large_answer_is_told_by_reference(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "wordy")).run_id)
    assert types(events) == [
        "agent_started", "message_created", "tool_executing", "tool_completed", "message_created", "agent_completed",
    ]  # fmt: skip
    asked, said, end = (events[place]["data"] for place in (2, 4, 5))
    assert (asked["parameters"], "parameters_ref" in asked) == ({}, False)
    assert json.loads(await Files(running.services, user).get(end["result_ref"]["artifact_id"])) == {"message": WORDS}
    assert end["result_ref"]["artifact_id"] in said["content"]
    assert len(said["content"]) < 4096


async def test_a_result_over_the_cap_fails_by_its_size(running: Runs) -> None:
    done = await call(running, await running.services.user(), "excessive")
    assert (done["status"], done["error"]["code"]) == ("error", "TOOL_FAILED")
    assert "67108864" in done["error"]["message"]


async def test_an_interactive_call_answers_a_large_result_by_reference(running: Runs) -> None:
    user = await running.services.user()
    request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="large")
    answer = await running.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=30)
    assert (answer.status, answer.result) == ("success", b"")
    text = await Files(running.services, user).get(answer.result_ref.artifact_id)
    assert (json.loads(text), text.decode().startswith(answer.preview)) == (LARGE, True)


async def test_a_child_is_in_the_run_of_its_parent_under_its_own_name(running: Runs) -> None:
    user = await running.services.user()
    events = await running.ended(user, (await running.start(user, "family")).run_id)
    assert types(events).count("agent_started") == types(events).count("agent_completed") == 1
    names = {event["type"]: event["data"]["agent_name"] for event in events}
    assert (names["agent_thinking"], names["tool_executing"], names["tool_completed"]) == ("family", "measurer", "measurer")
    assert names["agent_completed"] == "family"
    assert events[-1]["data"]["result"]["message"] == "Counted."
    assert events[-1]["data"]["usage"]["tools"] == 1


async def test_nobody_can_give_the_context_of_a_call(running: Runs) -> None:
    done = await call(running, await running.services.user(), "small", content="x", context={"workspace": "/etc"})
    assert (done["status"], done["error"]["code"]) == ("error", errors.InvalidPayload.code)
