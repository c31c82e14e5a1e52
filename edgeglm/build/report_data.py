"""What the report of a bundle shows, gathered from the artifacts of its stages."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from edgeglm.adapt.backbones import read_backbones
from edgeglm.build.evaluations import Metrics, metrics_of, read_preprocessing
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.pools import gate_pools, pool_gates
from edgeglm.build.quantize_stage import gallery_rows
from edgeglm.build.student_sizes import read_sizes
from edgeglm.bundle.manifest import Manifest
from edgeglm.calibration.quantize import QuantizeReport
from edgeglm.calibration.sets import CalibrationRecord
from edgeglm.compile.stage import compile_record_from_file
from edgeglm.core.artifact import Artifact
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Inputs
from edgeglm.data.pairs import PairSet, Track
from edgeglm.data.tokenization import Tokenizer
from edgeglm.evaluate.examples import example_retrievals
from edgeglm.evaluate.gates import ratio
from edgeglm.evaluate.retrieval import TrackMetrics
from edgeglm.evaluate.towers import TextSettings, text_embeddings
from edgeglm.report import ReportData
from edgeglm.report.data import (
    EngineRow,
    Example,
    ExampleImage,
    Fact,
    GateRow,
    LicenceRow,
    SizeRow,
    StageRow,
    Tower,
    TrackNote,
    verdict_sentence,
)
from edgeglm.targets.schema import ResolvedTarget

_TITLES = {"catalogue-transductive": "Catalogue", "catalogue-inductive": "Catalogue, unseen images"}
_THUMBNAIL = 96
_VARIANT_TITLES = {"fp32": "Student, FP32", "fp16": "Student, FP16", "int8": "Student, INT8"}


def report_of(
    inputs: Inputs,
    pairs: PairSet,
    recipe: Recipe,
    target: ResolvedTarget,
    manifest: Manifest,
    digest: str,
) -> ReportData:
    """Gather the report of one bundle."""
    rows = stage_rows(inputs, recipe)
    by_name = {row.name: row for row in rows}
    main = pairs.tracks[0].name
    tracks = tuple(track_note(track) for track in pairs.tracks)
    teacher, student = by_name["teacher"], by_name["fp32"]
    members = [member.name for member in target.members]
    return ReportData(
        bundle=manifest.name,
        target=target.target.name if len(members) == 1 else f"{target.target.name} ({', '.join(members)})",
        digest=digest,
        default_variant=manifest.default_variant,
        verdict=verdict_sentence(teacher, student, main, tracks),
        main_track=main,
        teacher="teacher",
        student="fp32",
        tracks=tracks,
        stages=rows,
        examples=examples_of(inputs, pairs, manifest.default_variant, recipe.seed),
        gates=gate_rows(inputs, pairs, recipe),
        sizes=_sizes(inputs, recipe.student.size),
        calibration=_calibration(inputs),
        engines=_engines(inputs),
        licences=tuple(
            LicenceRow(
                name=record.name,
                version=record.version,
                licence=record.licence,
                attribution=record.attribution,
                url=record.url or "",
            )
            for record in manifest.licences
        ),
        command=f"edgeglm build --target {target.target.name}",
        made=_made(manifest, recipe),
        notes=(
            "Latency was measured with ONNX Runtime, one thread, on the machine above and not on the target.",
        ),
    )


def track_note(track: Track) -> TrackNote:
    """Describe a track for a reader."""
    base = track.name.removesuffix("-keywords")
    title = _TITLES.get(base, base.replace("-", " ").capitalize())
    if track.query_kind == "keywords":
        title += ", keywords"
    return TrackNote(
        name=track.name,
        title=title,
        description=f"{track.title}.",
        one_relevant=all(len(query.relevant) == 1 for query in track.queries),
    )


def stage_rows(inputs: Inputs, recipe: Recipe) -> tuple[StageRow, ...]:
    """Return the rows of the growing table, in the order of the build."""
    latency = latencies_of(inputs["latency"])
    tried = _tried(inputs)
    teacher_cost = _seconds(inputs, "backbones", "teacher", "teacher-evaluation")
    rows = [
        _plain(inputs, "pairs", "Pairs", _pairs_note(inputs["pairs"])),
        StageRow(
            name="teacher",
            title="Teacher",
            seconds=teacher_cost,
            metrics=metrics_of(inputs["teacher-evaluation"]),
            towers=teacher_towers(inputs, recipe, latency),
        ),
        StageRow(
            name="distil",
            title="Student in torch",
            seconds=_seconds(inputs, "distil-text", "distil-image", "distil-evaluation"),
            metrics=metrics_of(inputs["distil-evaluation"]),
            towers=tuple(
                msgspec.structs.replace(t, size_bytes=None, latency_ms_1=None, latency_ms_8=None)
                for t in student_towers(inputs, recipe, latency, "fp32")
            ),
        ),
        _variant_row(inputs, recipe, latency, tried, "fp32"),
    ]
    for name in recipe.quantize.candidates:
        if name in tried.variants:
            rows.append(_variant_row(inputs, recipe, latency, tried, name))
        elif name in tried.trials:
            best = max(tried.trials[name], key=lambda trial: trial.verdict.score)
            usable = "unusable" not in best.metrics
            rows.append(
                StageRow(
                    name=name,
                    title=_VARIANT_TITLES[name],
                    seconds=0.0,
                    metrics=_typed(best.metrics) if usable else {},
                    kept=False,
                    note=tried.left_out[name],
                )
            )
    rows.append(_plain(inputs, "quantize", "Calibrate and quantize", ""))
    rows.append(_plain(inputs, "compile", "Compile", _compile_note(inputs["compile"])))
    return tuple(rows)


def gate_rows(inputs: Inputs, pairs: PairSet, recipe: Recipe) -> tuple[GateRow, ...]:
    """Return every gate: the teacher's floor, student against teacher, candidates against FP32."""
    teacher, student = metrics_of(inputs["teacher-evaluation"]), metrics_of(inputs["export-evaluation"])
    pools = gate_pools(pairs.tracks)
    rows = []
    main = pairs.tracks[0].name
    if recipe.gates.teacher_map10:
        value = teacher[main].map10.value
        rows.append(
            GateRow(
                name=f"teacher mAP@10, {main}",
                value=value,
                threshold=recipe.gates.teacher_map10,
                passed=value >= recipe.gates.teacher_map10,
                consequence="the build goes on",
            )
        )
    for gate in pool_gates("student / teacher", student, teacher, pools, recipe.gates.student_ratio):
        required = gate.name.endswith(", names")
        rows.append(
            GateRow(
                name=gate.name,
                value=gate.value,
                threshold=gate.threshold,
                passed=gate.passed,
                required=required,
                consequence="the build goes on" if required else "reported",
            )
        )
    for name, trials in _tried(inputs).trials.items():
        best = max(trials, key=lambda trial: trial.verdict.score)
        rows.append(
            GateRow(
                name=f"{name} / FP32, worst pool",
                value=best.verdict.score,
                threshold=recipe.gates.quantized_ratio,
                passed=best.verdict.passed,
                required=False,
                consequence="packed" if best.verdict.passed else "left out",
            )
        )
    return tuple(rows)


