"""Rooflines as an SVG, drawn by hand: a device has no plotting library.

Axes are logarithmic: operations a byte along, operations a second up. A machine's roof rises with its
bandwidth and is flat at its peak; each graph is a mark on it, for one batch, where its floor lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from edgeglm.targets.roofline import Floor, Machine

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 560, 64, 230, 34, 48
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_AXIS = "#777"

Place = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Roof:
    """One machine and the floors of the graphs on it; ``floors`` are ``(graph, floor)``."""

    machine: Machine
    floors: tuple[tuple[str, Floor], ...]


def roofline_svg(roofs: Sequence[Roof]) -> str:
    """Return the drawing; a machine without figures has no roof and is left out."""
    drawn = [roof for roof in roofs if roof.machine.bandwidth and roof.machine.rates]
    along = [
        floor.flops / floor.bytes for roof in drawn for _, floor in roof.floors if _has_place(floor)
    ] or [1.0]
    ridges = [max(r.machine.rates.values()) / (r.machine.bandwidth or 1) for r in drawn] or [1.0]
    low, high = _decades(min(along) / 2, max(*along, *ridges) * 2)
    rates = [rate for roof in drawn for rate in roof.machine.rates.values()] or [1.0]
    slow = min((10**low) * (roof.machine.bandwidth or 1) for roof in drawn) if drawn else 1.0
    least, most = _decades(slow, max(rates))
    x_of = _scale(low, high, _LEFT, _WIDE - _RIGHT)
    y_of = _scale(least, most, _HIGH - _BOTTOM, _TOP)
    parts = _axes(low, high, least, most, x_of, y_of)
    for number, roof in enumerate(drawn):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += _roof(roof.machine, number, x_of, y_of, 10.0**low, 10.0**high)
        dashed = " (dashed)" if number // len(_COLOURS) % 2 else ""
        words = f"{roof.machine.name}{dashed}: {(roof.machine.bandwidth or 0) / 1e9:.0f} GB/s"
        parts.append(_text(_WIDE - _RIGHT + 14, _TOP + 14 + 17 * number, words, colour=colour))
        for name, floor in roof.floors:
            if _has_place(floor):
                x, y = x_of(floor.flops / floor.bytes), y_of(floor.flops / floor.floor_ms * 1e3)
                hint = (
                    f"{name}, batch {floor.batch}, on {roof.machine.name}: {floor.floor_ms:.4f} ms at least, "
                )
                hint += f"{floor.bytes / 1e6:.1f} MB, bound by {floor.binding}"
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.7">'
                    f"<title>{escape(hint)}</title></circle>"
                )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_HIGH}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDE}" height="{_HIGH}" fill="white"/>',
            _text(_LEFT, 20, "Operations a second at most: a floor of latency, no promise", size=14),
            *parts,
            "</svg>\n",
        ]
    )


def _has_place(floor: Floor) -> bool:
    return floor.bytes > 0 and floor.flops > 0 and floor.floor_ms > 0


def _roof(machine: Machine, number: int, x_of: Place, y_of: Place, first: float, last: float) -> list[str]:
    """Draw one line a rate; the slope is shared."""
    bandwidth, colour = machine.bandwidth or 1.0, _COLOURS[number % len(_COLOURS)]
    dashes = ' stroke-dasharray="6 3"' if number // len(_COLOURS) % 2 else ""
    lines = []
    for precision, rate in sorted(machine.rates.items()):
        ridge = rate / bandwidth
        corners = [(first, min(first * bandwidth, rate)), (max(first, ridge), rate), (max(last, ridge), rate)]
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in corners)
        words = escape(f"{machine.name}, {precision}: {rate / 1e12:g} T/s")
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}>'
            f"<title>{words}</title></polyline>"
        )
    return lines


def _axes(low: int, high: int, least: int, most: int, x_of: Place, y_of: Place) -> list[str]:
    parts = []
    bottom, right = _HIGH - _BOTTOM, _WIDE - _RIGHT
    for power in range(low, high + 1):
        x = x_of(10.0**power)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#e5e5e5"/>')
        parts.append(_text(x, bottom + 17, _short(power), anchor="middle"))
    for power in range(least, most + 1):
        y = y_of(10.0**power)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e5e5e5"/>')
        parts.append(_text(_LEFT - 6, y + 4, _short(power), anchor="end"))
    parts.append(_text((_LEFT + right) / 2, _HIGH - 10, "operations a byte", anchor="middle"))
    return parts


def _decades(least: float, most: float) -> tuple[int, int]:
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return low, max(high, low + 1)


def _scale(low: int, high: int, start: float, end: float) -> Place:
    return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def _short(power: int) -> str:
    units = {0: "", 3: " k", 6: " M", 9: " G", 12: " T", 15: " P"}
    base = power - power % 3
    return f"{10 ** (power - base)}{units[base]}" if base in units else f"1e{power}"


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = _AXIS
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(words)}</text>"
    )
