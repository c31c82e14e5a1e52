"""Samples for models whose inputs are no batch of pictures or of rows: a remedy that can be followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from PIL import Image

from edgeglm.calibration.drawing import Drawing, calibration_set_for_model
from edgeglm.core.errors import UserError


def _identity(path: Path, shape: list[Any]) -> None:
    value, out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")
    )
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "main", [value], [out])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


@pytest.mark.parametrize("shape", [["n", 16, 16, 3], ["n", 1, 16, 16], ["n", 3, 16, 24]])
def test_pictures_for_a_model_that_takes_no_three_channels_of_a_square_are_refused(
    tmp_path: Path, shape: list[Any]
) -> None:
    _identity(tmp_path / "other.onnx", shape)
    Image.new("RGB", (20, 24)).save(tmp_path / "data.png")
    with pytest.raises(UserError, match=r"three channels of a square.*give an .npz"):
        calibration_set_for_model(tmp_path, tmp_path / "other.onnx", tmp_path / "set", drawing=Drawing())
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("shape", "given", "remedy"),
    [
        ([4], (6, 4), "along its first axis.*--batch-size 4"),
        ([], (6,), "as a constant"),
        ([6, 4], (6,), "reshape"),
    ],
)
def test_an_input_without_an_axis_for_samples_has_a_remedy_that_works(
    tmp_path: Path, shape: list[int], given: tuple[int, ...], remedy: str
) -> None:
    _identity(tmp_path / "m.onnx", shape)
    samples = np.random.default_rng(0).standard_normal(given).astype(np.float32)

    def drawn(array: Any, size: int) -> int:
        np.savez(tmp_path / "x.npz", x=array)
        drawing = Drawing(batch_size=size, samples=8)
        made = calibration_set_for_model(
            tmp_path / "x.npz", tmp_path / "m.onnx", tmp_path / "set", drawing=drawing
        )
        return made.batches("model").samples

    with pytest.raises(UserError, match=remedy):
        drawn(samples, 4)
    if shape == [4]:
        assert drawn(np.concatenate(samples), 4) == 8
