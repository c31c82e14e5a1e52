"""A student's text tower started from the layers and the vocabulary of a BERT.

Layers are taken evenly from the first on (weight inheritance, TinyCLIP, Wu et al., 2023, in its manual form:
whole layers, since the student is as wide). The input table becomes the product of two smaller ones by its
principal components, the mean of its rows a bias. Of a layer's feed-forward part a narrower student takes the
units with the largest weights: the norm of what comes in times that of what goes out (magnitude pruning of
whole units, as Han et al., 2015, do with single weights).

Shapes: W entries of the vocabulary, H hidden size, E factor, F units of the feed-forward part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeglm.models.student_shapes import require_inheritance
from edgeglm.models.students import StudentTextTower, TextLayer


@torch.no_grad()
def inherit_text(tower: StudentTextTower, teacher: nn.Module, kept: Tensor | None = None) -> list[int]:
    """Fill the tower in place from a ``transformers`` BERT and return the numbers of the layers it took.

    Args:
        tower: Of a shape with ``heir``.
        teacher: The model: embeddings and encoder.
        kept: int64, the entries of the vocabulary that the tower has, in its order; all of them by default.

    Raises:
        UserError: The teacher is of another width, or narrower inside, or has none of BERT's layers.
    """
    embeddings, layers = _parts(teacher)
    require_inheritance(_sizes_of(tower), _sizes(embeddings, layers))
    table_WH = embeddings["word_embeddings.weight"]
    chosen_WH = table_WH if kept is None else table_WH[kept]
    mean_H = chosen_WH.double().mean(0)
    centred = chosen_WH.double() - mean_H
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    basis_HE = vectors[:, values.argsort(descending=True)[: tower.tokens.embedding_dim]]
    tower.tokens.weight.copy_(centred @ basis_HE)
    tower.widen.weight.copy_(basis_HE)
    tower.widen.bias.copy_(mean_H)
    places = embeddings["position_embeddings.weight"][: len(tower.places)]
    tower.places[: len(places)] = places + embeddings["token_type_embeddings.weight"][0]
    tower.norm.weight.copy_(embeddings["LayerNorm.weight"])
    tower.norm.bias.copy_(embeddings["LayerNorm.bias"])
    taken = [round(i * len(layers) / len(tower.layers)) for i in range(len(tower.layers))]
    for place, layer in zip(taken, tower.layers, strict=True):
        assert isinstance(layer, TextLayer)
        source = _narrowed(layers[place], layer.rise.out_features)
        for ours, theirs in _NAMES.items():
            for kind in ("weight", "bias"):
                getattr(getattr(layer, ours), kind).copy_(source[f"{theirs}.{kind}"])
    return taken


#: Our names of a layer's parts, and BERT's.
_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "rise": "intermediate.dense",
    "fall": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def _narrowed(layer: dict[str, Tensor], units: int) -> dict[str, Tensor]:
    """Return a layer with that many units of its feed-forward part, in their order."""
    rise_FH, fall_HF = layer["intermediate.dense.weight"], layer["output.dense.weight"]
    weight_F = rise_FH.norm(dim=1) * fall_HF.norm(dim=0)
    chosen = weight_F.argsort(descending=True, stable=True)[:units].sort().values
    return layer | {
        "intermediate.dense.weight": rise_FH[chosen],
        "intermediate.dense.bias": layer["intermediate.dense.bias"][chosen],
        "output.dense.weight": fall_HF[:, chosen],
    }


def _parts(teacher: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    state = teacher.state_dict()
    embeddings = _below(state, "embeddings.")
    layers: list[dict[str, Tensor]] = []
    while found := _below(state, f"encoder.layer.{len(layers)}."):
        layers.append(found)
    return embeddings, layers


def _sizes(embeddings: dict[str, Tensor], layers: list[dict[str, Tensor]]) -> tuple[int, int] | None:
    """Return the width of a BERT and that inside; None for another model."""
    wanted = {f"{name}.weight" for name in _NAMES.values()}
    if "word_embeddings.weight" not in embeddings or not layers or not wanted <= layers[0].keys():
        return None
    return embeddings["word_embeddings.weight"].shape[1], len(layers[0]["intermediate.dense.weight"])


def _sizes_of(tower: StudentTextTower) -> tuple[int, int]:
    layer = tower.layers[0]
    assert isinstance(layer, TextLayer)
    return tower.widen.out_features, layer.rise.out_features


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
