"""The first job that users do: a usage log goes in, figures, a chart and a report come out."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from genai_prices import Usage, calc_price

from standalone import sample
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

HEAD = b"time,model,user,input_tokens,cached_input_tokens,output_tokens\n"
LOG = HEAD + b"2026-09-07T08:00:00Z,gpt-4o,web,1000000,200000,10000\n2026-09-07T09:30:00Z,gpt-4o-mini,web,3000,0,500\n"
QUESTION = "Where does the money go?"


def _client(system: System, user: User) -> httpx.AsyncClient:
    return web.client(base_url=gateway_url(system), headers={"Authorization": f"Bearer {user.token}"}, timeout=20)


async def _uploaded(system: System, user: User, content: bytes, name: str = "usage.csv") -> str:
    async with _client(system, user) as client:
        answer = await client.post("/v1/artifacts", params={"name": name}, content=content, headers={"Content-Type": "text/csv"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["artifact_id"])


async def _run(system: System, user: User, agent: str, artifact_id: str, **inputs: Any) -> list[dict[str, Any]]:
    async with sockets.opened(system, user) as socket:
        started = await socket.run(QUESTION, agent=agent, inputs={"artifact_id": artifact_id, **inputs})
        events = await socket.ended(started["run_id"])
    sockets.in_legal_order(events)
    sockets.contiguous(events)
    return events


async def _analysed(system: System, user: User, content: bytes, **inputs: Any) -> dict[str, Any]:
    last = (await _run(system, user, "spend-analyst", await _uploaded(system, user, content), **inputs))[-1]
    assert last["type"] == "agent_completed", last["data"]
    return dict(last["data"]["result"])


def _costs() -> dict[str, Decimal]:
    """The cost of the bundled log per model, request by request."""
    costs: dict[str, Decimal] = {}
    for row in csv.DictReader(sample.FILE.read_text().splitlines()):
        inputs, cached, output = (int(row[f"{name}_tokens"]) for name in ("input", "cached_input", "output"))
        if row["model"] != "house-ranker-2":
            usage = Usage(input_tokens=inputs, cache_read_tokens=cached, output_tokens=output)
            costs[row["model"]] = costs.get(row["model"], Decimal()) + calc_price(usage, row["model"]).total_price
    return costs


def _money(amount: Decimal) -> float:
    return float(amount.quantize(Decimal("0.000001"), ROUND_HALF_EVEN))


async def test_the_bundled_log_is_analysed_to_the_last_cent(system: System, new_user: NewUser) -> None:
    user = new_user()
    events = await _run(system, user, "spend-analyst", await _uploaded(system, user, sample.FILE.read_bytes()))
    assert events[-1]["type"] == "agent_completed", events[-1]["data"]
    first = {kind: next(place for place, event in enumerate(events) if event["type"] == kind) for kind in sockets.CRITICAL}
    assert sorted(sockets.CRITICAL, key=first.__getitem__) == sockets.CRITICAL
    told = {event["data"]["agent_name"] for event in events if event["type"] in ("agent_thinking", "tool_completed")}
    assert told == {"spend-analyst", "triage", "data", "optimization", "actions", "reporting"}
    called = Counter(event["data"]["tool_name"] for event in events if event["type"] == "tool_completed")
    names = ("usage_load", "usage_profile", "cost_breakdown", "spend_opportunities", "spend_chart", "spend_report")
    assert called == dict.fromkeys(names, 1)

    result, rows, costs = events[-1]["data"]["result"], list(csv.DictReader(sample.FILE.read_text().splitlines())), _costs()
    assert (result["currency"], result["total_cost"]) == ("USD", _money(sum(costs.values(), Decimal())))
    breakdown = result["cost_breakdown"]
    assert {row["model"]: row["cost"] for row in breakdown["by_model"]} == {model: _money(cost) for model, cost in costs.items()}
    assert [(row["model"], row["requests"]) for row in breakdown["unpriced"]] == [("house-ranker-2", 88)]
    profile = result["usage_profile"]
    assert profile["requests"] == len(rows) == sum(row["requests"] for row in breakdown["by_hour"])
    for name in ("input_tokens", "cached_input_tokens", "output_tokens"):
        assert profile[name] == sum(int(row[name]) for row in rows)
    assert (len(breakdown["by_day"]), len(breakdown["by_user"]), result["input"]["rows"]) == (7, 6, len(rows))
    found = result["optimization_opportunities"]
    assert {"cheaper_model", "batch_window", "prompt_cache"} <= {one["kind"] for one in found}
    assert sorted(one["kind"] for one in result["actions"]) == sorted(one["kind"] for one in found)
    assert [one["rank"] for one in result["actions"]] == list(range(1, len(found) + 1))
    assert 0 < result["combined_monthly_saving"] <= result["monthly"]["cost"]
    assert result["notes"]


async def test_chart_and_report_are_files_of_their_owner_alone(system: System, new_user: NewUser) -> None:
    user, other = new_user(), new_user()
    result = await _analysed(system, user, sample.FILE.read_bytes())
    content = {}
    async with _client(system, user) as owner, _client(system, other) as stranger:
        for name, media_type in (("chart", "image/svg+xml"), ("report", "text/markdown")):
            kept = result[name]
            answer = await owner.get(f"/v1/artifacts/{kept['artifact_id']}")
            assert (answer.status_code, len(answer.content)) == (200, kept["bytes"])
            assert hashlib.sha256(answer.content).hexdigest() == kept["sha256"]
            assert answer.headers["content-type"].startswith(media_type)
            assert kept["media_type"] == media_type
            assert (await stranger.get(f"/v1/artifacts/{kept['artifact_id']}")).status_code == 404
            assert (await stranger.delete(f"/v1/artifacts/{kept['artifact_id']}")).status_code == 404
            content[name] = answer.text
        kept_names = [row["name"] for row in (await owner.get("/v1/artifacts")).json()["artifacts"]]
        assert (await stranger.get("/v1/artifacts")).json()["artifacts"] == []
    assert sorted(kept_names) == ["spend-chart.svg", "spend-report.md", "usage.csv"]
    drawing = ElementTree.fromstring(content["chart"])  # noqa: S314  of our own making
    texts = [element.text or "" for element in drawing.iter()]
    assert any(text.startswith("gpt-4.1: $") for text in texts)
    assert f"> {QUESTION}" in content["report"].splitlines()
    assert "| house-ranker-2 | no price | 88 |" in content["report"]


async def test_the_result_of_a_year_is_a_file_that_its_event_names(system: System, new_user: NewUser) -> None:
    user, start = new_user(), datetime(2025, 1, 1, tzinfo=UTC)
    rows = [f"{start + timedelta(hours=hour):%Y-%m-%dT%H:%M:%SZ},gpt-4o,web,1000,0,10" for hour in range(365 * 24)]
    content = HEAD + "\n".join(rows).encode()
    last = (await _run(system, user, "spend-analyst", await _uploaded(system, user, content)))[-1]
    assert last["type"] == "agent_completed", last["data"]
    assert "result" not in last["data"]
    async with _client(system, user) as client:
        result = (await client.get(f"/v1/artifacts/{last['data']['result_ref']['artifact_id']}")).json()
        chart = (await client.get(f"/v1/artifacts/{result['chart']['artifact_id']}")).text
    assert (len(result["cost_breakdown"]["by_hour"]), result["total_cost"]) == (8760, 22.776)
    assert "Cost (USD) per 2 days" in chart


async def test_a_log_without_models_is_priced_by_the_model_given(system: System, new_user: NewUser) -> None:
    trace = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,1000000,10000\n2023-11-16 18:15:50.9951690,400,100\n"
    user = new_user()
    priced = await _analysed(system, user, trace, model="gpt-4o")
    assert (priced["total_cost"], priced["input"]["recognised_as"]) == (2.602, "azure-llm-trace")
    bare = await _analysed(system, user, trace)
    assert (bare["total_cost"], bare["cost_breakdown"]["unpriced"][0]["requests"]) == (0, 2)
    assert "Give one with the input model." in bare["message"]


async def test_columns_can_be_named(system: System, new_user: NewUser) -> None:
    log = b"when;who;in;out\n2026-09-07T08:00:00Z;web;1000;10\n".replace(b";", b",")
    columns = {"time": "when", "input": "in", "output": "out", "user": "who"}
    result = await _analysed(system, new_user(), log, model="gpt-4o", columns=columns)
    assert (result["usage_profile"]["input_tokens"], result["usage_profile"]["output_tokens"]) == (1000, 10)


@pytest.mark.parametrize("agent", ["triage", "data", "optimization", "actions", "reporting"])
async def test_each_specialist_can_be_asked_alone(system: System, new_user: NewUser, agent: str) -> None:
    user = new_user()
    events = await _run(system, user, agent, await _uploaded(system, user, LOG))
    assert events[-1]["type"] == "agent_completed", events[-1]["data"]
    assert events[-1]["data"]["agent_name"] == agent
    assert events[-1]["data"]["result"]["message"]


WRONG = {
    "empty": (b"", {}),
    "binary": (bytes(range(256)) * 20, {}),
    "no usable columns": (b"name,colour\nx,red\n", {}),
    "a bad number": (LOG + b"2026-09-07T09:31:00Z,gpt-4o,web,12x,0,5\n", {"line": "4", "column": "input_tokens"}),
    "a negative number": (LOG + b"2026-09-07T09:31:00Z,gpt-4o,web,12,0,-5\n", {"line": "4", "column": "output_tokens"}),
    "no time": (LOG + b"yesterday,gpt-4o,web,12,0,5\n", {"line": "4", "column": "time"}),
    "mixed time zones": (LOG + b"2026-09-07T09:31:00,gpt-4o,web,12,0,5\n", {"line": "4", "column": "time"}),
    "cut off": (gzip.compress(LOG * 500)[:-20], {}),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_file_ends_the_run_and_says_where_it_is_wrong(system: System, new_user: NewUser, name: str) -> None:
    content, place = WRONG[name]
    user = new_user()
    events = await _run(system, user, "spend-analyst", await _uploaded(system, user, content))
    assert events[-1]["type"] == "agent_failed", events[-1]
    error = events[-1]["data"]["error"]
    assert error["code"] == "INVALID_PAYLOAD", error
    assert {key: error["details"].get(key) for key in place} == place
    assert len(error["message"]) > 20
    for part in place.values():
        assert part in error["message"]
    failed = [event["data"] for event in events if event["type"] == "tool_completed"]
    assert [(call["tool_name"], call["status"], call["error"]["code"]) for call in failed] == [("usage_load", "error", "INVALID_PAYLOAD")]


async def test_the_file_of_another_user_is_not_there(system: System, new_user: NewUser) -> None:
    owner, stranger = new_user(), new_user()
    artifact_id = await _uploaded(system, owner, LOG)
    events = await _run(system, stranger, "spend-analyst", artifact_id)
    assert (events[-1]["type"], events[-1]["data"]["error"]["code"]) == ("agent_failed", "NOT_FOUND")


@pytest.mark.parametrize(
    ("inputs", "field"),
    [({"artifact_id": 7}, "inputs.artifact_id"), ({}, "inputs.artifact_id"), ({"artifact_id": "x", "columns": "time"}, "inputs.columns")],
)
async def test_a_wrong_input_is_named(system: System, new_user: NewUser, inputs: dict[str, Any], field: str) -> None:
    async with sockets.opened(system, new_user()) as socket:
        started = await socket.run(QUESTION, agent="spend-analyst", inputs=inputs)
        last = (await socket.ended(started["run_id"]))[-1]
    assert (last["type"], last["data"]["error"]["details"].get("field")) == ("agent_failed", field)


class TestSupervisor:
    """Who is asked when nobody is named."""

    async def _answered(self, system: System, user: User, text: str, **inputs: Any) -> dict[str, Any]:
        async with sockets.opened(system, user) as socket:
            ack = await socket.ask("START_AGENT", {"user_request": text, "inputs": inputs})
            last = (await socket.ended(ack["data"]["run_id"]))[-1]
        assert (last["type"], last["data"]["agent_name"]) == ("agent_completed", "supervisor"), last
        return dict(last["data"]["result"])

    async def test_a_usage_log_goes_to_the_spend_analyst(self, system: System, new_user: NewUser) -> None:
        user = new_user()
        result = await self._answered(system, user, "Have a look.", artifact_id=await _uploaded(system, user, LOG))
        assert (result["agent"], result["total_cost"]) == ("spend-analyst", 2.35075)

    async def test_a_text_goes_to_the_text_analyst(self, system: System, new_user: NewUser) -> None:
        result = await self._answered(system, new_user(), "Rivers carry water.")
        assert (result["agent"], result["statistics"]["words"]) == ("text-analyst", 3)

    async def test_a_question_about_money_without_a_log_is_told_how_to_attach_one(self, system: System, new_user: NewUser) -> None:
        result = await self._answered(system, new_user(), QUESTION)
        assert result["agent"] == "supervisor"
        assert "netra run --file" in result["message"]


def test_the_command_line_uploads_the_log_and_prints_the_events(system: System, new_user: NewUser, tmp_path: Path) -> None:
    log = tmp_path / "usage.csv"
    log.write_bytes(LOG)
    words = ["run", "spend-analyst", "--file", str(log), "--request", QUESTION, "--json"]
    variables = {"NETRA_URL": gateway_url(system), "NETRA_TOKEN": new_user().token, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "netra.cli", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    sockets.in_legal_order(events)
    assert events[-1]["data"]["result"]["total_cost"] == 2.35075
