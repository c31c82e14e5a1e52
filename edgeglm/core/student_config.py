"""The recipe's table ``[student]``: the light towers and how they learn."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgeglm.core.section import Count, Fraction, Positive, Rate, Section, Weight


class LossesConfig(Section, frozen=True, kw_only=True):
    """Both student towers in one step, by any sum of named terms; all 0 trains each tower by itself.

    Each key is the weight of a term of ``edgeglm.train.kd_losses``, where it is explained: ``labels``
    (CLIP, Radford et al., 2021), ``feature``, ``relational``, ``interactive`` and ``gradient`` (FD, CRD,
    ICL and GD of CLIP-KD, Yang et al., 2024), ``affinity`` (TinyCLIP, Wu et al., 2023), ``logits``
    (Hinton et al., 2015), and the recipe's own ``anchors`` and ``anchor_labels``. ``steps`` are of the
    training.
    """

    steps: Positive = 2_000
    labels: Weight = 0.0
    feature: Weight = 0.0
    relational: Weight = 0.0
    interactive: Weight = 0.0
    affinity: Weight = 0.0
    logits: Weight = 0.0
    gradient: Weight = 0.0
    anchors: Weight = 0.0
    anchor_labels: Weight = 0.0

    def weights(self) -> dict[str, float]:
        """Return the weight of each term."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "steps"}


class StudentConfig(Section, frozen=True, kw_only=True):
    """The light towers and how they learn from the teacher's embeddings.

    ``size`` names a shape; ``inherit`` the asset whose weights the image tower starts from ("" for
    none), of which the stem and the first ``frozen_blocks`` blocks stay as they are. ``resolution``
    is the side of its images in pixels, ``max_length`` the most tokens of a text. ``label_weight`` is
    the share of the labels in the image tower's loss; the rest of it comes from the teacher, whose
    similarities are read at ``temperature`` times ``softening``.
    An image has ``views`` augmented copies; ``image_target = "mean"`` asks for the mean of what the
    teacher says to its own copies of the image, ``"each"`` for what it says to the very same copy, which
    then must be one of the teacher's.
    ``corpus`` counts the phrases of ordinary words that the teacher embeds besides the captions, of
    which ``anchors`` join the concepts' names as what an image's similarities are compared on. A text's are
    compared on the concepts' images and, with the weight ``text_relation``, on the teacher's embeddings of
    the texts of its batch. A caption comes ``caption_repeats`` times an epoch.
    ``branches`` lets the image tower's depthwise convolutions learn with branches beside them, which are
    merged when it is done (RepVGG, Ding et al., 2021). ``vocabulary`` is how many entries the text tower's
    tokenizer keeps (0: all). ``losses`` trains both towers together by other terms.
    ``patience`` above 0 holds a twentieth of what a tower trains on back, stops it after so many epochs
    without a lower loss there, and keeps its best state; of towers that train together both stop at once.
    Every ``checkpoint_epochs`` epochs the state is kept in the store, so that a training that was killed
    goes on as it would have gone on (0: never); that is no part of what a student is.
    """

    size: str = "edge-s"
    inherit: Literal["efficientnet-lite0", ""] = "efficientnet-lite0"
    frozen_blocks: Count = 5
    resolution: Positive = 64
    max_length: Annotated[int, msgspec.Meta(ge=3)] = 32
    temperature: Rate = 0.05
    softening: Rate = 2.0
    views: Count = 4
    image_target: Literal["mean", "each"] = "mean"
    image_epochs: Positive = 14
    image_batch_size: Positive = 64
    image_learning_rate: Rate = 2e-3
    label_weight: Fraction = 0.1
    distance_weight: Rate = 6.0
    caption_repeats: Positive = 4
    corpus: Count = 20_000
    anchors: Count = 2_000
    text_epochs: Positive = 20
    text_batch_size: Positive = 256
    text_learning_rate: Rate = 4e-3
    text_relation: Weight = 1.0
    weight_decay: Fraction = 0.05
    branches: bool = False
    vocabulary: Count = 0
    losses: LossesConfig = LossesConfig()
    patience: Count = 0
    checkpoint_epochs: Count = 4
