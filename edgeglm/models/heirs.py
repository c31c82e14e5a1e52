"""A student's text tower started from the layers and the vocabulary of a BERT.

Layers are taken evenly from the first on (weight inheritance, TinyCLIP, Wu et al., 2023, in its manual form:
whole layers, since the student is as wide). The input table becomes the product of two smaller ones by its
principal components, the mean of its rows a bias.

Shapes: W entries of the vocabulary, H hidden size, E factor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError
from edgeglm.models.students import StudentTextTower, TextLayer


@torch.no_grad()
def inherit_text(tower: StudentTextTower, teacher: nn.Module, kept: Tensor | None = None) -> list[int]:
    """Fill the tower in place from a ``transformers`` BERT and return the numbers of the layers it took.

    Args:
        tower: Of a shape with ``heir``.
        teacher: The model: embeddings and encoder.
        kept: int64, the entries of the vocabulary that the tower has, in its order; all of them by default.

    Raises:
        UserError: The teacher is of another width, or has none of BERT's layers.
    """
    embeddings, layers = _parts(teacher)
    table_WH = embeddings["word_embeddings.weight"]
    width = tower.widen.out_features
    if table_WH.shape[1] != width:
        raise UserError(
            f"the teacher's text tower is {table_WH.shape[1]} wide and the student's {width}, so that its "
            "layers cannot be inherited; set student.size to 'edge-s'"
        )
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
        for ours, theirs in _NAMES.items():
            for kind in ("weight", "bias"):
                getattr(getattr(layer, ours), kind).copy_(layers[place][f"{theirs}.{kind}"])
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


def _parts(teacher: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    state = teacher.state_dict()
    embeddings = _below(state, "embeddings.")
    layers: list[dict[str, Tensor]] = []
    while found := _below(state, f"encoder.layer.{len(layers)}."):
        layers.append(found)
    wanted = {f"{name}.weight" for name in _NAMES.values()}
    if "word_embeddings.weight" not in embeddings or not layers or not wanted <= layers[0].keys():
        raise UserError(
            "the teacher's text tower has no layers of BERT to inherit; set student.size to 'edge-s'"
        )
    return embeddings, layers


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
