"""Models, plans' inputs and metrics that cannot be used: an error that says why, and nothing written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import numpy as np
import onnx
from onnx import numpy_helper

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import whole_plan
from edgeglm.calibration.groups import quantizable_groups
from edgeglm.calibration.policy import nodes_of_policy, policy_named
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.scoring import metric_from_name
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.export.fp16_lint import lint_fp16
from edgeglm.targets.schema import load_target
from tests.calibration.towers import batches_of, tower_tensors

CPU = load_target("cpu")
pytestmark = pytest.mark.usefixtures("every_scheme_pays")


def _bad(name: str, model: onnx.ModelProto, folder: Path) -> Path:
    """Write one kind of model that cannot be quantized."""
    path = folder / "model.onnx"
    if name == "no quantizable node":
        del model.graph.node[:]
        model.graph.node.append(
            onnx.helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0)
        )
    elif name == "unsupported op":
        model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", "strange"
        model.opset_import.append(onnx.helper.make_opsetid("strange", 1))
    elif name == "external data missing":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (folder / "weights.bin").unlink()
        return path
    elif name == "not a model":
        path.write_bytes(b"\x08\x07 no protobuf")
        return path
    elif name == "narrow weights":
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                narrow = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, path)
    return path


def _as_of_opset_11(model: onnx.ModelProto) -> None:
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 11))
    model.ir_version = 6
    pool = model.graph.node[-1]
    del pool.input[1:]
    pool.attribute.append(onnx.helper.make_attribute("axes", [2, 3]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no quantizable node", "nothing can be INT8"),
        ("unsupported op", "cannot load"),
        ("external data missing", "weights.bin"),
        ("not a model", "no ONNX model"),
        ("narrow weights", r"weights of 'stem/Conv' .* are FLOAT16.*give the FP32 model"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_a_users_error(
    fp32_dir: Path, tmp_path: Path, name: str, message: str
) -> None:
    path = _bad(name, onnx.load(fp32_dir / "image.onnx"), tmp_path)
    with pytest.raises(UserError, match=message):
        quantize_onnx(path, batches_of("image"), tmp_path / "out", target=CPU)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_and_one_sample_are_refused(fp32_dir: Path, tmp_path: Path) -> None:
    quantize_onnx(fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU)
    static = whole_plan(prepared_model(fp32_dir / "text.onnx"), "u8s8")
    quantize_onnx(fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU, plan=static)
    with pytest.raises(UserError, match="quantized already"):
        quantize_onnx(tmp_path / "out" / "model.onnx", batches_of("text"), tmp_path / "x", target=CPU)
    with pytest.raises(UserError, match="at least 2"):
        quantize_onnx(fp32_dir / "text.onnx", batches_of("text", 1), tmp_path / "x", target=CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "module:function"), ("no_such_module:f", "cannot import"), ("json:nope", "no function")],
)
def test_a_metric_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metric_from_name(name)


def test_a_metric_that_gives_nan_or_raises_is_a_users_error(fp32_dir: Path, tmp_path: Path) -> None:
    for metric, message in ((lambda _: float("nan"), "finite"), (lambda _: 1 / 0, "ZeroDivisionError")):
        with pytest.raises(UserError, match=message):
            quantize_onnx(
                fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU, metric=metric
            )


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_a_metric_that_no_share_can_be_taken_of_is_refused(
    fp32_dir: Path, tmp_path: Path, value: float
) -> None:
    with pytest.raises(UserError, match=r"the metric gives FP32 .* return a number above 0"):
        quantize_onnx(
            fp32_dir / "text.onnx",
            batches_of("text"),
            tmp_path / "out",
            target=CPU,
            metric=lambda _: value,
        )


def test_a_metric_finds_what_lies_beside_it_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metric_of_mine.py").write_text(
        "def score(path):\n    import data_of_mine\n    return data_of_mine.VALUE\n"
    )
    (tmp_path / "data_of_mine.py").write_text("VALUE = 0.25\n")
    before = list(sys.path)
    assert metric_from_name("metric_of_mine:score")(tmp_path) == 0.25
    assert sys.path == before
    (tmp_path / "broken_metric.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"broken_metric fails when it is imported .ZeroDivisionError"):
        metric_from_name("broken_metric:score")


def test_an_older_model_is_raised_and_quantized(fp32_dir: Path, tmp_path: Path) -> None:
    model = onnx.load(fp32_dir / "image.onnx")
    _as_of_opset_11(model)
    onnx.save(model, tmp_path / "old.onnx")
    outcome = quantize_onnx(tmp_path / "old.onnx", batches_of("image"), tmp_path / "out", target=CPU)
    assert outcome.passed
    assert outcome.cosine is not None
    assert outcome.cosine > 0.99
    assert onnx.load(tmp_path / "old.onnx") == model


def test_a_model_beyond_what_protobuf_holds_is_refused_by_its_size(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(
        onnx.load(fp32_dir / "text.onnx"), tmp_path / "model.onnx",
        save_as_external_data=True, location="weights.bin", size_threshold=0,
    )  # fmt: skip
    monkeypatch.setattr("edgeglm.calibration.preparation._MOST_BYTES", 50_000)  # the weights take more
    with pytest.raises(UserError, match=r"model.onnx and its weights take .* GB.* 2 GB at most"):
        quantize_onnx(tmp_path / "model.onnx", batches_of("text"), tmp_path / "out", target=CPU)


def _reduced(model: onnx.ModelProto, axes: list[int] | None) -> onnx.ModelProto:
    """Give one number for a sample, or one for all of a batch."""
    model.graph.node[-1].output[0] = "rows"
    inputs = ["rows"] if axes is None else ["rows", "scalar_axes"]
    if axes is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), "scalar_axes"))
    model.graph.node.append(onnx.helper.make_node("ReduceMean", inputs, ["embedding"], keepdims=0))
    shape = [] if axes is None else ["batch"]
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("embedding", 1, shape))
    return model


@pytest.mark.parametrize("axes", [None, [1]])
def test_single_numbers_are_compared_as_one_vector(
    fp32_dir: Path, tmp_path: Path, axes: list[int] | None
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_reduced(onnx.load(fp32_dir / "text.onnx"), axes), path)
    outcome = quantize_onnx(path, batches_of("text"), tmp_path / "out", target=CPU)
    assert outcome.passed
    assert outcome.cosine is not None
    assert outcome.cosine < 1.0  # of two numbers it would be 1 whatever they are


def test_one_number_in_all_is_no_score(fp32_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_reduced(onnx.load(fp32_dir / "text.onnx"), None), path)
    with pytest.raises(UserError, match=r"one number.*--metric"):
        quantize_onnx(path, batches_of("text", 8), tmp_path / "out", target=CPU)


def test_samples_that_the_model_cannot_compute_or_answers_with_nan_are_refused(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: dict[str, Any] = tower_tensors("text", 16)
    texts["input_ids"][-1, -1] = 600  # the table has 600 rows
    np.savez(tmp_path / "data.npz", **texts)
    arguments = ["quantize", str(fp32_dir / "text.onnx"), "--data", str(tmp_path / "data.npz")]
    assert exit_code([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "token ids of its own tokenizer" in capsys.readouterr().err.replace("\n", " ")
    model = onnx.load(fp32_dir / "image.onnx")
    model.graph.node[-1].output[0] = "rows"
    model.graph.node.append(onnx.helper.make_node("Log", ["rows"], ["embedding"]))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(UserError, match="itself gives NaN or infinity"):
        quantize_onnx(tmp_path / "nan.onnx", batches_of("image"), tmp_path / "out", target=CPU)


def test_a_batch_that_the_model_takes_whole_is_not_split(fp32_dir: Path, tmp_path: Path) -> None:
    model = onnx.load(fp32_dir / "image.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(UserError, match="give at least 8"):
        quantize_onnx(tmp_path / "fixed.onnx", batches_of("image", 4), tmp_path / "out", target=CPU)
    assert quantize_onnx(tmp_path / "fixed.onnx", batches_of("image", 8), tmp_path / "out", target=CPU).passed


@pytest.mark.parametrize("op", ["QLinearConv", "MatMulInteger", "DynamicQuantizeLinear", "DequantizeLinear"])
def test_whatever_computes_with_integers_is_quantized_already(fp32_dir: Path, op: str) -> None:
    model = onnx.load(fp32_dir / "text.onnx")
    model.graph.node.append(onnx.helper.make_node(op, ["r"], ["integers"], "odd"))
    for refused in (quantizable_groups, lambda m: nodes_of_policy(m, policy_named("linear-only")), lint_fp16):
        with pytest.raises(UserError, match=f"quantized already: node 'odd' is a {op}"):
            refused(model)
