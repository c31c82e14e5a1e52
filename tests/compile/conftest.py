"""Small ONNX graphs with the towers' names and shapes, as fixtures that write them to a path."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.skips import mount_small_disk

with suppress(ImportError):  # where onnx is absent, the tests that need these graphs skip
    from onnx import TensorProto, checker, helper, numpy_helper, save

OPSET = 20


@pytest.fixture(scope="session")
def image_tower() -> Callable[..., Path]:
    """Return ``write_image_tower``."""
    return write_image_tower


@pytest.fixture(scope="session")
def text_tower() -> Callable[..., Path]:
    """Return ``write_text_tower``."""
    return write_text_tower


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB, mounted where the engines of a bundle ``demo`` go."""
    place = tmp_path / "demo.finalized"
    place.mkdir()
    mount_small_disk(place, "size=96k")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def write_image_tower(
    path: Path, *, half: bool = True, side: int = 4, unsupported: bool = False, clip: bool = False
) -> Path:
    """``pixels`` float32 [B,3,side,side] -> MatMul, LayerNorm, Gelu -> ``embedding`` float32 [B,8]."""
    dtype, numpy_dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    width = 3 * side * side
    weights = np.random.default_rng(0).normal(size=(width, 8)).astype(numpy_dtype)
    constants = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.ones(8, numpy_dtype), "scale"),
        numpy_helper.from_array(np.zeros(8, numpy_dtype), "bias"),
        numpy_helper.from_array(np.array([0, width], np.int64), "flat_shape"),
    ]
    nodes = [
        helper.make_node("Reshape", ["pixels", "flat_shape"], ["flat"], name="flatten"),
        helper.make_node("Cast", ["flat"], ["flat_cast"], name="cast_in", to=dtype),
        helper.make_node("MatMul", ["flat_cast", "w"], ["m"], name="proj"),
        helper.make_node("LayerNormalization", ["m", "scale", "bias"], ["n"], name="norm", axis=-1),
        helper.make_node("Gelu", ["n"], ["g"], name="gelu"),
        helper.make_node("Cast", ["g"], ["embedding"], name="cast_out", to=TensorProto.FLOAT),
    ]
    if unsupported:
        nodes[4] = helper.make_node("StringNormalizer", ["n"], ["g"], name="odd_one")
    if clip:  # a bound that is subnormal in FP16 makes the builder complain on stdout
        constants.append(numpy_helper.from_array(np.array(6e-8, numpy_dtype), "least"))
        clipped = helper.make_node("Clip", ["m", "least"], ["mc"], name="clip")
        nodes[3:4] = [
            clipped,
            helper.make_node("LayerNormalization", ["mc", "scale", "bias"], ["n"], axis=-1),
        ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3, side, side])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", 8])
    return _saved(path, nodes, [pixels], [embedding], constants, check=not unsupported)


def write_text_tower(path: Path, *, half: bool = True) -> Path:
    """``input_ids``, ``attention_mask`` int64 [B,L] -> masked sum of embeddings, MatMul -> [B,8]."""
    dtype, numpy_dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    random = np.random.default_rng(1)
    constants = [
        numpy_helper.from_array(random.normal(size=(16, 8)).astype(numpy_dtype), "table"),
        numpy_helper.from_array(random.normal(size=(8, 8)).astype(numpy_dtype), "w"),
        numpy_helper.from_array(np.array([-1], np.int64), "last"),
        numpy_helper.from_array(np.array([1], np.int64), "tokens"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"], name="embed"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], name="cast_mask", to=dtype),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"], name="mask3"),
        helper.make_node("Mul", ["e", "mask3"], ["masked"], name="masked"),
        helper.make_node("ReduceSum", ["masked", "tokens"], ["sum"], name="pool", keepdims=0),
        helper.make_node("MatMul", ["sum", "w"], ["m"], name="proj"),
        helper.make_node("Cast", ["m"], ["embedding"], name="cast_out", to=TensorProto.FLOAT),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "L"])
        for name in ("input_ids", "attention_mask")
    ]
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", 8])
    return _saved(path, nodes, inputs, [embedding], constants, check=True)


def _saved(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any], *, check: bool
) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    if check:
        checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return path
