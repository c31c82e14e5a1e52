"""What the report of a bundle shows, gathered from the artifacts of its stages."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Mapping

import msgspec
import numpy as np

from edgeglm.build.command_line import command_of
from edgeglm.build.evaluations import metrics_of, read_preprocessing, student_ratios
from edgeglm.build.lane_a import LaneTrial
from edgeglm.build.pools import gate_pools, pool_gates, required_pools
from edgeglm.build.report_rows import lane_rows, stage_rows
from edgeglm.build.student_budget import Asked
from edgeglm.build.student_search import read_search
from edgeglm.build.table import TITLES, best_trial, quantize_report
from edgeglm.bundle.manifest import Manifest
from edgeglm.calibration.sets import CalibrationRecord
from edgeglm.calibration.variants import Verdict
from edgeglm.compile.stage import compile_record_from_file
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Inputs
from edgeglm.data.languages import LANGUAGES
from edgeglm.data.pairs import PairSet, Track
from edgeglm.data.tokenization import Tokenizer
from edgeglm.evaluate.examples import Retrieved, example_retrievals, hard_retrievals
from edgeglm.evaluate.retrieval import Interval
from edgeglm.evaluate.towers import TextSettings, text_embeddings
from edgeglm.report import ReportData
from edgeglm.report.data import (
    EngineRow,
    Example,
    ExampleImage,
    Fact,
    GateRow,
    LicenceRow,
    SearchedRow,
    SearchPlot,
    SecondLook,
    SecondLookRow,
    TrackNote,
    verdict_sentence,
)
from edgeglm.targets.schema import ResolvedTarget

_TITLES = {"catalogue-transductive": "Catalogue", "catalogue-inductive": "Catalogue, unseen images"}
_THUMBNAIL = 96


def report_of(
    inputs: Inputs,
    pairs: PairSet,
    recipe: Recipe,
    target: ResolvedTarget,
    manifest: Manifest,
    digest: str,
    lanes: Mapping[str, LaneTrial],
    *,
    asked: Asked | None = None,
) -> ReportData:
    """Gather the report of one bundle.

    ``lanes`` is what was measured of lane A when it was packed, ``asked`` what a search was asked for.
    """
    rows = (*stage_rows(inputs, recipe), *lane_rows(inputs, recipe, lanes))
    by_name = {row.name: row for row in rows}
    main = pairs.tracks[0].name
    tracks = tuple(track_note(track) for track in pairs.tracks)
    teacher, student = by_name["teacher"], by_name["fp32"]
    members = [member.name for member in target.members]
    drawn, worst = examples_of(inputs, pairs, manifest.default_variant, recipe.seed)
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
        examples=drawn,
        hard=worst,
        gates=(*gate_rows(inputs, pairs, recipe), *lane_gates(recipe, lanes)),
        left_out=tuple(Fact(label=left.name, value=left.reason) for left in manifest.left_out),
        search=_search(inputs, recipe),
        second_look=_second_look(inputs, pairs),
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
        command=command_of(recipe, target.target.name, asked),
        made=_made(manifest, recipe),
        notes=(
            "Latency was measured with one thread, on the machine above and not on the target: "
            f"of \u201c{TITLES['distil']}\u201d with PyTorch, of all others with ONNX Runtime.",
        ),
    )


def track_note(track: Track) -> TrackNote:
    """Describe a track for a reader."""
    base = track.name.removesuffix("-keywords").removeprefix(f"{track.language}-")
    title = _TITLES.get(base, base.replace("-", " ").capitalize())
    if track.query_kind == "keywords":
        title += ", keywords"
    if track.language not in ("", "en"):
        title += f", {LANGUAGES[track.language]}"
    return TrackNote(
        name=track.name,
        title=title,
        description=f"{track.title}.",
        one_relevant=all(len(query.relevant) == 1 for query in track.queries),
    )


def gate_rows(inputs: Inputs, pairs: PairSet, recipe: Recipe) -> tuple[GateRow, ...]:
    """Return every gate: the teacher's floor, student against teacher, candidates against FP32.

    Student against teacher is shown for pools and for each track; the names of each language are required.
    """
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
    found = student_ratios(inputs, pairs)
    for gate in pool_gates("student / teacher", student, teacher, pools, recipe.gates.student_ratio):
        pool = gate.name.rpartition(", ")[2]
        required, interval = pool in required_pools(pools), found.pools.get(pool)
        within = "" if gate.passed or not required else ", as the interval reaches the gate"
        rows.append(
            GateRow(
                name=gate.name,
                value=gate.value,
                interval=interval,
                threshold=gate.threshold,
                passed=gate.passed,
                required=required,
                consequence=f"the build goes on{within}" if required else "reported",
            )
        )
    for track, ratio in found.tracks.items():
        rows.append(
            GateRow(
                name=f"student / teacher, track {track}",
                value=ratio.value,
                interval=ratio,
                threshold=recipe.gates.student_ratio,
                passed=ratio.value >= recipe.gates.student_ratio,
                required=False,
                consequence="reported",
            )
        )
    tried = quantize_report(inputs["quantize"])
    for name in tried.trials:
        if (best := best_trial(tried, name)) is not None:
            rows.append(_candidate_gate(name, best.verdict, recipe))
    return tuple(rows)


def lane_gates(recipe: Recipe, lanes: Mapping[str, LaneTrial]) -> tuple[GateRow, ...]:
    """Return the gate of each variant of lane A, on its own files."""
    return tuple(_candidate_gate(name, trial.verdict, recipe) for name, trial in lanes.items())


def _candidate_gate(name: str, verdict: Verdict, recipe: Recipe) -> GateRow:
    return GateRow(
        name=f"{name} / FP32, worst pool",
        value=verdict.score,
        threshold=recipe.gates.quantized_ratio,
        passed=verdict.passed,
        required=False,
        consequence="packed" if verdict.passed else "left out",
    )


def examples_of(
    inputs: Inputs, pairs: PairSet, variant: str, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return retrievals of the first track by the very files of a variant: some at random, and the worst."""
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
    rows[pairs.shown_images()] = gallery

    def shown(answer: Retrieved) -> ExampleImage:
        label = pairs.rows[answer.image].text
        return ExampleImage(
            image=_png(pairs, answer.image), label=label, score=answer.score, right=answer.right
        )

    drawn = tuple(
        Example(query=found.query, track=track.name, images=tuple(map(shown, found.answers)))
        for found in example_retrievals(track, texts, rows, seed=seed)
    )
    worst = tuple(
        Example(
            query=found.query,
            track=track.name,
            images=tuple(map(shown, found.answers)),
            wanted=shown(found.wanted),
            rank=found.rank,
        )
        for found in hard_retrievals(track, texts, rows)
    )
    return drawn, worst


