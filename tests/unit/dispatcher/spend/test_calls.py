"""The spend tools as a run calls them: a file of the user's, a folder, a process, a result as declared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from netra import errors, ids
from netra.context import UserExecutionContext
from netra.tool import Artifact, ToolSpec
from services.dispatcher.tools import registry
from services.dispatcher.tools.sandbox import process
from services.dispatcher.tools.spend import tools
from tests.unit.dispatcher.spend import bench, logs, recount

ROWS = logs.requests(11, 200)


class Run:
    """What a call is given: a folder, and the user's files as the context service has them."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        folder.mkdir()
        self.workspace = folder
        self._files = files

    @property
    def context(self) -> UserExecutionContext:
        """These tools need none."""
        raise AssertionError

    async def fetch(self, artifact_id: str, to: Path) -> Artifact:
        """Write a file."""
        if artifact_id not in self._files:
            raise errors.NotFound(f"There is no artifact {artifact_id}.")
        content = self._files[artifact_id]
        to.write_bytes(content)  # noqa: ASYNC240 - a few kilobytes
        return Artifact(artifact_id, "usage.csv", "text/csv", len(content), hashlib.sha256(content).hexdigest())

    async def keep(self, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """These tools make none."""
        raise AssertionError(name, media_type, content)

    def left(self) -> list[str]:
        """The names of what is in the folder."""
        return sorted(path.name for path in self.workspace.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose user has three files."""
    return Run(tmp_path / "run", {"good": logs.generic_csv(ROWS), "bad": b"time,model,input,output\n2025-01-01,gpt-4o,x,1\n", "empty": b""})


async def called(tool: ToolSpec, run: Run, **arguments: object) -> Any:
    """The result of a call whose arguments and result are checked as the dispatcher checks them."""
    registered = registry.ToolRegistry([tool]).get(tool.name)
    registered.check_arguments(arguments)
    result = await tool.function(context=run, **arguments)
    registered.check_result(result)
    return result


async def test_a_log_is_loaded_and_each_tool_computes_from_it(run: Run) -> None:
    loaded = await called(tools.usage_load, run, artifact_id="good")
    assert (loaded["name"], loaded["rows"]) == ("usage.csv", 200)
    assert await called(tools.usage_profile, run) == recount.profile(ROWS)
    assert (await called(tools.cost_breakdown, run))["total_cost"] == recount.costs(ROWS)["total_cost"]
    assert (await called(tools.spend_opportunities, run))["combined_window_saving"] == recount.usd(recount.savings(ROWS)["combined"])
    assert run.left() == ["usage.parquet"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker answers in this process: starting one takes longer than all it does."""

    async def run(worker: str, request: dict[str, Any], *, cwd: Path) -> Any:
        assert worker == bench.WORKER
        return bench.asked(cwd, request)

    monkeypatch.setattr(process, "run", run)


@pytest.mark.usefixtures("here")
async def test_a_wrong_file_ends_the_call_with_its_line(run: Run) -> None:
    with pytest.raises(errors.InvalidPayload, match=r"^usage\.csv, line 2, column input: 'x' is not a number of tokens") as caught:
        await called(tools.usage_load, run, artifact_id="bad")
    assert caught.value.details == {"line": "2", "column": "input", "field": "input_tokens"}
    with pytest.raises(errors.InvalidPayload, match="it is empty"):
        await called(tools.usage_load, run, artifact_id="empty")
    assert run.left() == []


@pytest.mark.usefixtures("here")
async def test_a_wrong_file_leaves_the_log_before_it_as_it_was(run: Run) -> None:
    await called(tools.usage_load, run, artifact_id="good")
    with pytest.raises(errors.InvalidPayload):
        await called(tools.usage_load, run, artifact_id="bad")
    assert (await called(tools.usage_profile, run))["requests"] == 200


async def test_a_missing_file_is_said(run: Run) -> None:
    with pytest.raises(errors.NotFound):
        await called(tools.usage_load, run, artifact_id=str(ids.uuid7()))


@pytest.mark.parametrize("tool", [tools.usage_profile, tools.cost_breakdown, tools.spend_opportunities], ids=lambda tool: tool.name)
@pytest.mark.usefixtures("here")
async def test_a_run_that_lost_its_folder_loads_the_log_again(tool: ToolSpec, run: Run) -> None:
    with pytest.raises(errors.FailedPrecondition, match="call usage_load first"):
        await called(tool, run)
    assert await called(tool, run, artifact_id="good")
    assert run.left() == ["usage.parquet"]
