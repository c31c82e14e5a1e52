"""What a teacher's image head learns besides retrieval: of what category and subcategory a picture is.

Only labelled images tell their category. Pseudo-labelled ones, and those of which the pairs say none, take
no part in the classification.

Shapes: L labelled images, F features, C classes, B batch, D embedding dimensions, T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.adapt.targets import require_shared
from edgeglm.core.errors import UserError
from edgeglm.core.teacher_config import MultitaskConfig
from edgeglm.data.pairs import Pair, PairSet
from edgeglm.evaluate.measures import accuracy, macro_f1
from edgeglm.models.conse import ImageHead
from edgeglm.train.balance import (
    Balance,
    ConflictFreeBalance,
    FixedBalance,
    GradNormBalance,
    UncertaintyBalance,
)
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import Group

_UNKNOWN = -1
_FASTER = 10.0


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The classes of one task, and the class of each labelled image.

    Attributes:
        name: ``category`` or ``subcategory``.
        classes: Their names, sorted.
        label_L: int64, in the order of ``Concepts.image_N``; -1 where it is not known.
    """

    name: str
    classes: tuple[str, ...]
    label_L: Tensor

    @classmethod
    def of(cls, name: str, pairs: PairSet, concepts: Concepts) -> Kinds:
        """Collect them. Raises UserError where the labelled images tell fewer than two apart."""
        said = [_said(name, pairs.rows[i]) for i in concepts.image_N.tolist()]
        classes = tuple(sorted(set(said) - {""}))
        if len(classes) < 2:
            raise UserError(
                f"the labelled images are of {len(classes)} {name}, so there is nothing to tell apart; "
                "set data.categories = true for icons, or give lines of your own two values of "
                f"{name} at least"
            )
        place = {one: index for index, one in enumerate(classes)}
        return cls(
            name=name, classes=classes, label_L=torch.tensor([place.get(one, _UNKNOWN) for one in said])
        )


def kinds_of(config: MultitaskConfig, pairs: PairSet, concepts: Concepts) -> tuple[Kinds, ...]:
    """Return the tasks that the recipe weighs above 0.

    Raises:
        UserError: Weights are to be balanced or heads shared, and there is no task but the retrieval; or the
            labelled images tell no two classes apart.
    """
    weights = {"category": config.category_weight, "subcategory": config.subcategory_weight}
    if not any(weights.values()) and (config.balance != "fixed" or config.sharing != "hard"):
        raise UserError(
            f"teacher.multitask has balance = {config.balance!r}, sharing = {config.sharing!r} and no task "
            "beside the retrieval; set category_weight or subcategory_weight above 0, or leave both out"
        )
    return tuple(Kinds.of(name, pairs, concepts) for name, weight in weights.items() if weight)


