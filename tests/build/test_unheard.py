"""If these fail, a line of a recipe changes nothing and nobody says so."""

from __future__ import annotations

import pytest

from edgeglm.build.unheard import require_heard, require_heard_teacher, unread_data, unread_passes
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe, recipe_from_toml


def recipe(*overrides: str) -> Recipe:
    return recipe_from_toml("", origin="here", overrides=overrides)


TEACHERS = [
    ("teacher.domain.pseudo_label_epochs=5", "set teacher.domain.pseudo_label_rounds above 0"),
    ("teacher.auxiliary.epochs=5", "set teacher.auxiliary.icons, such as"),
    ("teacher.ensemble=scaled", "name a second backbone in teacher.image"),
    ("teacher.multitask.reptile_steps=9", "set teacher.multitask.reptile_rounds above 0"),
    ("teacher.multitask.soft_weight=1", 'set teacher.multitask.sharing = "soft"'),
    ("teacher.multitask.gradnorm_alpha=1", 'set teacher.multitask.balance = "gradnorm"'),
    ("teacher.image_rate=0.1", "set teacher.image_blocks above 0"),
    ("teacher.tuned_rate=0.1", "adapters learn at teacher.lora_learning_rate; set that one"),
    ("teacher.virtual_tokens=4", 'set teacher.tuning = "prompt" or "p-tuning"'),
    ('teacher.pretraining.corpus=["a.txt"]', "set teacher.pretraining.epochs above 0"),
    ("teacher.pretraining.glossary=terms.tsv", "set teacher.pretraining.epochs above 0"),
]
TOGETHER = [
    (
        ("teacher.multitask.sharing=soft", "teacher.multitask.balance=pcgrad"),
        'soft sharing has none; set teacher.multitask.sharing = "hard"',
    ),
    (("teacher.lora_epochs=0", "teacher.tuning=dora"), "set teacher.lora_epochs above 0"),
    (("teacher.tuning=full", "teacher.lora_learning_rate=0.1"), "learn at teacher.tuned_rate; set that one"),
    (("teacher.tuning=bottleneck", 'teacher.lora_targets=["query"]'), "set it to one of lora, rslora"),
    (("teacher.tuning=full", "teacher.lora_rank=4"), "set teacher.tuning to one of lora, .*bottleneck"),
    (("teacher.tuning=ia3", "teacher.lora_dropout=0.2"), "set teacher.tuning to one of lora, rslora, dora,"),
    (("teacher.pretraining.epochs=1", "teacher.pretraining.glossary=a.tsv"), "set .*term_weight above 0"),
    (("teacher.pretraining.epochs=1", "teacher.pretraining.name_model=de"), 'deidentify = "presidio"'),
]
STUDENTS = [
    ("student.losses.steps=50", "set one of labels, feature"),
    ("student.image_target=each", "set student.views to at most 3, or teacher.views to 4"),
    ("reranker.steps=3000", r"reranker\.steps is 3000 and .* set reranker\.enabled = true, or leave it out"),
]


@pytest.mark.parametrize(("override", "remedy"), [*TEACHERS, *STUDENTS])
def test_a_key_that_nothing_would_read_is_refused_with_what_would_make_it_count(
    override: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=remedy):
        require_heard(recipe(override))


@pytest.mark.parametrize(("override", "remedy"), TEACHERS)
def test_a_teacher_alone_is_asked_the_same(override: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        require_heard_teacher(recipe(override).teacher)


@pytest.mark.parametrize(("overrides", "remedy"), TOGETHER)
def test_a_key_that_another_silences_is_refused(overrides: tuple[str, ...], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        require_heard_teacher(recipe(*overrides).teacher)


def test_an_heir_of_a_teacher_with_fewer_words_is_refused() -> None:
    with pytest.raises(UserError, match=r"set teacher\.vocabulary to 0, or choose another student\.size"):
        require_heard(recipe("student.size=edge-heir", "teacher.vocabulary=8000"))


def test_branches_of_a_tower_without_convolutions_are_refused() -> None:
    with pytest.raises(UserError, match=r"student\.branches .* edge-vit has none; leave it out, or .*edge-s"):
        require_heard(recipe("student.branches=true", "student.size=edge-vit"))


def test_a_resolution_that_leaves_a_rest_beside_the_patches_is_refused() -> None:
    with pytest.raises(UserError, match=r"reads patches of 8 pixels, .*set it to 48, or 56"):
        require_heard(recipe("student.size=edge-vit", "student.resolution=50"))
    require_heard(recipe("student.size=edge-vit", "student.resolution=48"))


@pytest.mark.parametrize("key", ["negatives", "candidates"])
def test_a_re_ranker_of_one_candidate_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="set both to 2 or more"):
        require_heard(recipe("reranker.enabled=true", f"reranker.{key}=1"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("teacher.domain.pseudo_label_epochs=5", "teacher.domain.pseudo_label_rounds=1"),
        ("teacher.ensemble=scaled", 'teacher.image=["dinov2-small", "efficientnet-lite0"]'),
        ("teacher.tuning=full", "teacher.tuned_rate=0.1", "teacher.tuned_blocks=1"),
        (
            "teacher.pretraining.epochs=1",
            "teacher.pretraining.term_weight=1",
            "teacher.pretraining.glossary=a",
        ),
        ("student.losses.steps=50", "student.losses.feature=1"),
        ("student.image_target=each", "student.views=3"),
        ("student.branches=true",),
        ("reranker.enabled=true", "reranker.steps=3000"),
    ],
)
def test_what_is_read_is_taken(overrides: tuple[str, ...]) -> None:
    require_heard(recipe(*overrides))


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("student.size=edge-vit", "set student.size to edge-s"),
        ('student.inherit=""', "set student.inherit to efficientnet-lite0"),
    ],
)
def test_blocks_that_nothing_was_inherited_into_cannot_stay_as_they_were(override: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        require_heard(recipe(override, "student.frozen_blocks=3"))
    require_heard(recipe(override, "student.frozen_blocks=0"))


def test_passes_of_single_towers_are_told_as_unread_where_both_learn_together() -> None:
    keys = ("student.text_epochs=10", "student.caption_repeats=2")
    assert unread_passes(recipe(*keys).student) == ()
    together = recipe(*keys, "student.losses.labels=1").student
    assert unread_passes(together) == ("student.text_epochs", "student.caption_repeats")


def test_a_path_beside_icons_is_refused_as_these_would_be_built_in_its_place() -> None:
    with pytest.raises(UserError, match=r"data\.path is shop and .*set data\.source to \"folder\" or"):
        require_heard(recipe("data.path=shop"))
    require_heard(recipe("data.path=shop", "data.source=folder"))


def test_what_is_said_of_icons_is_told_as_unread_where_pairs_are_ones_own() -> None:
    keys = ("data.target=noto", 'data.language="zh"', "data.margin=0.1")
    assert unread_data(recipe(*keys).data) == ()
    own = recipe(*keys, "data.source=folder", "data.path=shop").data
    assert unread_data(own) == ("data.target", "data.language")
