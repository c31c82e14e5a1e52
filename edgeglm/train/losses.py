"""Losses on embeddings, each with its source.

Shapes: B batch, K concepts (classes or anchors), D embedding dimensions. Embeddings have length one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_contrastive(
    image_BD: Tensor, text_KD: Tensor, concept_B: Tensor, *, temperature: float
) -> Tensor:
    """Contrast images with the texts of *all* concepts, both ways. Returns a scalar.

    InfoNCE (van den Oord et al., 2018) as CLIP uses it (Radford et al., 2021), with two changes that a
    known list of concepts allows: the negatives of an image are all other concepts, not only those of
    the batch; and all images of a concept in the batch are positives of its text (SupCon, Khosla et
    al., 2020).

    Args:
        image_BD: Image embeddings.
        text_KD: One text embedding for each concept.
        concept_B: int64, the concept of each image.
        temperature: Of the softmax.
    """
    scores_BK = image_BD @ text_KD.T / temperature
    to_text = F.cross_entropy(scores_BK, concept_B)
    present, place_B = torch.unique(concept_B, return_inverse=True)
    log_share_PB = torch.log_softmax(scores_BK.T[present], dim=1)
    positive_PB = F.one_hot(place_B, len(present)).T.to(log_share_PB.dtype)
    to_image = -((log_share_PB * positive_PB).sum(1) / positive_PB.sum(1)).mean()
    return to_text + to_image


def embedding_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return the mean of 1 - cosine: half the squared distance of unit vectors (feature distillation)."""
    return (1.0 - (student_BD * teacher_BD).sum(1)).mean()


def similarity_divergence(
    student_BD: Tensor, teacher_BD: Tensor, anchor_KD: Tensor, *, temperature: float, softening: float = 1.0
) -> Tensor:
    """Return KL(teacher || student) of the distributions over anchors from the other tower.

    The student is placed in the teacher's space by its similarities to the teacher's own anchors:
    the interactive relation of CLIP-KD (Yang et al., 2024). ``softening`` is the distillation
    temperature of Hinton et al. (2015): logits are divided by it, and the loss is times its square, so
    that gradients keep their size. A softer teacher tells more of what is second and third.
    """
    student_BK, teacher_BK = (
        torch.log_softmax(rows @ anchor_KD.T / (temperature * softening), dim=1)
        for rows in (student_BD, teacher_BD)
    )
    return F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True) * softening**2
