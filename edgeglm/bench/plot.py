"""A measurement as one SVG: the latency of each share of the queries, and the sizes of the batches."""

from __future__ import annotations

import math
from html import escape

from edgeglm.bench.measurement import Measurement, figure_words

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_W, _PLOT_H = 960, 340, 64, 48, 400, 230
_RIGHT_PLOT = 530
_INK, _GRID, _FILL = "#1f2933", "#d9dee4", "#2f6fb3"


def svg_from_measurement(found: Measurement) -> str:
    """Draw latency over share of queries, on a logarithmic scale, beside calls by batch size."""
    title = (
        f"{found.bundle} {found.variant} {found.tower}, {found.scenario}: {found.throughput:,.1f} samples/s, "
        f"p50 {figure_words(found.latency_ms['p50'])} ms, p99 {figure_words(found.latency_ms['p99'])} ms"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(16, 24, title, size=14),
        *_curve(found.curve_ms),
        *_bars(found.batches),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curve(curve_ms: tuple[float, ...]) -> list[str]:
    low = math.floor(math.log10(max(min(curve_ms), 1e-3)))
    high = max(math.ceil(math.log10(max(*curve_ms, 1e-3))), low + 1)

    def y_of(value: float) -> float:
        at = (math.log10(max(value, 1e-3)) - low) / (high - low)
        return _TOP + _PLOT_H * (1 - at)

    parts = []
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{_PLOT_W}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{10.0**power:g}", anchor="end"))
    for percent in (0, 50, 90, 99, 100):
        x = _LEFT + _PLOT_W * percent / 100
        if percent not in (99,):
            parts.append(_text(x, _TOP + _PLOT_H + 18, f"{percent} %", anchor="middle"))
        parts.append(f'<path d="M{x:.1f} {_TOP}v{_PLOT_H}" stroke="{_GRID}"/>')
    step = _PLOT_W / (len(curve_ms) - 1)
    points = " ".join(f"{_LEFT + i * step:.1f},{y_of(value):.1f}" for i, value in enumerate(curve_ms))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{_FILL}" stroke-width="2"/>')
    parts.append(_text(_LEFT, _TOP + _PLOT_H + 40, "latency in ms of each share of the queries"))
    return parts


def _bars(batches: dict[int, int]) -> list[str]:
    most = max(batches.values(), default=1)
    step = _PLOT_W / max(len(batches), 1)
    parts = []
    every = max(1, math.ceil(len(batches) / 16))
    for i, (size, calls) in enumerate(sorted(batches.items())):
        height = _PLOT_H * calls / most
        x = _RIGHT_PLOT + i * step
        parts.append(
            f'<rect x="{x + step * 0.1:.1f}" y="{_TOP + _PLOT_H - height:.1f}" width="{step * 0.8:.1f}" '
            f'height="{height:.1f}" fill="{_FILL}"><title>{calls} calls of {size}</title></rect>'
        )
        if i % every == 0:
            parts.append(_text(x + step / 2, _TOP + _PLOT_H + 18, str(size), anchor="middle"))
    parts.append(
        _text(_RIGHT_PLOT, _TOP + _PLOT_H + 40, f"calls by batch size; the tallest bar is {most:,} calls")
    )
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
