"""Counts what happens thousands of times a second, for the price of an addition: metrics hear of it when they are read."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from opentelemetry.metrics import CallbackOptions, Observation
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from chassis import telemetry

Kind = Literal["counter", "gauge"]
# in seconds
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Tally:
    """A sum for each set of values of its labels. One thread adds to it; a `gauge` may go down as well."""

    def __init__(self, name: str, description: str, *labels: str, kind: Kind = "counter") -> None:
        self._labels, self._sums = labels, dict[tuple[str, ...], int]()
        make = telemetry.meter.create_observable_counter if kind == "counter" else telemetry.meter.create_observable_up_down_counter
        make(name, callbacks=[self._told], description=description)

    def add(self, number: int, *values: str) -> None:
        """Add a number, under the values of the labels in their order."""
        self._sums[values] = self._sums.get(values, 0) + number

    def _told(self, _options: CallbackOptions) -> Iterable[Observation]:
        # a copy, as metrics are read in another thread
        return [Observation(total, dict(zip(self._labels, values, strict=True))) for values, total in self._sums.copy().items()]


class Durations(Collector):
    """How long things took, in seconds, by one label; a histogram. One thread adds to it."""

    def __init__(
        self, name: str, description: str, label: str, bounds: Sequence[float] = BOUNDS, into: CollectorRegistry = REGISTRY
    ) -> None:
        self._name, self._description, self._label, self._bounds = name, description, label, tuple(bounds)
        self._found: dict[str, list[float]] = {}
        into.register(self)

    def add(self, seconds: float, value: str) -> None:
        """One took so long."""
        found = self._found.get(value)
        if found is None:
            # how many came to each bound, how many to none, and their sum
            found = self._found[value] = [0] * (len(self._bounds) + 1) + [0.0]
        found[bisect.bisect_left(self._bounds, seconds)] += 1
        found[-1] += seconds

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Its name, before there is anything to tell."""
        return [HistogramMetricFamily(self._name, self._description, labels=[self._label])]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As it is now."""
        told = HistogramMetricFamily(self._name, self._description, labels=[self._label])
        for value, found in self._found.copy().items():
            *counts, total = found
            so_far, buckets = 0.0, []
            for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            told.add_metric([value], buckets=buckets, sum_value=total)
        yield told
