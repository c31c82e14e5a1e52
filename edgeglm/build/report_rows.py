"""The stage rows of a report: what each step cost and kept, tower by tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from edgeglm.adapt.backbones import read_backbones
from edgeglm.build.evaluations import Metrics, metrics_of, milliseconds_of, read_preprocessing
from edgeglm.build.lane_a import LaneTrial
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.table import (
    TITLES,
    TUNED,
    best_trial,
    compile_note,
    quantize_report,
    stages_of,
    teacher_sizes,
    teachers_backbones,
    torch_sizes,
    usable_metrics,
)
from edgeglm.build.timed_towers import Milliseconds
from edgeglm.calibration.variants import QuantizeReport
from edgeglm.core.artifact import Artifact
from edgeglm.core.recipe import Recipe, TeacherConfig
from edgeglm.core.stage import Inputs
from edgeglm.evaluate.retrieval import TrackMetrics
from edgeglm.report.data import StageRow, Tower

_VARIANT_TITLES = {"fp32": "Student, FP32", "fp16": "Student, FP16", "int8": "Student, INT8"}


def stage_rows(inputs: Inputs, recipe: Recipe) -> tuple[StageRow, ...]:
    """Return the rows of the growing table, in the order of the build.

    Their seconds are those of every stage before the pack stage, each counted once.
    """
    latency = latencies_of(inputs["latency"])
    tried = quantize_report(inputs["quantize"])
    image, text = (inputs[f"distil-{tower}"] for tower in ("image", "text"))
    rows = [
        _plain(inputs, "pairs", "Pairs", _pairs_note(inputs["pairs"])),
        StageRow(
            name="teacher",
            title="Teacher",
            seconds=_seconds(inputs, *stages_of("teacher", inputs)),
            metrics=metrics_of(inputs["teacher-evaluation"]),
            towers=teacher_towers(inputs, recipe, latency["teacher"]),
        ),
        StageRow(
            name="distil",
            title="Student in torch",
            seconds=_seconds(inputs, *stages_of("distil", inputs)),
            metrics=metrics_of(inputs["distil-evaluation"]),
            towers=_student_towers(
                inputs, recipe, milliseconds_of(inputs["distil-evaluation"]), torch_sizes(image, text)
            ),
        ),
        _variant_row(inputs, recipe, latency, tried, "fp32"),
    ]
    alone = max(_seconds(inputs, "quantize") - sum(tried.seconds.values()), 0.0)
    rows.append(StageRow(name="calibrate", title=TITLES["calibrate"], seconds=alone))
    for name in recipe.quantize.candidates:
        if name in tried.variants:
            rows.append(_variant_row(inputs, recipe, latency, tried, name))
        elif name in tried.left_out:
            rows.append(
                StageRow(
                    name=name,
                    title=_VARIANT_TITLES[name],
                    seconds=tried.seconds[name],
                    metrics=_typed(usable_metrics(best_trial(tried, name))),
                    kept=False,
                    note=tried.left_out[name],
                )
            )
    rows.append(_plain(inputs, "latency", "Latency", "all models interleaved"))
    rows.append(_plain(inputs, "compile", TITLES["compile"], compile_note(inputs["compile"])))
    return tuple(rows)


def lane_rows(inputs: Inputs, recipe: Recipe, lanes: Mapping[str, LaneTrial]) -> tuple[StageRow, ...]:
    """Return a row for each variant of lane A: measured when the bundle is packed, and timed on a board."""
    return tuple(
        StageRow(
            name=name,
            title=f"{trial.of.upper()}, lane A",
            seconds=trial.seconds,
            metrics=_typed(trial.metrics),
            towers=_student_towers(inputs, recipe, None, trial.sizes) if trial.verdict.passed else (),
            kept=trial.verdict.passed,
            note="for TensorRT 8.5" if trial.verdict.passed else trial.verdict.reason,
        )
        for name, trial in lanes.items()
    )


def teacher_towers(inputs: Inputs, recipe: Recipe, latency: Milliseconds) -> tuple[Tower, ...]:
    """Return what the teacher's towers cost: backbones and heads together."""
    folder, images = inputs["teacher"].path, teachers_backbones(inputs)
    backbones = read_backbones(images.path)
    counts = json.loads((folder / "teacher.json").read_text())["parameters"]
    sizes = teacher_sizes(images, inputs["teacher"])
    titles = " + ".join(f"{b.title}, {b.resolution} px" for b in backbones)
    text_title = {"minilm-l6": "MiniLM-L6", "multilingual-e5-small": "multilingual E5-small"}.get(
        recipe.teacher.text, recipe.teacher.text
    )
    details = {"image": titles, "text": f"{text_title}{_tuned(recipe.teacher)}"}
    parameters = {
        "image": sum(b.parameters for b in backbones) + counts["image_head"],
        "text": counts["text"],
    }
    return tuple(_tower(tower, details[tower], parameters[tower], sizes[tower], latency) for tower in details)


