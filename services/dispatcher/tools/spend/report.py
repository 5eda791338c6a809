"""spend_report: the figures and what follows from them as a Markdown document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from netra.tool import ToolContext, tool
from services.dispatcher.tools.spend import chart, wording

NAME, MEDIA_TYPE = "spend-report.md", "text/markdown"
_MOST_MODELS, _MOST_USERS, _MOST_DAYS, _LONGEST_NAME = 50, 20, 62, 120
_MARKS = re.compile(r"([\\`*\[\]<>#|~])|(?<![^\W_])_|_(?![^\W_])")
_SPACE = re.compile(r"[\x00-\x20\x7f-\x9f]+")
Figures = Annotated[dict[str, Any], Field(description="What `report.arguments` gathers.")]


@tool(tags=("spend",), timeout_s=60.0, idempotent=True)
async def spend_report(context: ToolContext, question: str, message: str, figures: Figures) -> chart.Kept:
    """Writes the report of an analysis as Markdown: what was spent, on what, what could be saved and what to do about it."""
    return chart.kept(await context.keep(NAME, MEDIA_TYPE, written(question, message, figures).encode()))


def arguments(question: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `spend_report` for the result of an analysis: few enough rows to be read and recorded."""
    breakdown = result["cost_breakdown"]
    days = breakdown["by_day"]
    kept = {
        "by_model": _first(breakdown["by_model"], _MOST_MODELS),
        "unpriced": _first(breakdown["unpriced"], _MOST_MODELS),
        "by_user": _first(breakdown["by_user"], _MOST_USERS),
        "by_day": days if len(days) <= _MOST_DAYS else [],
        "left_out": {"by_model": max(len(breakdown["by_model"]) - _MOST_MODELS, 0)},
    }
    given = ("total_cost", "monthly", "price_list", "usage_profile", "optimization_opportunities", "combined_monthly_saving", "actions")
    figures = {name: result[name] for name in (*given, "input", "notes")} | {"cost_breakdown": kept}
    return {"question": question, "message": result["message"], "figures": figures}


