"""The models that a server offers: a bundle's towers, and the same towers fed with raw text and image files.

| model | takes | gives |
| --- | --- | --- |
| ``text`` | ``input_ids``, ``attention_mask`` INT64 [N, L] | ``embedding`` FP32 [N, D] |
| ``image`` | ``pixels`` FP32 [N, 3, R, R] | the same |
| ``embed_text`` | ``text`` BYTES [N], UTF-8 | the same |
| ``embed_image`` | ``image`` BYTES [N], image files | the same |
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import TensorSpec
from edgeglm.runtime.contract import TowerContract
from edgeglm.runtime.requests import Array
from edgeglm.runtime.runner import Runner
from edgeglm.runtime.towers import MAX_TEXT
from edgeglm.serve.refusals import TooLargeError
from edgeglm.serve.tensors import datatype_of
from edgeglm.serve.together import all_of

Feed = Literal["arrays", "text", "image"]
Outputs = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model: which tower it runs and what it is fed with."""

    name: str
    tower: str
    feed: Feed
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def platform(self) -> str:
        """The protocol's word for what runs it."""
        return "edgeglm_tower" if self.feed == "arrays" else "edgeglm_embedding"


def models_of(contracts: Mapping[str, TowerContract]) -> dict[str, Model]:
    """Return the models by name, for loaded towers."""
    models = {}
    for tower, contract in sorted(contracts.items()):
        models[tower] = Model(
            name=tower, tower=tower, feed="arrays", inputs=contract.inputs, outputs=contract.outputs
        )
        if contract.source.prepare is not None and tower in ("text", "image"):
            feed: Feed = "text" if tower == "text" else "image"
            name = f"embed_{tower}"
            raw = TensorSpec(name=feed, dtype="object", shape=("batch",))
            models[name] = Model(name=name, tower=tower, feed=feed, inputs=(raw,), outputs=contract.outputs)
    return dict(sorted(models.items()))


def model_metadata(model: Model, version: str) -> dict[str, Any]:
    """Return the protocol's ``metadata_model_response``; a free dimension is -1."""
    return {
        "name": model.name,
        "versions": [version],
        "platform": model.platform,
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
    }


def model_config(model: Model, max_rows: int) -> dict[str, Any]:
    """Return the part of Triton's model configuration that its clients read; the batch axis is left out."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        kind = datatype_of(spec.dtype)
        return {
            "name": spec.name,
            "data_type": "TYPE_STRING" if kind == "BYTES" else f"TYPE_{kind}",
            "dims": _tensor(spec)["shape"][1:] or [1],
        }

    return {
        "name": model.name,
        "platform": model.platform,
        "backend": "edgeglm",
        "max_batch_size": max_rows,
        "input": [tensor(spec) for spec in model.inputs],
        "output": [tensor(spec) for spec in model.outputs],
    }


async def answers(
    runner: Runner,
    model: Model,
    inputs: Mapping[str, Array],
    *,
    max_rows: int,
    deadline: float | None = None,
    priority: int = 1,
) -> Outputs:
    """Run the rows of a request, each of which may share a batch with rows of others.

    Args:
        runner: The runner.
        model: Which model.
        inputs: ``{name: [N, ...]}``.
        max_rows: The most rows.
        deadline: Seconds from now.
        priority: The smaller, the sooner.

    Raises:
        UserError: Names, dtypes or shapes that do not fit, or texts that are no UTF-8.
        TooLargeError: More rows than ``max_rows``, or a text over ``MAX_TEXT``.
        RequestError: What ``Runner.infer`` raises. Should one row fail, the others are withdrawn.
    """
    rows = _rows(model, inputs, max_rows)
    if rows == 1 and model.feed == "arrays":  # what takes most requests
        sample = {name: array[0] for name, array in inputs.items()}
        row = await runner.infer(model.tower, sample, deadline=deadline, priority=priority)
        return {name: array[None] for name, array in row.items()}
    calls = _calls(runner, model, inputs, rows, deadline, priority)
    if rows == 1:
        return {name: array[None] for name, array in (await calls[0]).items()}
    found = await all_of(calls)
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def _rows(model: Model, inputs: Mapping[str, Array], max_rows: int) -> int:
    """Count the rows; what is wrong within a row is the runner's to say."""
    rows, same = -1, True
    for name, array in inputs.items():
        if not array.ndim:
            raise UserError(f"{name} has no batch axis; give it the shape [1, ...]")
        same = same and rows in (-1, len(array))
        rows = len(array)
    if not same:
        counts = {name: len(array) for name, array in inputs.items()}
        raise UserError(f"inputs have {counts} rows; give all the same number")
    if rows > max_rows:
        raise TooLargeError(f"a request of {rows} rows is over the limit of {max_rows}; send several")
    if rows < 1:
        wanted = ", ".join(map(str, model.inputs))
        raise UserError(f"model {model.name!r} got no rows; it takes {wanted}, feed at least one")
    return rows


def _calls(
    runner: Runner,
    model: Model,
    inputs: Mapping[str, Array],
    rows: int,
    deadline: float | None,
    priority: int,
) -> list[Coroutine[Any, Any, dict[str, Array]]]:
    if model.feed == "arrays":
        return [
            runner.infer(
                model.tower,
                {name: array[row] for name, array in inputs.items()},
                deadline=deadline,
                priority=priority,
            )
            for row in range(rows)
        ]
    raw = inputs.get(model.feed)
    if raw is None or len(inputs) != 1 or raw.dtype.kind != "O" or raw.size != rows:
        raise UserError(f"model {model.name!r} takes {model.feed} BYTES [batch]; name and shape it like that")
    elements = [bytes(element) for element in raw.ravel()]
    if model.feed == "image":
        return [_named(runner.embed_image(e, deadline=deadline, priority=priority)) for e in elements]
    texts = [checked_text(text_from_bytes(element)) for element in elements]
    return [_named(runner.embed_text(text, deadline=deadline, priority=priority)) for text in texts]


async def _named(row: Coroutine[Any, Any, Array]) -> dict[str, Array]:
    return {"embedding": await row}


def checked_text(text: str) -> str:
    """Return a text that is short enough. Raises TooLargeError; the tower reads some tens of words."""
    if len(text) > MAX_TEXT:
        raise TooLargeError(f"a text of {len(text)} characters is over the limit of {MAX_TEXT}; shorten it")
    return text


def text_from_bytes(data: bytes) -> str:
    """Decode UTF-8. Raises UserError that says where it breaks."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"a text is no UTF-8 at byte {error.start}; encode it as UTF-8") from None


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}
