"""Unlabelled images of the target domain in the alignment of a teacher.

Nothing here ever sees a text of an unlabelled image: :class:`Domains` holds indices of images only.

Shapes: V views, N images, M unlabelled images, L labelled images, F features, K concepts, B batch,
D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.adapt.unlabelled import require_unlabelled
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import DomainConfig
from edgeglm.data.copies import near_pairs, thumbnails_of
from edgeglm.data.pairs import PairSet
from edgeglm.models.projection import normalized
from edgeglm.train.concepts import Concepts
from edgeglm.train.domain_losses import (
    DomainDiscriminator,
    adversarial_loss,
    covariance_distance,
    kernel_mean_distance,
    reversal_ramp,
)
from edgeglm.train.losses import embedding_distance

#: Unlabelled images shown in a step.
UNLABELLED_BATCH = 256
_STD_FLOOR = 1e-3
#: Views [B] and images [B] -> features [B, F].
Read = Callable[[Tensor, Tensor], Tensor]


def cached(features_VNF: Tensor) -> Read:
    """Return what reads features as they were computed once."""
    return lambda view_B, image_B: features_VNF[view_B, image_B].float()


@dataclass(frozen=True, kw_only=True)
class Domains:
    """Which images are unlabelled, and the domain of each labelled one.

    Attributes:
        unlabelled_M: int64, images of the target domain that may train without their texts.
        domain_L: int64, for each labelled image, in the order of ``Concepts.image_N``, its domain.
    """

    unlabelled_M: Tensor
    domain_L: Tensor

    @classmethod
    def of(cls, pairs: PairSet, concepts: Concepts) -> Domains:
        """Collect them. Raises UserError where there are too few unlabelled images."""
        require_unlabelled(pairs)
        domains = [pairs.rows[i].domain for i in concepts.image_N.tolist()]
        place = {name: index for index, name in enumerate(sorted(set(domains)))}
        return cls(
            unlabelled_M=torch.from_numpy(pairs.by_role("unlabelled")),
            domain_L=torch.tensor([place[domain] for domain in domains]),
        )


def refuse_leakage(pairs: PairSet, chosen: Sequence[int]) -> None:
    """Raise UserError if an image that would train is a copy of one that is evaluated on.

    Copies have equal pixels, or look the same (:mod:`edgeglm.data.copies`).
    """
    copies = pairs.overlap(chosen)
    if not copies:
        held = sorted(pairs.evaluation_images())
        shown = near_pairs(thumbnails_of(pairs.images, chosen), thumbnails_of(pairs.images, held))
        copies = tuple(chosen[i] for i in sorted({i for i, _ in shown}))
    if copies:
        names = ", ".join(pairs.rows[i].id for i in copies[:3])
        raise UserError(
            f"{len(copies)} of the images to train on are copies of images held out for evaluation "
            f"({names}), so every figure would be wrong; take the copies out of the data"
        )


class Statistics:
    """Mean and deviation of the features of each labelled domain and of the target, from plain views."""

    def __init__(self, features_VNF: Tensor, concepts: Concepts, domains: Domains) -> None:
        plain_NF = features_VNF[0]
        images = [concepts.image_N[domains.domain_L == d] for d in range(int(domains.domain_L.max()) + 1)]
        found = [_moments(plain_NF[chosen]) for chosen in images]
        self.mean_KF = torch.stack([mean for mean, _ in found])
        self.std_KF = torch.stack([std for _, std in found])
        self.target_mean_F, self.target_std_F = _moments(plain_NF[domains.unlabelled_M])

    def moved(self, x_BF: Tensor, domain_B: Tensor, share_B: Tensor) -> Tensor:
        """Move features of source domains by a share towards the target's statistics: [B, F]."""
        whitened = (x_BF - self.mean_KF[domain_B]) / self.std_KF[domain_B]
        there = whitened * self.target_std_F + self.target_mean_F
        return torch.lerp(x_BF, there, share_B[:, None])


