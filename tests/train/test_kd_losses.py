"""If these fail, a student is pulled towards something else than what its teacher says."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.train.kd_losses import (  # noqa: E402
    affinity_mimicking,
    contrastive_relational,
    feature_mse,
    gradient_distance,
    interactive_contrastive,
    pair_contrastive,
)
from edgeglm.train.losses import similarity_divergence  # noqa: E402

B, T, D = 6, 8, 5
TAU = 0.2


def rows(count: int, seed: int):
    drawn = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT = (rows(n, s) for s, n in enumerate((B, T, B, T)))
POSITIVE = torch.zeros(B, T, dtype=torch.bool)  # image 5 has no label; texts 4 to 7 belong to no image
POSITIVE[range(5), [0, 1, 2, 3, 3]] = True

#: Terms of (student's image rows, student's text rows) that compare with the fixed teacher.
TERMS = {
    "feature": lambda i, t: feature_mse(i, TEACHER_IMAGE) + feature_mse(t, TEACHER_TEXT),
    "relational": lambda i, t: contrastive_relational(i, t, TEACHER_IMAGE, TEACHER_TEXT, temperature=TAU),
    "logits": lambda i, t: (
        similarity_divergence(i, TEACHER_IMAGE, TEACHER_TEXT, temperature=TAU, softening=2.0)
        + similarity_divergence(t, TEACHER_TEXT, TEACHER_IMAGE, temperature=TAU, softening=2.0)
    ),
    "gradient": lambda i, t: gradient_distance(i, t, TEACHER_IMAGE, TEACHER_TEXT, POSITIVE, temperature=TAU),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_nothing_for_its_teacher_and_more_for_any_other(name: str) -> None:
    assert float(TERMS[name](TEACHER_IMAGE, TEACHER_TEXT)) == pytest.approx(0.0, abs=1e-5)
    assert float(TERMS[name](IMAGE, TEXT)) > 1e-3


@pytest.mark.parametrize("name", TERMS)
def test_going_down_a_term_brings_the_student_to_its_teacher(name: str) -> None:
    raw = [IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()]
    optimizer = torch.optim.Adam(raw, lr=0.05)
    values = []
    for _ in range(150):
        loss = TERMS[name](*(torch.nn.functional.normalize(x, dim=1) for x in raw))
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert values[-1] < values[0] / 10


def test_feature_distance_is_twice_one_minus_the_cosine() -> None:
    expected = 2 * (1 - (IMAGE * TEACHER_IMAGE).sum(1)).mean()
    torch.testing.assert_close(feature_mse(IMAGE, TEACHER_IMAGE), expected)


def test_contrast_within_one_to_one_pairs_is_the_clip_loss() -> None:
    scores = IMAGE @ TEXT[:B].T / TAU
    here = torch.arange(B)
    entropy = torch.nn.functional.cross_entropy
    clip = (entropy(scores, here) + entropy(scores.T, here)) / 2
    found = pair_contrastive(IMAGE, TEXT[:B], torch.eye(B, dtype=torch.bool), temperature=TAU)
    torch.testing.assert_close(found, clip)


def test_an_unlabelled_image_takes_no_part_in_the_contrast_and_a_text_of_no_image_is_wrong() -> None:
    other = IMAGE.clone()
    other[5] = -IMAGE[5]
    found = [pair_contrastive(i, TEXT, POSITIVE, temperature=TAU) for i in (IMAGE, other)]
    torch.testing.assert_close(*found)
    fewer = pair_contrastive(IMAGE, TEXT[:4], POSITIVE[:, :4], temperature=TAU)
    assert float(fewer) < float(found[0])


@pytest.mark.parametrize("term", [pair_contrastive, partial(interactive_contrastive)])
def test_a_batch_without_labels_teaches_nothing_and_breaks_nothing(term) -> None:
    image = IMAGE.clone().requires_grad_()
    none = torch.zeros(B, T, dtype=torch.bool)
    teacher = (TEACHER_IMAGE, TEACHER_TEXT) if isinstance(term, partial) else ()
    loss = term(image, TEXT, *teacher, none, temperature=TAU)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0.0
    assert not image.grad.any()


def test_interactive_contrast_draws_each_tower_to_the_teachers_other_one() -> None:
    """Not to the student's own other tower: with the teacher's rows swapped out nothing else is left."""
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    loss = interactive_contrastive(image, text, TEACHER_IMAGE, TEACHER_TEXT, POSITIVE, temperature=TAU)
    torch.autograd.backward(loss)
    alone = IMAGE.clone().requires_grad_()
    half = pair_contrastive(alone, TEACHER_TEXT, POSITIVE, temperature=TAU) / 2
    torch.autograd.backward(half)
    torch.testing.assert_close(image.grad, alone.grad)


def test_affinity_mimicking_at_one_temperature_has_the_relational_gradient() -> None:
    gradients = []
    for mimic in (True, False):
        image = IMAGE.clone().requires_grad_()
        others = (TEXT, TEACHER_IMAGE, TEACHER_TEXT)
        if mimic:
            loss = affinity_mimicking(image, *others, scale=1 / TAU, teacher_temperature=TAU)
        else:
            loss = contrastive_relational(image, *others, temperature=TAU)
        torch.autograd.backward(loss)
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients)


def test_the_scale_of_affinities_can_be_trained() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    loss = affinity_mimicking(IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT, scale=scale, teacher_temperature=TAU)
    torch.autograd.backward(loss)
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 0


def test_softening_keeps_the_size_of_the_gradient() -> None:
    """The square of the softening is there for this (Hinton et al., 2015, section 2.1)."""
    sizes = []
    for softening in (4.0, 8.0):
        image = IMAGE.clone().requires_grad_()
        loss = similarity_divergence(image, TEACHER_IMAGE, TEACHER_TEXT, temperature=1.0, softening=softening)
        torch.autograd.backward(loss)
        sizes.append(float(image.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_the_written_out_gradients_are_those_of_the_contrast() -> None:
    from edgeglm.train.kd_losses import _contrast_gradients

    image, text = IMAGE[:5].clone().requires_grad_(), TEXT.clone().requires_grad_()
    torch.autograd.backward(pair_contrastive(image, text, POSITIVE[:5], temperature=TAU))
    found = _contrast_gradients(image.detach(), text.detach(), POSITIVE[:5], TAU)
    torch.testing.assert_close(found[0], image.grad * TAU * 5)
    torch.testing.assert_close(found[1], text.grad * TAU * 4)
