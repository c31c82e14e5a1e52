"""The manifest of a bundle and what travels beside it: figures, licences and whom to credit."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import msgspec

from edgeglm import __version__
from edgeglm.build.evaluations import metrics_of, read_preprocessing, student_ratios
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.pack_sources import REFERENCE
from edgeglm.build.report_rows import student_towers, teacher_towers
from edgeglm.build.table import best_trial, quantize_report, usable_metrics
from edgeglm.bundle.manifest import (
    LeftOutRecord,
    LicenceRecord,
    Manifest,
    StageRecord,
    TargetRecord,
    TensorRecord,
    TowerRecord,
    VariantRecord,
)
from edgeglm.core.artifact import Artifact
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Inputs
from edgeglm.data.pairs import PairSet
from edgeglm.targets.description import dotted_sm
from edgeglm.targets.schema import ResolvedTarget


def portable_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe without paths of this machine: their last part stays."""
    return msgspec.convert(portable(msgspec.to_builtins(recipe)), Recipe)


def portable(value: Any) -> Any:
    """Return JSON-like data with the last part of every string that is an absolute path."""
    if isinstance(value, Mapping):
        return {key: portable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(child) for child in value]
    if isinstance(value, str) and (path := PurePath(value.removeprefix("file:"))).is_absolute():
        return path.name
    return value


def licence_of(name: str, provenance: Mapping[str, Any]) -> LicenceRecord:
    """Return the licence of a fetched source from its provenance: of a folder only its last part is named."""
    source = str(provenance.get("name", name))
    named = source if str(provenance.get("spec", "")).startswith("hf:") else PurePath(source).name
    return LicenceRecord(
        name=str(provenance.get("title") or named),
        version=str(provenance.get("version") or ""),
        licence=str(provenance.get("licence") or "as stated by its owner"),
        attribution=str(provenance.get("attribution") or "given by the user of the recipe"),
        url=provenance.get("url"),
    )


def licences_of(inputs: Inputs, pairs: PairSet) -> list[LicenceRecord]:
    """Return whom to credit for pictures: one's own pairs', and those of other domains if any were used."""
    others = inputs.get("auxiliary-pairs")
    return [
        LicenceRecord(
            name=entry.name,
            version=entry.version,
            licence=entry.licence,
            attribution=entry.attribution,
            url=entry.url,
        )
        for entry in (*pairs.licences, *(PairSet.open(others).licences if others is not None else ()))
    ]


def manifest_of(
    inputs: Inputs,
    pairs: PairSet,
    recipe: Recipe,
    resolved: ResolvedTarget,
    weights: Sequence[LicenceRecord],
) -> Manifest:
    """Return the manifest but for its files and its space; every stage that was an input is recorded."""
    tried = quantize_report(inputs["quantize"])
    latency = latencies_of(inputs["latency"])
    target = resolved.target
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
        name=f"{recipe.name}-{target.name}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        edgeglm=__version__,
        target=TargetRecord(
            name=target.name,
            description=target.title,
            members=tuple(member.name for member in resolved.members),
            facts=_facts(resolved),
        ),
        default_variant=fastest_variant(latency, [variant.name for variant in variants]),
        variants=variants,
        left_out=tuple(
            LeftOutRecord(name=name, reason=why, metrics=usable_metrics(best_trial(tried, name)))
            for name, why in sorted(tried.left_out.items())
        ),
        towers=_towers(inputs),
        stages=tuple(_stage_record(name, inputs[name]) for name in inputs),
        licences=(*licences_of(inputs, pairs), *weights),
        seeds={"recipe": recipe.seed},
    )


def fastest_variant(latency: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Return the variant whose towers together are the fastest at batch 1 where it was measured."""
    return min(names, key=lambda name: (sum(tower["1"] for tower in latency[name].values()), name))


def _facts(resolved: ResolvedTarget) -> dict[str, Any]:
    """Return what the boards are, each value once, in the order of the members."""
    members = resolved.members
    found: dict[str, list[Any]] = {
        "architectures": [member.arch for member in members],
        "compute_capabilities": [dotted_sm(member.sm) if member.sm else None for member in members],
        "memory_gb": [member.memory_gb.value if member.memory_gb else None for member in members],
        "builders": [member.builder for member in members],
        "lanes": [lane for member in members for lane in member.lanes],
    }
    known = {name: [value for value in dict.fromkeys(values) if value] for name, values in found.items()}
    return {"kind": resolved.target.kind, **{name: values for name, values in known.items() if values}}


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
        config=portable(key["config"]),
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


def metrics_of_bundle(inputs: Inputs, pairs: PairSet, recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """Return ``metrics.json``: every evaluation, the ratios with their intervals, latency and towers."""
    latency, ratios = latencies_of(inputs["latency"]), student_ratios(inputs, pairs)
    found: dict[str, Any] = {
        name: msgspec.to_builtins(metrics_of(inputs[f"{name}-evaluation"]))
        for name in ("teacher", "distil", "export")
    }
    found["variants"] = {variant.name: variant.metrics for variant in manifest.variants}
    found["left_out"] = {record.name: record.reason for record in manifest.left_out}
    found["ratios"] = msgspec.to_builtins({"tracks": ratios.tracks, "pools": ratios.pools})
    if "reranker-evaluation" in inputs:
        found["reranker"] = inputs["reranker-evaluation"].provenance["measured"]
    found["latency_ms"] = latency
    found["latency_tokens"] = inputs["latency"].provenance["measured"]["tokens"]
    found["towers"] = {
        model: {tower.name: {"detail": tower.detail, "parameters": tower.parameters} for tower in towers}
        for model, towers in (
            ("teacher", teacher_towers(inputs, recipe, latency["teacher"])),
            ("student", student_towers(inputs, recipe, latency[REFERENCE], REFERENCE)),
        )
    }
    return found


def notice(manifest: Manifest) -> str:
    """Return NOTICE.md: whom this bundle owes what."""
    lines = [f"# Sources of the bundle {manifest.name}", ""]
    for record in manifest.licences:
        link = f" <{record.url}>" if record.url else ""
        lines.append(f"- {record.name} {record.version}: {record.licence}. {record.attribution}.{link}")
    return "\n".join([*lines, ""])
