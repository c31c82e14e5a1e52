"""The pack stage: everything a device needs, as a bundle folder inside the artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgeglm.build.lane_a import LaneTrial, takes_lane_a, with_lane_a
from edgeglm.build.pack_manifest import licence_of, manifest_of, metrics_of_bundle, notice, portable_recipe
from edgeglm.build.pack_sources import (
    REFERENCE,
    gallery_sources,
    golden_inputs,
    golden_outputs,
    model_sources,
    settings_sources,
)
from edgeglm.build.report_data import report_of
from edgeglm.build.space import agreement_of_files, measured_space
from edgeglm.build.student_budget import Asked
from edgeglm.build.table import quantize_report
from edgeglm.build.tower_scores import TowerScores
from edgeglm.bundle.goldens import golden_sources
from edgeglm.bundle.manifest import FileRecord, LicenceRecord, Manifest, content_digest
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile.fit import VariantFit, fits_of, require_fit
from edgeglm.compile.preflight import variant_subjects
from edgeglm.compile.shell import write_with_shell
from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.report import render_report
from edgeglm.targets.costs import GraphCosts, costs_from_json
from edgeglm.targets.schema import ResolvedTarget, Target, resolve_target

BUNDLE_FOLDER = "bundle"
FIT_NAME = "preflight.json"


class PackStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bundle says of itself; ``weights`` are the licences of the pretrained towers.

    ``asked`` is what the search was asked for that chose the recipe's student, if one did.
    """

    recipe: Recipe
    target: ResolvedTarget
    weights: tuple[LicenceRecord, ...] = ()
    asked: Asked | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, target: Target, sources: Mapping[str, Artifact], asked: Asked | None = None
    ) -> PackStageConfig:
        """Make it from a recipe, a target and the fetched sources."""
        found = {
            name: licence_of(name, artifact.provenance)
            for name, artifact in sorted(sources.items())
            if not name.startswith(("data:", "auxiliary:"))  # the stages that read pictures tell of those
        }
        weights = {record.name: record for record in found.values()}
        return cls(
            recipe=portable_recipe(recipe),
            target=resolve_target(target, recipe.engine),
            weights=tuple(weights.values()),
            asked=asked,
        )


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
        "edgeglm.evaluate",
        "edgeglm.engines.onnxruntime_engine",
        "edgeglm.data.transforms",
        "edgeglm.data.tokenization",
    )
    libraries: ClassVar[tuple[str, ...]] = (
        "matplotlib",
        "onnx",
        "pillow",
        "onnxruntime-gpu",
        "numpy",
        "tokenizers",
    )

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Collect, embed the goldens, draw the report, write the bundle."""
        pairs = PairSet.open(inputs["pairs"])
        recipe, target = self.config.recipe, self.config.target
        with context.progress.task("Pack", total=4) as task:
            sources = {**model_sources(inputs), **settings_sources(inputs, recipe, target)}
            task.advance()
            sources.update(gallery_sources(pairs, inputs, recipe.pack.thumbnails))
            task.advance()
            images, texts, feeds = golden_inputs(pairs, inputs, recipe.pack.goldens)
            sources.update(golden_sources(images, texts, golden_outputs(inputs, feeds, context.threads)))
            task.advance()
            manifest = manifest_of(inputs, pairs, recipe, target, self.config.weights)
            names = [variant.name for variant in manifest.variants]
            space = measured_space(pairs, inputs, names, reference=REFERENCE, threads=context.threads)
            manifest = msgspec.structs.replace(manifest, space=space)
            lanes: Mapping[str, LaneTrial] = {}
            if takes_lane_a(target):
                scores = TowerScores(
                    pairs,
                    inputs["export"].path,
                    threads=context.threads,
                    seed=recipe.seed,
                    minimum=recipe.gates.quantized_ratio,
                    integers=False,  # as TensorRT computes
                )
                with context.store.scratch() as scratch:
                    sources, manifest, lanes = with_lane_a(
                        sources,
                        manifest,
                        tried=quantize_report(inputs["quantize"]),
                        feeds=feeds,
                        scratch=scratch,
                        threads=context.threads,
                        scores=scores,
                        agreement=lambda towers: agreement_of_files(
                            pairs, inputs, towers, scores, reference=REFERENCE, threads=context.threads
                        ),
                    )
            fits = _fits(manifest, sources, target)
            sources[FIT_NAME] = msgspec.json.format(msgspec.json.encode(fits), indent=1)
            sources["NOTICE.md"] = notice(manifest).encode()
            licences = msgspec.to_builtins(manifest.licences)
            sources["licences.json"] = json.dumps(licences, indent=1).encode()
            metrics = metrics_of_bundle(inputs, pairs, recipe, manifest)
            sources["metrics.json"] = json.dumps(metrics, indent=1, sort_keys=True).encode()
            digest = content_digest(_listed(sources))  # the report quotes it, and is no part of it
            told = report_of(inputs, pairs, recipe, target, manifest, digest, lanes, asked=self.config.asked)
            page = render_report(told)
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
