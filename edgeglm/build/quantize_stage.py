"""The quantize stage: a calibration set from training data only, candidates, and their gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.build.tower_scores import TowerScores
from edgeglm.build.tuning import TuningConfig, tuner
from edgeglm.calibration.plan import PrecisionPlan, plan_from_file
from edgeglm.calibration.quantize import make_candidates
from edgeglm.calibration.schemes import Method, cpu_schemes, scheme_named
from edgeglm.calibration.sets import Candidates, calibration_set_from_arrays
from edgeglm.calibration.variants import QuantizeConfig as CandidatesConfig
from edgeglm.calibration.variants import Tune
from edgeglm.compile.clock import gpu_clock
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.recipe import QuantizeConfig, Recipe, StudentConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.environment import cpu_flags
from edgeglm.evaluate.towers import gallery_images
from edgeglm.targets.schema import Target, resolve_target

#: Of the ranges under a scheme: cutting a long tail kept most on the founding data, so it comes first.
METHODS: tuple[Method, ...] = ("percentile", "max")
_PHRASES = 2000  # candidates for the text calibration set


class QuantizeStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The recipe's table, the gate, what INT8 graphs compute in besides, and what makes them.

    ``schemes`` are what the instructions of the machine that builds for a CPU may like, so they are in the
    key; which of them makes the files is timed. ``timed_on`` is the device that GPU 0 of this machine is, if
    it is the target's and a search may time plans on it; else all TensorRT targets share the key.
    ``tuning`` is None where nothing is trained for INT8.
    """

    quantize: QuantizeConfig
    candidates: tuple[Literal["fp16", "int8"], ...]
    minimum_ratio: float
    high_precision: Literal["fp16", "fp32"]
    seed: int
    schemes: dict[str, tuple[str, ...]] = {}
    plans: dict[str, PrecisionPlan] = {}
    timed_on: Target | None = None
    tuning: TuningConfig | None = None


class QuantizeStage(Stage[QuantizeStageConfig]):
    """``models/<variant>/{image,text}.onnx`` of FP32 and each candidate above the gate.

    Beside them ``variants.json`` (all that was tried), ``precision_plan.json`` (what decides the files),
    ``calibration.json``, and ``embeddings-<variant>.npy`` float32 [G, D] of the images that a bundle shows.
    """

    name = "quantize"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.quantize_stage",
        "edgeglm.build.tower_scores",
        "edgeglm.build.pools",
        "edgeglm.build.tuning",
        "edgeglm.build.export_stage",
        "edgeglm.distill",
        "edgeglm.train",
        "edgeglm.models",
        "edgeglm.calibration",
        "edgeglm.evaluate",
        "edgeglm.export",
        "edgeglm.data.transforms",
        "edgeglm.data.tokenization",
    )
    libraries: ClassVar[tuple[str, ...]] = ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "numpy", "torch")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Draw the set, make the candidates, evaluate each on its very file."""
        pairs, exported = PairSet.open(inputs["pairs"]), inputs["export"].path
        scores = TowerScores(
            pairs,
            exported,
            threads=context.threads,
            seed=self.config.seed,
            minimum=self.config.minimum_ratio,
        )
        with context.store.scratch() as scratch:
            calibration = calibration_set_from_arrays(
                scratch / "calibration",
                calibration_candidates(pairs, inputs["targets"].path, exported),
                preprocessing=json.loads((exported / "preprocessing.json").read_text()),
                samples=self.config.quantize.calibration_samples,
                seed=self.config.seed,
            )
            shutil.copytree(exported / "models" / "fp32", scratch / "fp32")  # tools rewrite what they read
            for path in (scratch / "fp32").iterdir():
                path.chmod(0o644)
            report = make_candidates(
                scratch / "fp32",
                scratch / "models",
                calibration,
                evaluate=lambda _, files: scores.metrics(files),
                judge=scores.judged,
                config=CandidatesConfig(
                    candidates=self.config.candidates,
                    policies={
                        "image": self.config.quantize.image_policy,
                        "text": self.config.quantize.text_policy,
                    },
                    high_precision=self.config.high_precision,
                    schemes=self.config.schemes,
                    methods=METHODS,
                    plans=self.config.plans,
                    search_evaluations=self.config.quantize.search_evaluations,
                    minimum_score=self.config.minimum_ratio,
                ),
                clock=None
                if self.config.timed_on is None
                else gpu_clock(self.config.timed_on, progress=context.progress),
                progress=context.progress,
                tune=self._tuner(inputs, context),
            )
            for variant in report.variants:
                shutil.copytree(scratch / "models" / variant, out / "models" / variant)
            shutil.copyfile(calibration.folder / "calibration.json", out / "calibration.json")
        for name in report.variants:
            rows = scores.embeddings(out / "models" / name / "image.onnx", pairs.shown_images())
            np.save(out / f"embeddings-{name}.npy", rows)
        tried = msgspec.to_builtins(report)
        (out / "variants.json").write_text(json.dumps(tried, indent=1, sort_keys=True))
        (out / "precision_plan.json").write_text(json.dumps(_plan(tried), indent=1, sort_keys=True))
        tuned = sorted(name for name, variant in report.variants.items() if variant.tuned)
        return {"variants": sorted(report.variants), "left_out": report.left_out, "tuned": tuned}

    def _tuner(self, inputs: Inputs, context: Context) -> Tune | None:
        tuning = self.config.tuning
        if tuning is None:
            return None
        return tuner(
            inputs, tuning, seed=self.config.seed, threads=context.threads, progress=context.progress
        )


def quantize_config(
    recipe: Recipe, target: Target, candidates: tuple[Literal["fp16", "int8"], ...]
) -> QuantizeStageConfig:
    """Return the stage's config for a target; plans are read here, so that their content is in the key."""
    on_cpu = target.kind == "cpu"
    flags = cpu_flags()
    schemes = {
        tower: tuple(scheme.name for scheme in cpu_schemes(flags, convolutions=tower == "image"))
        for tower in ("image", "text")
    }
    reduced = on_cpu and any(scheme_named(name).reduced for names in schemes.values() for name in names)
    clock = None
    if not on_cpu and recipe.quantize.search_evaluations:
        clock = gpu_clock(resolve_target(target, recipe.engine))  # with the options that finalize builds by
    paths = {"image": recipe.quantize.image_plan, "text": recipe.quantize.text_plan}
    return QuantizeStageConfig(
        quantize=recipe.quantize,
        candidates=candidates,
        minimum_ratio=recipe.gates.quantized_ratio,
        high_precision="fp32" if on_cpu else "fp16",
        seed=recipe.seed,
        schemes=schemes if on_cpu else {},
        plans={tower: plan_from_file(Path(path)) for tower, path in paths.items() if path},
        timed_on=None if clock is None else clock.member,
        tuning=TuningConfig(
            # How often a training was kept is no part of what it left.
            student=replace(recipe.student, checkpoint_epochs=StudentConfig().checkpoint_epochs),
            export=recipe.export,
            steps=recipe.quantize.qat_steps,
            weight_bits=7 if reduced else 8,
        )
        if recipe.quantize.qat_steps and "int8" in candidates
        else None,
    )


