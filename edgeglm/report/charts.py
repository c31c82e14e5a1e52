"""The report's plots as SVG, drawn by hand so that they follow the page's colours and stay the same.

Colours and fonts come from classes that ``page.css`` defines; series also differ by the shape of
their marks, so that no reader depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from edgeglm.report import figures
from edgeglm.report.data import ReportData, SearchPlot, StageRow

WIDE, NARROW = 1080, 540
_LEFT, _RIGHT, _TOP = 48, 16, 16
SERIES = 8  # as many as page.css has colours


def accuracy_chart(data: ReportData) -> str:
    """Draw mAP@10 with its 95 % interval for each evaluated stage and track."""
    stages = [stage for stage in data.stages if stage.metrics]
    if not stages:
        return ""
    height, bottom = 330, 40
    found = [metrics.map10 for stage in stages for metrics in stage.metrics.values()]
    top = min(1.0, math.ceil(max(interval.high for interval in found) * 10 + 0.3) / 10)
    step = (WIDE - _LEFT - _RIGHT) / len(stages)
    gap = min(18.0, step * 0.7 / max(1, len(data.tracks)))

    def y_of(value: float) -> float:
        return _TOP + (height - bottom - _TOP) * (1 - value / top)

    parts = [_y_grid(WIDE, [tick / 10 for tick in range(round(top * 10) + 1)], y_of)]
    for column, stage in enumerate(stages):
        middle = _LEFT + step * (column + 0.5)
        parts.append(_text(middle, height - bottom + 22, stage.title, "tick middle"))
    for series, track in enumerate(data.tracks):
        shift = (series - (len(data.tracks) - 1) / 2) * gap
        points = [
            (_LEFT + step * (column + 0.5) + shift, stage.metrics[track.name].map10)
            for column, stage in enumerate(stages)
            if track.name in stage.metrics
        ]
        line = " ".join(f"{_n(x)},{_n(y_of(interval.value))}" for x, interval in points)
        parts.append(f'<polyline class="link s{series % SERIES}" points="{line}"/>')
        for x, interval in points:
            low, high = y_of(interval.low), y_of(interval.high)
            parts.append(f'<path class="bar s{series % SERIES}" d="{_whisker(x, low, high)}"/>')
            hint = f"{track.title}: {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
            parts.append(mark(series, x, y_of(interval.value), hint))
    summary = "; ".join(
        f"{stage.title} {figures.rate(stage.metrics[data.main_track].map10.value)}"
        for stage in stages
        if data.main_track in stage.metrics
    )
    return _svg(WIDE, height, "mAP@10 per stage, with 95 % intervals", summary, parts)


def latency_chart(stages: Sequence[StageRow]) -> str:
    """Draw the milliseconds of a call for each measured stage, at batch 1 and at batch 8."""
    measured = [stage for stage in stages if stage.latency_ms_1 is not None]
    if not measured:
        return ""
    left, row, right = 132, 58, 46
    height = _TOP + row * len(measured) + 34
    ticks = _linear_ticks(max(max(stage.latency_ms_1 or 0, stage.latency_ms_8 or 0) for stage in measured))

    def x_of(value: float) -> float:
        return left + (NARROW - left - right) * value / ticks[-1]

    parts = []
    for tick in ticks:
        parts.append(_line(x_of(tick), _TOP, x_of(tick), height - 34, "grid"))
        parts.append(_text(x_of(tick), height - 14, f"{tick:g} ms", "tick middle"))
    for index, stage in enumerate(measured):
        y = _TOP + row * index + 8
        parts.append(_text(left - 12, y + 24, stage.title, "label end"))
        for series, value in ((0, stage.latency_ms_1), (1, stage.latency_ms_8)):
            if value is None:
                continue
            top, long = y + 20 * series, max(1.5, x_of(value) - left)
            area = f'x="{left}" y="{_n(top)}" width="{_n(long)}" height="17"'
            parts.append(f'<rect class="fill s{series}" {area} rx="3"/>')
            parts.append(_text(left + long + 7, top + 13, figures.milliseconds(value), "value"))
    summary = "; ".join(f"{stage.title} {figures.milliseconds(stage.latency_ms_1)} ms" for stage in measured)
    return _svg(NARROW, height, "Latency of both towers per stage", f"Batch 1: {summary}", parts)


def tradeoff_chart(data: ReportData) -> str:
    """Draw accuracy against latency: one point for each stage that has both; latency is logarithmic."""
    points = [
        (stage.latency_ms_1, stage.metrics[data.main_track].map10, stage)
        for stage in tradeoff_stages(data)
        if stage.latency_ms_1 is not None
    ]
    if not points:
        return ""
    height, bottom = 320, 52
    ticks = _log_ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    least = math.floor(min(interval.low for _, interval, _ in points) * 20) / 20
    most = math.ceil(max(interval.high for _, interval, _ in points) * 20) / 20
    least, most = (least, most) if most > least else (least - 0.05, most + 0.05)
    span = math.log(ticks[-1] / ticks[0])

    def x_of(value: float) -> float:
        return _LEFT + 16 + (NARROW - _LEFT - _RIGHT - 32) * math.log(value / ticks[0]) / span

    def y_of(value: float) -> float:
        return _TOP + (height - bottom - _TOP) * (1 - (value - least) / (most - least))

    steps = round((most - least) / 0.05)
    every = max(1, math.ceil(steps / 8))
    parts = [_y_grid(NARROW, [least + 0.05 * tick for tick in range(0, steps + 1, every)], y_of)]
    for tick in ticks:
        parts.append(_line(x_of(tick), _TOP, x_of(tick), height - bottom, "grid"))
        parts.append(_text(x_of(tick), height - bottom + 20, f"{tick:g}", "tick middle"))
    middle = _LEFT + (NARROW - _LEFT - _RIGHT) / 2
    parts.append(
        _text(middle, height - 10, "milliseconds, batch 1, both towers (logarithmic)", "tick middle")
    )
    for series, (latency, interval, stage) in enumerate(points):
        x = x_of(latency)
        whisker = _whisker(x, y_of(interval.low), y_of(interval.high))
        parts.append(f'<path class="bar s{series % SERIES}" d="{whisker}"/>')
        hint = f"{stage.title}: {interval.value:.3f} at {figures.milliseconds(latency)} ms"
        parts.append(mark(series, x, y_of(interval.value), hint))
    summary = "; ".join(f"{stage.title} {interval.value:.3f} at {x:.2f} ms" for x, interval, stage in points)
    return _svg(NARROW, height, "Accuracy against latency", summary, parts)


def search_chart(search: SearchPlot | None) -> str:
    """Draw mAP@10 after a short training against latency, and the Pareto front of the search.

    On the front are also students that are beaten in this plane but smaller; the line leaves them out.
    """
    if search is None or not search.students:
        return ""
    height, bottom = 340, 52
    rows = search.students
    ticks = _log_ticks(min(row.latency_ms for row in rows), max(row.latency_ms for row in rows))
    least = math.floor(min(row.map10 for row in rows) * 20) / 20
    most = max(math.ceil(max(row.map10 for row in rows) * 20 + 1e-9) / 20, least + 0.05)
    left, wide = _LEFT + 16, WIDE - _LEFT - _RIGHT - 48
    span = math.log(ticks[-1] / ticks[0])

    def x_of(milliseconds: float) -> float:
        return left + wide * math.log(milliseconds / ticks[0]) / span

    def y_of(value: float) -> float:
        return _TOP + 12 + (height - bottom - _TOP - 12) * (1 - (value - least) / (most - least))

    steps = round((most - least) / 0.05)
    every = max(1, math.ceil(steps / 8))
    parts = [_y_grid(WIDE, [least + 0.05 * tick for tick in range(0, steps + 1, every)], y_of)]
    for tick in ticks:
        parts.append(_line(x_of(tick), _TOP, x_of(tick), height - bottom, "grid"))
        parts.append(_text(x_of(tick), height - bottom + 20, f"{tick:g}", "tick middle"))
    axis = "milliseconds, an image and a text (logarithmic); up: mAP@10 after a short training"
    parts.append(_text(left + wide / 2, height - 10, axis, "tick middle"))
    best, line = -1.0, list[str]()
    for row in sorted(rows, key=lambda row: (row.latency_ms, -row.map10)):
        if row.map10 > best:
            best = row.map10
            line.append(f"{_n(x_of(row.latency_ms))},{_n(y_of(row.map10))}")
    parts.append(f'<polyline class="link s0" points="{" ".join(line)}"/>')
    for row in rows:
        x, y = x_of(row.latency_ms), y_of(row.map10)
        hint = f"{row.label}: {row.map10:.3f}, {row.latency_ms:.3g} ms, {row.file_bytes / 1e6:.1f} MB"
        parts.append(mark(0 if row.front else 1, x, y, hint))
        if row.chosen:
            parts.append(_text(x, y - 12, f"chosen: {row.label}", "value middle"))
    summary = "; ".join(
        f"{row.label} {row.map10:.3f} at {row.latency_ms:.3g} ms{', chosen' if row.chosen else ''}"
        for row in rows
        if row.front or row.chosen
    )
    return _svg(WIDE, height, "Students that the search tried, and their Pareto front", summary, parts)


def tradeoff_stages(data: ReportData) -> list[StageRow]:
    """Return the stages of :func:`tradeoff_chart`, in the order of its series."""
    return [stage for stage in data.stages if stage.latency_ms_1 and data.main_track in stage.metrics]


def mark(series: int, x: float, y: float, hint: str = "") -> str:
    """Return the mark of a series at a point: circle, square, diamond or triangle in turn."""
    shapes = (
        f'<circle cx="{_n(x)}" cy="{_n(y)}" r="5"/>',
        f'<rect x="{_n(x - 4.5)}" y="{_n(y - 4.5)}" width="9" height="9"/>',
        f'<path d="M{_n(x)} {_n(y - 6)}l6 6l-6 6l-6 -6z"/>',
        f'<path d="M{_n(x)} {_n(y - 6)}l5.5 10h-11z"/>',
    )
    shape = shapes[series % len(shapes)]
    return f'<g class="mark s{series % SERIES}">{f"<title>{escape(hint)}</title>" if hint else ""}{shape}</g>'


def legend(labels: Sequence[str]) -> str:
    """Return the legend of a chart as an HTML list, in the order of the series."""
    items = "".join(
        f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{mark(series, 8, 8)}</svg>{escape(label)}</li>'
        for series, label in enumerate(labels)
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(width: int, height: float, title: str, summary: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {_n(height)}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>{''.join(parts)}</svg>"
    )


def _y_grid(width: int, ticks: Sequence[float], y_of: Callable[[float], float]) -> str:
    return "".join(
        _line(_LEFT, y_of(tick), width - _RIGHT, y_of(tick), "grid")
        + _text(_LEFT - 10, y_of(tick) + 4, f"{tick:.2f}".rstrip("0").rstrip("."), "tick end")
        for tick in ticks
    )


def _whisker(x: float, low: float, high: float) -> str:
    return f"M{_n(x - 4)} {_n(low)}h8M{_n(x - 4)} {_n(high)}h8M{_n(x)} {_n(low)}V{_n(high)}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>'


def _linear_ticks(most: float) -> list[float]:
    """Return about five round ticks from 0 to at least ``most``."""
    power = 10 ** math.floor(math.log10(most / 4)) if most > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= most)
    return [step * tick for tick in range(math.ceil(most / step - 1e-9) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Return the 1-2-5 ticks that enclose both values; at least two."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    first = max(index for index, tick in enumerate(ticks) if tick <= least * 1.0001)
    last = min(index for index, tick in enumerate(ticks) if tick >= most * 0.9999 and index > first)
    return ticks[first : last + 1]


def _n(value: float) -> str:
    """Return a coordinate with one decimal, so that the page does not depend on the last bit."""
    return f"{value:.1f}".removesuffix(".0")
