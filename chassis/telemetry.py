"""OpenTelemetry set-up; the correlation id in metadata, spans and log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType

from opentelemetry import context as contexts
from opentelemetry import metrics, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from prometheus_client import start_http_server

from chassis import log, spans
from chassis import settings as settings_
from netra import ids

CORRELATION_HEADER = "x-correlation-id"
_correlation: ContextVar[str] = ContextVar("correlation_id", default="")
_incoming = TraceContextTextMapPropagator()
_outgoing = CompositePropagator([_incoming, W3CBaggagePropagator()])
meter = metrics.get_meter("netra")
_SCOPE = InstrumentationScope("netra")
_new = RandomIdGenerator()
_UNSET = trace.Status()
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)


class _Exporting(TracerProvider):
    """A provider that tells to whom it exports."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource=resource)
        self.to: list[SpanProcessor] = []

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        """Export to this one as well."""
        super().add_span_processor(span_processor)
        self.to.append(span_processor)


def _exporting(service: str, settings: settings_.ProcessSettings) -> TracerProvider:
    provider = _Exporting(Resource.create({"service.name": service}))
    if settings.trace_dir is not None:
        written = spans.SpanFile(settings.trace_dir / f"{service}.jsonl")
        provider.add_span_processor(BatchSpanProcessor(written, schedule_delay_millis=500))
    if settings.otlp_endpoint:
        # loaded only where spans leave the machine: it would cost every start a tenth of a second
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=settings.otlp_endpoint.startswith("http://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def set_up(service: str, settings: settings_.ProcessSettings) -> TracerProvider:
    """Export spans to the trace folder and, when an endpoint is set, over OTLP; serve metrics when a port is set.

    The caller shuts the returned provider down at the end, which writes what is still pending.
    """
    provider = _exporting(service, settings)
    trace.set_tracer_provider(provider)
    # exemplars would be gathered for each measurement and shown by none of the exporters
    metrics.set_meter_provider(MeterProvider(metric_readers=[PrometheusMetricReader()], exemplar_filter=AlwaysOffExemplarFilter()))
    if settings.metrics_port:
        start_http_server(settings.metrics_port, addr=settings.host)
    return provider


def correlation_id() -> str:
    """The correlation id of the request at hand; empty outside of one."""
    return _correlation.get()


def trace_id() -> str:
    """The trace id of the current span: 32 hex digits, zeros outside of one."""
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


def span_id() -> str:
    """The id of the current span: 16 hex digits, zeros outside of one."""
    return f"{trace.get_current_span().get_span_context().span_id:016x}"


def carrier() -> dict[str, str]:
    """What travels with a call: traceparent, baggage, correlation id."""
    headers: dict[str, str] = {}
    _outgoing.inject(headers)
    if _correlation.get():
        headers[CORRELATION_HEADER] = _correlation.get()
    return headers


def annotate(name: str, value: str) -> None:
    """Add an attribute to the current span; never what a user said."""
    trace.get_current_span().set_attribute(name, value)


class _Span(trace.NonRecordingSpan):
    """What is told of a span when it is over. The SDK's own costs five times as much, and every call has one; no events, no links."""

    def __init__(self, name: str, parent: trace.SpanContext, kind: trace.SpanKind) -> None:
        self._name, self._kind, self._parent = name, kind, parent if parent.is_valid else None
        self._status, self._attributes = _UNSET, dict[str, AttributeValue]()
        trace_id = parent.trace_id if self._parent else _new.generate_trace_id()
        flags = parent.trace_flags if self._parent else _SAMPLED
        super().__init__(trace.SpanContext(trace_id, _new.generate_span_id(), False, flags, parent.trace_state))
        self._began = time.time_ns()

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """Add one, or put it in the place of another."""
        self._attributes[key] = value

    def set_status(self, status: trace.Status | trace.StatusCode, description: str | None = None) -> None:
        """How it went."""
        self._status = status if isinstance(status, trace.Status) else trace.Status(status, description)

    def end(self, end_time: int | None = None) -> None:
        """Hand it to those who export. They pass over what is not sampled."""
        provider = trace.get_tracer_provider()
        if isinstance(provider, _Exporting):
            over = ReadableSpan(
                self._name, self._context, self._parent, provider.resource, self._attributes, kind=self._kind, status=self._status,
                start_time=self._began, end_time=end_time or time.time_ns(), instrumentation_scope=_SCOPE,
            )  # fmt: skip
            for processor in provider.to:
                processor.on_end(over)


def span(name: str, headers: Mapping[str, str] | None = None, kind: str = "INTERNAL") -> AbstractContextManager[trace.Span]:
    """A span, joined to the trace in `headers` when given (as a server does), else to the current one.

    Takes over the correlation id from the headers, or makes one when there is none or it is malformed.
    """
    return _Work(name, headers, kind)


def apart(name: str, headers: Mapping[str, str], kind: str = "INTERNAL") -> trace.Span:
    """A span of the trace in `headers`, with their correlation id, that is nobody's current one: whoever asked for it ends it."""
    parent = trace.get_current_span(_incoming.extract(headers)).get_span_context()
    begun = _Span(name, parent, trace.SpanKind[kind])
    begun.set_attribute("netra.correlation_id", headers[CORRELATION_HEADER])
    return begun


class _Work(AbstractContextManager[trace.Span]):
    """The time of a span. No generator, and nothing of the SDK's own around it: every call of every service goes through here."""

    __slots__ = ("_headers", "_kind", "_name", "_span", "_token")
    _span: trace.Span
    _token: Token[contexts.Context]

    def __init__(self, name: str, headers: Mapping[str, str] | None, kind: str) -> None:
        self._name, self._headers, self._kind = name, headers, kind

    def __enter__(self) -> trace.Span:
        headers, parent, correlation = self._headers, trace.INVALID_SPAN_CONTEXT, _correlation.get()
        if headers is None:
            parent = trace.get_current_span().get_span_context()
        else:
            if "traceparent" in headers:
                parent = trace.get_current_span(_incoming.extract(headers)).get_span_context()
            told = headers.get(CORRELATION_HEADER, "")
            correlation = told if ids.is_correlation_id(told) else ids.CorrelationId.new()
            _correlation.set(correlation)
            log.bind(correlation_id=correlation)
        self._span = _Span(self._name, parent, trace.SpanKind[self._kind])
        if correlation:
            self._span.set_attribute("netra.correlation_id", correlation)
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _where: TracebackType | None) -> None:
        if isinstance(error, Exception):
            failed(self._span, type(error).__name__)
        contexts.detach(self._token)
        self._span.end()


class Step(_Work):
    """A span of what takes microseconds, within the current trace; all that it says is known when it begins.

    Where nobody exports there is none: what it calls belongs to the span around it.
    """

    __slots__ = ("_attributes", "_is_told")

    def __init__(self, name: str, **attributes: str) -> None:
        super().__init__(name, None, "INTERNAL")
        self._attributes = attributes
        provider = trace.get_tracer_provider()
        self._is_told = isinstance(provider, _Exporting) and bool(provider.to)

    def __enter__(self) -> trace.Span:
        if not self._is_told:
            return trace.INVALID_SPAN
        current = super().__enter__()
        for name, value in self._attributes.items():
            current.set_attribute(f"netra.{name}", value)
        return current

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._is_told:
            super().__exit__(kind, error, where)


def failed(current: trace.Span, code: str) -> None:
    """Mark a span as failed with a reason; never with a message, which may hold a user's words."""
    current.set_status(trace.StatusCode.ERROR, code)