def calibration_candidates(pairs: PairSet, targets: Path, exported: Path) -> dict[str, Candidates]:
    """Return what may be drawn: labelled images that no gallery shows, texts that no track asks for."""
    preprocessing = read_preprocessing(exported)
    digests = pairs.image_sha256
    shown = {digests[i] for i in {*gallery_images(pairs.tracks), *pairs.evaluation_images()}}
    images = [i for i in pairs.by_role("labelled").tolist() if digests[i] not in shown]
    texts = _texts(pairs, targets)
    tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)

    def pixels(chosen: Sequence[int]) -> dict[str, Any]:
        return {"pixels": pairs.shown([images[i] for i in chosen], preprocessing.image.resolution)}

    def tokens(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = tokenizer.encode([texts[i] for i in chosen], max_length=preprocessing.text.max_length)
        return {"input_ids": ids, "attention_mask": mask}

    asked = sorted({query.text for track in pairs.tracks for query in track.queries})
    return {
        "image": Candidates(
            ids=[pairs.rows[i].id for i in images],
            strata=[pairs.rows[i].domain for i in images],
            digests=[digests[i] for i in images],
            tensors=pixels,
            evaluation_digests=shown,
        ),
        "text": Candidates(
            ids=texts,
            strata=[str(min(len(text.split()), 4)) for text in texts],
            digests=[sha256_bytes(text.encode()) for text in texts],
            tensors=tokens,
            evaluation_digests=[sha256_bytes(text.encode()) for text in asked],
            traits={"words": [str(len(text.split())) for text in texts]},
            rows_at_once=len(texts),  # padded together, to one length
        ),
    }


def _texts(pairs: PairSet, targets: Path) -> list[str]:
    asked = {query.text for track in pairs.tracks for query in track.queries}
    texts: list[str] = json.loads((targets / "texts.json").read_text("utf-8"))
    return [text for text in texts if text not in asked][:_PHRASES]


def _plan(tried: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the files: no metrics, no times."""
    variants = {
        name: {key: _untimed(variant[key]) for key in ("precisions", "sha256", "conversions")}
        for name, variant in tried["variants"].items()
    }
    return {"variants": variants, "left_out": sorted(tried["left_out"])}


def _untimed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _untimed(child) for key, child in value.items() if key != "seconds"}
    if isinstance(value, (list, tuple)):
        return [_untimed(child) for child in value]
    return value
