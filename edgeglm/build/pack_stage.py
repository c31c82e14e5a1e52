"""The pack stage: everything a device needs, as a bundle folder inside the artifact."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm import __version__
from edgeglm.build.evaluations import metrics_of, read_preprocessing
from edgeglm.build.lane_a import takes_lane_a, with_lane_a
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.quantize_stage import gallery_rows
from edgeglm.build.report_data import report_of
from edgeglm.build.space import agreement_of_files, measured_space
from edgeglm.bundle.goldens import golden_sources
from edgeglm.bundle.manifest import (
    FileRecord,
    LeftOutRecord,
    LicenceRecord,
    Manifest,
    StageRecord,
    TargetRecord,
    TensorRecord,
    TowerRecord,
    VariantRecord,
    content_digest,
)
from edgeglm.bundle.opened import GalleryItem
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.calibration.quantize import QuantizeReport
from edgeglm.compile.fit import VariantFit, fits_of, require_fit
from edgeglm.compile.preflight import variant_subjects
from edgeglm.compile.shell import write_with_shell
from edgeglm.compile.contract import variants_of
from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.recipe import Recipe, toml_tree
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import model_input_from_files
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.export.costs import costs_sources
from edgeglm.report import render_report
from edgeglm.targets.costs import GraphCosts, costs_from_json
from edgeglm.targets.schema import ResolvedTarget, Target, resolve_target, toml_from_resolved

BUNDLE_FOLDER = "bundle"
FIT_NAME = "preflight.json"
REFERENCE = "fp32"
_GOLDEN_SEED = 0


class PackStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bundle says of itself; ``weights`` are the licences of the pretrained towers."""

    recipe: Recipe
    target: ResolvedTarget
    weights: tuple[LicenceRecord, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, target: Target, sources: Mapping[str, Artifact]) -> PackStageConfig:
        """Make it from a recipe, a target and the fetched sources."""
        found = {
            name: _licence(name, artifact.provenance)
            for name, artifact in sorted(sources.items())
            if not name.startswith("data:")
        }
        weights = {record.name: record for record in found.values()}
        return cls(
            recipe=portable_recipe(recipe),
            target=resolve_target(target, recipe.engine),
            weights=tuple(weights.values()),
        )


def portable_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe without paths of this machine: their last part stays."""
    data = msgspec.structs.replace(recipe.data, path=_portable(recipe.data.path))
    teacher = msgspec.structs.replace(
        recipe.teacher, image=tuple(_portable(recipe.teacher.image)), text=_portable(recipe.teacher.text)
    )
    return msgspec.structs.replace(recipe, data=data, teacher=teacher)


def _portable(value: Any) -> Any:
    """Return JSON-like data with the last part of every string that is an absolute path."""
    if isinstance(value, Mapping):
        return {key: _portable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(child) for child in value]
    if isinstance(value, str) and (path := PurePath(value.removeprefix("file:"))).is_absolute():
        return path.name
    return value


class PackStage(Stage[PackStageConfig]):
    """``bundle/``: the whole bundle."""

    name = "pack"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build",
        "edgeglm.bundle",
        "edgeglm.report",
        "edgeglm.compile.lane_record",
        "edgeglm.compile.fit",
        "edgeglm.compile.preflight",
        "edgeglm.targets",
        "edgeglm.compile.shell",
        "edgeglm.export",
    )
    libraries: ClassVar[tuple[str, ...]] = ("matplotlib", "onnx", "pillow", "onnxruntime-gpu", "numpy")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Collect, embed the goldens, draw the report, write the bundle."""
        pairs = PairSet.open(inputs["pairs"])
        with context.progress.task("Pack", total=4) as task:
            sources: dict[str, Path | bytes] = {**_models(inputs), **_settings(inputs, self.config)}
            task.advance()
            sources.update(_gallery(pairs, inputs, self.config.recipe.pack.thumbnails))
            task.advance()
            images, texts, feeds = _golden_inputs(pairs, inputs, self.config.recipe.pack.goldens)
            sources.update(golden_sources(images, texts, _golden_outputs(inputs, feeds, context.threads)))
            task.advance()
            manifest = _manifest(inputs, pairs, self.config)
            names = [variant.name for variant in manifest.variants]
            space = measured_space(pairs, inputs, names, reference=REFERENCE, threads=context.threads)
            manifest = msgspec.structs.replace(manifest, space=space)
            if takes_lane_a(self.config.target):
                with context.store.scratch() as scratch:
                    sources, manifest = with_lane_a(
                        sources,
                        manifest,
                        tried=_tried(inputs),
                        feeds=feeds,
                        scratch=scratch,
                        threads=context.threads,
                        agreement=lambda towers: agreement_of_files(
                            pairs, inputs, towers, reference=REFERENCE, threads=context.threads
                        ),
                    )
            fits = _fits(manifest, sources, self.config.target)
            sources[FIT_NAME] = msgspec.json.format(msgspec.json.encode(fits), indent=1)
            sources["NOTICE.md"] = notice(manifest).encode()
            licences = msgspec.to_builtins(manifest.licences)
            sources["licences.json"] = json.dumps(licences, indent=1).encode()
            metrics = _metrics(inputs, manifest)
            sources["metrics.json"] = json.dumps(metrics, indent=1, sort_keys=True).encode()
            recipe, target = self.config.recipe, self.config.target
            digest = content_digest(_listed(sources))  # the report quotes it, and is no part of it
            page = render_report(report_of(inputs, pairs, recipe, target, manifest, digest))
            sources["report.html"] = page.encode()
            folder = write_bundle(out / BUNDLE_FOLDER, sources=sources, manifest=manifest, archive="none")
            if any(member.arch == "aarch64" for member in target.members):
                with open_bundle(folder) as bundle:
                    whole = write_with_shell(bundle, target)
                    write_bundle(folder, sources=whole, manifest=manifest, archive="none")
            task.advance()
        return {"bytes": sum(p.stat().st_size for p in (out / BUNDLE_FOLDER).rglob("*") if p.is_file())}


