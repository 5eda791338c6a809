"""OpenTelemetry set-up; the correlation id in metadata, spans and log lines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType

from opentelemetry import context as contexts
from opentelemetry import metrics, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import start_http_server

from chassis import log
from chassis import settings as settings_
from netra import ids

CORRELATION_HEADER = "x-correlation-id"
_correlation: ContextVar[str] = ContextVar("correlation_id", default="")
_incoming = TraceContextTextMapPropagator()
_outgoing = CompositePropagator([_incoming, W3CBaggagePropagator()])
tracer = trace.get_tracer("netra")
meter = metrics.get_meter("netra")


def _exporting(service: str, settings: settings_.ProcessSettings) -> TracerProvider:
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    if settings.trace_dir is not None:
        provider.add_span_processor(BatchSpanProcessor(_file_exporter(settings.trace_dir, service), schedule_delay_millis=500))
    if settings.otlp_endpoint:
        # loaded only where spans leave the machine: it would cost every start a tenth of a second
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=settings.otlp_endpoint.startswith("http://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _file_exporter(folder: Path, service: str) -> FileSpanExporter:
    folder.mkdir(parents=True, exist_ok=True)
    return FileSpanExporter(str(folder / f"{service}.jsonl"))


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


def span(name: str, headers: Mapping[str, str] | None = None, kind: str = "INTERNAL") -> AbstractContextManager[trace.Span]:
    """A span, joined to the trace in `headers` when given (as a server does), else to the current one.

    Takes over the correlation id from the headers, or makes one when there is none or it is malformed.
    """
    return _Work(name, headers, kind)


class _Work(AbstractContextManager[trace.Span]):
    """The time of a span. No generator, and nothing of the SDK's own around it: every call of every service goes through here."""

    __slots__ = ("_headers", "_kind", "_name", "_span", "_token")
    _span: trace.Span
    _token: Token[contexts.Context]

    def __init__(self, name: str, headers: Mapping[str, str] | None, kind: str) -> None:
        self._name, self._headers, self._kind = name, headers, kind

    def __enter__(self) -> trace.Span:
        headers, parent, correlation = self._headers, None, _correlation.get()
        if headers is not None:
            parent, told = _incoming.extract(headers), headers.get(CORRELATION_HEADER, "")
            correlation = told if ids.is_correlation_id(told) else ids.CorrelationId.new()
            _correlation.set(correlation)
            log.bind(correlation_id=correlation)
        self._span = tracer.start_span(
            self._name, parent, trace.SpanKind[self._kind], {"netra.correlation_id": correlation} if correlation else None,
            record_exception=False, set_status_on_exception=False,
        )  # fmt: skip
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _where: TracebackType | None) -> None:
        if isinstance(error, Exception):
            failed(self._span, type(error).__name__)
        contexts.detach(self._token)
        self._span.end()


def failed(current: trace.Span, code: str) -> None:
    """Mark a span as failed with a reason; never with a message, which may hold a user's words."""
    current.set_status(trace.StatusCode.ERROR, code)
