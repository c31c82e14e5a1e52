"""Losses of cross-modal distillation, each a term of its own with its source.

A step sees B images and T texts, of both the student's and the teacher's towers. ``positive_BT`` says
which text belongs to which image; an image without a label has no text, a phrase no image. Embeddings
have length one. Every term is a scalar, nothing for a student that is its teacher where the term
compares the two, and in the order of one at the start of a training.

Shapes: B images, T texts, K concepts, D embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return the mean squared distance of the embeddings, summed over D.

    Feature distillation, FD, of CLIP-KD (Yang et al., 2024). Theirs is the mean over D, weighted 2,000: at
    512 dimensions that is this one weighted 4.
    """
    return (student_BD - teacher_BD).square().sum(1).mean()


def pair_contrastive(image_BD: Tensor, text_TD: Tensor, positive_BT: Tensor, *, temperature: float) -> Tensor:
    """Return InfoNCE within the batch, half of each direction (CLIP, Radford et al., 2021).

    Where several are right they share the probability (SupCon, Khosla et al., 2020). A text of no image
    counts as wrong for all; an image without a label takes no part: what it shows is not known.
    """
    known = positive_BT.any(1)
    if not bool(known.any()):
        return image_BD.sum() * 0.0
    positive_LT = positive_BT[known]
    scores_LT = image_BD[known] @ text_TD.T / temperature
    asked = positive_LT.any(0)
    to_text = _cross_entropy(scores_LT, _shares(positive_LT))
    return (to_text + _cross_entropy(scores_LT.T[asked], _shares(positive_LT.T[asked]))) / 2


def interactive_contrastive(
    image_BD: Tensor,
    text_TD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_TD: Tensor,
    positive_BT: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Contrast each of the student's towers with the *teacher's* other one.

    Interactive contrastive learning, ICL, of CLIP-KD (Yang et al., 2024): it raises a lower bound of
    the mutual information of student and teacher.
    """
    to_text = pair_contrastive(image_BD, teacher_text_TD, positive_BT, temperature=temperature)
    to_image = pair_contrastive(teacher_image_BD, text_TD, positive_BT, temperature=temperature)
    return (to_text + to_image) / 2


def contrastive_relational(
    image_BD: Tensor,
    text_TD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_TD: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Return KL(teacher || student) of the distributions over the batch's other modality, both ways.

    Contrastive relational distillation, CRD, of CLIP-KD (Yang et al., 2024). It needs no labels.
    """
    student_BT = image_BD @ text_TD.T / temperature
    teacher_BT = teacher_image_BD @ teacher_text_TD.T / temperature
    return _divergence(student_BT, teacher_BT) + _divergence(student_BT.T, teacher_BT.T)


def affinity_mimicking(
    image_BD: Tensor,
    text_TD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_TD: Tensor,
    *,
    scale: Tensor | float,
    teacher_temperature: float,
) -> Tensor:
    """Return the cross-entropy of the student's affinities under the teacher's, both ways.

    TinyCLIP (Wu et al., 2023). At one temperature its gradient is that of :func:`contrastive_relational`
    (a cross-entropy is a divergence and the entropy of the teacher); what differs is that the student has a
    ``scale`` (one over its temperature) of its own, which may be trained.
    """
    student_BT = image_BD @ text_TD.T * scale
    teacher_BT = teacher_image_BD @ teacher_text_TD.T / teacher_temperature
    to_text = _cross_entropy(student_BT, torch.softmax(teacher_BT, 1))
    return to_text + _cross_entropy(student_BT.T, torch.softmax(teacher_BT.T, 1))


def gradient_distance(
    image_BD: Tensor,
    text_TD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_TD: Tensor,
    positive_BT: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Return the squared distance of the gradients that the contrastive loss has at the embeddings.

    Gradient distillation, GD, of CLIP-KD (Yang et al., 2024), with the gradients of
    :func:`pair_contrastive` written out. They are per sample, not divided by the batch, and times the
    temperature, so that the weight needs no eight digits. Embeddings that are all alike have no gradient
    either, close to that of a good teacher: beside a weak other loss this term makes a student collapse.
    """
    known = positive_BT.any(1)
    if not bool(known.any()):
        return image_BD.sum() * 0.0
    right_LT = positive_BT[known]
    student = _contrast_gradients(image_BD[known], text_TD, right_LT, temperature)
    teacher = _contrast_gradients(teacher_image_BD[known], teacher_text_TD, right_LT, temperature)
    return feature_mse(student[0], teacher[0]) + feature_mse(student[1], teacher[1])


def _contrast_gradients(
    image_LD: Tensor, text_TD: Tensor, positive_LT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return what the contrast pulls each of L labelled images and T texts by.

    ``temperature * L * dL/d(image)`` and ``temperature * A * dL/d(text)``, A the texts with an image.
    """
    scores_LT = image_LD @ text_TD.T / temperature
    asked_T = positive_LT.any(0)
    to_text_LT = torch.softmax(scores_LT, 1) - _shares(positive_LT)
    to_image_LT = (torch.softmax(scores_LT, 0) - _shares(positive_LT.T).T) * asked_T
    # Each direction is a mean over its own rows; both count half.
    ratio = len(image_LD) / asked_T.sum()
    pull_LT = (to_text_LT + to_image_LT * ratio) / 2
    return pull_LT @ text_TD, pull_LT.T @ image_LD / ratio


def _shares(positive: Tensor) -> Tensor:
    """Return the probability that each right one of a row should have."""
    return positive / positive.sum(1, keepdim=True).clamp(min=1)


def _cross_entropy(scores: Tensor, share: Tensor) -> Tensor:
    return -(share * torch.log_softmax(scores, 1)).sum(1).mean()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        torch.log_softmax(student, 1), torch.log_softmax(teacher, 1), reduction="batchmean", log_target=True
    )
