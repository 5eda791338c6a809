"""supervisor, triage, data, optimization, actions, reporting: the spend analyst."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from netra import errors
from netra.agent import Turn, agent
from services.dispatcher.agents import ranking, shapes
from services.dispatcher.tools.spend import chart, report, wording

_DEADLINE_S = 3600.0  # a log of gigabytes takes minutes in each of several steps
_SAID = {"str": "a text that is not empty", "dict": "an object"}
_ABOUT_MONEY = re.compile(
    r"\b(spend|spends|spent|spending|costs?|costing|bills|billing|billed|invoices?|prices?|pricing|priced|budgets?|savings?|money"
    r"|expensive|expenses?|cheap|cheaper|usage logs?|token usage)\b",
    re.IGNORECASE,
)
_ATTACH = (
    "To say where the money goes I need the usage log: a CSV, JSONL or Parquet file with the time, the input and output tokens and, "
    "when known, the model and the user of each request. Attach it with `netra run --file usage.csv --request \"...\"`, or upload it with "
    "POST /v1/artifacts and give its id as the input artifact_id."
)  # fmt: skip


@agent("supervisor", deadline_s=_DEADLINE_S)
async def supervisor(turn: Turn) -> dict[str, object]:
    """Hands a request to the agent for it: a usage log or a question about spending to spend-analyst, any other text to text-analyst."""
    chosen, reason = route(turn.request, turn.inputs)
    await turn.think(reason)
    if not chosen:
        return {"agent": "supervisor", "message": _ATTACH}
    return {**await turn.child(chosen), "agent": chosen}


def route(request: str, inputs: Mapping[str, Any]) -> tuple[str, str]:
    """The agent for a request, and why; no agent where a usage log would be needed and is not there."""
    if "artifact_id" in inputs:
        return "spend-analyst", "A file is attached: spend-analyst takes it."
    if _ABOUT_MONEY.search(request):
        return "", "This is about spending, but no usage log is attached."
    return "text-analyst", "This is a text to look at: text-analyst takes it."


@agent("triage", deadline_s=_DEADLINE_S)
async def triage(turn: Turn) -> dict[str, object]:
    """Says what an attached usage log is and whether it can be used. Inputs: artifact_id; where needed model, columns, timezone."""
    artifact_id = _input(turn, "artifact_id", str, "attach a usage log: netra run --file usage.csv")
    wanted = {"model": str, "columns": dict, "timezone": str}
    given = {name: _input(turn, name, kind) for name, kind in wanted.items() if name in turn.inputs}
    await turn.think("First what the file is, and whether every line of it can be used.")
    loaded = await turn.tool("usage_load", artifact_id=artifact_id, **given)
    rows = wording.times(loaded["rows"], "row")
    return {
        "message": f"{loaded['name']} is a {loaded['format']} log of {rows} ({loaded['recognised_as']}); it can be used.",
        "input": loaded,
    }


@agent("data", deadline_s=_DEADLINE_S)
async def data(turn: Turn) -> dict[str, object]:
    """Computes how models were used and what that cost. Inputs: as for triage."""
    await _loaded(turn)
    await turn.think("The usage profile and the cost of every request, at the same time.")
    profile, costs = await turn.gather(turn.tool("usage_profile"), turn.tool("cost_breakdown"))
    spent = f"cost {wording.usd(costs['total_cost'])}" if costs["cost_breakdown"]["by_model"] else "have no price"
    message = f"{wording.times(profile['requests'], 'request')} {spent}."
    return {**costs, "usage_profile": profile, "message": message}


@agent("optimization", deadline_s=_DEADLINE_S)
async def optimization(turn: Turn) -> dict[str, object]:
    """Looks for what the same work could cost less, each saving with its assumption and a way to verify it. Inputs: as for triage."""
    await _loaded(turn)
    await turn.think("What the same requests would cost otherwise, by the same price list.")
    found = await turn.tool("spend_opportunities")
    saving, ways = wording.usd(found["combined_monthly_saving"]), sum(one["monthly_saving"] > 0 for one in found["opportunities"])
    message = f"{wording.times(ways, 'way')} to save, together up to {saving} a month." if ways else "Nothing would save money."
    return {**found, "message": message}


@agent("actions", deadline_s=_DEADLINE_S)
async def actions(turn: Turn) -> dict[str, object]:
    """Ranks what to do about the opportunities. Inputs: opportunities, or as for triage."""
    if "opportunities" in turn.inputs:
        found = shapes.opportunities(turn.inputs)
    else:
        found = (await turn.child("optimization"))["opportunities"]
    await turn.think("What to do first: the greatest saving, then the smaller effort.")
    ranked = ranking.ranked(found)
    return {"message": str(ranked[0]["action"]) if ranked else "There is nothing to do.", "actions": ranked}


@agent("reporting", deadline_s=_DEADLINE_S)
async def reporting(turn: Turn) -> dict[str, object]:
    """Draws the chart and writes the report. Inputs: result (of spend-analyst), or as for triage."""
    result = shapes.analysis(turn.inputs) if "result" in turn.inputs else await _analysed(turn)
    await turn.think("The chart and the report, at the same time.")
    drawn, written = await turn.gather(
        turn.tool("spend_chart", **chart.arguments(result["usage_profile"], result)),
        turn.tool("spend_report", **report.arguments(turn.request, result)),
    )
    return {"message": f"The chart is {drawn['name']}, the report {written['name']}.", "chart": drawn, "report": written}


@agent("spend-analyst", deadline_s=_DEADLINE_S)
async def analyst(turn: Turn) -> dict[str, object]:
    """Says where the money for language models goes and how less of it would do, from an attached usage log.

    Inputs: artifact_id; `model` prices a log that names none, `columns` and `timezone` say what the log does not.
    """
    result = await _analysed(turn)
    kept = await turn.child("reporting", result=result)
    await turn.think("Everything is there.", progress=100)
    return {**result, "chart": kept["chart"], "report": kept["report"]}


async def _analysed(turn: Turn) -> dict[str, Any]:
    """The result of an analysis but for its files; each part is the work of one agent."""
    await turn.think("First the file, then its figures and what could be saved, then what to do.", progress=0)
    checked = await turn.child("triage")
    await turn.think(str(checked["message"]), progress=20)
    figures, saving = await turn.gather(turn.child("data", loaded=True), turn.child("optimization", loaded=True))
    await turn.think(f"{figures['message']} {saving['message']}", progress=80)
    todo = await turn.child("actions", opportunities=saving["opportunities"])
    result = {
        **{name: figures[name] for name in ("currency", "total_cost", "cost_breakdown", "usage_profile", "monthly", "price_list")},
        "optimization_opportunities": saving["opportunities"],
        "combined_monthly_saving": saving["combined_monthly_saving"],
        "actions": todo["actions"],
        "input": checked["input"],
        "notes": list(dict.fromkeys([*figures["notes"], *saving["notes"]])),
    }
    return {"message": _message(result), **result}


async def _loaded(turn: Turn) -> None:
    """Returns when the log of this run is ready for the tools."""
    if "loaded" not in turn.inputs:
        await turn.child("triage")


def _message(result: Mapping[str, Any]) -> str:
    """The answer in a few sentences."""
    profile, models = result["usage_profile"], sorted(result["cost_breakdown"]["by_model"], key=lambda row: -row["cost"])
    first, last = (wording.minute(wording.moment(profile[end])) for end in ("from", "to"))
    window = f"{wording.times(profile['requests'], 'request')} from {first} to {last} UTC"
    if not models:
        return f"{window} have no price: the log names no model that the price list knows. Give one with the input model."
    total = result["total_cost"]
    most = ", ".join(f"{row['model']} {wording.share(row['cost'], total)}" for row in models[:3])
    told = [f"{window} cost {wording.usd(total)}: {most}."]
    if unpriced := sum(row["requests"] for row in result["cost_breakdown"]["unpriced"]):
        told.append(f"Not in that sum, for want of a price: {unpriced:,} of these requests.")
    told.append(f"A month at this pace is {wording.usd(result['monthly']['cost'])}.")
    if result["combined_monthly_saving"]:
        told.append(f"Up to {wording.usd(result['combined_monthly_saving'])} of it could be saved. First: {result['actions'][0]['action']}")
    return " ".join(told)


def _input(turn: Turn, name: str, kind: type, remedy: str = "") -> Any:
    value = turn.inputs.get(name)
    if not isinstance(value, kind) or value == "":
        message = f"inputs.{name} must be {_SAID[kind.__name__]}{f': {remedy}' if remedy else ''}"
        raise errors.InvalidPayload(message, field=f"inputs.{name}")
    return value
