"""What is counted at the price of an addition is told as any metric is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from prometheus_client import CollectorRegistry, generate_latest

from chassis import tally, telemetry


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """Reads what is counted during the test."""
    found = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[found])
    monkeypatch.setattr(telemetry, "meter", provider.get_meter("test"))
    yield found
    provider.shutdown()


def told(reader: InMemoryMetricReader) -> dict[str, tuple[bool, dict[tuple[object, ...], float]]]:
    """By name: whether it only grows, and its sums by the values of their labels."""
    data = reader.get_metrics_data()
    found: dict[str, tuple[bool, dict[tuple[object, ...], float]]] = {}
    for one in [] if data is None else data.resource_metrics[0].scope_metrics[0].metrics:
        assert isinstance(one.data, Sum)
        found[one.name] = one.data.is_monotonic, {tuple((point.attributes or {}).values()): point.value for point in one.data.data_points}
    return found


def test_a_tally_is_the_sum_by_its_labels(reader: InMemoryMetricReader) -> None:
    calls = tally.Tally("calls", "Calls.", "tool", "status")
    calls.add(1, "echo", "success")
    calls.add(2, "echo", "success")
    calls.add(1, "echo", "error")
    expected = {("echo", "success"): 3, ("echo", "error"): 1}
    assert told(reader) == {"calls": (True, expected)}
    calls.add(1, "other", "error")
    assert told(reader) == {"calls": (True, {**expected, ("other", "error"): 1})}


def test_a_gauge_goes_down_as_well(reader: InMemoryMetricReader) -> None:
    running = tally.Tally("running", "Running.", kind="gauge")
    running.add(1)
    running.add(1)
    running.add(-1)
    assert told(reader) == {"running": (False, {(): 1})}


def test_durations_are_a_histogram() -> None:
    registry = CollectorRegistry()
    seconds = tally.Durations("took_seconds", "Took.", "tool", bounds=(0.1, 1.0), into=registry)
    assert b"took_seconds_bucket" not in generate_latest(registry)
    # one that is as long as a bound belongs to it
    for took in (0.05, 0.1, 0.5, 3.0):
        seconds.add(took, "echo")
    page = generate_latest(registry).decode().splitlines()
    assert [line for line in page if line.startswith("took")] == [
        'took_seconds_bucket{le="0.1",tool="echo"} 2.0',
        'took_seconds_bucket{le="1.0",tool="echo"} 3.0',
        'took_seconds_bucket{le="+Inf",tool="echo"} 4.0',
        'took_seconds_count{tool="echo"} 4.0',
        'took_seconds_sum{tool="echo"} 3.65',
    ]