def _png(pairs: PairSet, index: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(np.asarray(pairs.images[index])).resize((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.quantize(64).save(buffer, "PNG")
    return buffer.getvalue()


def _search(inputs: Inputs, recipe: Recipe) -> SearchPlot | None:
    """Return the search that a budget asked for, if there was one."""
    if "student-search" not in inputs:
        return None
    search, student = read_search(inputs["student-search"]), recipe.student
    return SearchPlot(
        judged=search.judged,
        teacher_map10=search.teacher_map10,
        queries=search.queries,
        students=tuple(
            SearchedRow(
                size=one.size,
                resolution=one.resolution,
                map10=one.map10,
                latency_ms=one.judged_ms,
                here_ms=one.here_ms,
                parameters=one.parameters,
                file_bytes=one.file_bytes,
                front=one.front,
                chosen=(one.size, one.resolution) == (student.size, student.resolution),
            )
            for one in search.students
        ),
    )


def _second_look(inputs: Inputs, pairs: PairSet) -> SecondLook | None:
    """Return what a re-ranker was measured to add and to cost, if there is one."""
    if "reranker-evaluation" not in inputs:
        return None
    found = inputs["reranker-evaluation"].provenance["measured"]
    return SecondLook(
        candidates=found["candidates"],
        milliseconds=found["latency_ms"]["reranker"],
        text_milliseconds=found["latency_ms"]["text"],
        rows=tuple(
            SecondLookRow(
                track=track.name,
                without=said["without"],
                reranked=said["with"],
                ratio=msgspec.convert(said["ratio"], Interval) if "ratio" in said else None,
            )
            for track in pairs.tracks
            if (said := found["tracks"].get(track.name))
        ),
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
