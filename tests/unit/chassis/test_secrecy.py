"""Secrets do not leave in logs or spans, however they got there."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chassis import log, telemetry
from chassis.settings import ProcessSettings

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
URL = "postgresql://netra:hunter2@127.0.0.1/netra"


@pytest.fixture(params=["json", "console"])
def lines(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What a process would write, in either format."""
    kept, level, written = logging.root.handlers, logging.root.level, io.StringIO()
    log.set_up("test", ProcessSettings(log_format=request.param))
    (handler,) = logging.root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    yield written
    logging.root.handlers = kept
    logging.root.setLevel(level)
    structlog.reset_defaults()


def test_values_are_masked_by_key_and_by_shape(lines: io.StringIO) -> None:
    log.get("test").warning("seen", password="hunter2", nested={"api_key": "hunter2"}, text=f"with {TOKEN}", url=URL)
    written = lines.getvalue()
    assert "seen" in written
    assert "hunter2" not in written
    assert TOKEN not in written


@pytest.mark.parametrize("secret", [f"nak_AbCd1234_{'x-_Y' * 10}abc", f"nrt_{'a' * 43}", f"nrs_{'-' * 43}", f"nlc_{'_9' * 21}Z"])
def test_opaque_tokens_of_ours_are_masked_by_shape(lines: io.StringIO, secret: str) -> None:
    log.get("test").warning("seen", text=f"with {secret}.", path=f"/callback?code={secret}&x=1", listed=[secret])
    try:
        raise ValueError(f"cannot use {secret}")
    except ValueError:
        log.get("test").exception("failed")
    written = lines.getvalue()
    assert "x=1" in written
    assert secret not in written
    assert secret[-20:] not in written


def test_what_a_key_is_recognised_by_is_shown(lines: io.StringIO) -> None:
    log.get("test").warning("seen", prefix="nak_AbCd1234")
    assert "nak_AbCd1234" in lines.getvalue()


def test_exceptions_are_masked_too(lines: io.StringIO) -> None:
    password = "correct horse"
    try:
        raise ValueError(f"cannot use {URL} with {TOKEN}")
    except ValueError:
        log.get("test").exception("failed")
    written = lines.getvalue()
    assert "ValueError" in written
    for secret in ("hunter2", TOKEN, password):
        assert secret not in written


def test_a_span_says_what_kind_of_error_and_not_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = telemetry._Exporting(Resource.create())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with pytest.raises(ValueError, match="hunter2"), telemetry.span("work"):
        raise ValueError("hunter2")
    (span,) = exporter.get_finished_spans()
    assert (span.status.description, list(span.events)) == ("ValueError", [])
