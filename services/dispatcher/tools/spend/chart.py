"""spend_chart: cost over time and per model as a drawing that every browser shows, in light and dark."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from xml.sax.saxutils import escape

from pydantic import Field
from typing_extensions import TypedDict

from netra.tool import Artifact, ToolContext, tool
from services.dispatcher.tools.spend import wording

NAME, MEDIA_TYPE = "spend-chart.svg", "image/svg+xml"
MOST_BARS, MOST_MODELS, _LONGEST_NAME = 192, 12, 120
_STEPS_H = (1, 2, 3, 6, 12, 24, 48, 168, 720, 2160, 8760)
_WIDTH, _LEFT, _RIGHT = 960.0, 72.0, 24.0
_TOP, _TALL = 104.0, 208.0
_ROW, _LABEL = 28.0, 224.0
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# the attributes are the light colours, for viewers that take no style sheet; the style sheet has the dark ones
_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; } .ink { fill: #e6edf3; } .soft { fill: #9da7b3; } .line { stroke: #30363d; }
  .bar { fill: #6cb0ff; } .peak { fill: #ffa657; } .halo { stroke: #0d1117; }
}
"""
_CLASS = {
    "ground": 'class="ground" fill="#ffffff"', "ink": 'class="ink" fill="#1f2328"', "soft": 'class="soft" fill="#57606a"',
    "line": 'class="line" stroke="#d0d7de"', "bar": 'class="bar" fill="#1f6feb"', "peak": 'class="peak" fill="#bc4c00"',
    "crest": 'class="peak halo" fill="#bc4c00" stroke="#ffffff" stroke-width="4" paint-order="stroke"',
}  # fmt: skip


class Bar(TypedDict):
    """What was used from a time on."""

    start: str
    requests: int
    cost: float


class Model(TypedDict):
    """What one model was used for; no cost where there is no price."""

    model: str
    requests: int
    cost: float | None


class Kept(TypedDict):
    """A file that was made for the user."""

    artifact_id: str
    name: str
    media_type: str
    bytes: int
    sha256: str


def kept(artifact: Artifact) -> Kept:
    """The file as a result names it."""
    return Kept(
        artifact_id=artifact.artifact_id, name=artifact.name, media_type=artifact.media_type, bytes=artifact.size, sha256=artifact.sha256
    )


@tool(tags=("spend",), timeout_s=60.0, idempotent=True)
async def spend_chart(
    context: ToolContext,
    begin: str,
    end: str,
    total_cost: float,
    step_h: Annotated[int, Field(ge=1)],
    bars: Annotated[list[Bar], Field(min_length=1, max_length=MOST_BARS)],
    models: Annotated[list[Model], Field(max_length=MOST_MODELS)],
) -> Kept:
    """Draws cost (or requests, where nothing has a price) over time and per model as an SVG; each of `bars` tells of `step_h` hours."""
    drawing = draw(
        f"{wording.minute(wording.moment(begin))} to {wording.minute(wording.moment(end))} UTC", total_cost, step_h, bars, models
    )
    return kept(await context.keep(NAME, MEDIA_TYPE, drawing.encode()))


