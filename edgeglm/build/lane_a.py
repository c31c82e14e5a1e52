"""The files of lane A that a bundle carries for boards with TensorRT 8.5.

They are made from the gated variants when the bundle is packed, a second a tower, and hold the same
weights: nothing is trained or calibrated again. What they answer to the golden inputs is compared with what
the gated variant answers, and kept for the board to compare with. What they keep of the task is measured on
these very files and passes the same gate; whether they share the embedding space is measured as for every
variant.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.build.pack_sources import REFERENCE
from edgeglm.build.tower_scores import TowerScores
from edgeglm.bundle.goldens import OUTPUTS, golden_sources
from edgeglm.bundle.manifest import LeftOutRecord, Manifest, VariantRecord
from edgeglm.calibration.variants import QuantizeReport, Verdict
from edgeglm.calibration.variants import Variant as Kept
from edgeglm.compile.lane_record import SUFFIX, LaneRecord, LaneTower, record_name
from edgeglm.core.errors import UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.parity import cosine_rows
from edgeglm.export.costs import costs_sources
from edgeglm.export.lanes import checked_lane
from edgeglm.export.lowering import lane_a_from_onnx
from edgeglm.targets.schema import ResolvedTarget

Sources = Mapping[str, "Path | bytes"]
Feeds = Mapping[str, Mapping[str, npt.NDArray[Any]]]

#: By the precision of the tower. INT8 activations that lie between two steps round either way in FP16, which
#: lane B computes in besides, and in FP32, which lane A does.
_LEAST_COSINE = {"fp32": 0.999, "fp16": 0.999, "int8": 0.99}


@dataclass(frozen=True, kw_only=True)
class LaneTrial:
    """What the files of one variant keep of the task, their bytes by tower, and how long all of it took.

    ``of`` is the variant of lane B that they were made from. ``metrics`` are as in ``VariantRecord``; empty
    where the embeddings are of no use.
    """

    of: str
    metrics: dict[str, Any]
    verdict: Verdict
    sizes: dict[str, int]
    seconds: float


def takes_lane_a(target: ResolvedTarget) -> bool:
    """Say whether some board of the target has a TensorRT that parses lane A only."""
    return any(member.lanes == ("A",) for member in target.members)


def with_lane_a(
    sources: Sources,
    manifest: Manifest,
    *,
    tried: QuantizeReport,
    feeds: Feeds,
    scratch: Path,
    threads: int,
    scores: TowerScores,
    agreement: Callable[[Mapping[str, Path]], float],
) -> tuple[dict[str, Path | bytes], Manifest, dict[str, LaneTrial]]:
    """Return the sources and the manifest of a bundle with lane A beside lane B, and what was measured.

    Args:
        sources: As they are, with models and goldens.
        manifest: As it is.
        tried: The quantize stage's report: the precision of each tower, what AutoCast kept in FP32, and the
            figures of FP32, against which all are gated.
        feeds: The golden inputs as model input.
        scratch: An empty folder.
        threads: Of ONNX Runtime.
        scores: Measures and judges the task; products between Q/DQ have to be computed as they are written.
        agreement: Measures how far files ``{tower: path}`` share the reference's embedding space.

    A variant that cannot be written for lane A, or misses the gate, is left out, with the reason in the
    manifest.
    """
    whole, variants, left_out = dict(sources), [], []
    agreements = dict(manifest.space.agreement)
    outputs = _stored_outputs(sources[OUTPUTS])
    trials: dict[str, LaneTrial] = {}
    for variant in manifest.variants:
        if variant.gate != "passed":
            continue
        name, started = f"{variant.name}{SUFFIX}", time.perf_counter()
        try:
            made, answers = _made(
                sources, variant, tried.variants[variant.name], outputs, feeds, scratch, threads
            )
        except UserError as error:
            left_out.append(LeftOutRecord(name=name, reason=str(error)))
            continue
        files = {tower: f"models/{name}/{tower}.onnx" for tower in variant.files}
        towers = {tower: scratch / name / f"{tower}.onnx" for tower in files}
        metrics = scores.metrics(towers)
        verdict = scores.judged(metrics, tried.variants[REFERENCE].metrics)
        trial = trials[name] = LaneTrial(
            of=variant.name,
            metrics={} if "unusable" in metrics else metrics,
            verdict=verdict,
            sizes={tower: len(made[file]) for tower, file in files.items()},
            seconds=time.perf_counter() - started,
        )
        if not verdict.passed:
            left_out.append(LeftOutRecord(name=name, reason=verdict.reason, metrics=trial.metrics))
            continue
        whole.update(made)
        outputs.update(answers)
        whole[f"gallery/embeddings-{name}.npy"] = sources[f"gallery/embeddings-{variant.name}.npy"]
        agreements[name] = agreement(towers)
        variants.append(VariantRecord(name=name, files=files, gate="passed", metrics=trial.metrics, lane="A"))
    whole[OUTPUTS] = _with_outputs(outputs)
    changed = msgspec.structs.replace(
        manifest,
        variants=(*manifest.variants, *variants),
        left_out=(*manifest.left_out, *left_out),
        space=msgspec.structs.replace(manifest.space, agreement=agreements),
    )
    return whole, changed, trials


def _made(
    sources: Sources,
    variant: VariantRecord,
    kept: Kept,
    outputs: Mapping[str, npt.NDArray[np.float32]],
    feeds: Feeds,
    scratch: Path,
    threads: int,
) -> tuple[dict[str, bytes], dict[str, npt.NDArray[np.float32]]]:
    name = f"{variant.name}{SUFFIX}"
    made: dict[str, bytes] = {}
    answers, towers, paths = {}, {}, {}
    for tower, file in variant.files.items():
        # FP16 is chosen by the builder of TensorRT 8.5: it gets the weights in full precision.
        origin = f"models/fp32/{tower}.onnx" if kept.precisions[tower] == "fp16" else file
        conversion = kept.conversions.get(tower)
        path = paths[tower] = scratch / name / f"{tower}.onnx"
        source = _as_file(sources[origin], scratch / "of" / origin)
        lowered = lane_a_from_onnx(source, path, keep_fp32=conversion.left_in_fp32 if conversion else ())
        checked_lane(path, "A")
        # As it is written, which is what TensorRT computes: ONNX Runtime's integer kernels may saturate.
        with OnnxRuntimeEngine(path, threads=threads, spinning=False, integers=False) as engine:
            answer = np.asarray(engine.infer(feeds[tower])["embedding"], np.float32)
        expected = outputs[f"{tower}-{variant.name}"]
        cosine = float(cosine_rows(answer, expected).min())
        least = _LEAST_COSINE[kept.precisions[tower]]
        if not cosine >= least:
            raise UserError(
                f"the {tower} tower answers otherwise on lane A: cosine {cosine:.5f} with {variant.name}, "
                f"{least} is asked; boards with TensorRT 8.5 take another variant"
            )
        answers[f"{tower}-{name}"] = answer
        made[f"models/{name}/{tower}.onnx"] = path.read_bytes()
        towers[tower] = LaneTower(
            source=origin,
            opset=lowered.opset,
            fp32_nodes=lowered.fp32_nodes,
            rewritten=lowered.rewritten,
            max_abs=float(np.abs(answer - expected).max()),
            min_cosine=cosine,
        )
    made.update(costs_sources({name: paths}))
    record = LaneRecord(of=variant.name, towers=towers)
    made[record_name(name)] = msgspec.json.format(msgspec.json.encode(record), indent=1)
    return made, answers


def _as_file(source: Path | bytes, place: Path) -> Path:
    if isinstance(source, Path):
        return source
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(source)
    return place


def _stored_outputs(source: Path | bytes) -> dict[str, npt.NDArray[np.float32]]:
    with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as stored:
        return {name: np.asarray(stored[name], np.float32) for name in stored.files}


def _with_outputs(outputs: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    counts = [len(outputs[tower]) for tower in ("image", "text")]
    return golden_sources([b""] * counts[0], [""] * counts[1], outputs)[OUTPUTS]
