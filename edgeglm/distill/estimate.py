"""How good a student of some shape will be, from a short training on the teacher's cached words.

Nothing is asked of the teacher, and nothing of what an evaluation asks: one labelled image of each of some
concepts is held back, the two towers learn from a part of the rest, and the concepts' names are asked of the
images held back. What comes out ranks shapes; it is no forecast of a figure.

Shapes: G concepts asked for, S images trained on, D embedding dimensions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context, Inputs
from edgeglm.data.pairs import PairSet
from edgeglm.distill.image_student import fit_image_student, image_student, image_targets
from edgeglm.distill.stages import (
    anchors,
    concept_means,
    concept_of_images,
    mapped,
    own_tokenizer,
    started_text,
    text_rows,
)
from edgeglm.distill.text_student import fit_text_student
from edgeglm.evaluate.retrieval import FloatArray, average_precisions
from edgeglm.models.published import lite0_state
from edgeglm.models.student_shapes import student_shape
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import seeded

ASKED = 400
IMAGES = 1500
PHRASES = 4000
_BATCH = 128


class Estimator:
    """Estimates students of one recipe; a tower that two of them share is trained once.

    Attributes:
        queries: G.
        vocabulary: Entries of the students' tokenizer.
    """

    def __init__(
        self, inputs: Inputs, config: StudentConfig, *, steps: int, seed: int, scratch: Path, context: Context
    ) -> None:
        self._inputs, self._context, self._steps, self._seed = inputs, context, steps, seed
        self._pairs = pairs = PairSet.open(inputs["pairs"])
        self._concepts = concepts = Concepts.of(pairs)
        captions = pairs.training_texts()
        config, self._tokenizer, self._kept = own_tokenizer(config, inputs, captions, scratch)
        self._config = msgspec.structs.replace(
            config, views=1, image_target="mean", patience=0, checkpoint_epochs=0, caption_repeats=1
        )
        self._teacher_VND = mapped(inputs["teacher"].path / "image_embeddings.npy")
        rng = np.random.default_rng((seed, 11))
        count = min(ASKED, max(1, len(concepts.image_N) // 4))  # most images must be left to learn from
        asked_G = np.sort(rng.permutation(len(concepts))[:count])
        of_concept = [np.flatnonzero(concepts.concept_N.numpy() == k) for k in asked_G]
        self._held_G = concepts.image_N.numpy()[[int(rng.choice(places)) for places in of_concept]]
        self._names = [concepts.texts[concepts.captions[k][0]] for k in asked_G]
        rest = np.setdiff1d(pairs.by_role("labelled", "unlabelled"), self._held_G)
        self._images_S = torch.from_numpy(np.sort(rng.permutation(rest)[:IMAGES]))
        texts = json.loads((inputs["targets"].path / "texts.json").read_text("utf-8"))
        phrases = len(captions) + np.sort(rng.permutation(len(texts) - len(captions))[:PHRASES])
        chosen = [*range(len(captions)), *phrases.tolist()]
        self._texts, self._rows_TD = [texts[i] for i in chosen], text_rows(inputs)[chosen]
        self._captions = len(captions)
        self._image: dict[tuple[Any, ...], FloatArray] = {}
        self._text: dict[tuple[Any, ...], FloatArray] = {}
        self.queries, self.vocabulary = len(asked_G), self._tokenizer.vocabulary_size

    def map10(self, size: str, resolution: int) -> float:
        """Return the mAP@10 of a student after its short training. The same arguments give the same value."""
        shape = student_shape(size)
        config = msgspec.structs.replace(self._config, size=size, resolution=resolution)
        image = (shape.blocks, shape.channels, resolution)
        if image not in self._image:
            self._image[image] = self._image_rows(config)
        text = (shape.factor, shape.width, shape.layers)
        if text not in self._text:
            self._text[text] = self._text_rows(config)
        return self._scored(self._text[text], self._image[image])

    def teacher_map10(self) -> float:
        """Return what the teacher reaches on the same question; it has learnt from these images."""
        names = [self._concepts.texts.index(name) for name in self._names]
        return self._scored(
            text_rows(self._inputs)[names].numpy(), self._teacher_VND[0][self._held_G].numpy()
        )

    def _scored(self, text_GD: FloatArray, image_GD: FloatArray) -> float:
        relevant = [[place] for place in range(self.queries)]
        return float(average_precisions(text_GD, image_GD, relevant).mean())

    def _image_rows(self, config: StudentConfig) -> FloatArray:
        concepts, pairs = self._concepts, self._pairs
        inherit = lite0_state(self._inputs["inherit"]) if "inherit" in self._inputs else None
        with seeded(self._seed, threads=self._context.threads):
            tower = image_student(config, embedding_dim=self._teacher_VND.shape[2], inherit=inherit)
            fit_image_student(
                tower,
                pairs,
                image_targets(self._teacher_VND, config),
                anchors(text_rows(self._inputs), concepts, config.anchors, seed=self._seed),
                concept_of_images(pairs, concepts),
                config,
                seed=self._seed,
                view_seed=self._seed,
                progress=QuietProgress(),
                steps=self._steps,
                images=self._images_S,
            )
            rows = []
            with torch.no_grad():
                for start in range(0, len(self._held_G), _BATCH):
                    shown = pairs.shown(self._held_G[start : start + _BATCH], config.resolution)
                    fed = torch.from_numpy(shown)
                    rows.append(tower(fed).numpy())
        return np.concatenate(rows)

    def _text_rows(self, config: StudentConfig) -> FloatArray:
        with seeded(self._seed, threads=self._context.threads):
            tower = started_text(
                config,
                self._inputs,
                self._kept,
                teacher="",
                embedding_dim=self._rows_TD.shape[1],
                context=self._context,
            )
            fit_text_student(
                tower,
                self._tokenizer,
                self._texts,
                self._rows_TD,
                concept_means(self._teacher_VND[0], self._concepts),
                config,
                captions=self._captions,
                seed=self._seed,
                progress=QuietProgress(),
                steps=self._steps,
            )
            rows = []
            with torch.no_grad():
                for start in range(0, len(self._names), _BATCH):
                    batch = self._names[start : start + _BATCH]
                    ids, mask = self._tokenizer.encode(batch, max_length=config.max_length)
                    rows.append(tower(torch.from_numpy(ids), torch.from_numpy(mask)).numpy())
        return np.concatenate(rows)
