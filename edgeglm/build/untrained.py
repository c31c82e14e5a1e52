"""A student that has learnt nothing, as ONNX: it tells what it costs, and whether a board takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LENGTH = 8  # tokens of a text: a query of a few words


def fewer_entries(whole: int, *wanted: int) -> int:
    """Return how many entries a vocabulary has after each wish for fewer; 0 wishes nothing."""
    return min([whole, *(count for count in wanted if count)])


def untrained_towers(
    size: str,
    folder: Path,
    *,
    resolution: int,
    max_length: int,
    vocabulary: int,
    embedding_dim: int,
    opset: int,
    threads: int,
) -> tuple[dict[str, Path], int]:
    """Export a student of a named size with weights drawn from a fixed seed.

    Returns:
        ``{"image": path, "text": path}``, named after the size, and its parameters, the vocabulary counted.
    """
    import torch

    from edgeglm.export.torch_to_onnx import onnx_from_module
    from edgeglm.models.student_shapes import student_shape
    from edgeglm.models.students import StudentTextTower, student_image_tower
    from edgeglm.train.loop import seeded

    shape = student_shape(size)
    with seeded(0, threads=threads):
        image = student_image_tower(shape, resolution=resolution, embedding_dim=embedding_dim)
        text = StudentTextTower(
            shape, vocabulary=vocabulary, max_length=max_length, embedding_dim=embedding_dim
        )
    free = {0: "batch", 1: "length"}
    ids = torch.ones(2, min(LENGTH, max_length), dtype=torch.int64)
    pixels = torch.rand(2, 3, resolution, resolution)
    made: dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]] = {
        "image": (image, {"pixels": pixels}, {"pixels": {0: "batch"}}),
        "text": (
            text,
            {"input_ids": ids, "attention_mask": ids},
            {"input_ids": free, "attention_mask": free},
        ),
    }
    paths = {}
    for kind, (tower, feeds, axes) in made.items():
        paths[kind] = folder / f"{size}-{kind}.onnx"
        onnx_from_module(tower.eval(), feeds, paths[kind], dynamic_axes=axes, opset=opset)
    parameters = sum(weights.numel() for tower, _, _ in made.values() for weights in tower.parameters())
    return paths, parameters
