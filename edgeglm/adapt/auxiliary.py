"""Named pictures of other domains beside one's own pairs, as one numbering of images, concepts and texts.

Shapes: V views, N own images, M auxiliary images, F features, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeglm.adapt.batches import Replay
from edgeglm.adapt.domains import Read
from edgeglm.data.languages import folded
from edgeglm.data.pairs import PairSet
from edgeglm.train.concepts import Concepts


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What heads are trained on besides one's own pairs.

    Attributes:
        features_VMF: Features of every view of every auxiliary image.
        concepts: One's own concepts first, as they were numbered; auxiliary images count from N on.
        replay: Which images are auxiliary, and what share of a batch they are after the first phase.
    """

    features_VMF: Tensor
    concepts: Concepts
    replay: Replay

    def read(self, own: Read, view_B: Tensor, image_B: Tensor) -> Tensor:
        """Return float32 features [B, F] of images of both kinds."""
        first = self.replay.first
        is_own = image_B < first
        if bool(is_own.all()):
            return own(view_B, image_B)
        others_RF = self.features_VMF[view_B[~is_own], image_B[~is_own] - first].float()
        found_BF = others_RF.new_empty(len(image_B), others_RF.shape[1])
        found_BF[~is_own] = others_RF
        if bool(is_own.any()):
            found_BF[is_own] = own(view_B[is_own], image_B[is_own])
        return found_BF


def auxiliary_beside(
    concepts: Concepts, count: int, pairs: PairSet, features_VMF: Tensor, *, share: float
) -> Auxiliary:
    """Number auxiliary pairs after one's own.

    A picture whose name is a caption of exactly one of one's own concepts is of that concept.

    Args:
        concepts: Those of one's own pairs.
        count: N, of all one's own images, those that do not train included.
        pairs: The auxiliary pairs.
        features_VMF: Their features.
        share: Of a batch that is replayed.
    """
    texts, captions = list(concepts.texts), list(concepts.captions)
    position = {text: i for i, text in enumerate(texts)}
    owners: dict[str, set[int]] = {}
    for concept, own in enumerate(captions):
        for i in own:
            owners.setdefault(folded(texts[i]), set()).add(concept)
    known = {text: next(iter(found)) for text, found in owners.items() if len(found) == 1}
    concept_M = []
    for row in pairs.rows:
        if row.concept not in known:
            known[row.concept] = len(captions)
            if row.text not in position:
                position[row.text] = len(texts)
                texts.append(row.text)
            captions.append((position[row.text],))
        concept_M.append(known[row.concept])
    joined = Concepts(
        image_N=torch.cat([concepts.image_N, torch.arange(count, count + len(pairs))]),
        concept_N=torch.cat([concepts.concept_N, torch.tensor(concept_M)]),
        texts=tuple(texts),
        captions=tuple(captions),
    )
    return Auxiliary(
        features_VMF=features_VMF,
        concepts=joined,
        replay=Replay(first=count, concepts=len(concepts), share=share),
    )
