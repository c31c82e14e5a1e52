"""Models, plans' inputs and metrics that cannot be used: an error that says why, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import prepared_model, whole_plan
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.scoring import metric_from_name
from edgeglm.core.errors import UserError
from edgeglm.targets.schema import load_target
from tests.calibration.towers import tower_tensors

CPU = load_target("cpu")


def _batches(tower: str, count: int = 32) -> Batches:
    return Batches(tower_tensors(tower, count), 4)


@pytest.fixture(autouse=True)
def every_scheme_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small are not faster in INT8, which is not what these tests ask."""
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 1.5)


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
    elif name == "old opset":
        del model.opset_import[:]
        model.opset_import.append(onnx.helper.make_opsetid("", 11))
        model.ir_version = 6
        pool = model.graph.node[-1]
        del pool.input[1:]
        pool.attribute.append(onnx.helper.make_attribute("axes", [2, 3]))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no quantizable node", "nothing can be INT8"),
        ("unsupported op", "cannot load"),
        ("external data missing", "weights.bin"),
        ("not a model", "no ONNX model"),
        ("old opset", "opset 11"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_a_users_error(
    fp32_dir: Path, tmp_path: Path, name: str, message: str
) -> None:
    path = _bad(name, onnx.load(fp32_dir / "image.onnx"), tmp_path)
    with pytest.raises(UserError, match=message):
        quantize_onnx(path, _batches("image"), tmp_path / "out", target=CPU)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_and_one_sample_are_refused(fp32_dir: Path, tmp_path: Path) -> None:
    quantize_onnx(fp32_dir / "text.onnx", _batches("text"), tmp_path / "out", target=CPU)
    static = whole_plan(prepared_model(fp32_dir / "text.onnx"), "u8s8")
    quantize_onnx(fp32_dir / "text.onnx", _batches("text"), tmp_path / "out", target=CPU, plan=static)
    with pytest.raises(UserError, match="quantized already"):
        quantize_onnx(tmp_path / "out" / "model.onnx", _batches("text"), tmp_path / "x", target=CPU)
    with pytest.raises(UserError, match="at least 2"):
        quantize_onnx(fp32_dir / "text.onnx", _batches("text", 1), tmp_path / "x", target=CPU)


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
                fp32_dir / "text.onnx", _batches("text"), tmp_path / "out", target=CPU, metric=metric
            )
