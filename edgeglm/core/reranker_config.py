"""The recipe's table ``[reranker]``: a fused encoder that orders the first candidates anew."""

from __future__ import annotations

from edgeglm.core.section import Fraction, Positive, Rate, Section


class RerankerConfig(Section, frozen=True, kw_only=True):
    """One shared Transformer over patches and tokens, trained on the student's own candidates.

    Off by default: see ``docs/bench/rerank.md`` for what it adds and costs. ``depth`` and ``width`` are of
    the Transformer, ``candidates`` how many of the student's first images it orders anew. It learns for
    ``steps`` steps of ``queries`` texts with ``negatives`` candidates each, from the teacher's similarities
    and, by ``label_weight``, from the labels (ITM with hard negatives: Li et al., ALBEF, 2021; BLIP, 2022).
    Similarities are read at ``temperature``.
    """

    enabled: bool = False
    depth: Positive = 2
    width: Positive = 96
    candidates: Positive = 50
    steps: Positive = 300
    queries: Positive = 16
    negatives: Positive = 16
    learning_rate: Rate = 1e-3
    label_weight: Fraction = 0.2
    temperature: Rate = 0.05
