"""Pairs that do not suit a recipe, told as soon as they are there: before features are made of them."""

from __future__ import annotations

from collections.abc import Mapping

from edgeglm.adapt.beginning import require_told, said_texts
from edgeglm.adapt.conse import named_classes
from edgeglm.build.sources import TEXT
from edgeglm.core.artifact import Artifact
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context
from edgeglm.data.pairs import PairSet


def require_suited(
    recipe: Recipe,
    pairs: PairSet,
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
        context: For scratch space.
        student: Whether a student is made too.
    """
    require_told(recipe.teacher, pairs)
    wanted = recipe.student.vocabulary if student else 0
    if not recipe.teacher.vocabulary and not wanted:
        return
    from edgeglm.adapt.text_teacher import keep_entries, load_text_teacher
    from edgeglm.data.vocabulary import trimmed_tokenizer

    teacher, captions = recipe.teacher, pairs.training_texts()
    named = named_classes(sources["teacher:class-names"], pairs) if teacher.conse.weight else None
    with context.store.scratch() as folder:
        text = load_text_teacher(
            teacher.text, sources[TEXT], folder / "text", max_length=recipe.student.max_length
        )
        keep_entries(text, said_texts(captions, named), teacher.vocabulary, folder / "kept")
        if 0 < wanted < text.tokenizer.vocabulary_size:
            trimmed_tokenizer(text.tower.tokenizer_path, captions, count=wanted, lowercase=text.lowercase)
