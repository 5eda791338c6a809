"""The trace of a request, read from the files that the processes write (OTLP JSON), and drawn as a waterfall."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from standalone.errors import StandaloneError

FLUSH_S = 0.7  # processes write their spans every half second
_HEX = re.compile(r"[0-9a-f]{32}")
_RUN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ERROR = 2
_NAMES = {"netra.correlation_id", "netra.run_id"}
_SERVICE_COLOURS = {"gateway": "magenta", "dispatcher": "cyan", "context": "green", "events": "yellow", "auth": "blue"}
_SLOWEST = 3
_HEAD = ("service", "span", "start", "took", "status")
_LEAST_BAR, _GAPS = 8, 10
_PREFIX = re.compile(r"^netra\.\w+\.v\d+\.")


@dataclass(slots=True)
class Span:
    """One span. `own_ns` is the time in which none of its children was at work; `critical`: the end waited for it."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int
    error: str
    attributes: dict[str, str]
    children: list["Span"] = field(default_factory=list, repr=False)
    depth: int = 0
    critical: bool = False

    @property
    def until_ns(self) -> int:
        """When it and all that came of it was over: what was accepted may go on after the answer."""
        return max([self.end_ns, *(child.until_ns for child in self.children)])

    @property
    def own_ns(self) -> int:
        own, done = self.end_ns - self.start_ns, self.start_ns
        for child in self.children:
            begin, end = max(child.start_ns, done), min(child.end_ns, self.end_ns)
            own -= max(end - begin, 0)
            done = max(done, end)
        return own


@dataclass(frozen=True, slots=True)
class Trace:
    """All spans of a trace, each before its children, children by their start."""

    trace_id: str
    spans: Sequence[Span]
    incomplete: bool  # a parent has not been written: something is still at work

    @property
    def start_ns(self) -> int:
        return min(span.start_ns for span in self.spans)

    @property
    def length_ns(self) -> int:
        return max(span.end_ns for span in self.spans) - self.start_ns

    def slowest(self) -> list[Span]:
        """Where the time went: the spans with most time of their own."""
        return sorted(self.spans, key=lambda span: -span.own_ns)[:_SLOWEST]


def find(folder: Path, name: str, wait: Callable[[float], None] = time.sleep) -> list[Trace]:
    """The traces of a correlation id, a run id or a trace id, the earliest first.

    Looks twice when something is missing, for processes write with a delay. Raises `StandaloneError` naming the remedy.
    """
    if not (_HEX.fullmatch(name) or _RUN.fullmatch(name)):
        raise StandaloneError(
            f"{name!r} is no correlation id or trace id (32 hexadecimal digits) and no run id (a UUID), in lower case",
            "`netra runs` lists your runs; `netra why RUN` tells the correlation id",
        )
    if not any(folder.glob("*.jsonl")):
        raise StandaloneError(f"there are no traces in {folder}", "start Netra with: make run; or name the folder with --dir")
    found = _look(folder, name)
    if not found or any(trace.incomplete for trace in found):
        wait(FLUSH_S)
        found = _look(folder, name)
    if not found:
        raise StandaloneError(
            f"no span in {folder} belongs to {name}",
            "look for the right id with: netra runs, netra why RUN; traces of another stack are in its own folder: --dir",
        )
    return found


def _look(folder: Path, name: str) -> list[Trace]:
    ids = {span.trace_id for span in _spans(folder, [name]) if name == span.trace_id or name in span.attributes.values()}
    by_trace: dict[str, list[Span]] = {trace_id: [] for trace_id in ids}
    for span in _spans(folder, ids) if ids else ():
        if span.trace_id in by_trace:
            by_trace[span.trace_id].append(span)
    return sorted((_ordered(trace_id, spans) for trace_id, spans in by_trace.items()), key=lambda trace: trace.start_ns)


def _spans(folder: Path, mentioned: Sequence[str] | set[str]) -> Iterator[Span]:
    """The spans of all lines that mention one of the texts: reading every line as JSON would take minutes."""
    wanted = [text.encode() for text in mentioned]
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                if any(text in line for text in wanted):
                    yield from _of_line(line)


def _of_line(line: bytes) -> Iterator[Span]:
    try:
        batch = json.loads(line)
    except ValueError:
        return  # the last line of a process that was killed while it wrote
    for resource in batch.get("resourceSpans", ()):
        service = _attributes(resource.get("resource", {})).get("service.name", "")
        for scope in resource.get("scopeSpans", ()):
            for found in scope.get("spans", ()):
                yield _span(service, found)


def _span(service: str, found: dict[str, Any]) -> Span:
    status = found.get("status", {})
    failed = status.get("code") in (_ERROR, "STATUS_CODE_ERROR")
    return Span(
        found["traceId"], found["spanId"], found.get("parentSpanId", ""), service, found["name"],
        int(found["startTimeUnixNano"]), int(found["endTimeUnixNano"]),
        (status.get("message") or "error") if failed else "", _attributes(found),
    )  # fmt: skip


def _attributes(holder: dict[str, Any]) -> dict[str, str]:
    return {entry["key"]: str(next(iter(entry["value"].values()), "")) for entry in holder.get("attributes", ())}


