"""The stages of a student whose towers learn together, in place of one stage a tower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.distill.stages import (
    anchors,
    concept_means,
    concept_of_images,
    mapped,
    own_tokenizer,
    saved,
    started_text,
    text_rows,
    text_shape,
)
from edgeglm.distill.student_stage import StudentStage, StudentStageConfig


class TogetherStage(StudentStage):
    """Both towers in one step, by the recipe's ``student.losses``.

    It takes the place of the text tower's stage, and holds the files of both; ``ImagePartStage`` that of the
    image tower's.
    """

    name = "distil-text"

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Train on the cached embeddings."""
        import torch

        from edgeglm.distill.image_student import (
            front_activations,
            frozen_blocks,
            image_student,
            image_targets,
        )
        from edgeglm.distill.joint import Cached, Terms, fit_towers_together
        from edgeglm.models.published import lite0_state
        from edgeglm.train.concepts import Concepts
        from edgeglm.train.loop import seeded

        pairs, seed, progress = PairSet.open(inputs["pairs"]), self.config.seed, context.progress
        config, tokenizer, kept = own_tokenizer(self.config.student, inputs, pairs.training_texts(), out)
        concepts, text_TD = Concepts.of(pairs), text_rows(inputs)
        concept_N = concept_of_images(pairs, concepts)
        used = torch.from_numpy(np.sort(pairs.by_role("labelled", "unlabelled")))
        images_VND = mapped(inputs["teacher"].path / "image_embeddings.npy")
        target_VND = image_targets(images_VND, config)
        inherit = lite0_state(inputs["inherit"]) if "inherit" in inputs else None
        dim = images_VND.shape[2]
        with self.keeping(inputs, context) as keeper, seeded(seed, threads=context.threads):
            image = image_student(config, embedding_dim=dim, inherit=inherit)
            text = started_text(
                config, inputs, kept, teacher=self.config.teacher, embedding_dim=dim, context=context
            )
            front_VU = front_activations(
                image,
                pairs,
                used,
                len(target_VND),
                frozen_blocks(image, config),
                resolution=config.resolution,
                seed=self.config.view_seed,
            )
            cached = Cached(
                front_VU=front_VU,
                target_VUD=target_VND[:, used],
                concept_U=concept_N[used],
                concepts=concepts,
                texts=json.loads((inputs["targets"].path / "texts.json").read_text("utf-8")),
                text_TD=text_TD,
                name_KD=anchors(text_TD, concepts, config.anchors, seed=seed),
                mean_KD=concept_means(images_VND[0], concepts),
            )
            terms = Terms(**config.losses.weights())
            steps = config.losses.steps
            curve = fit_towers_together(
                image,
                text,
                tokenizer,
                cached,
                terms,
                config,
                steps=steps,
                seed=seed,
                progress=progress,
                keeper=keeper,
            )
            of_image = saved(image, "image", out, {"embedding_dim": dim}, curve)
            return saved(text, "text", out, text_shape(config, tokenizer, dim), curve) | {"image": of_image}


class ImagePartStage(Stage[StudentStageConfig]):
    """The image tower out of what :class:`TogetherStage` made."""

    name = "distil-image"
    code: ClassVar[tuple[str, ...]] = ("edgeglm.distill.together",)

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Copy its files."""
        made = inputs["distil-text"]
        for name in ("image.safetensors", "image.json"):
            shutil.copyfile(made.path / name, out / name)
        return dict(made.provenance["measured"]["image"])
