"""How far a student is from its teacher: what each tower's own training, and its tuning while rounded, lower.

Shapes: B batch, K anchors, D embedding dimensions. Embeddings have length one.
"""

from __future__ import annotations

from torch import Tensor

from edgeglm.core.recipe import StudentConfig
from edgeglm.train.losses import embedding_distance, similarity_divergence


def from_teacher(student_BD: Tensor, teacher_BD: Tensor, anchor_KD: Tensor, config: StudentConfig) -> Tensor:
    """Return the distance to what the teacher says, and to its similarities with the anchors. A scalar."""
    loss = config.distance_weight * embedding_distance(student_BD, teacher_BD)
    return loss + _divergence(student_BD, teacher_BD, anchor_KD, config)


def from_text_teacher(
    student_BD: Tensor, teacher_BD: Tensor, anchor_KD: Tensor, config: StudentConfig
) -> Tensor:
    """Return the same for texts, held also to what a batch of them is to each other for the teacher.

    The teacher's embeddings of the batch are anchors like others (the relations of CRD in CLIP-KD, Yang et
    al., 2024), weighted ``text_relation``.
    """
    loss = from_teacher(student_BD, teacher_BD, anchor_KD, config)
    if config.text_relation:
        loss = loss + config.text_relation * _divergence(student_BD, teacher_BD, teacher_BD, config)
    return loss


def _divergence(student_BD: Tensor, teacher_BD: Tensor, anchor_KD: Tensor, config: StudentConfig) -> Tensor:
    return similarity_divergence(
        student_BD, teacher_BD, anchor_KD, temperature=config.temperature, softening=config.softening
    )