def _ordered(trace_id: str, spans: Sequence[Span]) -> Trace:
    known = {span.span_id: span for span in spans}
    roots: list[Span] = []
    for span in sorted(known.values(), key=lambda span: (span.start_ns, -span.end_ns)):
        parent = known.get(span.parent_id)
        (roots if parent is None else parent.children).append(span)
    incomplete = any(root.parent_id for root in roots)
    ordered = [span for root in roots for span in _descended(root, 0)]
    if roots:
        _mark(roots, max(root.until_ns for root in roots))
    return Trace(trace_id, ordered, incomplete)


def _descended(span: Span, depth: int) -> Iterator[Span]:
    span.depth = depth
    yield span
    for child in span.children:
        yield from _descended(child, depth + 1)


def _mark(siblings: Sequence[Span], until: int) -> None:
    """Mark what the end waited for: from the end backwards, always what was over last before."""
    for span in sorted(siblings, key=lambda span: -span.until_ns):
        if span.until_ns <= until:
            span.critical = True
            _mark(span.children, span.until_ns)
            until = span.start_ns


def rows(trace: Trace) -> Iterator[dict[str, Any]]:
    """The spans as JSON, in the order of the drawing; times in milliseconds."""
    for span in trace.spans:
        yield {
            "trace_id": span.trace_id, "span_id": span.span_id, "parent_span_id": span.parent_id or None, "depth": span.depth,
            "service": span.service, "name": span.name, "start_ms": (span.start_ns - trace.start_ns) / 1e6,
            "duration_ms": (span.end_ns - span.start_ns) / 1e6, "own_ms": span.own_ns / 1e6, "critical": span.critical,
            "error": span.error or None, "attributes": span.attributes,
        }  # fmt: skip


def draw(console: Console, trace: Trace) -> None:
    """The waterfall."""
    first = trace.spans[0]
    names = {key: value for span in reversed(trace.spans) for key, value in span.attributes.items() if key in _NAMES}
    console.print(
        Text.assemble(
            ("trace ", "bold"), trace.trace_id, f"  {first.name}, {len(trace.spans)} spans in {_ms(trace.length_ns)}",
            *(f"\n{key.removeprefix('netra.').replace('_', ' ')} {value}" for key, value in sorted(names.items())),
        ), soft_wrap=True,
    )  # fmt: skip
    slowest = [span for span in trace.slowest() if span.own_ns * 20 > trace.length_ns]
    console.print(_waterfall(trace, slowest, console.width))
    _legend(console, trace, slowest)


def _waterfall(trace: Trace, slowest: Sequence[Span], room: int) -> Table:
    cells = [
        (span.service, _label(span), _ms(span.start_ns - trace.start_ns), _ms(span.end_ns - span.start_ns), span.error or "ok")
        for span in trace.spans
    ]
    service, name, start, took, status = (max(len(row[column]) for row in (*cells, _HEAD)) for column in range(5))
    # what is left for the bars; a name is cut before they vanish
    name = max(min(name, room - service - start - took - status - _LEAST_BAR - _GAPS), 10)
    width = max(room - service - name - start - took - status - _GAPS, _LEAST_BAR)
    table = Table(
        Column("service", width=service), Column("span", width=name, no_wrap=True, overflow="ellipsis"),
        Column("start", justify="right", width=start), Column("", width=width), Column("took", justify="right", width=took),
        Column("status", width=status), box=None, padding=(0, 2, 0, 0), pad_edge=False,
    )  # fmt: skip
    for span, row in zip(trace.spans, cells, strict=True):
        style, colour = "bold" if span in slowest else "", _SERVICE_COLOURS.get(span.service, "")
        told = Text(row[4], "red" if span.error else "dim")
        table.add_row(Text(row[0], colour), Text(row[1], style), row[2], _bar(trace, span, width), Text(row[3], style), told)
    return table


def _label(span: Span) -> str:
    return "  " * span.depth + _PREFIX.sub("", span.name)


def _bar(trace: Trace, span: Span, width: int) -> Text:
    scale = width / max(trace.length_ns, 1)
    left = min(int((span.start_ns - trace.start_ns) * scale), width - 1)
    length = min(max(round((span.end_ns - span.start_ns) * scale), 1), width - left)
    colour = "red" if span.error else _SERVICE_COLOURS.get(span.service, "")
    return Text(" " * left).append(("█" if span.critical else "░") * length, colour)


def _legend(console: Console, trace: Trace, slowest: Sequence[Span]) -> None:
    console.print(Text("█ the end waited for it (critical path)   ░ beside it", "dim"))
    for span in slowest:
        share = span.own_ns / max(trace.length_ns, 1)
        console.print(Text(f"slow: {_ms(span.own_ns)} ({share:.0%}) in {span.service} {_PREFIX.sub('', span.name)} itself"), soft_wrap=True)
    if trace.incomplete:
        console.print(Text("Not complete: a span that others belong to is not written yet; the run may still be going on.", "yellow"))


def _ms(nanoseconds: int) -> str:
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds / 1000:.3f} s"
