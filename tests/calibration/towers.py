"""Two small towers with what breaks quantization: residuals, a dead channel, large token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.plan import PlanGroup, PrecisionPlan
from edgeglm.calibration.preparation import prepared_model

Feeds = list[dict[str, npt.NDArray[Any]]]
WIDTH = 32


def _model(
    nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], output: list[Any], weights: dict[str, Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def image_tower() -> onnx.ModelProto:
    """Stem, a residual depthwise block, a pooled head. One channel is dead, as in real weights."""
    random = np.random.default_rng(0)
    depthwise = random.normal(0, 0.3, (WIDTH, 1, 3, 3)).astype(np.float32)
    depthwise[0] *= 1e-9
    weights = {
        "stem.w": random.normal(0, 0.3, (WIDTH, 3, 3, 3)).astype(np.float32),
        "depthwise.w": depthwise,
        "project.w": random.normal(0, 0.2, (WIDTH, WIDTH, 1, 1)).astype(np.float32),
        "zero": np.float32(0),
        "six": np.float32(6),
        "axes": np.array([2, 3], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "stem.w"], ["a"], "stem/Conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "zero", "six"], ["b"], "stem/Clip"),
        helper.make_node(
            "Conv",
            ["b", "depthwise.w"],
            ["c"],
            "depthwise/Conv",
            kernel_shape=[3, 3],
            group=WIDTH,
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("Clip", ["c", "zero", "six"], ["d"], "depthwise/Clip"),
        helper.make_node("Conv", ["d", "project.w"], ["e"], "project/Conv"),
        helper.make_node("Add", ["b", "e"], ["f"], "residual/Add"),
        helper.make_node("ReduceMean", ["f", "axes"], ["embedding"], "pool/ReduceMean", keepdims=0),
    ]
    return _model(nodes, {"pixels": (TensorProto.FLOAT, ["batch", 3, 16, 16])}, ["batch", WIDTH], weights)


def text_tower() -> onnx.ModelProto:
    """A table, a residual feed-forward block, a masked mean."""
    random = np.random.default_rng(1)
    weights = {
        "table": random.normal(0, 1, (600, WIDTH)).astype(np.float32),
        "up.w": random.normal(0, 0.2, (WIDTH, 4 * WIDTH)).astype(np.float32),
        "down.w": random.normal(0, 0.1, (4 * WIDTH, WIDTH)).astype(np.float32),
        "scale": np.ones(WIDTH, np.float32),
        "last": np.array([-1], dtype=np.int64),
        "one": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "table/Gather"),
        helper.make_node("LayerNormalization", ["x", "scale"], ["n"], "norm/LayerNormalization"),
        helper.make_node("MatMul", ["n", "up.w"], ["u"], "up/MatMul"),
        helper.make_node("Gelu", ["u"], ["g"], "up/Gelu"),
        helper.make_node("MatMul", ["g", "down.w"], ["d"], "down/MatMul"),
        helper.make_node("Add", ["n", "d"], ["r"], "residual/Add"),
        helper.make_node("Cast", ["attention_mask"], ["m"], "mask/Cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["mm"], "mask/Unsqueeze"),
        helper.make_node("Mul", ["r", "mm"], ["masked"], "mask/Mul"),
        helper.make_node("ReduceSum", ["masked", "one"], ["embedding"], "pool/ReduceSum", keepdims=0),
    ]
    ids = (TensorProto.INT64, ["batch", "length"])
    return _model(nodes, {"input_ids": ids, "attention_mask": ids}, ["batch", WIDTH], weights)


@pytest.fixture(scope="session")
def fp32_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both FP32 towers."""
    folder = tmp_path_factory.mktemp("fp32")
    for tower, model in (("image", image_tower()), ("text", text_tower())):
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / f"{tower}.onnx")
    return folder


def tower_tensors(tower: str, count: int, seed: int = 3) -> dict[str, npt.NDArray[Any]]:
    random = np.random.default_rng(seed)
    if tower == "image":
        return {"pixels": random.random((count, 3, 16, 16), dtype=np.float32)}
    ids = random.integers(0, 600, (count, 6))
    mask = np.ones_like(ids)
    mask[::2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batches_of(tower: str, count: int = 32) -> Batches:
    """Return ``count`` samples of a tower in batches of four."""
    return Batches(tower_tensors(tower, count), 4)


def plan_of(path: Path, scheme: str, **changes: Any) -> PrecisionPlan:
    """Return the plan that has every group of a model in INT8."""
    prepared = prepared_model(path)
    groups = tuple(PlanGroup(name=g.name, nodes=g.nodes, precision="int8") for g in prepared.groups)
    return PrecisionPlan(source_sha256=prepared.sha256, scheme=scheme, group=groups, **changes)


@pytest.fixture(scope="session")
def batches() -> dict[str, Feeds]:
    """Four batches of four samples for each tower."""
    found: dict[str, Feeds] = {}
    for tower in ("image", "text"):
        tensors = tower_tensors(tower, 16)
        found[tower] = [{name: a[i : i + 4] for name, a in tensors.items()} for i in range(0, 16, 4)]
    return found
