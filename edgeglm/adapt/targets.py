"""What is told of a text tower by its checkpoint alone, before anything is computed.

Which of its linear layers are adapted, and whether a student can inherit from it. The header of a safetensors
file names every tensor with its shape, so no weights are read for this.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

from edgeglm.assets import asset_named
from edgeglm.assets.members import member_head
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.teacher_config import MultitaskConfig
from edgeglm.models.student_shapes import require_inheritance, student_shape

#: What LoRA was published with (Hu et al., 2022), by the names that models give these two layers.
QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"))
_USES_TARGETS = ("lora", "rslora", "dora", "ia3")
_MOST_HEADER = 1 << 26


def require_shared(config: MultitaskConfig) -> None:
    """Raise UserError where gradients of shared parameters are to be weighed, and none are shared."""
    if config.sharing == "soft" and config.balance in ("gradnorm", "pcgrad"):
        raise UserError(
            f"teacher.multitask.balance = {config.balance!r} weighs gradients of shared parameters, and soft "
            'sharing has none; set teacher.multitask.sharing = "hard"'
        )


def chosen_targets(
    wanted: Sequence[str], linear: Collection[str], model: str, *, key: str = "teacher.lora_targets"
) -> list[str]:
    """Return the layers to adapt: those wanted, or, if none are named, the model's query and value layers.

    Args:
        wanted: What the user named.
        linear: Names of the linear layers that there are.
        model: What to call the model.
        key: What the user knows ``wanted`` as.

    Raises:
        UserError: The model has no layer of such a name; the message lists those that exist.
    """
    if wanted:
        if absent := sorted(set(wanted) - set(linear)):
            raise UserError(
                f"{key} names {', '.join(absent)}, and {model} has no such linear layer; "
                f"choose from {', '.join(sorted(linear))}"
            )
        return list(wanted)
    for names in QUERY_AND_VALUE:
        if set(names) <= set(linear):
            return list(names)
    raise UserError(
        f"no layers of {model} are known to be its query and value; "
        f"set {key} to some of {', '.join(sorted(linear))}"
    )


def require_targets(config: TeacherConfig, source: Artifact) -> None:
    """Check ``teacher.lora_targets`` against the text model's file, before features are computed.

    A checkpoint without a safetensors file is checked when it is loaded. Raises UserError as
    :func:`chosen_targets` does.
    """
    if not config.lora_epochs or config.tuning not in _USES_TARGETS:
        return
    if linear := linear_layers(config.text, source):
        chosen_targets(config.lora_targets, linear, config.text)


def require_heirs_teacher(size: str, name: str, source: Artifact) -> None:
    """Check that a student of a size that inherits can take the text teacher's layers, by its file.

    A checkpoint without a safetensors file is checked when it is loaded.

    Args:
        size: ``student.size``.
        name: ``teacher.text``.
        source: The fetched text teacher.

    Raises:
        UserError: It is no BERT, of another width, or narrower inside.
    """
    shape = student_shape(size)
    shapes = weight_shapes(name, source) if shape.heir else {}
    if not shapes:
        return
    tables = [key for key in shapes if key.endswith("embeddings.word_embeddings.weight")]
    rises = [key for key in shapes if key.endswith("encoder.layer.0.intermediate.dense.weight")]
    is_bert = len(tables) == len(rises) == 1 and not any(key.startswith("vision_model.") for key in shapes)
    found = (shapes[tables[0]][1], shapes[rises[0]][0]) if is_bert else None
    require_inheritance((shape.width, shape.inner), found)


def linear_layers(name: str, source: Artifact) -> frozenset[str]:
    """Return the names of the linear layers of a text model; none where its weights are no safetensors.

    Args:
        name: A catalogue asset, ``hf:owner/name``, or a folder.
        source: The fetched asset.
    """
    return frozenset(_linear(weight_shapes(name, source)))


def weight_shapes(name: str, source: Artifact) -> dict[str, list[int]]:
    """Return the shape of each weight of a text model; none where its weights are no safetensors."""
    if len(source.files) == 1 and ":" not in name and "/" not in name:
        weights = [asset_named(name).members.get("weights", "")]
    else:
        weights = [file for file in source.files if file.endswith(".safetensors") and "/" not in file]
    shapes: dict[str, list[int]] = {}
    for file in weights:
        if file.endswith(".safetensors"):
            shapes |= _shapes(source, file)
    return shapes


def _shapes(source: Artifact, file: str) -> dict[str, list[int]]:
    length = int.from_bytes(member_head(source, file, 8), "little")
    if not 0 < length < _MOST_HEADER:
        return {}
    try:
        header = json.loads(member_head(source, file, 8 + length)[8:])
        return {key: value["shape"] for key, value in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged; loading it says what is wrong
        return {}


def _linear(shapes: dict[str, list[int]]) -> Iterable[str]:
    """Yield the last names of matrices that are no embeddings; of a dual encoder, the text tower's."""
    dual = any(key.startswith("text_model.") for key in shapes)
    for key, shape in shapes.items():
        if dual and not key.startswith("text_model."):
            continue
        if key.endswith(".weight") and len(shape) == 2 and "embed" not in key:
            yield key.split(".")[-2]
