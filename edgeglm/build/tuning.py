"""Where INT8 misses its gate: both students learn on while they are rounded, and are exported again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeglm.build.export_stage import exported_image, exported_text, load_students
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import ExportConfig, StudentConfig
from edgeglm.core.stage import Inputs
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer

if TYPE_CHECKING:
    from edgeglm.distill.quantization_aware import Taught


class TuningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the students were trained and exported, for how many steps they go on, and with which weights."""

    student: StudentConfig
    export: ExportConfig
    steps: int
    weight_bits: int = 8


def tuner(
    inputs: Inputs, config: TuningConfig, *, seed: int, threads: int, progress: Progress
) -> Callable[[Path, str], None]:
    """Return what writes a tuned ``image.onnx`` or ``text.onnx`` into a folder, held against torch.

    Args:
        inputs: ``pairs``, ``targets``, ``teacher``, ``distil-image`` and ``distil-text``.
        config: As the students were trained.
        seed: Of order and views.
        threads: Of torch.
        progress: Shows the steps.
    """

    def tune(folder: Path, tower: str) -> None:
        from edgeglm.distill.quantization_aware import tune_image, tune_text
        from edgeglm.train.fake_quantization import Rounding
        from edgeglm.train.loop import seeded

        student = config.student
        image, text = load_students(inputs, student.size, student.resolution)
        rounding = Rounding(weight_bits=config.weight_bits)
        shared: Any = {"steps": config.steps, "seed": seed, "progress": progress, "rounding": rounding}
        with seeded(seed, threads=threads):
            taught = _taught(inputs, student, seed=seed)
            if tower == "image":
                tune_image(image, taught, student, **shared)
            else:
                _, settings = teacher_tokenizer(inputs["teacher"].path)
                path = inputs["distil-text"].path / "tokenizer.json"
                tokenizer = Tokenizer(path, lowercase=settings.lowercase)
                tune_text(text, tokenizer, taught, student, **shared)
        if tower == "image":
            exported_image(image, student.resolution, folder, config.export)
        else:
            exported_text(text, folder, config.export)

    return tune


def _taught(inputs: Inputs, student: StudentConfig, *, seed: int) -> Taught:
    """Return what the students learnt from, mapped from the store."""
    import torch

    from edgeglm.distill.image_student import image_targets
    from edgeglm.distill.quantization_aware import Taught
    from edgeglm.distill.stages import anchors, concept_means, concept_of_images, text_rows
    from edgeglm.train.concepts import Concepts

    pairs = PairSet.open(inputs["pairs"])
    concepts, text_TD = Concepts.of(pairs), text_rows(inputs)
    said_VND = torch.from_numpy(np.load(inputs["teacher"].path / "image_embeddings.npy", mmap_mode="c"))
    return Taught(
        pairs=pairs,
        # The mean of the views for either target: these steps draw views of their own.
        target_ND=image_targets(said_VND, msgspec.structs.replace(student, image_target="mean"))[0],
        name_KD=anchors(text_TD, concepts, student.anchors, seed=seed),
        concept_N=concept_of_images(pairs, concepts),
        texts=json.loads((inputs["targets"].path / "texts.json").read_text("utf-8")),
        captions=len(concepts.texts),
        text_TD=text_TD,
        mean_KD=concept_means(said_VND[0], concepts),
    )
