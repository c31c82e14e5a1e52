"""The one picture of results: queries with their first images, for a README."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeglm.report.data import Example

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_INK, _SOFT, _LINE, _GOOD, _PAPER = "#17202e", "#586476", "#e0e4ea", "#1a8a4e", "#ffffff"


def results_picture(
    examples: Sequence[Example], *, title: str = "", columns: int = 2, thumbnail: int = 104, scale: int = 2
) -> bytes:
    """Return a PNG with each query and its first images, the right ones framed in green with a tick.

    Args:
        examples: What to draw, row by row. Images are any format that Pillow reads.
        title: A line above everything; none if empty.
        columns: Queries beside each other.
        thumbnail: Side of an image, in points.
        scale: Pixels a point; 2 is sharp on a dense screen.

    Raises:
        ValueError: There is no example.
    """
    if not examples:
        raise ValueError("a picture of results needs at least one example")
    from PIL import Image, ImageDraw

    hits = max(len(example.images) for example in examples)
    gap, margin, head = 10, 24, 30
    cell_width = hits * (thumbnail + gap) - gap
    cell_height = head + thumbnail + 40
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    top = margin + (38 if title else 0)
    width = 2 * margin + columns * cell_width + (columns - 1) * 2 * margin
    height = top + rows * cell_height + (rows - 1) * gap + margin // 2
    image = Image.new("RGB", (width * scale, height * scale), _PAPER)
    draw = ImageDraw.Draw(image)
    if title:
        _write(draw, margin, margin - 4, title, 20, _INK, scale)
    for index, example in enumerate(examples):
        left = margin + (index % columns) * (cell_width + 2 * margin)
        upper = top + (index // columns) * (cell_height + gap)
        text = _fitted(draw, f"\u201c{example.query}\u201d", 16, cell_width, scale)
        _write(draw, left, upper, text, 16, _INK, scale)
        for rank, hit in enumerate(example.images):
            x, y = left + rank * (thumbnail + gap), upper + head
            _frame(image, draw, hit.image, (x, y, thumbnail), right=hit.right, scale=scale)
            label = _fitted(draw, hit.label, 11, thumbnail, scale)
            _write(draw, x, y + thumbnail + 6, f"{hit.score:.2f}", 12, _GOOD if hit.right else _INK, scale)
            _write(draw, x, y + thumbnail + 21, label, 11, _SOFT, scale)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _frame(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    content: bytes,
    box: tuple[int, int, int],
    *,
    right: bool,
    scale: int,
) -> None:
    from PIL import Image

    x, y, side = (value * scale for value in box)
    line = (3 if right else 1) * scale
    draw.rounded_rectangle(
        (x, y, x + side - 1, y + side - 1), 8 * scale, _PAPER, _GOOD if right else _LINE, line
    )
    inner = side - 2 * 7 * scale
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA")
    ratio = inner / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    image.paste(picture, (x + (side - size[0]) // 2, y + (side - size[1]) // 2), picture)
    if right:
        radius = 9 * scale
        cx, cy = x + side - 7 * scale, y + 7 * scale
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), _GOOD, _PAPER, scale)
        tick = [(-4, 0), (-1, 3), (4, -3)]
        draw.line([(cx + dx * scale, cy + dy * scale) for dx, dy in tick], _PAPER, 2 * scale, joint="curve")


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour: str, scale: int) -> None:
    from PIL import ImageFont

    # Pillow's own font: the same letters on every machine.
    draw.text((x * scale, y * scale), text, colour, ImageFont.load_default(size * scale))


def _fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: int, scale: int) -> str:
    from PIL import ImageFont

    font = ImageFont.load_default(size * scale)
    if draw.textlength(text, font) <= width * scale:
        return text
    while text and draw.textlength(f"{text}\u2026", font) > width * scale:
        text = text[:-1]
    return f"{text.rstrip()}\u2026"
