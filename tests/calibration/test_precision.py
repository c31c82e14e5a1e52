from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx
from onnx import TensorProto

from edgeglm.calibration.policy import Int8Policy, nodes_of_policy, policy_named
from edgeglm.calibration.precision import fidelity, fp16_from_fp32, int8_from_fp32
from edgeglm.calibration.qdq import quantized_weight
from edgeglm.compile.builder import engine_from_onnx
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.schema import load_target
from tests.calibration.towers import Feeds, image_tower, text_tower

TOWERS = ("image", "text")
POLICY = policy_named("linear-and-conv")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory, fp32_dir: Path, batches: dict[str, Feeds]) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for tower in TOWERS:
        source = fp32_dir / f"{tower}.onnx"
        fp16_from_fp32(source, folder / f"{tower}-fp16.onnx", batches[tower][:2])
        int8_from_fp32(source, folder / f"{tower}-int8.onnx", batches[tower], policy=POLICY)
    return folder


@pytest.mark.parametrize("tower", TOWERS)
def test_variants_stay_close_to_fp32(
    variants: Path, fp32_dir: Path, batches: dict[str, Feeds], tower: str
) -> None:
    source = fp32_dir / f"{tower}.onnx"
    assert fidelity(variants / f"{tower}-fp16.onnx", source, batches[tower]).min_cosine > 0.9999
    assert fidelity(variants / f"{tower}-int8.onnx", source, batches[tower]).min_cosine > 0.998


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("tower", TOWERS)
def test_inputs_and_outputs_keep_their_types(
    variants: Path, fp32_dir: Path, tower: str, precision: str
) -> None:
    before = onnx.load(fp32_dir / f"{tower}.onnx").graph
    after = onnx.load(variants / f"{tower}-{precision}.onnx").graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_same_bytes_and_samples_give_the_same_bytes_and_leave_the_source_alone(
    variants: Path, fp32_dir: Path, batches: dict[str, Feeds], tower: str, tmp_path: Path
) -> None:
    source = fp32_dir / f"{tower}.onnx"
    before = sha256_file(source)
    int8 = int8_from_fp32(source, tmp_path / "int8.onnx", batches[tower], policy=POLICY)
    fp16 = fp16_from_fp32(source, tmp_path / "fp16.onnx", batches[tower][:2])
    assert int8.sha256 == sha256_file(variants / f"{tower}-int8.onnx")
    assert fp16.sha256 == sha256_file(variants / f"{tower}-fp16.onnx")
    assert sha256_file(source) == before


@pytest.mark.parametrize("tower", TOWERS)
def test_residual_adds_read_the_values_as_they_were(variants: Path, tower: str) -> None:
    graph = onnx.load(variants / f"{tower}-int8.onnx").graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    readers = {n.name for n in graph.node if dequantized & set(n.input)}
    assert "residual/Add" not in readers
    assert readers == set(nodes_of_policy(_source(tower), POLICY))


def _source(tower: str) -> onnx.ModelProto:
    return image_tower() if tower == "image" else text_tower()


def test_weights_travel_as_int8_and_no_activation_is_quantized_from_fp16(variants: Path) -> None:
    graph = onnx.load(variants / "text-int8.onnx").graph
    weights = {t.name: t for t in graph.initializer}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantizers
    assert all(weights[n.input[1]].data_type == TensorProto.FLOAT for n in quantizers)
    assert not any(n.input[0] in weights for n in quantizers)
    assert weights["up.w_int8"].data_type == TensorProto.INT8
    assert weights["table"].data_type == TensorProto.FLOAT16


def test_fp16_keeps_the_token_table_in_fp16_though_ids_are_large(variants: Path) -> None:
    weights = {t.name: t for t in onnx.load(variants / "text-fp16.onnx").graph.initializer}
    assert weights["table"].data_type == TensorProto.FLOAT16


def test_modelopt_says_nothing_on_the_terminal(
    fp32_dir: Path, batches: dict[str, Feeds], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = logging.getLogger().handlers[:]
    int8_from_fp32(fp32_dir / "text.onnx", tmp_path / "x.onnx", batches["text"], policy=POLICY)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("target", ["t4", "a100"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("tower", TOWERS)
def test_tensorrt_rtx_builds_each_variant(variants: Path, tower: str, precision: str, target: str) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    shapes = {"pixels": (3, 16, 16)} if tower == "image" else {"input_ids": (6,), "attention_mask": (6,)}
    profile = {
        name: ShapeRange(min=(1, *rest), opt=(4, *rest), max=(8, *rest)) for name, rest in shapes.items()
    }
    plan = engine_from_onnx(
        variants / f"{tower}-{precision}.onnx",
        targets=[load_target(target)],
        library="tensorrt-rtx",
        precision=precision,
        profiles=[profile],
    )
    assert plan.plan


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": np.full((2, 3, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"pixels": np.zeros((2, 3, 8, 8), np.float32)}, "shape"),
        ({"pixels": np.zeros((2, 3, 16, 16), np.float64)}, "float64"),
        ({"image": np.zeros((2, 3, 16, 16), np.float32)}, "pixels"),
    ],
)
def test_feeds_that_do_not_fit_are_named(
    fp32_dir: Path, tmp_path: Path, batch: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        int8_from_fp32(fp32_dir / "image.onnx", tmp_path / "x.onnx", [batch], policy=POLICY)


def test_no_samples_never_means_random_samples(fp32_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        int8_from_fp32(fp32_dir / "image.onnx", tmp_path / "x.onnx", [], policy=POLICY)


def test_a_quantized_model_is_not_quantized_again(
    variants: Path, batches: dict[str, Feeds], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="already"):
        int8_from_fp32(variants / "image-int8.onnx", tmp_path / "x.onnx", batches["image"], policy=POLICY)


def test_policies_choose_by_op_shape_and_name() -> None:
    text = _source("text")
    assert nodes_of_policy(text, POLICY) == ["up/MatMul", "down/MatMul"]
    assert nodes_of_policy(text, policy_named("expanding")) == ["up/MatMul"]
    assert nodes_of_policy(text, Int8Policy(name="x", exclude=("up/.*",))) == ["down/MatMul"]
    with pytest.raises(UserError, match="finds no node"):
        nodes_of_policy(text, policy_named("conv-only"))
    with pytest.raises(UserError, match="did you mean 'expanding'"):
        policy_named("expandin")


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0.015625, 2, width=32))
def test_a_weight_is_never_further_than_half_a_step_from_its_int8(values: list[float], scale: float) -> None:
    weight = np.array(values, np.float32)
    rounded = quantized_weight(weight, np.array(scale, np.float32), 0).astype(np.float64) * np.float32(scale)
    inside = np.abs(weight) <= 127 * np.float32(scale)
    assert np.all(np.abs(rounded - weight)[inside] <= np.float32(scale) / 2 + 1e-9)