def _tuned(teacher: TeacherConfig) -> str:
    """Return how the text tower was tuned, to follow its name."""
    if not teacher.lora_epochs:
        return ""
    rank, tokens, last = teacher.lora_rank, teacher.virtual_tokens, teacher.tuned_blocks
    said = {
        "lora": f"LoRA {rank}",
        "rslora": f"rsLoRA {rank}",
        "dora": f"DoRA {rank}",
        "ia3": "IA3",
        "bottleneck": f"bottleneck adapters {rank}",
        "prompt": f"prompt of {tokens}",
        "p-tuning": f"P-tuning of {tokens}",
    }
    where = f"last {last} blocks" if last else "all blocks"
    if teacher.tuning not in said:
        return f", {where} tuned"
    return f" + {said[teacher.tuning]}{f', {where}' if last else ''}"


def student_towers(inputs: Inputs, recipe: Recipe, latency: Milliseconds, variant: str) -> tuple[Tower, ...]:
    """Return what the towers of one variant cost."""
    folder = inputs["quantize"].path / "models" / variant
    sizes = {tower: (folder / f"{tower}.onnx").stat().st_size for tower in ("image", "text")}
    return _student_towers(inputs, recipe, latency, sizes)


def _student_towers(
    inputs: Inputs, recipe: Recipe, latency: Milliseconds | None, sizes: Mapping[str, int]
) -> tuple[Tower, ...]:
    shapes = json.loads((inputs["export"].path / "towers.json").read_text())
    preprocessing = read_preprocessing(inputs["export"].path)
    details = {
        "image": f"{recipe.student.size}, {preprocessing.image.resolution} px",
        "text": f"{recipe.student.size}, {preprocessing.text.max_length} tokens",
    }
    return tuple(
        _tower(tower, detail, shapes[tower]["parameters"], sizes[tower], latency)
        for tower, detail in details.items()
    )


def _tower(name: str, detail: str, parameters: int, size: int, latency: Milliseconds | None) -> Tower:
    return Tower(
        name=name,
        detail=detail,
        parameters=parameters,
        size_bytes=size,
        latency_ms_1=latency[name]["1"] if latency else None,
        latency_ms_8=latency[name]["8"] if latency else None,
    )


def _variant_row(
    inputs: Inputs, recipe: Recipe, latency: Mapping[str, Milliseconds], tried: QuantizeReport, name: str
) -> StageRow:
    seconds = _seconds(inputs, *stages_of("fp32", inputs)) if name == "fp32" else tried.seconds[name]
    precisions = set(tried.variants[name].precisions.items())
    notes = [TUNED] if tried.variants[name].tuned else []
    if len({precision for _, precision in precisions}) > 1:
        notes += [f"{tower} {precision}" for tower, precision in sorted(precisions)]
    sums = sorted(tower for tower, made in tried.variants[name].conversions.items() if made.residuals)
    notes += [f"residual sums of {' and '.join(sums)} read INT8"] if sums else []
    return StageRow(
        name=name,
        title=_VARIANT_TITLES[name],
        seconds=seconds,
        metrics=_typed(tried.variants[name].metrics),
        towers=student_towers(inputs, recipe, latency[name], name),
        note=", ".join(notes),
    )


def _typed(metrics: Mapping[str, Any]) -> Metrics:
    return msgspec.convert(dict(metrics), dict[str, TrackMetrics])


def _plain(inputs: Inputs, name: str, title: str, note: str) -> StageRow:
    return StageRow(name=name, title=title, seconds=_seconds(inputs, name), note=note)


def _seconds(inputs: Inputs, *names: str) -> float:
    return float(sum(inputs[name].provenance["seconds"] for name in names))


def _pairs_note(artifact: Artifact) -> str:
    summary = artifact.provenance["measured"]
    return f"{summary.get('images', 0):,} images"
