"""A small pair set that needs no download: drawn shapes in colours. For unit tests, never for a figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from edgeglm.data.pairs import Licence, Pair, Query, Role, Track, empty_images, write_pairs

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (240, 140, 30),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar", "ring", "arrow")


def drawn(shape: str, colour: str, size: int, *, target: bool = False) -> np.ndarray:
    """Draw one shape: uint8 [size, size, 3]. The target style is smaller, outlined, on light grey."""
    image = Image.new("RGB", (size, size), (235, 235, 235) if target else (255, 255, 255))
    pen = ImageDraw.Draw(image)
    margin = size * (0.28 if target else 0.15)
    low, high, middle = margin, size - margin, size / 2
    fill = COLOURS[colour]
    edge = (0, 0, 0) if target else fill
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=fill, outline=edge)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=fill, outline=edge)
    elif shape == "triangle":
        pen.polygon([(low, high), (middle, low), (high, high)], fill=fill, outline=edge)
    elif shape == "diamond":
        pen.polygon([(low, middle), (middle, low), (high, middle), (middle, high)], fill=fill, outline=edge)
    elif shape == "cross":
        wide = max(int(size * 0.16), 1)
        pen.line((low, middle, high, middle), fill=fill, width=wide)
        pen.line((middle, low, middle, high), fill=fill, width=wide)
    elif shape == "bar":
        pen.rectangle((low, middle - size * 0.1, high, middle + size * 0.1), fill=fill, outline=edge)
    elif shape == "ring":
        pen.ellipse((low, low, high, high), outline=fill, width=max(int(size * 0.1), 1))
    else:
        pen.polygon([(low, low), (high, middle), (low, high), (middle, middle)], fill=fill, outline=edge)
    return np.asarray(image, dtype=np.uint8)


def write_synthetic_pairs(out: Path, *, size: int = 48, colours: int = 8) -> Path:
    """Write a pairs artifact of ``8 * colours`` concepts in a labelled and a target style; return ``out``.

    One colour in eight is unseen; of the other target images half are held. Tracks as the icons have them.
    """
    out.mkdir(parents=True, exist_ok=True)
    concepts = [(shape, colour) for shape in SHAPES for colour in list(COLOURS)[:colours]]
    unseen = {f"{colour}-{shape}" for i, (shape, colour) in enumerate(concepts) if i % 8 == (i // 8) % 8}
    images = empty_images(out, count=2 * len(concepts), size=size)
    rows: list[Pair] = []
    for domain in ("drawn", "outlined"):
        for i, (shape, colour) in enumerate(concepts):
            name = f"{colour}-{shape}"
            images[len(rows)] = drawn(shape, colour, size, target=domain == "outlined")
            role: Role = "held" if name in unseen else "labelled"
            if domain == "outlined" and role == "labelled":
                role = "held" if i % 2 else "unlabelled"
            text = f"{colour} {shape}"
            captions = (text, f"a {shape} in {colour}")
            rows.append(
                Pair(
                    id=f"{domain}/{name}",
                    text=text,
                    captions=captions,
                    concept=name,
                    domain=domain,
                    role=role,
                )
            )
    images.flush()
    shown = [i for i, row in enumerate(rows) if row.domain == "outlined"]
    sides = {
        "catalogue-transductive": [i for i in shown if rows[i].role == "unlabelled"],
        "catalogue-inductive": [i for i in shown if rows[i].role == "held" and rows[i].concept not in unseen],
        "unseen": [i for i in shown if rows[i].concept in unseen],
    }
    tracks = []
    for name, side in sides.items():
        gallery = side if name == "unseen" else shown
        named = tuple(Query(text=rows[i].text, relevant=(i,)) for i in side)
        words = sorted({word for i in side for word in rows[i].text.split()})
        worded = tuple(
            Query(text=word, relevant=tuple(i for i in gallery if word in rows[i].text.split()))
            for word in words
        )
        tracks.append(Track(name=name, title=name, query_kind="names", queries=named, gallery=tuple(gallery)))
        tracks.append(
            Track(
                name=f"{name}-keywords",
                title=f"{name}, keywords",
                query_kind="keywords",
                queries=worded,
                gallery=tuple(gallery),
            )
        )
    licence = Licence(name="synthetic", version="1", licence="Apache-2.0", attribution="drawn by the tests")
    summary = {"images": len(rows), "concepts": len(concepts)}
    write_pairs(out, rows=rows, tracks=tracks, licences=[licence], summary=summary)
    return out


def write_synthetic_folder(out: Path, *, count: int = 60, size: int = 40) -> Path:
    """Write a person's own folder: PNG files and ``pairs.jsonl``; return ``out``."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    concepts = [(shape, colour) for colour in COLOURS for shape in SHAPES][:count]
    lines = []
    for shape, colour in concepts:
        file = f"images/{colour}-{shape}.png"
        Image.fromarray(drawn(shape, colour, size)).save(out / file)
        lines.append(json.dumps({"image": file, "text": f"a {colour} {shape}"}))
    (out / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return out
