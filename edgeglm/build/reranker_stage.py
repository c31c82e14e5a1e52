"""The re-ranker's stages: trained, exported with parity, held against the towers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.build.export_stage import load_students
from edgeglm.core.recipe import ExportConfig, RerankerConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.timing import measure_latency
from edgeglm.evaluate.ranked import average_precision
from edgeglm.evaluate.retrieval import CUTOFF, positions_in_gallery, ratio_of_means, top_k
from edgeglm.evaluate.towers import TextSettings, gallery_images, image_embeddings, text_embeddings
from edgeglm.runtime.reranking import RerankerSettings, pair_scores

_BATCH = 64
_TOKENS = 8  # of a text whose candidates are timed
_CODE = (
    "edgeglm.build.reranker_stage",
    "edgeglm.data.tokenization",
    "edgeglm.data.transforms",
    "edgeglm.distill.reranking",
    "edgeglm.distill.text_student",
    "edgeglm.export",
    "edgeglm.models.projection",
    "edgeglm.models.reranker",
    "edgeglm.models.students",
    "edgeglm.models.student_shapes",
    "edgeglm.models.efficientnet_lite",
    "edgeglm.train.loop",
    "edgeglm.train.schedules",
    "edgeglm.train.views",
    "edgeglm.train.concepts",
)


class RerankerStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The recipe's table, the student it is for, and how it becomes ONNX."""

    reranker: RerankerConfig
    export: ExportConfig
    size: str
    resolution: int
    seed: int


class RerankerStage(Stage[RerankerStageConfig]):
    """``model.onnx``, ``settings.json``, and ``patches.npy`` float16 [G, N, C] of what a bundle shows.

    ``patches.onnx`` is the part of the image tower that makes patches of pixels.
    """

    name = "reranker"
    code: ClassVar[tuple[str, ...]] = _CODE
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Train, export, cut the gallery into patches by the exported file."""
        import torch

        from edgeglm.distill.reranking import fit_reranker, seen_by_both
        from edgeglm.models.reranker import FusedReranker, PatchTower
        from edgeglm.train.loop import seeded

        pairs, config = PairSet.open(inputs["pairs"]), self.config
        image, text = load_students(inputs, config.size, config.resolution)
        settings = read_preprocessing(inputs["export"].path).text
        tokenizer = Tokenizer(inputs["export"].path / "tokenizer.json", lowercase=settings.lowercase)
        said = torch.from_numpy(np.load(inputs["teacher"].path / "image_embeddings.npy"))
        with seeded(config.seed, threads=context.threads):
            seen = seen_by_both(
                image,
                text,
                tokenizer,
                pairs,
                teacher_VND=said,
                texts=json.loads((inputs["targets"].path / "texts.json").read_text("utf-8")),
                said_TD=torch.from_numpy(np.load(inputs["targets"].path / "text_embeddings.npy")),
                resolution=config.resolution,
                max_length=settings.max_length,
                seed=config.seed,
                progress=context.progress,
            )
            _, _, patches, channels = seen.patch_VUNC.shape
            model = FusedReranker(
                table_VE=text.tokens.weight.detach(),
                patches=patches,
                channels=channels,
                max_length=settings.max_length,
                width=config.reranker.width,
                depth=config.reranker.depth,
            )
            curve = fit_reranker(
                model,
                seen,
                config.reranker,
                pad=tokenizer.pad_id,
                seed=config.seed,
                progress=context.progress,
            )
        with context.progress.task("Re-ranker: export", total=None):
            parity = _exported(model, PatchTower(image), out, config, (patches, channels))
            np.save(out / "patches.npy", _gallery_patches(pairs, out, config.resolution, context.threads))
        made = RerankerSettings(candidates=config.reranker.candidates)
        (out / "settings.json").write_bytes(msgspec.json.encode(made))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"parameters": trained, "table": model.tokens.weight.numel(), "loss": curve, "parity": parity}


def _exported(
    model: Any, cut: Any, out: Path, config: RerankerStageConfig, patch: tuple[int, int]
) -> dict[str, float]:
    """Write both files; each is held against its module on three shapes. Returns the largest differences."""
    import torch

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    generator = torch.Generator().manual_seed(0)
    vocabulary, limit, side = model.tokens.num_embeddings, len(model.places), config.resolution

    def pair(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        return {
            "patches": torch.rand(batch, *patch, generator=generator),
            "input_ids": ids,
            "attention_mask": mask,
            "cosine": torch.rand(batch, generator=generator),
        }

    def pixels(batch: int) -> dict[str, torch.Tensor]:
        return {"pixels": torch.rand(batch, 3, side, side, generator=generator)}

    free, atol = {0: "batch"}, config.export.parity_atol
    axes = {"patches": free, "input_ids": {**free, 1: "length"}, "attention_mask": {**free, 1: "length"}}
    onnx_from_module(
        model,
        pair(2, min(5, limit)),
        out / "model.onnx",
        output_names=("score",),
        dynamic_axes={**axes, "cosine": free},
        opset=config.export.opset,
    )
    onnx_from_module(
        cut,
        pixels(2),
        out / "patches.onnx",
        output_names=("patches",),
        dynamic_axes={"pixels": free},
        opset=config.export.opset,
    )
    shapes = [pair(1, min(3, limit)), pair(3, min(7, limit)), pair(config.reranker.candidates + 1, limit)]
    # A score is one number: its sign is all that a cosine would see.
    scores = assert_parity(model, out / "model.onnx", shapes, atol=atol, min_cosine=-1.0)
    cuts = assert_parity(cut, out / "patches.onnx", [pixels(1), pixels(3), pixels(8)], atol=atol)
    return {"model": scores.max_abs, "patches": cuts.max_abs}


def _gallery_patches(pairs: PairSet, folder: Path, resolution: int, threads: int) -> Any:
    shown, found = pairs.shown_images(), []
    with OnnxRuntimeEngine(folder / "patches.onnx", threads=threads, spinning=False) as engine:
        for start in range(0, len(shown), _BATCH):
            feeds = {"pixels": pairs.shown(shown[start : start + _BATCH], resolution)}
            found.append(np.asarray(engine.infer(feeds)["patches"], np.float16))
    return np.concatenate(found)


class RerankerEvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seed of the bootstrap."""

    seed: int