def _moments(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    x_NF = x_NF.float()
    std_F = x_NF.std(0) if len(x_NF) > 1 else torch.zeros(x_NF.shape[1])
    return x_NF.mean(0), std_F + _STD_FLOOR


class DomainTerms:
    """The terms that unlabelled images add to the loss of a step, and the curriculum of the labelled ones.

    Draws come from a generator of their own, so that a recipe without these terms draws as it always did.
    """

    def __init__(
        self,
        config: DomainConfig,
        features_VNF: Tensor,
        concepts: Concepts,
        domains: Domains,
        *,
        embedding_dim: int,
        seed: int,
    ) -> None:
        self.config = config
        self.features_VNF = features_VNF
        self.read = cached(features_VNF)
        self.shown = UNLABELLED_BATCH
        self.domains = domains
        self.statistics = Statistics(features_VNF, concepts, domains) if config.curriculum else None
        self.discriminator = DomainDiscriminator(embedding_dim) if config.dann_weight else None
        self.rng = np.random.default_rng((seed, 4242))
        self.step, self.total = 0, 1

    def show(self, read: Read, count: int) -> None:
        """Read features anew from now on, of so many unlabelled images a step: those that are being tuned."""
        self.read, self.shown = read, count

    def begin(self, steps: int) -> None:
        """Start a phase of so many steps: the ramps start anew."""
        self.step, self.total = 0, max(1, steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep besides parameters."""
        return {"step": self.step, "random": dict(self.rng.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on drawing where the state was taken."""
        self.step = state["step"]
        self.rng.bit_generator.state = state["random"]

    def parameters(self) -> list[nn.Parameter]:
        """Return what trains besides the heads."""
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    def labelled(self, x_BF: Tensor, place_B: Tensor) -> Tensor:
        """Return the labelled features of a step, some moved towards the target. ``place_B`` is in L."""
        if self.statistics is None:
            return x_BF
        reach = self.config.curriculum * min(1.0, 2.0 * self.step / self.total)
        known = place_B < len(self.domains.domain_L)  # pseudo-labelled ones are of the target already
        share_B = torch.from_numpy(self.rng.uniform(0.0, reach, len(x_BF))).float() * known
        domain_B = self.domains.domain_L[torch.where(known, place_B, 0)]
        return self.statistics.moved(x_BF, domain_B, share_B)

    def loss(self, image_head: Callable[[Tensor], Tensor], source_BD: Tensor) -> Tensor:
        """Return the weighted sum of the terms for fresh unlabelled images, and count the step.

        ``source_BD`` is whatever has a label in the step, auxiliary pictures left out. In the papers on MMD,
        CORAL and DANN that is the source domain alone. In rounds of pseudo-labels it holds the paired images
        of the target too, which count as labelled from then on, as in self-training: the terms then compare
        a mixture with the target, and pull less the more of it was paired.
        """
        config, unlabelled_M = self.config, self.domains.unlabelled_M
        share = self.step / self.total
        self.step += 1
        total = source_BD.new_zeros(())
        if not (config.mmd_weight or config.coral_weight or config.dann_weight or config.consistency_weight):
            return total
        size = min(self.shown, len(unlabelled_M))
        chosen_T = unlabelled_M[torch.from_numpy(self.rng.choice(len(unlabelled_M), size, replace=False))]
        view_T = torch.from_numpy(self.rng.integers(0, len(self.features_VNF), size))
        target_TD = image_head(self.read(view_T, chosen_T))
        if config.mmd_weight:
            total = total + config.mmd_weight * kernel_mean_distance(source_BD, target_TD)
        if config.coral_weight:
            total = total + config.coral_weight * covariance_distance(source_BD, target_TD)
        if self.discriminator is not None:
            against = adversarial_loss(
                self.discriminator, source_BD, target_TD, strength=reversal_ramp(share)
            )
            total = total + config.dann_weight * against
        if config.consistency_weight:
            with torch.no_grad():
                each = (torch.full_like(chosen_T, view) for view in range(len(self.features_VNF)))
                views = [image_head(self.read(view_T, chosen_T)) for view_T in each]
                wanted_TD = normalized(torch.stack(views).mean(0))
            total = total + config.consistency_weight * embedding_distance(target_TD, wanted_TD)
        return total


@torch.no_grad()
def mutual_neighbours(
    image_MD: Tensor, text_KD: Tensor, prototype_KD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return images and concepts that are each other's nearest: two int64 of equal length.

    An image and a concept are as near as the cosine of the image and the concept's text, plus, if
    given, that of the image and the mean image of the concept. A pair that chooses itself from
    both sides is right far more often than the best concept of an image is, and no threshold is needed.

    Args:
        image_MD: Embeddings of unlabelled images; the mean over views is steadier than one view.
        text_KD: Embeddings of the concepts' texts.
        prototype_KD: Mean embeddings of the concepts' labelled images.
    """
    scores_MK = image_MD @ text_KD.T
    if prototype_KD is not None:
        scores_MK = scores_MK + image_MD @ prototype_KD.T
    concept_M, image_K = scores_MK.argmax(1), scores_MK.argmax(0)
    chosen = torch.nonzero(image_K[concept_M] == torch.arange(len(image_MD)))[:, 0]
    return chosen, concept_M[chosen]


@torch.no_grad()
def concept_prototypes(image_ND: Tensor, concept_N: Tensor, count: int) -> Tensor:
    """Return the normalised mean embedding of each concept's images, [K, D]."""
    sums = torch.zeros(count, image_ND.shape[1]).index_add_(0, concept_N, image_ND)
    return F.normalize(sums, dim=1)
