"""If these fail, methods of distillation are not compared on the same ground, or teach nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import StudentConfig  # noqa: E402
from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.distill import joint as room  # noqa: E402
from edgeglm.distill.image_student import image_student  # noqa: E402
from edgeglm.distill.joint import CLIP_KD, RECIPE, Cached, Terms, fit_towers_together  # noqa: E402
from edgeglm.distill.text_student import text_student  # noqa: E402
from edgeglm.models.students import StudentImageTower  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.kd_losses import feature_mse  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from tests.tiny_towers import WORDS, write_wordpiece  # noqa: E402

CONFIG = StudentConfig(
    size="edge-xs", inherit="efficientnet-lite0", resolution=32, image_batch_size=8, max_length=8
)
TEXTS = [*WORDS[:6], f"{WORDS[0]} {WORDS[1]}", f"{WORDS[2]} {WORDS[3]}"]
K, D, U, FROZEN = 6, 8, 24, 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return Tokenizer(write_wordpiece(path))


@pytest.fixture(scope="module")
def cached() -> Cached:
    generator = torch.Generator().manual_seed(0)

    def unit(count: int):
        return torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=1)

    text_TD = unit(len(TEXTS))
    concept_U = torch.arange(U) % K
    concept_U[-6:] = -1
    target_UD = torch.nn.functional.normalize(text_TD[torch.arange(U) % K] + 0.3 * unit(U), dim=1)
    with seeded(0, threads=1):
        tower = image_student(CONFIG, embedding_dim=D, inherit=None).eval()
        pixels = torch.rand(2 * U, 3, 32, 32, generator=generator)
        with torch.no_grad():
            assert isinstance(tower, StudentImageTower)
            front = tower.trunk.front(pixels, FROZEN)
    known = torch.nonzero(concept_U >= 0).flatten()
    return Cached(
        front_VU=front.view(2, U, *front.shape[1:]).half(),
        target_VUD=target_UD.expand(2, -1, -1),
        concept_U=concept_U,
        concepts=Concepts(
            image_N=known,
            concept_N=concept_U[known],
            texts=tuple(TEXTS[:K]),
            captions=tuple((i,) for i in range(K)),
        ),
        texts=TEXTS,
        text_TD=text_TD,
        name_KD=text_TD,
        mean_KD=text_TD[:K],
    )


def fitted(tokenizer: Tokenizer, cached: Cached, terms: Terms, *, steps: int = 12, config=CONFIG):
    with seeded(0, threads=1):
        image = image_student(config, embedding_dim=D, inherit=None)
        words = torch.randn(tokenizer.vocabulary_size, D, generator=torch.Generator().manual_seed(1))
        text = text_student(config, embedding_dim=D, words_WD=words)
        curve = fit_towers_together(
            image, text, tokenizer, cached, terms, config,
            steps=steps, captions=K, phrases=2, seed=0, progress=QuietProgress(),
        )  # fmt: skip
    return image, text, curve


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Terms)])
def test_each_term_alone_falls(tokenizer: Tokenizer, cached: Cached, name: str) -> None:
    *_, curve = fitted(tokenizer, cached, Terms(**{name: 1.0}), steps=40)
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("terms", [RECIPE, CLIP_KD])
def test_a_sum_of_terms_falls_and_frozen_blocks_stay(
    tokenizer: Tokenizer, cached: Cached, terms: Terms
) -> None:
    image, _, curve = fitted(tokenizer, cached, terms, steps=40)
    assert curve[-1] < curve[0]
    with seeded(0, threads=1):
        fresh = image_student(CONFIG, embedding_dim=D, inherit=None)
    assert isinstance(fresh, StudentImageTower)
    assert isinstance(image, StudentImageTower)
    before = [p for module in fresh.trunk.part(FROZEN) for p in module.parameters()]
    after = [p for module in image.trunk.part(FROZEN) for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_equal_seeds_give_equal_bits(tokenizer: Tokenizer, cached: Cached) -> None:
    states = [fitted(tokenizer, cached, RECIPE, steps=4)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_methods_that_are_compared_see_the_same_batches(
    tokenizer: Tokenizer, cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    drawn = room._drawn

    def recorded(*given):
        batch = drawn(*given)
        seen[-1].extend([*batch.image_B.tolist(), *batch.text_T.tolist()])
        return batch

    monkeypatch.setattr(room, "_drawn", recorded)
    for terms in (RECIPE, CLIP_KD):
        seen.append([])
        fitted(tokenizer, cached, terms, steps=4)
    assert seen[0] == seen[1]


def test_every_labelled_image_of_a_step_has_its_caption_there(cached: Cached) -> None:
    import numpy as np

    pool, _ = room._pools(cached, CONFIG, 0)
    batch = room._drawn(cached, 8, 6, 2, np.random.default_rng(0), pool)
    asked = set(cached.concept_U[batch.image_B].tolist()) - {-1}
    assert asked <= set(batch.concept_T.tolist())
    captions = batch.text_T[batch.concept_T >= 0]
    assert torch.equal(captions, batch.concept_T[batch.concept_T >= 0])  # here caption i is of concept i
    assert bool((batch.text_T[batch.concept_T < 0] >= K).all())


def test_each_view_is_asked_for_what_the_teacher_said_to_it(
    tokenizer: Tokenizer, cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(2, U, D, generator=torch.Generator().manual_seed(4))
    said_VUD = torch.nn.functional.normalize(rows, dim=2)
    asked = []

    def watched(student_BD, teacher_BD):
        asked.append(teacher_BD)
        return feature_mse(student_BD, teacher_BD)

    monkeypatch.setattr("edgeglm.train.kd_losses.feature_mse", watched)
    each = dataclasses.replace(cached, target_VUD=said_VUD)
    fitted(tokenizer, each, Terms(feature=1.0), steps=8)
    pictures = torch.cat(asked[::2])
    of_view = [bool((pictures[:, None] == said_VUD[view]).all(2).any()) for view in (0, 1)]
    assert of_view == [True, True]


def test_with_patience_both_towers_stop_at_their_best_where_what_they_have_not_seen_gets_no_better(
    tokenizer: Tokenizer, cached: Cached
) -> None:
    # A teacher of noise: nothing learnt of some images and phrases holds for others.
    noise = torch.randn(U, D, generator=torch.Generator().manual_seed(3))
    target_UD = torch.nn.functional.normalize(noise, dim=1)
    odd = dataclasses.replace(cached, target_VUD=target_UD.expand(2, -1, -1))
    patient = msgspec.structs.replace(CONFIG, patience=2, image_learning_rate=2e-2, text_learning_rate=2e-2)
    steps = 120
    per_stretch = (U - 1) // CONFIG.image_batch_size  # one of twenty-four is held back
    *_, curve = fitted(tokenizer, odd, RECIPE, steps=steps, config=patient)
    assert 2 < len(curve) < steps // per_stretch


def test_what_is_held_back_of_towers_that_train_together_is_never_trained_on(
    tokenizer: Tokenizer, cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = msgspec.structs.replace(CONFIG, patience=99)
    trained, apart = room._pools(cached, patient, 0)
    assert set(trained.image_P.tolist()).isdisjoint(apart.image_P.tolist())
    assert len(trained.image_P) + len(apart.image_P) == U
    assert sorted([*trained.phrase_P.tolist(), *apart.phrase_P.tolist()]) == [6, 7]
    seen: set[int] = set()
    drawn = room._drawn

    def recorded(*given):
        batch = drawn(*given)
        seen.update(batch.image_B.tolist())
        return batch

    monkeypatch.setattr(room, "_drawn", recorded)
    fitted(tokenizer, cached, RECIPE, steps=12, config=patient)
    assert seen <= set(trained.image_P.tolist())


def test_terms_without_a_weight_are_refused() -> None:
    with pytest.raises(UserError, match="give one of labels, feature"):
        Terms()
    with pytest.raises(UserError, match="no positive weight"):
        Terms(feature=-1.0, labels=1.0)
