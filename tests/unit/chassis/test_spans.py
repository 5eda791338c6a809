"""Spans are those of OpenTelemetry, and so is the file they are written to, whoever makes and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chassis import spans, telemetry

TRACE, PARENT, CORRELATION = "ab" * 16, "cd" * 8, "0" * 31 + "1"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", telemetry.CORRELATION_HEADER: CORRELATION}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is exported during the test."""
    provider = telemetry._Exporting(Resource.create({"service.name": "test"}))
    found = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield found
    provider.shutdown()


def test_a_span_of_a_call_belongs_to_the_trace_in_its_headers(exported: InMemorySpanExporter) -> None:
    with telemetry.span("call", HEADERS, "SERVER"):
        telemetry.annotate("netra.run_id", "r1")
        sent = telemetry.carrier()
        with telemetry.span("part"):
            assert telemetry.trace_id() == TRACE
    part, call = exported.get_finished_spans()
    assert (call.name, call.kind, call.attributes) == (
        "call", trace.SpanKind.SERVER, {"netra.correlation_id": CORRELATION, "netra.run_id": "r1"},
    )  # fmt: skip
    assert (f"{call.context.trace_id:032x}", call.parent and f"{call.parent.span_id:016x}") == (TRACE, PARENT)
    assert (part.parent, part.context.trace_id) == (call.context, call.context.trace_id)
    assert sent == {
        "traceparent": f"00-{TRACE}-{call.context.span_id:016x}-01", "tracestate": "a=b", telemetry.CORRELATION_HEADER: CORRELATION,
    }  # fmt: skip
    times = [time or 0 for time in (call.start_time, part.start_time, part.end_time, call.end_time)]
    assert times == sorted(times)
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}, None])
def test_a_call_that_belongs_to_no_trace_begins_one(exported: InMemorySpanExporter, headers: dict[str, str] | None) -> None:
    for _ in range(2):
        with telemetry.span("call", headers):
            assert telemetry.trace_id() != "0" * 32
    first, second = exported.get_finished_spans()
    assert (first.parent, second.parent) == (None, None)
    assert first.context.trace_id != second.context.trace_id
    assert first.context.trace_flags.sampled


def test_headers_count_for_more_than_what_goes_on_around_them(exported: InMemorySpanExporter) -> None:
    with telemetry.span("around"), telemetry.span("call", {}):
        pass
    call, around = exported.get_finished_spans()
    assert call.parent is None
    assert call.context.trace_id != around.context.trace_id


def test_of_a_trace_that_is_not_sampled_nothing_is_told(exported: InMemorySpanExporter) -> None:
    with telemetry.span("call", {"traceparent": f"00-{TRACE}-{PARENT}-00"}):
        assert telemetry.carrier()["traceparent"].endswith("-00")
        with telemetry.span("part"):
            pass
    assert list(exported.get_finished_spans()) == []


def test_the_file_is_as_opentelemetry_writes_it(exported: InMemorySpanExporter, tmp_path: Path) -> None:
    with telemetry.span("call", HEADERS, "SERVER"):
        telemetry.annotate("netra.run_id", 'a \u2028 \u00fc "quoted" \n')
        with telemetry.span("part"):
            pass
    with telemetry.span("run") as failed:
        telemetry.failed(failed, "NOT_FOUND")
    found = exported.get_finished_spans()
    theirs, ours = FileSpanExporter(str(tmp_path / "theirs")), spans.SpanFile(tmp_path / "folder" / "ours")
    for exporter in (theirs, ours):
        exporter.export(found)
        exporter.export(found[:1])
        exporter.shutdown()
    expected, written = ((tmp_path / name).read_bytes().rstrip().split(b"\n") for name in ("theirs", "folder/ours"))
    assert len(written) == 2
    assert [json.loads(line) for line in written] == [json.loads(line) for line in expected]
