"""The command line over the whole of Netra: a file goes in, a report comes out, and every end is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import sockets
from tests.fixtures.stack import System, gateway_url, spans_of
from tests.fixtures.users import NewUser

LOG = """time,model,user,input_tokens,output_tokens
2026-09-07T00:00:00Z,gpt-4o,anna,1000000,0
2026-09-07T01:00:00Z,gpt-4o,bert,0,1000000
2026-09-07T02:00:00Z,house-model,anna,5,7
"""
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(system: System, new_user: NewUser, tmp_path: Path) -> Command:
    """`netra` of a fresh user, run in a folder of its own."""
    variables = {"NETRA_URL": gateway_url(system), "NETRA_TOKEN": new_user().token, "COLUMNS": "160"}
    variables |= {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        called = [sys.executable, "-m", "netra.cli", *words]
        return subprocess.run(called, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    return run


@pytest.fixture
def log(tmp_path: Path) -> str:
    """A usage log whose cost can be told at a glance."""
    (tmp_path / "usage.csv").write_text(LOG)
    return "usage.csv"


def frames(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What --json printed: one frame per line and nothing else."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_file_is_analysed(command: Command, log: str, tmp_path: Path) -> None:
    done = command("run", "spend-analyst", "--file", log, "--request", "Where does the money go?", "--save", "out", "--json")
    assert done.returncode == 0, done.stderr
    events = frames(done)
    assert [kind for kind in sockets.CRITICAL if kind in {event["type"] for event in events}] == sockets.CRITICAL
    result = events[-1]["data"]["result"]
    assert result["total_cost"] == 12.5  # a million tokens in for 2.50 USD, a million out for 10 USD
    assert [row["model"] for row in result["cost_breakdown"]["unpriced"]] == ["house-model"]
    assert "Uploaded usage.csv" in done.stderr
    for name in ("chart", "report"):
        assert (tmp_path / "out" / result[name]["name"]).stat().st_size == result[name]["bytes"]


def test_the_report_is_shown_as_tables(command: Command, log: str) -> None:
    done = command("run", "--file", log)
    assert done.returncode == 0, done.stderr
    for words in (
        "agent_completed",
        "Total cost  12.50 USD",
        "gpt-4o",
        "house-model",
        "no price",
        "Opportunities",
        "netra artifacts download",
    ):
        assert words in done.stdout, words


def test_a_wrong_line_ends_the_run_with_its_place(command: Command, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text(LOG.replace(",5,7", ",5,seven"))
    done = command("run", "spend-analyst", "--file", "wrong.csv", "--json")
    assert done.returncode == 1
    last = frames(done)[-1]
    error = last["data"]["error"]
    assert (last["type"], error["code"], error["details"]["line"], error["details"]["column"]) == (
        "agent_failed", "INVALID_PAYLOAD", "4", "output_tokens",
    )  # fmt: skip
    why = command("why", last["run_id"])
    assert why.returncode == 0, why.stderr
    assert "INVALID_PAYLOAD" in why.stdout
    assert "tool usage_load of triage" in why.stdout
    assert f"netra trace {last['correlation_id']}" in why.stdout


def test_artifacts_are_listed_downloaded_and_deleted(command: Command, log: str, tmp_path: Path) -> None:
    assert command("run", "triage", "--file", log).returncode == 0
    (kept,) = frames(command("artifacts", "list", "--json"))
    assert (kept["name"], kept["bytes"]) == ("usage.csv", len(LOG))
    refused = command("artifacts", "download", kept["artifact_id"])
    assert refused.returncode == 1
    assert "is here already" in refused.stderr
    assert command("artifacts", "download", kept["artifact_id"], "--to", "copy.csv").returncode == 0
    assert (tmp_path / "copy.csv").read_text() == LOG
    assert command("artifacts", "delete", kept["artifact_id"]).returncode == 0
    assert command("artifacts", "list", "--json").stdout == ""
    assert command("artifacts", "delete", kept["artifact_id"]).returncode == 1


def test_a_file_is_put_into_a_thread(command: Command, log: str) -> None:
    ended = frames(command("run", "triage", "--file", log, "--json"))[-1]
    for words in (("artifacts", "upload", log), ("run", "triage", "--file", log)):
        done = command(*words, "--thread", ended["thread_id"], "--json")
        assert done.returncode == 0, done.stderr
    kept = frames(command("artifacts", "list", "--json"))
    assert [one["thread_id"] for one in kept] == [ended["thread_id"], ended["thread_id"], None]
    followed = frames(command("follow", ended["thread_id"], "--once", "--json"))
    assert [event["type"] for event in followed].count("agent_completed") == 2
    assert len({event["run_id"] for event in followed}) == 2
    nowhere = command("artifacts", "upload", log, "--thread", ended["run_id"])
    assert (nowhere.returncode, "NOT_FOUND" in nowhere.stderr) == (1, True)


def test_the_trace_of_a_run_is_drawn(command: Command, system: System, log: str, tmp_path: Path) -> None:
    last = frames(command("run", "triage", "--file", log, "--json"))[-1]
    wanted, traces = {"ws START_AGENT", "run triage", "tool usage_load", "ContextService/GetArtifact"}, tmp_path / "traces"
    deadline = time.monotonic() + 20
    while not wanted <= {
        span["name"].removeprefix("netra.context.v1.") for span in spans_of(system) if span["traceId"] == last["trace_id"]
    }:
        assert time.monotonic() < deadline
    traces.mkdir()
    (traces / "all.jsonl").write_text("\n".join(system.trace_lines()))
    for name in (last["correlation_id"], last["run_id"], last["trace_id"]):
        done = command("trace", name, "--dir", str(traces))
        assert done.returncode == 0, done.stderr
        for span in wanted:
            assert re.search(rf"{span}.*█.*ok", done.stdout), span


def test_a_run_of_somebody_else_is_not_there(command: Command) -> None:
    done = command("why", "01a1fc97-8f66-765d-ad04-30ac679f73c0")
    assert done.returncode == 1
    assert "netra runs" in done.stderr


def test_an_administrator_reads_and_verifies_the_record_of_access(system: System, new_user: NewUser, command: Command) -> None:
    token = new_user("admin").token
    (entry,) = frames(command("audit", "list", "--limit", "1", "--json", "--token", token))
    assert entry["action"]
    first = command("audit", "verify", "--token", token)
    assert first.returncode == 0, first.stderr
    kept = first.stdout.splitlines()[-1].strip()
    (again,) = frames(command("audit", "verify", "--from", kept, "--json", "--token", token))
    assert again["verified"] >= 1
    assert again["broken_at"] == 0
    forged = f"{kept.partition(':')[0]}:{'00' * 32}"
    refused = command("audit", "verify", "--from", forged, "--token", token)
    assert refused.returncode == 1
    assert "does not fit" in refused.stderr
    assert command("audit", "verify").returncode == 1