class Multitask:
    """The classifiers, their own image head if sharing is soft, and how their losses join the retrieval's.

    Attributes:
        classifiers: One linear layer a task, from an embedding scaled by the root of D.
        own_head: The second image head under soft sharing, else None.
    """

    def __init__(
        self, config: MultitaskConfig, kinds: Sequence[Kinds], image_head: ImageHead, dimensions: int
    ) -> None:
        self.config = config
        self.kinds = tuple(kinds)
        self.image_head = image_head
        self.scale = dimensions**0.5
        self.classifiers = nn.ModuleList(nn.Linear(dimensions, len(one.classes)) for one in kinds)
        self.own_head = copy.deepcopy(image_head) if config.sharing == "soft" else None
        self.balance = self._balance()

    def _balance(self) -> Balance:
        name, count = self.config.balance, 1 + len(self.kinds)
        if name == "fixed":
            return FixedBalance(count)
        if name == "uncertainty":
            return UncertaintyBalance(count)
        require_shared(self.config)
        if name == "gradnorm":
            last = self.image_head.last_layers()
            return GradNormBalance(count, last, alpha=self.config.gradnorm_alpha)
        return ConflictFreeBalance(count, list(self.image_head.parameters()))

    def groups(self, rate: float) -> list[Group]:
        """Return what trains besides the two heads; what starts from nothing learns faster than they do."""
        fresh = [*self.classifiers.parameters(), *self.balance.parameters()]
        found = [Group(parameters=fresh, learning_rate=_FASTER * rate)]
        if self.own_head is not None:
            found.append(Group(parameters=list(self.own_head.parameters()), learning_rate=rate))
        return found

    def start_there(self) -> None:
        """Let the second head start where the first one is by now, which was trained without it."""
        if self.own_head is not None:
            self.own_head.load_state_dict(self.image_head.state_dict())

    def train(self, mode: bool) -> None:
        """Set whether the second head drops out."""
        if self.own_head is not None:
            self.own_head.train(mode)

    def shown(self, image_BD: Tensor) -> Tensor:
        """Return the embeddings as the retrieval's loss must see them."""
        return self.balance.gates()[0](image_BD)

    def joined(self, retrieval: Tensor, features_BF: Tensor, image_BD: Tensor, place_B: Tensor) -> Tensor:
        """Return one loss of the retrieval's and those of the classifications.

        Args:
            retrieval: Computed from what :meth:`shown` returned.
            features_BF: What the image head was given.
            image_BD: What it said.
            place_B: Places in L; those beyond are pseudo-labelled images.
        """
        wanted = {"category": self.config.category_weight, "subcategory": self.config.subcategory_weight}
        read_BD = image_BD if self.own_head is None else self.own_head(features_BF)
        losses = [retrieval]
        gates = self.balance.gates()[1:]
        for one, classifier, gate in zip(self.kinds, self.classifiers, gates, strict=True):
            known_B = place_B < len(one.label_L)
            label_B = torch.where(known_B, one.label_L[torch.where(known_B, place_B, 0)], _UNKNOWN)
            logits_BC = classifier(gate(read_BD) * self.scale)
            count = (label_B >= 0).sum().clamp(min=1)
            summed = F.cross_entropy(logits_BC, label_B, ignore_index=_UNKNOWN, reduction="sum")
            losses.append(wanted[one.name] * summed / count)
        total = self.balance.combined(losses)
        if self.own_head is not None:
            total = total + self.config.soft_weight * self._apart(self.own_head)
        return total

    def _apart(self, own: ImageHead) -> Tensor:
        """Return the squared distance of the two heads' parameters (Duong et al., 2015)."""
        pairs = zip(self.image_head.parameters(), own.parameters(), strict=True)
        return torch.stack([(one - other).square().sum() for one, other in pairs]).sum()

    def logits(self, features_BF: Tensor) -> list[Tensor]:
        """Return, for each task, logits [B, C] of features."""
        head = self.image_head if self.own_head is None else self.own_head
        embedded_BD = head(features_BF) * self.scale
        return [classifier(embedded_BD) for classifier in self.classifiers]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep besides parameters."""
        return self.balance.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take it back."""
        self.balance.load_state_dict(state)

    @torch.no_grad()
    def scores(self, features_NF: Tensor, pairs: PairSet, chosen: Sequence[int]) -> dict[str, Any]:
        """Return accuracy and macro-F1 of each task on some images, by what the pairs say of them."""
        self.train(False)
        rows = features_NF[torch.as_tensor(chosen, dtype=torch.int64)].float()
        found = self.logits(rows) if len(rows) else []
        told: dict[str, Any] = {}
        for one, logits_NC in zip(self.kinds, found, strict=False):
            place = {name: index for index, name in enumerate(one.classes)}
            true = np.array([place.get(_said(one.name, pairs.rows[i]), _UNKNOWN) for i in chosen])
            guess = logits_NC.argmax(1).numpy()
            known = true >= 0
            if known.any():
                told[one.name] = {
                    "images": int(known.sum()),
                    "accuracy": round(accuracy(true[known], guess[known]), 4),
                    "macro_f1": round(macro_f1(true[known], guess[known]), 4),
                }
        return told


def _said(name: str, row: Pair) -> str:
    return row.category if name == "category" else row.subcategory