class RerankerEvaluation(Stage[RerankerEvaluationConfig]):
    """``reranker.json``: mAP@10 of the FP32 towers with and without, track by track, and what it costs."""

    name = "reranker-evaluation"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.reranker_stage",
        "edgeglm.runtime.reranking",
        "edgeglm.evaluate",
        "edgeglm.engines.timing",
        "edgeglm.data.transforms",
        "edgeglm.data.tokenization",
    )
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu", "numpy", "tokenizers")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Ask every query of the very files, as ``edgeglm run --rerank`` does."""
        pairs = PairSet.open(inputs["pairs"])
        with context.progress.task("Evaluating the re-ranker"):
            found = reranked_tracks(
                pairs, inputs["export"].path, inputs["reranker"].path, context.threads, self.config.seed
            )
        (out / "reranker.json").write_text(json.dumps(found, indent=1, sort_keys=True))
        return found


def reranked_tracks(
    pairs: PairSet, exported: Path, reranker: Path, threads: int, seed: int
) -> dict[str, Any]:
    """Return mAP@10 without and with the re-ranker and their ratio with its paired interval, and latency.

    ``candidates`` says how many are ordered anew; ``latency_ms`` is of all of them in one call, beside both
    towers' of one query, one thread.
    """
    preprocessing = read_preprocessing(exported)
    towers = {tower: exported / "models" / "fp32" / f"{tower}.onnx" for tower in ("image", "text")}
    tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)
    text = TextSettings(tokenizer=tokenizer, max_length=preprocessing.text.max_length)
    settings = msgspec.json.decode((reranker / "settings.json").read_bytes(), type=RerankerSettings)
    patches_GNC = np.load(reranker / "patches.npy", mmap_mode="r")
    place = {image: row for row, image in enumerate(pairs.shown_images())}
    chosen = gallery_images(pairs.tracks)
    rows = image_embeddings(
        towers["image"],
        pairs.images,
        chosen,
        preprocessing=preprocessing.image,
        threads=threads,
    )
    row_of = {image: row for row, image in enumerate(chosen)}
    queries = sorted({query.text for track in pairs.tracks for query in track.queries})
    embedded = text_embeddings(towers["text"], queries, text, threads=threads)
    text_of = {query: row for row, query in enumerate(queries)}
    tracks: dict[str, Any] = {}
    with OnnxRuntimeEngine(reranker / "model.onnx", threads=threads, spinning=False) as engine:
        for track in pairs.tracks:
            gallery = np.asarray(track.gallery)
            query_QD = embedded[[text_of[query.text] for query in track.queries]]
            shown = max(settings.candidates, CUTOFF)  # behind the candidates the order stays
            best_QS, cosine_QS = top_k(query_QD, rows[[row_of[image] for image in track.gallery]], shown)
            before, after = [], []
            for q, relevant in enumerate(positions_in_gallery(track)):
                ids = tokenizer.encode([track.queries[q].text], max_length=text.max_length)[0][0]
                first_A, rest = np.split(best_QS[q], [settings.candidates])
                patches_ANC = patches_GNC[[place[image] for image in gallery[first_A].tolist()]]
                scores_A = pair_scores(engine, patches_ANC, ids, cosine_QS[q][: len(first_A)])
                anew = [*first_A[np.argsort(-scores_A, kind="stable")].tolist(), *rest.tolist()]
                before.append(average_precision(best_QS[q].tolist(), set(relevant)))
                after.append(average_precision(anew, set(relevant)))
            tracks[track.name] = _compared(np.asarray(before), np.asarray(after), seed)
    return {
        "candidates": min(settings.candidates, len(patches_GNC)),
        "tracks": tracks,
        "latency_ms": _latency(
            towers,
            reranker,
            patches_GNC,
            settings.candidates,
            preprocessing.image.resolution,
            min(_TOKENS, text.max_length),
        ),
    }


def _compared(before_Q: Any, after_Q: Any, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"without": float(before_Q.mean()), "with": float(after_Q.mean())}
    if before_Q.mean() > 0:
        found["ratio"] = msgspec.to_builtins(ratio_of_means(after_Q, before_Q, seed=seed))
    return found


def _latency(
    towers: Mapping[str, Path],
    reranker: Path,
    patches_GNC: Any,
    candidates: int,
    side: int,
    length: int,
) -> dict[str, float]:
    ids = np.ones((1, length), np.int64)
    count = min(candidates, len(patches_GNC))
    rows_AL = np.ones((count, length), np.int64)
    feeds: dict[Path, dict[str, Any]] = {
        towers["text"]: {"input_ids": ids, "attention_mask": ids},
        towers["image"]: {"pixels": np.zeros((1, 3, side, side), np.float32)},
        reranker / "model.onnx": {
            "patches": np.asarray(patches_GNC[:count], np.float32),
            "input_ids": rows_AL,
            "attention_mask": rows_AL,
            "cosine": np.zeros(count, np.float32),
        },
    }
    found = {}
    for name, (path, given) in zip(("text", "image", "reranker"), feeds.items(), strict=True):
        with OnnxRuntimeEngine(path, threads=1, spinning=False) as engine:
            found[name] = round(measure_latency(engine, given).median_ms, 3)
    return found
