"""A made-up report with every section filled, for tests and for looking at."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageDraw

from edgeglm.evaluate.retrieval import Interval, TrackMetrics
from edgeglm.report.data import (
    EngineRow,
    Example,
    ExampleImage,
    Fact,
    GateRow,
    LicenceRow,
    ReportData,
    StageRow,
    Tower,
    TrackNote,
    verdict_sentence,
)


def disc(colour: str) -> bytes:
    """Return a small PNG of a coloured disc."""
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).ellipse((6, 6, 42, 42), colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


TRACKS = (
    TrackNote(
        name="catalogue-transductive",
        title="Catalogue",
        description="Known concepts; gallery of all target-style images, used without their names.",
        one_relevant=True,
    ),
    TrackNote(
        name="catalogue-inductive",
        title="Catalogue, inductive",
        description="Half of the target-style images were never seen in any form.",
        one_relevant=True,
    ),
    TrackNote(
        name="unseen", title="Unseen", description="Concepts held out of all training.", one_relevant=True
    ),
    TrackNote(
        name="unseen-keywords",
        title="Unseen, keywords",
        description="Keywords never seen in training; several images may be right.",
    ),
)


def metrics(*values: float) -> dict[str, TrackMetrics]:
    """Return metrics of all tracks from their mAP@10."""
    sizes = {
        "catalogue-transductive": 1651,
        "catalogue-inductive": 825,
        "unseen": 165,
        "unseen-keywords": 164,
    }
    found = {}
    for track, value in zip(TRACKS, values, strict=True):
        width = 0.9 / sizes[track.name] ** 0.5
        found[track.name] = TrackMetrics(
            map10=Interval(value=value, low=max(0, value - width), high=value + width),
            r1=value * 0.86,
            r10=min(1, value * 1.3),
            r1_i2t=value * 0.83,
            r10_i2t=min(1, value * 1.28),
            queries=sizes[track.name],
            gallery=sizes[track.name],
        )
    return found


def towers(
    image: tuple[float, ...], text: tuple[float, ...], bytes_each: int, details: tuple[str, str]
) -> tuple[Tower, ...]:
    return tuple(
        Tower(
            name=name,
            detail=detail,
            parameters=int(p * 1e6),
            size_bytes=int(p * 1e6 * bytes_each),
            latency_ms_1=one,
            latency_ms_8=eight,
        )
        for name, detail, (p, one, eight) in zip(("image", "text"), details, (image, text), strict=True)
    )


def sample_report(picture: Callable[[str], bytes] | None = None) -> ReportData:
    """Return the whole sample. ``picture`` gives image bytes by concept name; discs by default."""
    colours = ["#d33", "#e90", "#3a3", "#38d", "#83c", "#888"]
    draw = picture or (lambda name: disc(colours[len(name) % len(colours)]))
    big = ("EfficientNet-Lite0, 128 px", "MiniLM-L6 + LoRA, 32 tokens")
    small = ("edge-s convolutional, 80 px", "edge-s, hashed embeddings, 32 tokens")
    teacher = StageRow(
        name="teacher",
        title="Teacher",
        seconds=214.2,
        metrics=metrics(0.612, 0.585, 0.41, 0.274),
        towers=towers((4.1, 10.4, 71.0), (22.7, 8.1, 39.5), 4, big),
    )
    student = StageRow(
        name="student",
        title="Student, FP32",
        seconds=187.0,
        metrics=metrics(0.595, 0.571, 0.402, 0.269),
        towers=towers((1.4, 1.52, 9.6), (1.81, 1.08, 4.7), 4, small),
    )
    fp16 = StageRow(
        name="fp16",
        title="Student, FP16",
        seconds=9.4,
        metrics=metrics(0.595, 0.571, 0.402, 0.268),
        towers=towers((1.4, 1.71, 11.0), (1.81, 1.2, 5.3), 2, small),
    )
    int8 = StageRow(
        name="int8",
        title="Student, INT8",
        seconds=31.8,
        metrics=metrics(0.561, 0.54, 0.37, 0.25),
        towers=towers((1.4, 1.3, 8.1), (1.81, 0.82, 3.4), 1, small),
        kept=False,
        note="0.943 of FP32 on catalogue, below 0.99",
    )
    names = ["red-apple", "green-apple", "pear", "tomato", "cherries"]
    cats = ["dog-face", "wolf", "fox", "cat-face", "lion"]
    examples = (
        _example("red apple", names, {0}, draw),
        _example("grinning cat", ["grinning-cat", "cat-face", "lion", "fox", "tiger-face"], {0}, draw),
        _example("sailboat", ["sailboat", "canoe", "ship", "anchor", "umbrella-on-ground"], {0}, draw),
        _example(
            "vehicle",
            ["bus", "taxi", "apple-pie" if picture is None else "teapot", "ambulance", "tractor"],
            {0, 1, 3, 4},
            draw,
        ),
        _example("house cat", cats, {3}, draw),
        _example("crimson fruit", ["rose", "cherries", "heart-suit", "strawberry", "tomato"], set(), draw),
    )
    return ReportData(
        bundle="emoji-search",
        target="jetson-agx (Orin 32 GB, Orin 64 GB, Thor)",
        digest="9f2c1be47d0a5c3388f1d2b6a97e4410c0ffee5eaf00d1234567890abcdef012",
        default_variant="fp16",
        verdict=verdict_sentence(teacher, student, "catalogue-transductive"),
        main_track="catalogue-transductive",
        teacher="teacher",
        student="student",
        tracks=TRACKS,
        stages=(
            StageRow(name="pairs", title="Pairs", seconds=48.6, note="8,214 images, 5 styles"),
            teacher,
            student,
            StageRow(name="export", title="Export", seconds=14.9, note="parity 3e-7"),
            fp16,
            int8,
            StageRow(name="compile", title="Compile", seconds=3.1),
            StageRow(name="pack", title="Pack", seconds=2.2),
        ),
        examples=examples,
        gates=(
            GateRow(
                name="student / teacher, catalogue",
                value=0.9722,
                threshold=0.96,
                passed=True,
                consequence="build goes on",
            ),
            GateRow(
                name="fp16 / fp32, worst track",
                value=0.9985,
                threshold=0.99,
                passed=True,
                required=False,
                consequence="packed as a candidate",
            ),
            GateRow(
                name="int8 / fp32, worst track",
                value=0.9203,
                threshold=0.99,
                passed=False,
                required=False,
                consequence="left out; layer norms of the text tower cost most",
            ),
        ),
        calibration=(
            Fact(label="Samples", value="256 training images, drawn by seed 0"),
            Fact(label="Method", value="max, per channel"),
            Fact(
                label="Disjoint from evaluation", value="yes: 0 of 256 digests among 1,816 evaluation images"
            ),
        ),
        engines=(
            EngineRow(
                member="jetson-agx-orin-32gb",
                engine="TensorRT",
                state="deferred",
                reason="SM 87 engines are built on the device",
            ),
            EngineRow(
                member="jetson-agx-thor",
                engine="TensorRT",
                state="deferred",
                reason="SM 110 engines are built on the device",
            ),
            EngineRow(
                member="l4",
                engine="TensorRT-RTX image-fp16",
                state="built",
                size_bytes=3_400_000,
                reason="built here in 1.5 s",
            ),
        ),
        licences=(
            LicenceRow(
                name="Noto Emoji",
                version="1.2.9",
                licence="Apache-2.0",
                attribution="Google",
                url="https://github.com/googlefonts/noto-emoji",
            ),
            LicenceRow(
                name="Twemoji",
                version="1.2.5",
                licence="CC-BY-4.0",
                attribution="Twitter, Inc. and other contributors",
            ),
            LicenceRow(
                name="MiniLM-L6", version="0.1.0", licence="Apache-2.0", attribution="sentence-transformers"
            ),
        ),
        left_out=(
            Fact(label="int8", value="0.943 of FP32 on catalogue, below 0.99"),
            Fact(label="fp16-lane-a", value="the older parser has no <Gelu>"),
        ),
        command="edgeglm build --target jetson-agx",
        made=(
            Fact(label="edgeglm", value="0.1.0"),
            Fact(label="Libraries", value="torch 2.13.0, onnx 1.21.0, onnxruntime 1.24.0, modelopt 0.47.0"),
            Fact(label="Machine", value="2 CPU cores (x86-64), 2 threads, no GPU"),
            Fact(label="Seed", value="0"),
        ),
        notes=("Latency was measured with one thread on the machine above, not on the target.",),
    )


def _example(query: str, names: list[str], right: set[int], draw: Callable[[str], bytes]) -> Example:
    images = tuple(
        ExampleImage(
            image=draw(name), label=name.replace("-", " "), score=0.71 - 0.06 * rank, right=rank in right
        )
        for rank, name in enumerate(names)
    )
    return Example(query=query, images=images)
