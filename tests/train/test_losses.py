"""If these fail, towers are pulled towards something else than their texts and their teacher."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.train.losses import (  # noqa: E402
    concept_contrastive,
    embedding_distance,
    similarity_divergence,
)

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def test_the_contrast_of_two_concepts_is_what_a_pencil_gives() -> None:
    # Scores 1 and 0: each softmax gives its own concept e / (e + 1), in both directions.
    images, texts = torch.tensor([EAST, NORTH]), torch.tensor([EAST, NORTH])
    each = -math.log(math.e / (math.e + 1))
    found = concept_contrastive(images, texts, torch.tensor([0, 1]), temperature=1.0)
    assert float(found) == pytest.approx(2 * each)


def test_two_images_of_one_concept_are_both_right_for_its_text() -> None:
    images, texts = torch.tensor([EAST, EAST]), torch.tensor([EAST, NORTH])
    to_text = -math.log(math.e / (math.e + 1))
    to_image = math.log(2)  # the best that two equally right images can share
    found = concept_contrastive(images, texts, torch.tensor([0, 0]), temperature=1.0)
    assert float(found) == pytest.approx(to_text + to_image)


def test_a_concept_without_an_image_in_the_batch_still_counts_against() -> None:
    images, own = torch.tensor([EAST]), torch.tensor([EAST])
    alone = concept_contrastive(images, own, torch.tensor([0]), temperature=1.0)
    among = concept_contrastive(images, torch.tensor([EAST, EAST]), torch.tensor([0]), temperature=1.0)
    assert float(alone) == pytest.approx(0.0)
    assert float(among) == pytest.approx(math.log(2))


def test_a_lower_temperature_sharpens() -> None:
    images = torch.tensor([EAST, NORTH])
    losses = [float(concept_contrastive(images, images, torch.arange(2), temperature=t)) for t in (1.0, 0.1)]
    assert losses[1] < 1e-3 < losses[0]


def test_the_distance_is_half_the_squared_one_of_unit_vectors() -> None:
    student, teacher = torch.tensor([EAST, EAST, EAST]), torch.tensor([EAST, NORTH, [-1.0, 0.0]])
    assert float(embedding_distance(student, teacher)) == pytest.approx((0 + 1 + 2) / 3)
    halves = ((student - teacher) ** 2).sum(1).mean() / 2
    torch.testing.assert_close(embedding_distance(student, teacher), halves)


def test_the_divergence_is_nothing_for_an_equal_student_and_what_a_pencil_gives_else() -> None:
    anchors, teacher = torch.tensor([EAST, NORTH]), torch.tensor([EAST])
    assert float(similarity_divergence(teacher, teacher, anchors, temperature=0.1)) == pytest.approx(
        0.0, abs=1e-6
    )
    p = math.e / (math.e + 1)
    expected = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)  # the student mirrors it
    found = similarity_divergence(torch.tensor([NORTH]), teacher, anchors, temperature=1.0)
    assert float(found) == pytest.approx(expected)
