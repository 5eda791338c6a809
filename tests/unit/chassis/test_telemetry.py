"""Spans of what takes microseconds are spans as any other: of the trace at hand, with what is inside of them below them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chassis import telemetry


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is exported during the test."""
    provider = telemetry._Exporting(Resource.create({"service.name": "test"}))
    found = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield found
    provider.shutdown()


def by_name(found: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans."""
    return {span.name: span for span in found.get_finished_spans()}


def test_a_step_is_a_span_of_the_trace_at_hand(exported: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", telemetry.CORRELATION_HEADER: "0" * 31 + "1"}
    with telemetry.span("run", headers), telemetry.Step("tool echo", tool_call_id="t1"):
        inside = telemetry.carrier()["traceparent"]
        with telemetry.span("fetch"):
            pass
    spans = by_name(exported)
    assert list(spans) == ["fetch", "tool echo", "run"]
    run, step, fetch = spans["run"], spans["tool echo"], spans["fetch"]
    assert {span.context.trace_id for span in spans.values()} == {int("ab" * 16, 16)}
    assert (step.parent, fetch.parent) == (run.context, step.context)
    assert inside == f"00-{'ab' * 16}-{step.context.span_id:016x}-01"
    assert step.attributes == {"netra.tool_call_id": "t1", "netra.correlation_id": "0" * 31 + "1"}
    assert (step.status.status_code, step.resource, step.kind) == (trace.StatusCode.UNSET, run.resource, run.kind)
    times = [time or 0 for time in (step.start_time, fetch.start_time, fetch.end_time, step.end_time)]
    assert times == sorted(times)
    # it writes as the others do
    assert step.to_json()


def test_a_step_without_a_trace_begins_one(exported: InMemorySpanExporter) -> None:
    for _ in range(2):
        with telemetry.Step("alone"):
            assert telemetry.trace_id() != "0" * 32
    first, second = exported.get_finished_spans()
    assert first.parent is None
    assert first.context.trace_id != second.context.trace_id


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("a secret"), "ValueError"), (asyncio.CancelledError(), None)], ids=["failed", "cancelled"]
)
def test_a_step_that_fails_says_with_what_and_no_more(exported: InMemorySpanExporter, error: BaseException, status: str | None) -> None:
    with pytest.raises(type(error)), telemetry.Step("tool echo"):
        raise error
    (step,) = exported.get_finished_spans()
    assert step.status.is_ok is (status is None)
    assert step.status.description == status
    assert "a secret" not in step.to_json()
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_trace_that_is_not_sampled_exports_no_step(exported: InMemorySpanExporter) -> None:
    with telemetry.span("run", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00"}), telemetry.Step("tool echo"):
        pass
    assert [span.name for span in exported.get_finished_spans()] == []


def test_where_nobody_exports_what_a_step_calls_belongs_to_the_span_around_it() -> None:
    with telemetry.span("run", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}):
        around = telemetry.carrier()["traceparent"]
        with telemetry.Step("tool echo"):
            assert telemetry.carrier()["traceparent"] == around
        assert telemetry.carrier()["traceparent"] == around
