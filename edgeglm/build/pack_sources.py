"""What goes into a bundle besides its manifest: models, settings, gallery and golden samples."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.bundle.opened import GalleryItem
from edgeglm.compile.contract import variants_of
from edgeglm.core.recipe import Recipe, toml_tree
from edgeglm.core.stage import Inputs
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import model_input_from_files
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.towers import gallery_images
from edgeglm.export.costs import costs_sources
from edgeglm.runtime.reranking import MODEL, PATCHES, SETTINGS
from edgeglm.targets.schema import ResolvedTarget, toml_from_resolved

REFERENCE = "fp32"
SEARCH_NAME = "student_search.json"
_GOLDEN_SEED = 0


def model_sources(inputs: Inputs) -> dict[str, Path | bytes]:
    """Return models, engines, their costs and records by their names in the bundle."""
    quantize, compiled = inputs["quantize"], inputs["compile"]
    found: dict[str, Path | bytes] = {
        name: quantize.path / name for name in quantize.files if name.startswith("models/")
    }
    found.update({name: compiled.path / name for name in compiled.files if name.startswith("engines/")})
    found["compile.json"] = compiled.path / "compile.json"
    folder = quantize.path / "models"
    towers = {
        variant: {tower: folder / variant / f"{tower}.onnx" for tower in parts}
        for variant, parts in variants_of(quantize.files).items()
    }
    found.update(costs_sources(towers))  # so that a device can plan without the onnx package
    found["precision_plan.json"] = quantize.path / "precision_plan.json"
    found["calibration.json"] = quantize.path / "calibration.json"
    if "reranker" in inputs:
        folder = inputs["reranker"].path
        found.update({name: folder / PurePosixPath(name).name for name in (MODEL, PATCHES, SETTINGS)})
    return found


def settings_sources(inputs: Inputs, recipe: Recipe, target: ResolvedTarget) -> dict[str, Path | bytes]:
    """Return tokenizer, preprocessing, recipe and target by their names in the bundle."""
    import tomli_w

    exported = inputs["export"].path
    return {
        "tokenizer/tokenizer.json": exported / "tokenizer.json",
        "preprocessing.json": exported / "preprocessing.json",
        "recipe.toml": tomli_w.dumps(toml_tree(recipe)).encode(),
        "target.toml": toml_from_resolved(target).encode(),
        **_search_sources(inputs),
    }


def _search_sources(inputs: Inputs) -> dict[str, Path | bytes]:
    """Return what the search for the student tried, if a budget asked for one."""
    found = inputs.get("student-search")
    return {} if found is None else {SEARCH_NAME: found.path / SEARCH_NAME}


def gallery_sources(pairs: PairSet, inputs: Inputs, side: int) -> dict[str, Path | bytes]:
    """Return the gallery: thumbnails of at most ``side`` pixels, items, embeddings of every variant."""
    from PIL import Image

    found: dict[str, Path | bytes] = {}
    lines = []
    for row, index in enumerate(pairs.shown_images()):
        name = f"thumbnails/{row:05d}.png"
        image = Image.fromarray(np.asarray(pairs.images[index]))
        if image.width > side:
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.quantize(64).save(buffer, "PNG")
        found[f"gallery/{name}"] = buffer.getvalue()
        item = GalleryItem(id=pairs.rows[index].id, text=pairs.rows[index].text, thumbnail=name)
        lines.append(msgspec.json.encode(item))
    found["gallery/items.jsonl"] = b"\n".join([*lines, b""])
    for variant in variants_of(inputs["quantize"].files):
        rows = np.load(inputs["quantize"].path / f"embeddings-{variant}.npy")
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, rows, version=(1, 0))
        found[f"gallery/embeddings-{variant}.npy"] = buffer.getvalue()
    return found


def golden_inputs(
    pairs: PairSet, inputs: Inputs, count: int
) -> tuple[list[bytes], list[str], dict[str, dict[str, Any]]]:
    """Return raw pictures, texts, and both as model input."""
    from PIL import Image

    rng = np.random.default_rng(_GOLDEN_SEED)
    rows = gallery_images(pairs.tracks)
    chosen = sorted(rng.choice(rows, size=min(count, len(rows)), replace=False).tolist())
    queries = sorted({query.text for track in pairs.tracks for query in track.queries})
    texts = sorted(rng.choice(queries, size=min(count, len(queries)), replace=False).tolist())
    images = []
    for index in chosen:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pairs.images[index])).save(buffer, "PNG")
        images.append(buffer.getvalue())
    exported = inputs["export"].path
    preprocessing = read_preprocessing(exported)
    tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)
    ids, mask = tokenizer.encode(texts, max_length=preprocessing.text.max_length)
    feeds: dict[str, dict[str, Any]] = {
        "image": {"pixels": model_input_from_files(images, preprocessing.image)},
        "text": {"input_ids": ids, "attention_mask": mask},
    }
    return images, texts, feeds


def golden_outputs(inputs: Inputs, feeds: Mapping[str, Mapping[str, Any]], threads: int) -> dict[str, Any]:
    """Return what every variant says to the golden input: ``image``, ``text``, ``image-fp16``, ..."""
    outputs = {}
    for variant in variants_of(inputs["quantize"].files):
        for tower, given in feeds.items():
            path = inputs["quantize"].path / "models" / variant / f"{tower}.onnx"
            with OnnxRuntimeEngine(path, threads=threads, spinning=False) as engine:
                name = tower if variant == REFERENCE else f"{tower}-{variant}"
                outputs[name] = np.asarray(engine.infer(given)["embedding"], np.float32)
    return outputs