def _fits(
    manifest: Manifest, sources: Mapping[str, Path | bytes], target: ResolvedTarget
) -> tuple[VariantFit, ...]:
    """Ask every board whether it takes the bundle. Raises UserError for one that takes none of it."""

    def costs_of(name: str) -> GraphCosts:
        source = sources[name]
        return costs_from_json(source if isinstance(source, bytes) else source.read_bytes(), name)

    subjects = {variant.name: variant_subjects(variant, costs_of) for variant in manifest.variants}
    fits = fits_of(subjects, target.members)
    require_fit(fits)
    return fits


def _listed(sources: Mapping[str, Path | bytes]) -> dict[str, FileRecord]:
    return {
        name: FileRecord(
            sha256=sha256_bytes(source) if isinstance(source, bytes) else sha256_file(source), size=0
        )
        for name, source in sources.items()
    }


def notice(manifest: Manifest) -> str:
    """Return NOTICE.md: whom this bundle owes what."""
    lines = [f"# Sources of the bundle {manifest.name}", ""]
    for record in manifest.licences:
        link = f" <{record.url}>" if record.url else ""
        lines.append(f"- {record.name} {record.version}: {record.licence}. {record.attribution}.{link}")
    return "\n".join([*lines, ""])


def _licence(name: str, provenance: Mapping[str, Any]) -> LicenceRecord:
    return LicenceRecord(
        name=str(provenance.get("title") or PurePath(str(provenance.get("name", name))).name),
        version=str(provenance.get("version") or ""),
        licence=str(provenance.get("licence") or "as stated by its owner"),
        attribution=str(provenance.get("attribution") or "given by the user of the recipe"),
        url=provenance.get("url"),
    )


def _models(inputs: Inputs) -> dict[str, Path | bytes]:
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
    return found


def _settings(inputs: Inputs, config: PackStageConfig) -> dict[str, Path | bytes]:
    import tomli_w

    exported = inputs["export"].path
    return {
        "tokenizer/tokenizer.json": exported / "tokenizer.json",
        "preprocessing.json": exported / "preprocessing.json",
        "recipe.toml": tomli_w.dumps(toml_tree(config.recipe)).encode(),
        "target.toml": toml_from_resolved(config.target).encode(),
    }


def _gallery(pairs: PairSet, inputs: Inputs, side: int) -> dict[str, Path | bytes]:
    from PIL import Image

    found: dict[str, Path | bytes] = {}
    lines = []
    for row, index in enumerate(gallery_rows(pairs)):
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


def _golden_inputs(
    pairs: PairSet, inputs: Inputs, count: int
) -> tuple[list[bytes], list[str], dict[str, dict[str, Any]]]:
    """Return raw pictures, texts, and both as model input."""
    from PIL import Image

    rng = np.random.default_rng(_GOLDEN_SEED)
    rows = gallery_rows(pairs)
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