def teacher_towers(inputs: Inputs, recipe: Recipe, latency: Mapping[str, Any]) -> tuple[Tower, ...]:
    """Return what the teacher's towers cost: backbones and heads together."""
    folder, backbones = inputs["teacher"].path, read_backbones(inputs["backbones"].path)
    counts = json.loads((folder / "teacher.json").read_text())["parameters"]
    head = (folder / "image-head.onnx").stat().st_size
    sizes = [(inputs["backbones"].path / b.file).stat().st_size for b in backbones]
    titles = " + ".join(f"{b.title}, {b.resolution} px" for b in backbones)
    lora = f" + LoRA {recipe.teacher.lora_rank}" if recipe.teacher.lora_epochs else ""
    text_title = {"minilm-l6": "MiniLM-L6"}.get(recipe.teacher.text, recipe.teacher.text)
    return (
        Tower(
            name="image",
            detail=titles,
            parameters=sum(b.parameters for b in backbones) + counts["image_head"],
            size_bytes=sum(sizes) + head,
            latency_ms_1=latency["teacher"]["image"]["1"],
            latency_ms_8=latency["teacher"]["image"]["8"],
        ),
        Tower(
            name="text",
            detail=f"{text_title}{lora}",
            parameters=counts["text"],
            size_bytes=(folder / "text.onnx").stat().st_size,
            latency_ms_1=latency["teacher"]["text"]["1"],
            latency_ms_8=latency["teacher"]["text"]["8"],
        ),
    )