def arguments(profile: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `spend_chart` for what `usage_profile` and `cost_breakdown` returned: few enough bars to be seen and recorded."""
    breakdown = costs["cost_breakdown"]
    # a log of more than two years is told by days
    step_h, bars = binned(breakdown["by_hour"] or [{**row, "hour": f"{row['day']}T00:00:00Z"} for row in breakdown["by_day"]])
    given = {"begin": profile["from"], "end": profile["to"], "total_cost": costs["total_cost"]}
    return {**given, "step_h": step_h, "bars": bars, "models": _models(breakdown)}


def binned(by_hour: Sequence[Mapping[str, Any]]) -> tuple[int, list[Bar]]:
    """Hours, put together from midnight on where more than `MOST_BARS` lie between the first and the last; and how many make a bar."""
    hours = sorted(((wording.moment(row["hour"]), row) for row in by_hour), key=operator.itemgetter(0))
    first, last = hours[0][0], hours[-1][0]
    if last - first >= timedelta(hours=MOST_BARS):
        first = first.replace(hour=0)
    span_h = int((last - first) / timedelta(hours=1)) + 1
    step_h = next((step for step in _STEPS_H if span_h <= step * MOST_BARS), math.ceil(span_h / MOST_BARS / 24) * 24)
    found: dict[int, list[Mapping[str, Any]]] = {}
    for time, row in hours:
        found.setdefault(int((time - first) / timedelta(hours=step_h)), []).append(row)
    return step_h, [_sum(first + timedelta(hours=step_h * place), rows) for place, rows in found.items()]


def _sum(start: datetime, rows: Sequence[Mapping[str, Any]]) -> Bar:
    cost = sum((Decimal(str(row["cost"])) for row in rows), Decimal())
    return Bar(start=wording.stamp(start), requests=sum(row["requests"] for row in rows), cost=float(cost))


def _models(breakdown: Mapping[str, Any]) -> list[Model]:
    priced = [Model(model=row["model"][:_LONGEST_NAME], requests=row["requests"], cost=row["cost"]) for row in breakdown["by_model"]]
    unpriced = [
        Model(model=(row["model"] or "(no model)")[:_LONGEST_NAME], requests=row["requests"], cost=None) for row in breakdown["unpriced"]
    ]
    rows = sorted(priced, key=lambda row: -(row["cost"] or 0)) + sorted(unpriced, key=lambda row: -row["requests"])
    if len(rows) <= MOST_MODELS:
        return rows
    rest = rows[MOST_MODELS - 1 :]
    cost = float(sum(Decimal(str(row["cost"] or 0)) for row in rest))
    others = Model(model=f"{len(rest)} others", requests=sum(row["requests"] for row in rest), cost=cost or None)
    return [*rows[: MOST_MODELS - 1], others]


@dataclass(frozen=True, slots=True)
class _Measure:
    """What the bars show: cost, or requests where nothing has a price."""

    in_usd: bool

    @property
    def name(self) -> str:
        return "Cost (USD)" if self.in_usd else "Requests"

    def of(self, row: Bar | Model) -> float:
        return float(row["cost"] or 0) if self.in_usd else row["requests"]

    def figure(self, value: float) -> str:
        return wording.usd(value) if self.in_usd else f"{int(value):,}"

    def both(self, row: Bar | Model) -> str:
        requests = wording.times(row["requests"], "request")
        return f"{wording.usd(row['cost'])}, {requests}" if row["cost"] is not None and self.in_usd else f"no price, {requests}"

    def axis(self, most: float) -> list[tuple[float, str]]:
        """From nothing to the first round number with room above the most, in two to six steps; and how they are written."""
        rough = (most or 1) * 1.1 / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
        step = step if self.in_usd else max(step, 1.0)
        ticks = [number * step for number in range(math.ceil(round((most or 1) * 1.1 / step, 9)) + 1)]
        unit, mark = next((unit, mark) for unit, mark in ((1e6, "M"), (1e3, "k"), (1.0, "")) if step >= unit * 20 or unit == 1)
        places = 0 if step >= 1 else max(2, -math.floor(math.log10(step)))
        return [(tick, f"{'$' if self.in_usd else ''}{tick / unit:,.{places}f}{mark}") for tick in ticks]


def draw(window: str, total_cost: float, step_h: int, bars: Sequence[Bar], models: Sequence[Model]) -> str:
    """The SVG."""
    measure = _Measure(any(bar["cost"] for bar in bars))
    height = _TOP + _TALL + 92 + _ROW * len(models)
    first, last = wording.moment(bars[0]["start"]), _after(wording.moment(bars[-1]["start"]), step_h)
    requests = sum(bar["requests"] for bar in bars)
    title = f"AI spend: {wording.usd(total_cost)}" if measure.in_usd else f"AI usage: {wording.times(requests, 'request')}"
    about = f"{wording.times(requests, 'request')} from {window}"
    told = f"{measure.name} per {_step(step_h)}, {about}. " + "; ".join(f"{row['model']}: {measure.both(row)}" for row in models)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" width="{_WIDTH:g}" height="{height:g}"'
        ' role="img" aria-labelledby="title about" font-family="sans-serif" font-size="13">',
        f'<title id="title">{_text(title)}</title>',
        f'<desc id="about">{_text(told)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect {_CLASS["ground"]} width="100%" height="100%"/>',
        _written(_LEFT - 48, 38, title, size=20, weight=600),
        _written(_LEFT - 48, 60, about, "soft"),
        *_over_time(measure, step_h, bars, first, last),
        *_per_model(measure, models),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _over_time(measure: _Measure, step_h: int, bars: Sequence[Bar], first: datetime, last: datetime) -> Iterator[str]:
    yield _written(_LEFT - 48, _TOP - 16, f"{measure.name} per {_step(step_h)}", weight=600)
    ticks = measure.axis(max(measure.of(bar) for bar in bars))
    top = ticks[-1][0]
    for tick, label in ticks:
        y = _TOP + _TALL * (1 - tick / top)
        yield f'<line {_CLASS["line"]} x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _written(_LEFT - 8, y + 4, label, "soft", anchor="end", size=12)
    slot = (_WIDTH - _LEFT - _RIGHT) / max((last - first) / timedelta(hours=step_h), 1)
    wide = min(slot * (0.8 if slot > 4 else 1), 64)
    peak = max(bars, key=measure.of)
    for bar in bars:
        start = wording.moment(bar["start"])
        x = _LEFT + (start - first) / timedelta(hours=step_h) * slot + (slot - wide) / 2
        tall = _TALL * measure.of(bar) / top
        yield _column(measure, bar, (x, wide, tall), "peak" if bar is peak else "bar", step_h)
        if bar is peak:
            crest = f"{measure.figure(measure.of(bar))}, {wording.day(start)}{f' {start:%H:%M}' if step_h < 24 else ''}"
            yield _crest(crest, x + wide / 2, _TOP + _TALL - tall - 6)
    yield from _dates(first, last)


def _column(measure: _Measure, bar: Bar, place: tuple[float, float, float], kind: str, step_h: int) -> str:
    x, wide, tall = place
    start = wording.moment(bar["start"])
    told = f"{wording.minute(start)} to {wording.minute(_after(start, step_h))} UTC: {measure.both(bar)}"
    box = f'x="{x:.2f}" y="{_TOP + _TALL - tall:.2f}" width="{wide:.2f}" height="{tall:.2f}"'
    return f"<rect {_CLASS[kind]} {box}><title>{_text(told)}</title></rect>"


def _after(start: datetime, hours: int) -> datetime:
    """The end of a bar; the calendar has one too."""
    return start + min(timedelta(hours=hours), datetime.max.replace(tzinfo=start.tzinfo) - start)


def _crest(words: str, x: float, y: float) -> str:
    anchor = "start" if x < _LEFT + 90 else "end" if x > _WIDTH - _RIGHT - 90 else "middle"
    return _written(x, y, words, "crest", anchor=anchor, size=12)


def _dates(first: datetime, last: datetime) -> Iterator[str]:
    """Marks under the time axis: hours within some days, else days; never more than ten."""
    span_h = (last - first) / timedelta(hours=1)
    steps = [1, 2, 3, 4, 6, 12, *(24 * days for days in (1, 2, 4, 7, 14, 28, 91, 182, 365))]
    step_h = next((step for step in steps if span_h / step <= 10), math.ceil(span_h / 240) * 24)
    for place in range(int(span_h / step_h) + 1):
        time = first + timedelta(hours=place * step_h)
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place * step_h / span_h)
        label = f"{time:%H:%M}" if time.hour else wording.day(time) if span_h < 300 * 24 else wording.minute(time)[:10]
        yield f'<line {_CLASS["line"]} x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP + _TALL:g}" y2="{_TOP + _TALL + 5:g}"/>'
        if x <= _WIDTH - _RIGHT - 20:
            yield _written(x, _TOP + _TALL + 20, label, "soft", anchor="middle" if x > _LEFT + 20 else "start", size=12)


def _per_model(measure: _Measure, models: Sequence[Model]) -> Iterator[str]:
    top = _TOP + _TALL + 64
    yield _written(_LEFT - 48, top, f"{measure.name} per model", weight=600)
    most = max((measure.of(row) for row in models), default=0) or 1
    room = _WIDTH - _LABEL - _LEFT + 48 - _RIGHT - 190
    for place, row in enumerate(models):
        y = top + 14 + place * _ROW
        wide = room * measure.of(row) / most
        name = row["model"] if len(row["model"]) <= 26 else row["model"][:25] + "…"
        x = _LEFT - 48 + _LABEL
        yield f"<g><title>{_text(row['model'])}: {_text(measure.both(row))}</title>"
        yield _written(_LEFT - 48, y + 14, name, size=13)
        yield f'<rect {_CLASS["bar"]} x="{x:g}" y="{y + 1:g}" width="{wide:.2f}" height="{_ROW - 10:g}"/>'
        yield _written(x + wide + 8, y + 14, measure.both(row), "soft", size=12)
        yield "</g>"


def _step(step_h: int) -> str:
    names = {1: "hour", 24: "day", 168: "week"}
    return names.get(step_h) or (f"{step_h} hours" if step_h < 24 else f"{step_h // 24} days")


def _written(x: float, y: float, words: str, kind: str = "ink", *, anchor: str = "start", size: int = 13, weight: int = 400) -> str:
    return (
        f'<text {_CLASS[kind]} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{_text(words)}</text>"
    )


def _text(words: str) -> str:
    """What may stand in a document: names come from the user's file."""
    return escape(_NOT_XML.sub("\ufffd", words))
