"""Pairs that do not suit a recipe, told as soon as they are there: before features are made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgeglm.adapt.beginning import require_told, said_texts
from edgeglm.adapt.conse import named_classes
from edgeglm.adapt.features_stage import TOWERS_CODE
from edgeglm.build.sources import TEXT
from edgeglm.build.stage_memory import run_stage
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet

_LENGTH = 32  # tokens; the vocabulary does not depend on it
_CLASS_NAMES = "class-names"


class VocabularyFitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text teacher, and how many entries it and its student keep; 0 is all."""

    text_teacher: str
    teacher: int
    student: int


class VocabularyFitStage(Stage[VocabularyFitConfig]):
    """``vocabulary.json``: that both vocabularies hold what the pairs say. It is asked once."""

    name = "vocabulary-fit"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.suited",
        "edgeglm.adapt.beginning",
        "edgeglm.adapt.conse",
        "edgeglm.adapt.text_teacher",
        *TOWERS_CODE,
        "edgeglm.data.auxiliary",
        "edgeglm.data.tokenization",
        "edgeglm.data.unseen_names",
        "edgeglm.data.vocabulary",
    )
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "tokenizers")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Trim both as their own stages would."""
        from edgeglm.adapt.text_teacher import keep_entries, load_text_teacher
        from edgeglm.data.vocabulary import trimmed_tokenizer

        config, pairs = self.config, PairSet.open(inputs["pairs"])
        captions = pairs.training_texts()
        named = named_classes(inputs[_CLASS_NAMES], pairs) if _CLASS_NAMES in inputs else None
        with context.store.scratch() as folder:
            text = load_text_teacher(config.text_teacher, inputs["text"], folder / "text", max_length=_LENGTH)
            keep_entries(text, said_texts(captions, named), config.teacher, folder / "kept")
            if 0 < config.student < text.tokenizer.vocabulary_size:
                trimmed_tokenizer(
                    text.tower.tokenizer_path, captions, count=config.student, lowercase=text.lowercase
                )
        (out / "vocabulary.json").write_text(json.dumps({"captions": len(captions)}))
        return {"captions": len(captions)}


def require_suited(
    recipe: Recipe,
    pairs: Artifact,
    sources: Mapping[str, Artifact],
    context: Context,
    *,
    student: bool = True,
) -> None:
    """Raise UserError for what a stage hours from here would say of these pairs.

    Args:
        recipe: Its ``teacher``, and the ``vocabulary`` of its student.
        pairs: What the first stage made.
        sources: What was fetched, by the name of the source.
        context: Store, progress, threads.
        student: Whether a student is made too.
    """
    teacher, opened = recipe.teacher, PairSet.open(pairs)
    if student and not opened.tracks:
        raise UserError(
            "no image is held out of training, so nothing could be evaluated; raise data.unseen_fraction"
        )
    require_told(teacher, opened)
    config = VocabularyFitConfig(
        text_teacher=teacher.text,
        teacher=teacher.vocabulary,
        student=recipe.student.vocabulary if student else 0,
    )
    if not config.teacher and not config.student:
        return
    inputs = {"pairs": pairs, "text": sources[TEXT]}
    if teacher.conse.weight:
        inputs[_CLASS_NAMES] = sources[f"teacher:{_CLASS_NAMES}"]
    run_stage(VocabularyFitStage(config), inputs, context)
