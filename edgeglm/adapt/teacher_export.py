"""A finished teacher as ONNX, held against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeglm.export.parity import assert_parity
from edgeglm.export.torch_to_onnx import onnx_from_module


def exported_teacher(alignment: Any, image_head: Any, text_head: Any, out: Path) -> dict[str, float]:
    """Write ``text.onnx``, ``image-head.onnx`` and, of several tasks, ``kinds.onnx`` into a folder.

    Args:
        alignment: A finished one, for its text tower, its classifiers and examples of what they take.
        image_head: Features -> embedding.
        text_head: Features of a text -> embedding.
        out: The folder.

    Returns:
        The largest difference of each to torch.
    """

    class AlignedText(nn.Module):
        def __init__(self, tower: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.tower, self.head = tower, head

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            embedded: Tensor = self.head(self.tower(input_ids, attention_mask))
            return embedded

    class ImageHead(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, features: Tensor) -> Tensor:
            embedded: Tensor = self.head(features)
            return embedded

    text, texts = alignment.text, list(alignment.concepts.texts[:8])
    encoded = text.tokenizer.encode(texts, max_length=text.max_length)
    ids, mask = (torch.from_numpy(array) for array in encoded)
    batches = [{"input_ids": ids, "attention_mask": mask}]
    batches.append({"input_ids": ids[:1, :3], "attention_mask": mask[:1, :3]})
    free = {0: "batch", 1: "length"}
    module = AlignedText(text.module(), text_head).eval()
    if ids.shape[0] < 2 or ids.shape[1] < 2:  # the exporter would take a 1 for a constant
        batches[0] = {name: tensor.repeat(2, 2) for name, tensor in batches[0].items()}
    onnx_from_module(
        module, batches[0], out / "text.onnx", dynamic_axes={"input_ids": free, "attention_mask": free}
    )
    text_parity = assert_parity(module, out / "text.onnx", batches)

    rows = alignment.features_VNF[0][:8].float()
    head = ImageHead(image_head).eval()
    example = {"features": rows.repeat(2, 1)[:8]}
    onnx_from_module(head, example, out / "image-head.onnx", dynamic_axes={"features": {0: "batch"}})
    image_parity = assert_parity(head, out / "image-head.onnx", [example, {"features": rows[:1]}])
    differences = {"text": text_parity.max_abs, "image": image_parity.max_abs}
    if alignment.multitask is None:
        return differences

    class Kinds(nn.Module):
        def __init__(self, tasks: Any) -> None:
            super().__init__()
            self.head = tasks.image_head if tasks.own_head is None else tasks.own_head
            self.classifiers, self.scale = tasks.classifiers, tasks.scale

        def forward(self, features: Tensor) -> Tensor:
            embedded = self.head(features) * self.scale
            return torch.cat([classifier(embedded) for classifier in self.classifiers], dim=1)

    kinds = Kinds(alignment.multitask).eval()
    onnx_from_module(
        kinds,
        example,
        out / "kinds.onnx",
        output_names=("logits",),
        dynamic_axes={"features": {0: "batch"}},
    )
    kinds_parity = assert_parity(kinds, out / "kinds.onnx", [example, {"features": rows[:1]}], atol=1e-3)
    return {**differences, "kinds": kinds_parity.max_abs}
