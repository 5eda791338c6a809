"""What the command line puts on a terminal: events, tables, the progress of a transfer, the report of a spend analysis."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from netra.account import Account, Call

_STYLES = {"completed": "green", "failed": "red", "timed_out": "red", "cancelled": "yellow", "executing": "cyan", "thinking": "dim"}
_CONFIDENCE = {"high": "green", "medium": "yellow", "low": "red"}
_GIST, _LEAST = 240, 40
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
# what a file or another user named must not be able to move the cursor or rename the window
_CONTROL = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
Advance = Callable[[int, int], None]


def plain(value: object) -> str:
    """Text that can do nothing to a terminal."""
    return str(value).translate(_CONTROL)


def failure(console: Console, code: str, message: str) -> None:
    """One line that says what went wrong."""
    console.print(Text.assemble((code, "bold red"), " ", plain(message)), soft_wrap=True)


def style_of(kind: str) -> str:
    """The colour of an event."""
    return next((style for end, style in _STYLES.items() if kind.endswith(end)), "")


def event(console: Console, frame: Mapping[str, Any]) -> None:
    """One event: what is said in full, what machines tell each other as far as the line goes."""
    kind, data = str(frame["type"]), frame["data"]
    head = Text.assemble(
        (f"{frame['seq']:>4} ", "dim"), (f"{kind:<16}", style_of(kind)), (f" {plain(data.get('agent_name', '')):<14} ", "dim")
    )
    limit = max(console.width - head.cell_len, _LEAST) if console.is_terminal else _GIST
    console.print(head.append(plain(gist(data, limit)).replace("\n", " ")), soft_wrap=True)


def gist(data: Mapping[str, Any], limit: int = _GIST) -> str:
    """What an event is about."""
    if data.get("approval_id") and not data.get("waits_for"):
        return _approval(data)
    label = f"{data['tool_name']}: " if data.get("tool_name") else ""
    for name in ("reasoning", "result", "content"):
        if data.get(name) is not None:
            return _told(label, data[name], limit)
    if data.get("result_ref"):
        kept = data["result_ref"]
        return f"{label}{size(kept['bytes'])}, kept as artifact {kept['artifact_id']}"
    failed = data.get("error") or {}
    if data.get("tool_name"):
        given = json.dumps(data["parameters"], ensure_ascii=False) if data.get("parameters") else ""
        return f"{data['tool_name']} {failed.get('message') or shortened(given, limit - len(data['tool_name']) - 1)}".rstrip()
    return str(failed.get("message") or data.get("message") or data.get("agent_name") or "")


def _approval(data: Mapping[str, Any]) -> str:
    """What is asked for and how to answer, or what was answered."""
    if "decision" not in data:
        return f"{data.get('message', '')} (netra approve {data['approval_id']})"
    comment = f": {data['comment']}" if data.get("comment") else ""
    return f"{data['decision']}{comment}"


def _told(label: str, value: Any, limit: int) -> str:
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        value = value["message"]  # written to be read; --json has the rest
    return label + value if isinstance(value, str) else shortened(label + json.dumps(value, ensure_ascii=False), limit)


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and how long it is."""
    if len(text) <= limit:
        return text
    end = f"… {len(text):,} characters"
    return text[: max(limit - len(end), 1)] + end


def table(console: Console, rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...]) -> None:
    """Rows of a resource."""
    found = Table(*(Column(name, no_wrap=name.endswith("_id"), overflow="fold") for name in columns))
    for row in rows:
        found.add_row(*(Text(_cell(name, row.get(name))) for name in columns))
    console.print(found)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    # a table shows seconds; --json has the rest
    return str(value)[:19].replace("T", " ") if name.endswith("_at") else plain(value)


@contextlib.contextmanager
def transfer(console: Console, label: str) -> Iterator[Advance]:
    """How far an upload or a download is, while it lasts; nothing where nobody watches."""
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(plain(label), total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total or None)


def uploaded(console: Console, kept: Mapping[str, Any]) -> None:
    """What became of an upload."""
    console.print(Text(plain(f"Uploaded {kept['name']} ({size(kept['bytes'])}) as artifact {kept['artifact_id']}.")), soft_wrap=True)


def size(count: int) -> str:
    """`1.5 MiB`."""
    amount, power = float(count), 0
    while amount >= 1024 and power < len(_UNITS) - 1:
        amount, power = amount / 1024, power + 1
    return f"{amount:.1f} {_UNITS[power]}" if power else f"{count} bytes"


def money(value: float, *, exact: bool = False) -> str:
    """Cents; every digit when asked for, or of what is less than one."""
    amount = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if exact or 0 < abs(amount) < Decimal("0.01"):
        text = f"{amount:,f}"
        whole, _, digits = text.partition(".")
        return f"{whole}.{digits.rstrip('0'):0<2}"
    return f"{amount:,.2f}"


