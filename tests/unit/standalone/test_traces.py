"""The trace of a request out of the files of all processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from standalone import commands, traces
from standalone.errors import StandaloneError

TRACE, OTHER = "a" * 32, "b" * 32
CORRELATION, RUN = "c" * 32, "01a1fc97-8f66-765d-ad04-30ac679f73c0"
MS = 1_000_000


def span(name: str, parent: str, start: float, end: float, *, trace: str = TRACE, error: str = "", **attributes: str) -> dict[str, Any]:
    """As the OTLP JSON exporter writes it; the name is the span's id, too."""
    found: dict[str, Any] = {
        "traceId": trace, "spanId": name, "name": name, "kind": 2, "startTimeUnixNano": str(int((1000 + start) * MS)),
        "endTimeUnixNano": str(int((1000 + end) * MS)), "status": {"code": 2, "message": error} if error else {},
        "attributes": [{"key": f"netra.{key}", "value": {"stringValue": value}} for key, value in attributes.items()],
    }  # fmt: skip
    return {**found, "parentSpanId": parent} if parent else found


def write(folder: Path, service: str, *spans: dict[str, Any]) -> None:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    line = json.dumps(
        {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}, separators=(",", ":")
    )
    with (folder / f"{service}.jsonl").open("a") as file:
        file.write(line + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was accepted in 30 ms and went on for 100 more, with two tools side by side."""
    write(
        tmp_path, "gateway", span("ws", "", 0, 30, correlation_id=CORRELATION), span("else", "", 0, 1, trace=OTHER, correlation_id="d" * 32)
    )
    write(tmp_path, "dispatcher", span("start", "ws", 1, 29, correlation_id=CORRELATION))
    write(tmp_path, "context", span("open", "start", 5, 15))
    write(tmp_path, "dispatcher", span("short", "run", 50, 60), span("long", "run", 50, 110, error="TOOL_FAILED"))
    write(tmp_path, "dispatcher", span("run", "start", 40, 120, correlation_id=CORRELATION, run_id=RUN))
    write(tmp_path, "context", span("close", "run", 115, 130))
    return tmp_path


def never(_: float) -> None:
    raise AssertionError("nothing is missing: there is nothing to wait for")


@pytest.mark.parametrize("name", [CORRELATION, RUN, TRACE])
def test_a_trace_is_found_by_each_of_its_names(folder: Path, name: str) -> None:
    (found,) = traces.find(folder, name, wait=never)
    assert [(span.depth, span.service, span.name) for span in found.spans] == [
        (0, "gateway", "ws"),
        (1, "dispatcher", "start"),
        (2, "context", "open"),
        (2, "dispatcher", "run"),
        (3, "dispatcher", "long"),
        (3, "dispatcher", "short"),
        (3, "context", "close"),
    ]
    assert (found.length_ns, found.incomplete) == (130 * MS, False)


def test_the_critical_path_is_what_the_end_waited_for(folder: Path) -> None:
    (found,) = traces.find(folder, RUN, wait=never)
    assert {span.name for span in found.spans if not span.critical} == {"short"}


def test_own_time_is_without_that_of_the_children(folder: Path) -> None:
    (found,) = traces.find(folder, RUN, wait=never)
    own = {span.name: span.own_ns // MS for span in found.spans}
    # the run is 80 ms, of which 50 to 110 and 115 to 120 belong to its children; `close` goes on after it
    assert own == {"ws": 2, "start": 18, "open": 10, "run": 15, "short": 10, "long": 60, "close": 15}
    assert next(span.name for span in found.slowest()) == "long"


def test_two_requests_with_one_correlation_id_are_two_traces(folder: Path) -> None:
    write(folder, "gateway", span("HTTP GET", "", 200, 201, trace="e" * 32, correlation_id=CORRELATION))
    assert [trace.trace_id for trace in traces.find(folder, CORRELATION, wait=never)] == [TRACE, "e" * 32]


def test_spans_that_are_still_to_be_written_are_waited_for_once(folder: Path) -> None:
    waits: list[float] = []

    def arrive(seconds: float) -> None:
        waits.append(seconds)
        write(folder, "events", span("parent", "run", 60, 70))

    write(folder, "auth", span("child", "parent", 61, 62))
    (found,) = traces.find(folder, RUN, wait=arrive)
    assert waits == [traces.FLUSH_S]
    assert not found.incomplete
    write(folder, "auth", span("orphan", "gone", 80, 81))
    (found,) = traces.find(folder, RUN, wait=waits.append)
    assert found.incomplete
    assert "orphan" in {span.name for span in found.spans}
    assert "Not complete" in drawn(found)


def test_half_a_line_is_passed_over(folder: Path) -> None:
    with (folder / "events.jsonl").open("w") as file:
        file.write('{"resourceSpans":[{"traceId":"' + TRACE)
    assert len(traces.find(folder, RUN, wait=never)[0].spans) == 7


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("abc", "is no correlation id", "netra why"),
        ("f" * 32, "no span in", "netra runs"),
        (CORRELATION.upper(), "lower case", "netra runs"),
    ],
)
def test_what_cannot_be_found_is_told_with_a_remedy(folder: Path, name: str, message: str, remedy: str) -> None:
    with pytest.raises(StandaloneError, match=message) as refused:
        traces.find(folder, name, wait=lambda _: None)
    assert remedy in refused.value.remedy


def test_a_checkout_where_nothing_ran_is_told(tmp_path: Path) -> None:
    with pytest.raises(StandaloneError, match="no traces in") as refused:
        traces.find(tmp_path / "traces", CORRELATION, wait=never)
    assert "make run" in refused.value.remedy


def drawn(trace: traces.Trace, width: int = 110) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    traces.draw(console, trace)
    return console.export_text()


@pytest.mark.parametrize("width", [70, 110, 200])
def test_a_bar_begins_and_ends_where_its_span_does(folder: Path, width: int) -> None:
    (found,) = traces.find(folder, RUN, wait=never)
    lines = {line.split()[1]: line for line in drawn(found, width).splitlines() if line.startswith(("gateway ", "dispatcher ", "context "))}
    first = lines["ws"].index("█")
    room = lines["close"].rindex("█") + 1 - first
    for name, start, end in (("start", 1, 29), ("run", 40, 120), ("long", 50, 110)):
        begins, ends = lines[name].index("█") - first, lines[name].rindex("█") + 1 - first
        assert abs(begins - start / 130 * room) <= 1, name
        assert abs(ends - end / 130 * room) <= 1.5, name
    assert "░" in lines["short"]
    assert "TOOL_FAILED" in lines["long"]
    assert max(map(len, lines.values())) <= width


def test_the_command_prints_one_span_per_line(folder: Path) -> None:
    app = Typer()
    app.command()(commands.trace)
    done = CliRunner().invoke(app, [RUN, "--dir", str(folder), "--json"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["ws", "start", "open", "run", "long", "short", "close"]
    assert rows[3]["start_ms"] == 40.0
    assert rows[3]["attributes"]["netra.run_id"] == RUN
    assert CliRunner().invoke(app, ["nothing", "--dir", str(folder)]).exit_code == 1