def _golden_outputs(inputs: Inputs, feeds: Mapping[str, Mapping[str, Any]], threads: int) -> dict[str, Any]:
    outputs = {}
    for variant in variants_of(inputs["quantize"].files):
        for tower, given in feeds.items():
            path = inputs["quantize"].path / "models" / variant / f"{tower}.onnx"
            with OnnxRuntimeEngine(path, threads=threads, spinning=False) as engine:
                name = tower if variant == REFERENCE else f"{tower}-{variant}"
                outputs[name] = np.asarray(engine.infer(given)["embedding"], np.float32)
    return outputs


def _tried(inputs: Inputs) -> QuantizeReport:
    written = (inputs["quantize"].path / "variants.json").read_bytes()
    return msgspec.json.decode(written, type=QuantizeReport)


def _metrics(inputs: Inputs, manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: msgspec.to_builtins(metrics_of(inputs[f"{name}-evaluation"]))
        for name in ("teacher", "distil", "export")
    }
    found["variants"] = {variant.name: variant.metrics for variant in manifest.variants}
    found["left_out"] = {record.name: record.reason for record in manifest.left_out}
    found["latency_ms"] = latencies_of(inputs["latency"])
    return found


def _manifest(inputs: Inputs, pairs: PairSet, config: PackStageConfig) -> Manifest:
    tried = _tried(inputs)
    latency = latencies_of(inputs["latency"])
    target = config.target.target
    licences = [
        LicenceRecord(
            name=entry.name,
            version=entry.version,
            licence=entry.licence,
            attribution=entry.attribution,
            url=entry.url,
        )
        for entry in pairs.licences
    ]
    variants = tuple(
        VariantRecord(
            name=name,
            files={tower: f"models/{name}/{tower}.onnx" for tower in ("image", "text")},
            gate="reference" if name == REFERENCE else "passed",
            metrics=variant.metrics,
            latency={
                f"{tower}_b{batch}_ms": value
                for tower, by_batch in latency[name].items()
                for batch, value in by_batch.items()
            },
        )
        for name, variant in tried.variants.items()
    )
    return Manifest(
        name=f"{config.recipe.name}-{target.name}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        edgeglm=__version__,
        target=TargetRecord(
            name=target.name, description=target.title, members=tuple(m.name for m in config.target.members)
        ),
        default_variant=fastest_variant(latency, [variant.name for variant in variants]),
        variants=variants,
        left_out=tuple(LeftOutRecord(name=name, reason=why) for name, why in sorted(tried.left_out.items())),
        towers=_towers(inputs),
        stages=tuple(_stage_record(name, inputs[name]) for name in inputs),
        licences=(*licences, *config.weights),
        seeds={"recipe": config.recipe.seed},
    )


def fastest_variant(latency: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Return the variant whose towers together are the fastest at batch 1 where it was measured."""
    return min(names, key=lambda name: (sum(tower["1"] for tower in latency[name].values()), name))


def _towers(inputs: Inputs) -> dict[str, TowerRecord]:
    shapes = json.loads((inputs["export"].path / "towers.json").read_text())
    side = read_preprocessing(inputs["export"].path).image.resolution
    dim = shapes["image"]["embedding_dim"]
    output = (TensorRecord(name="embedding", dtype="float32", shape=("batch", dim)),)
    tokens = tuple(
        TensorRecord(name=name, dtype="int64", shape=("batch", "length"))
        for name in ("input_ids", "attention_mask")
    )
    pixels = (TensorRecord(name="pixels", dtype="float32", shape=("batch", 3, side, side)),)
    return {
        "image": TowerRecord(
            inputs=pixels,
            outputs=output,
            embedding_dim=dim,
            parameters=shapes["image"]["parameters"],
            resolution=side,
        ),
        "text": TowerRecord(
            inputs=tokens, outputs=output, embedding_dim=dim, parameters=shapes["text"]["parameters"]
        ),
    }


def _stage_record(name: str, artifact: Artifact) -> StageRecord:
    key = artifact.provenance["key"]
    return StageRecord(
        name=name,
        config=_portable(key["config"]),
        inputs=key["inputs"],
        artifact=artifact.digest,
        libraries=key["libraries"],
        seconds=artifact.provenance["seconds"],
        metrics=_json_like(artifact.provenance["measured"]),
    )


def _json_like(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_like(child) for key, child in value.items()}
    return value