def student_towers(
    inputs: Inputs, recipe: Recipe, latency: Mapping[str, Any], variant: str
) -> tuple[Tower, ...]:
    """Return what the towers of one variant cost."""
    shapes = json.loads((inputs["export"].path / "towers.json").read_text())
    preprocessing = read_preprocessing(inputs["export"].path)
    details = {
        "image": f"{recipe.student.size}, {preprocessing.image.resolution} px",
        "text": f"{recipe.student.size}, {preprocessing.text.max_length} tokens",
    }
    return tuple(
        Tower(
            name=tower,
            detail=detail,
            parameters=shapes[tower]["parameters"],
            size_bytes=(inputs["quantize"].path / "models" / variant / f"{tower}.onnx").stat().st_size,
            latency_ms_1=latency[variant][tower]["1"],
            latency_ms_8=latency[variant][tower]["8"],
        )
        for tower, detail in details.items()
    )


def examples_of(inputs: Inputs, pairs: PairSet, variant: str, seed: int) -> tuple[Example, ...]:
    """Draw example retrievals on the first track with the very files of a variant."""
    folder, exported = inputs["quantize"].path, inputs["export"].path
    preprocessing = read_preprocessing(exported)
    track = pairs.tracks[0]
    settings = TextSettings(
        tokenizer=Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase),
        max_length=preprocessing.text.max_length,
    )
    texts = text_embeddings(
        folder / "models" / variant / "text.onnx", [q.text for q in track.queries], settings, threads=1
    )
    gallery = np.load(folder / f"embeddings-{variant}.npy")
    rows = np.zeros((len(pairs), gallery.shape[1]), np.float32)
    rows[gallery_rows(pairs)] = gallery
    return tuple(
        Example(
            query=found.query,
            track=track.name,
            images=tuple(
                ExampleImage(
                    image=_png(pairs, answer.image),
                    label=pairs.rows[answer.image].text,
                    score=answer.score,
                    right=answer.right,
                )
                for answer in found.answers
            ),
        )
        for found in example_retrievals(track, texts, rows, seed=seed)
    )