# the report of a spend analysis


def is_report(result: object) -> bool:
    """Whether a result is that of a spend analysis."""
    return isinstance(result, dict) and isinstance(result.get("cost_breakdown"), dict) and isinstance(result.get("usage_profile"), dict)


def report(console: Console, result: Mapping[str, Any], saved: Mapping[str, Path]) -> None:
    """A spend analysis as tables, and where its files are."""
    console.print()
    _total(console, result)
    for part in (_models, _profile, _opportunities, _actions):
        part(console, result)
    for note in result.get("notes") or ():
        console.print(Text(f"note: {plain(note)}", "dim"))
    _files(console, result, saved)


def _table(title: str, *columns: str | Column) -> Table:
    return Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def _number(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _total(console: Console, result: Mapping[str, Any]) -> None:
    currency, monthly, prices = result.get("currency", ""), result.get("monthly") or {}, result.get("price_list") or {}
    line = Text.assemble("Total cost  ", (f"{money(result['total_cost'], exact=True)} {currency}", "bold"))
    if monthly.get("cost") is not None:
        line.append(f"   {money(monthly['cost'])} {currency} in a month of {monthly.get('hours', 730)} h at this pace")
    if prices.get("source"):
        line.append(f"   prices: {plain(prices['source'])} {plain(prices.get('version', ''))}", "dim")
    console.print(line, "", sep="\n")


def _models(console: Console, result: Mapping[str, Any]) -> None:
    currency, costs = result.get("currency", ""), result["cost_breakdown"]
    counts = ("requests", "input_tokens", "cached_input_tokens", "output_tokens")
    figures = [_number(name) for name in ("requests", "input", "cached", "output", currency, "share")]
    shown = _table("Per model", Column("model", overflow="fold"), Column("priced as", overflow="fold"), *figures)
    total = Decimal(repr(result["total_cost"]))
    for row in costs.get("by_model") or ():
        names = [row.get("provider"), row.get("priced_as") if row.get("priced_as") != row["model"] else None]
        priced = "/".join(plain(name) for name in names if name)
        share = f"{Decimal(repr(row['cost'])) / total:.1%}" if total else ""
        shown.add_row(Text(plain(row["model"])), Text(priced), *(_count(row.get(name)) for name in counts), money(row["cost"]), share)
    for row in costs.get("unpriced") or ():
        model = Text(plain(row.get("model") or "(none named)"))
        shown.add_row(model, Text("no price", "yellow"), *(_count(row.get(name)) for name in counts), "", "")
    console.print(shown, "", sep="\n")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else ""


def _profile(console: Console, result: Mapping[str, Any]) -> None:
    profile = result["usage_profile"]
    words = [f"{_count(profile.get('requests'))} requests from {profile.get('from')} to {profile.get('to')}"]
    words += [
        f"busiest {name.removeprefix('peak_')}: {peak['start']} with {_count(peak['requests'])}"
        for name in ("peak_minute", "peak_hour")
        if (peak := profile.get(name))
    ]
    ranks = ("p50", "p95", "p99", "max")
    shown = _table("Profile", "tokens of a request", *map(_number, ranks), _number("in all"))
    for name, found in (profile.get("percentiles") or {}).items():
        shown.add_row(name.removesuffix("_tokens"), *(_count(found.get(rank)) for rank in ranks), _count(profile.get(name)))
    console.print(shown, "", sep="\n")
    for line in words:
        console.print(Text(line), soft_wrap=True)
    console.print()


def _opportunities(console: Console, result: Mapping[str, Any]) -> None:
    found = result.get("optimization_opportunities") or []
    if not found:
        return
    shown = _table("Opportunities", "what", _number(f"{result.get('currency', '')} a month"), "confidence", "if", "overlaps with")
    for row in found:
        confidence = str(row.get("confidence", ""))
        shown.add_row(
            Text(plain(row.get("title") or row["kind"])), money(row["monthly_saving"]), Text(confidence, _CONFIDENCE.get(confidence, "")),
            Text(plain(row.get("assumption", ""))), Text(", ".join(map(plain, row.get("overlaps_with") or ()))),
        )  # fmt: skip
    console.print(shown, "", sep="\n")
    if result.get("combined_monthly_saving") is not None:
        together = money(result["combined_monthly_saving"])
        console.print(Text(f"Together {together} {result.get('currency', '')} a month: savings that overlap are counted once.\n"))


def _actions(console: Console, result: Mapping[str, Any]) -> None:
    found = result.get("actions") or []
    if not found:
        return
    shown = _table("Actions", _number("#"), "do", _number(f"{result.get('currency', '')} a month"), "effort", "who")
    for row in found:
        shown.add_row(
            str(row.get("rank", "")), Text(plain(row["action"])), money(row.get("monthly_saving") or 0), plain(row.get("effort", "")),
            plain(row.get("owner_hint", "")),
        )  # fmt: skip
    console.print(shown, "", sep="\n")


def files_of(result: object) -> dict[str, dict[str, Any]]:
    """The artifacts that a result names, by what they are."""
    if not isinstance(result, dict):
        return {}
    found = {name: result.get(name) for name in ("chart", "report")}
    return {name: value for name, value in found.items() if isinstance(value, dict) and value.get("artifact_id")}


def _files(console: Console, result: Mapping[str, Any], saved: Mapping[str, Path]) -> None:
    for name, kept in files_of(result).items():
        where = str(saved[name]) if name in saved else f"netra artifacts download {kept['artifact_id']}"
        line = Text.assemble(
            (f"{name:<8}", "bold"), plain(kept.get("name", "")), f" ({size(kept.get('bytes', 0))})  ", (plain(where), "cyan")
        )
        console.print(line, soft_wrap=True)


# the account of a run


def why(console: Console, found: Account) -> None:
    """What a run did with its time, and why it ended as it did."""
    run = found.run
    ended = found.ending.state or str(run.get("state", ""))
    console.print(
        Text.assemble(
            "Run ",
            (run["run_id"], "bold"),
            f"  {plain(run.get('agent', ''))}  ",
            (ended, style_of(ended)),
            f" after {seconds(found.total_s)}",
        )
    )
    if found.request:
        console.print(Text(f"asked: {shortened(plain(found.request), _GIST)}"), soft_wrap=True)
    _moments(console, found)
    _shares(console, found)
    _ending(console, found)
    console.print(Text(f"correlation id {run.get('correlation_id', '')}   thread {run.get('thread_id', '')}", "dim"), soft_wrap=True)
    for command in found.next_commands:
        console.print(Text.assemble(("next  ", "dim"), (command, "cyan")), soft_wrap=True)


def seconds(value: float) -> str:
    """`350 ms`, `2.35 s`, `3 min 20 s`."""
    if value < 1:
        return f"{value * 1000:.3g} ms" if value < 0.01 else f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 120 else f"{value // 60:.0f} min {value % 60:.0f} s"


def _moments(console: Console, found: Account) -> None:
    calls = {call.tool_call_id: call for call in found.calls}
    longest = max((moment.gap_s for moment in found.moments), default=0.0)
    shown = _table("Events", _number("seq"), _number("at"), _number("after"), "event", "agent", "what")
    for moment in found.moments:
        gap = Text(f"+{seconds(moment.gap_s)}", "bold yellow" if moment.gap_s == longest and longest else "")
        call = calls.get(str(moment.data.get("tool_call_id", ""))) if moment.type == "tool_completed" else None
        what = plain(gist(moment.data) if call is None else _called(call)).replace("\n", " ")
        kind = Text(moment.type, style_of(moment.type), no_wrap=True)
        told = Text(what, no_wrap=True, overflow="ellipsis")
        shown.add_row(str(moment.seq), seconds(moment.at_s), gap, kind, Text(plain(moment.agent), no_wrap=True), told)
    console.print(shown, "", sep="\n")
    slow = max(found.moments, key=lambda moment: moment.gap_s, default=None)
    if slow is not None:
        console.print(Text(f"The longest silence, {seconds(slow.gap_s)}, was before event {slow.seq}, {slow.type}.\n"))


def _called(call: Call) -> str:
    failed = f" {call.error}" if call.error else ""
    return f"{call.tool} {call.status}{failed} in {seconds(call.took_s)}{', beside others' if call.beside else ''}"


def _shares(console: Console, found: Account) -> None:
    shown = _table("What took the time", "what", _number("took"), _number("share"))
    for share in found.shares:
        shown.add_row(Text(plain(share.what)), seconds(share.seconds), f"{share.share:.0%}")
    console.print(shown, "", sep="\n")
    if any(call.beside for call in found.calls):
        console.print(Text("Tools ran side by side: shares add up to more than the whole.\n", "dim"))


def _ending(console: Console, found: Account) -> None:
    ending = found.ending
    head = Text.assemble((ending.state.replace("_", " ") or "running", f"bold {style_of(ending.state)}".strip()), "  ")
    if ending.code:
        head.append(f"{ending.code} ", "bold")
    console.print(head.append(plain(ending.message)), soft_wrap=True)
    if ending.where:
        console.print(Text(f"in {plain(ending.where)}"), soft_wrap=True)
    for name, value in ending.details.items():
        console.print(Text.assemble((f"  {plain(name)} ", "dim"), plain(value)), soft_wrap=True)
    if ending.remedy:
        console.print(Text.assemble(("remedy  ", "bold"), plain(ending.remedy)), soft_wrap=True)