def _first(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    found = sorted(rows, key=lambda row: (-row.get("cost", 0), -row["requests"]))[:most]
    return [{name: value[:_LONGEST_NAME] if isinstance(value, str) else value for name, value in row.items()} for row in found]


def written(question: str, message: str, figures: Mapping[str, Any]) -> str:
    """The document."""
    profile = figures["usage_profile"]
    first, last = (wording.minute(wording.moment(profile[end])) for end in ("from", "to"))
    blocks = [
        f"# AI spend: {wording.usd(figures['total_cost']) if figures['cost_breakdown']['by_model'] else 'no prices'}",
        f"{wording.times(profile['requests'], 'request')} from {first} to {last} UTC. The chart beside this report is `{chart.NAME}`.",
        f"> {_plain(question)}",
        _plain(message),
        *_money(figures),
        *_usage(profile),
        *_savings(figures),
        *_actions(figures["actions"]),
        *_sources(figures),
    ]
    return "\n\n".join(blocks) + "\n"


def _money(figures: Mapping[str, Any]) -> Iterator[str]:
    breakdown, total = figures["cost_breakdown"], figures["total_cost"]
    yield "## Where the money goes"
    priced = [
        [row["model"], row["priced_as"], *_tokens(row), wording.usd(row["cost"]), wording.share(row["cost"], total)]
        for row in breakdown["by_model"]
    ]
    unpriced = [[row["model"] or "(no model)", "no price", *_tokens(row), "", ""] for row in breakdown["unpriced"]]
    yield _table("Model | Priced as | Requests: | Input tokens: | of them cached: | Output tokens: | Cost: | Share:", priced + unpriced)
    if breakdown["left_out"]["by_model"]:
        yield f"{wording.times(breakdown['left_out']['by_model'], 'more model')} cost less than these."
    if breakdown["by_user"]:
        rows = [[row["user"] or "(none)", f"{row['requests']:,}", wording.usd(row["cost"]), wording.share(row["cost"], total)]
                for row in breakdown["by_user"]]  # fmt: skip
        yield _table("User | Requests: | Cost: | Share:", rows)
    if len(breakdown["by_day"]) > 1:
        rows = [[row["day"], f"{row['requests']:,}", wording.usd(row["cost"])] for row in breakdown["by_day"]]
        yield _table("Day | Requests: | Cost:", rows)
    yield _plain(f"A month at this pace: {wording.usd(figures['monthly']['cost'])}. {figures['monthly']['note']}")


def _tokens(row: Mapping[str, Any]) -> list[str]:
    cached = row.get("cached_input_tokens")
    return [f"{row['requests']:,}", f"{row['input_tokens']:,}", "" if cached is None else f"{cached:,}", f"{row['output_tokens']:,}"]


def _usage(profile: Mapping[str, Any]) -> Iterator[str]:
    yield "## How it is used"
    points = ("p50", "p95", "p99", "max")
    percentiles = profile["percentiles"]
    rows = [[name.replace("_", " "), *(f"{percentiles[name][point]:,}" for point in points), f"{profile[name]:,}"] for name in percentiles]
    yield _table("Tokens of a request | p50: | p95: | p99: | max: | all:", rows)
    minute, hour = (
        f"{wording.minute(wording.moment(peak['start']))} with {wording.times(peak['requests'], 'request')}"
        for peak in (profile["peak_minute"], profile["peak_hour"])
    )
    yield f"The busiest minute is {minute}, the busiest hour {hour}."


def _savings(figures: Mapping[str, Any]) -> Iterator[str]:
    found = figures["optimization_opportunities"]
    yield "## What could be saved"
    if combined := figures["combined_monthly_saving"]:
        yield f"All of it together: {wording.usd(combined)} a month. Single savings touch the same requests, so they do not add up to that."
    else:
        yield "Nothing was found in this log that would save money."
    for number, one in enumerate(found, 1):
        saving = f": {wording.usd(one['monthly_saving'])} a month" if one["monthly_saving"] else ""
        yield f"### {number}. {_plain(one['title'])}{saving}"
        yield "\n".join(f"- **{name}:** {_plain(text)}" for name, text in _reasons(one))


def _reasons(opportunity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Method", opportunity["method"]
    yield "Assumption", opportunity["assumption"]
    yield "How to verify", opportunity["how_to_verify"]
    yield "Confidence", opportunity["confidence"]
    if opportunity["overlaps_with"]:
        yield "Overlaps with", ", ".join(kind.replace("_", " ") for kind in opportunity["overlaps_with"])


def _actions(actions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if actions:
        yield "## What to do"
        rows = [[str(one["rank"]), one["action"], wording.usd(one["monthly_saving"]), one["effort"], one["owner_hint"]] for one in actions]
        yield _table("Rank: | Action | A month: | Effort | Who", rows)


def _sources(figures: Mapping[str, Any]) -> Iterator[str]:
    given, prices = figures["input"], figures["price_list"]
    columns = ", ".join(f"{role} from {column}" for role, column in given["columns"].items())
    yield "## How these figures were made"
    lines = [
        f"File: {given['name']}, {wording.times(given['bytes'], 'byte')}, {wording.times(given['rows'], 'row')}, "
        f"{given['format']}, read as {given['recognised_as']}.",
        f"Columns: {columns}. Times: {given['timezone']}.",
        f"Model: {given['model']}." if given["model"] else "",
        *given["assumptions"],
        f"Prices: {prices['source']} {prices['version']}. {prices['note']}",
        "Amounts in this report are rounded to be read; the result of the run has them to six places.",
        *figures["notes"],
    ]
    yield "\n".join(f"- {_plain(line)}" for line in lines if line)


def _table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose heading ends in a colon holds figures."""
    heads = [name.strip() for name in head.split("|")]
    lines = [
        " | ".join(name.rstrip(":") for name in heads),
        " | ".join("---:" if name.endswith(":") else "---" for name in heads),
        *(" | ".join(_plain(cell) for cell in row) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _plain(text: str) -> str:
    """Text that stays text: names and questions come from the user, and a reader's browser may show the document."""
    return _MARKS.sub(lambda mark: f"\\{mark.group()}", _SPACE.sub(" ", text)).replace("&", "&amp;")