def _png(pairs: PairSet, index: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(np.asarray(pairs.images[index])).resize((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.quantize(64).save(buffer, "PNG")
    return buffer.getvalue()


def _variant_row(
    inputs: Inputs, recipe: Recipe, latency: Mapping[str, Any], tried: QuantizeReport, name: str
) -> StageRow:
    seconds = _seconds(inputs, "export", "export-evaluation") if name == "fp32" else 0.0
    precisions = set(tried.variants[name].precisions.items())
    mixed = len({precision for _, precision in precisions}) > 1
    return StageRow(
        name=name,
        title=_VARIANT_TITLES[name],
        seconds=seconds,
        metrics=_typed(tried.variants[name].metrics),
        towers=student_towers(inputs, recipe, latency, name),
        note=", ".join(f"{tower} {precision}" for tower, precision in sorted(precisions)) if mixed else "",
    )


def _tried(inputs: Inputs) -> QuantizeReport:
    return msgspec.json.decode((inputs["quantize"].path / "variants.json").read_bytes(), type=QuantizeReport)


def _typed(metrics: Mapping[str, Any]) -> Metrics:
    return msgspec.convert(dict(metrics), dict[str, TrackMetrics])


def _plain(inputs: Inputs, name: str, title: str, note: str) -> StageRow:
    return StageRow(name=name, title=title, seconds=_seconds(inputs, name), note=note)


def _seconds(inputs: Inputs, *names: str) -> float:
    return float(sum(inputs[name].provenance["seconds"] for name in names if name in inputs))


def _pairs_note(artifact: Artifact) -> str:
    summary = artifact.provenance["measured"]
    return f"{summary.get('images', 0):,} images"


def _compile_note(artifact: Artifact) -> str:
    engines = artifact.provenance["measured"]["engines"]
    return f"{engines} engines built here" if engines else "engines are built on the device"


def _sizes(inputs: Inputs, chosen: str) -> tuple[SizeRow, ...]:
    """Return what the choice within a budget measured, if there was one."""
    if "student-sizes" not in inputs:
        return ()
    return tuple(
        SizeRow(
            size=cost.size,
            latency_ms=cost.latency_ms,
            parameters=cost.parameters,
            file_bytes=cost.file_bytes,
            chosen=cost.size == chosen,
        )
        for cost in read_sizes(inputs["student-sizes"])
    )


def _calibration(inputs: Inputs) -> tuple[Fact, ...]:
    record = msgspec.json.decode(
        (inputs["quantize"].path / "calibration.json").read_bytes(), type=CalibrationRecord
    )
    facts = [Fact(label="Drawn", value=f"{record.drawn}; seed {record.seed}; source: {record.source}")]
    for tower, part in record.towers.items():
        proof = part.disjointness
        facts.append(
            Fact(
                label=tower.capitalize(),
                value=f"{len(part.samples)} samples, {proof.overlap} of them among "
                f"{proof.evaluation_samples:,} that any evaluation uses",
            )
        )
    return tuple(facts)


def _engines(inputs: Inputs) -> tuple[EngineRow, ...]:
    record = compile_record_from_file(inputs["compile"].path / "compile.json")
    rows = []
    for member in record.members:
        library = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}.get(
            member.library or "", "ONNX Runtime"
        )
        for engine in member.engines:
            path = inputs["compile"].path / engine.file if engine.file else None
            rows.append(
                EngineRow(
                    member=member.name,
                    engine=f"{library} {engine.tower} {engine.variant}",
                    state="built" if path else "refused",
                    reason=engine.failure or "built on this machine",
                    size_bytes=path.stat().st_size if path else None,
                )
            )
        if not member.engines:
            rows.append(
                EngineRow(
                    member=member.name,
                    engine=library,
                    state="built" if member.status == "onnxruntime" else "deferred",
                    reason=member.reason,
                )
            )
    return tuple(rows)


def _made(manifest: Manifest, recipe: Recipe) -> tuple[Fact, ...]:
    libraries: dict[str, str] = {}
    for stage in manifest.stages:
        libraries.update(stage.libraries)
    return (
        Fact(label="edgeglm", value=manifest.edgeglm),
        Fact(label="Recipe", value=recipe.name),
        Fact(label="Libraries", value=", ".join(f"{k} {v}" for k, v in sorted(libraries.items()))),
        Fact(label="Machine", value=f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"),
        Fact(label="Seed", value=str(recipe.seed)),
    )


def kept_share(inputs: Inputs, track: str) -> float:
    """Return student / teacher mAP@10 on a track."""
    teacher, student = metrics_of(inputs["teacher-evaluation"]), metrics_of(inputs["export-evaluation"])
    return ratio(student[track].map10.value, teacher[track].map10.value)
