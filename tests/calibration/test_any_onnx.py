"""Files that others exported: every spelling of a product that ONNX has keeps its meaning in INT8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import file_by_plan, int8_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.embeddings import quantize_tables
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.opsets import keep_used_opsets
from edgeglm.calibration.outcome import Outcome, Settings
from edgeglm.calibration.plan import PlanGroup, plan_from_file
from edgeglm.calibration.precision import fidelity
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.smooth import smoothed
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.export.anonymous import save_deterministic
from edgeglm.targets.schema import load_target

WIDTH = 64
CPU, T4 = load_target("cpu"), load_target("t4")
_FLOAT = TensorProto.FLOAT


def _matrix(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(seed)
    made: npt.NDArray[np.float32] = (random.standard_normal(shape) / np.sqrt(WIDTH)).astype(np.float32)
    return made


def _batches(count: int = 32) -> Batches:
    return Batches({"x": np.random.default_rng(7).standard_normal((count, WIDTH)).astype(np.float32)}, 8)


def _file(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any],
    *,
    ir: int = 8,
    opset: int = 17,
    shape: list[Any] | None = None,
) -> Path:
    """Write a model from ``x`` to ``y``, with whatever domains its nodes name."""
    graph = helper.make_graph(
        list(nodes),
        "main",
        [helper.make_tensor_value_info("x", _FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", _FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    domains = {node.domain for node in nodes if node.domain}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in sorted(domains))]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), path)
    return path


def _two_products(between: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return x -> product -> ``between`` (from a to b) -> product -> y."""
    first = helper.make_node("MatMul", ["x", "one"], ["a"], "one/MatMul")
    return [first, between, helper.make_node("MatMul", ["b", "two"], ["y"], "two/MatMul")]


_TWO = {"one": _matrix(WIDTH, WIDTH), "two": _matrix(WIDTH, WIDTH, seed=1)}
_RELU = helper.make_node("Relu", ["a"], ["b"], "relu")


def _whole(source: Path, out: Path, scheme: str) -> float:
    """Write the whole model in INT8 and return the worst cosine to FP32."""
    prepared, batches = prepared_model(source), _batches()
    ranges = ranges_from_batches(prepared, batches, ("max",))
    if scheme == "tensorrt":
        plan = whole_plan(prepared, scheme, high_precision="fp16")
        file_by_plan(prepared, out, plan, ranges, batches)
    else:
        int8_by_plan(prepared, out, whole_plan(prepared, scheme), ranges)
    return fidelity(out, source, batches).min_cosine


def _quantized(source: Path, out: Path, target: Any = T4, **options: Any) -> Outcome:
    return quantize_onnx(source, _batches(), out, target=target, **options)


@pytest.mark.parametrize("scheme", ["dynamic", "u8s8", "s8s8-chains", "tensorrt"])
def test_gemm_keeps_its_alpha_and_beta_in_int8(tmp_path: Path, scheme: str) -> None:
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", alpha=0.5, beta=2.0, transB=1)
    weights = {"w": _matrix(WIDTH, WIDTH), "b": 3 * _matrix(WIDTH)}
    assert _whole(_file(tmp_path / "m.onnx", [gemm], weights), tmp_path / "out.onnx", scheme) > 0.999


def _looked_up_and_multiplied() -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    nodes = [
        helper.make_node("Gather", ["table", "three"], ["row"], "look-up"),
        helper.make_node("Add", ["x", "row"], ["a"], "add"),
        helper.make_node("Gemm", ["a", "table"], ["y"], "logits", transB=1),
    ]
    return nodes, {"table": _matrix(300, WIDTH), "three": np.int64(3)}


def _multiplied_and_summed() -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("ReduceSum", ["w", "zero"], ["s"], "sum", keepdims=0),
        helper.make_node("Add", ["a", "s"], ["y"], "add"),
    ]
    return nodes, {"w": _matrix(WIDTH, WIDTH), "zero": np.array([0])}


@pytest.mark.parametrize("scheme", ["dynamic", "u8s8", "tensorrt"])
@pytest.mark.parametrize("make", [_looked_up_and_multiplied, _multiplied_and_summed])
def test_a_weight_that_two_operators_read_is_whole_for_both(tmp_path: Path, scheme: str, make: Any) -> None:
    source = _file(tmp_path / "m.onnx", *make())
    assert _whole(source, tmp_path / "out.onnx", scheme) > 0.999


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, 0), (2, WIDTH, WIDTH)])
def test_a_product_whose_weight_is_no_matrix_keeps_its_precision(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"], "one/MatMul"),
        helper.make_node("MatMul", ["a", "other"], ["y"], "other/MatMul"),
    ]
    weights = {"one": _TWO["one"], "other": np.ones(shape, np.float32)}
    source = _file(tmp_path / "m.onnx", nodes, weights)
    assert [group.nodes for group in prepared_model(source).groups] == [("one/MatMul",)]
    ranges = ranges_from_batches(prepared_model(source), _batches(), ("max",))
    for scheme in ("dynamic", "u8s8-chains-reduced"):
        int8_by_plan(
            prepared_model(source), tmp_path / scheme, whole_plan(prepared_model(source), scheme), ranges
        )


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize("target", [CPU, T4, load_target("jetson-agx-xavier")], ids=lambda t: t.name)
def test_a_model_that_lists_its_weights_as_inputs_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ir: int, target: Any
) -> None:
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 1.5)
    source = _file(tmp_path / "m.onnx", _two_products(_RELU), _TWO, ir=ir, opset=8)
    model = onnx.load(source)
    for name, weight in _TWO.items():
        model.graph.input.append(helper.make_tensor_value_info(name, _FLOAT, weight.shape))
    onnx.save(model, source)
    outcome = _quantized(source, tmp_path / "out", target)
    assert outcome.passed
    assert outcome.fp16_left_out == "" or target.name == "jetson-agx-xavier"
    for made in (tmp_path / "out").glob("*.onnx"):
        assert [value.name for value in onnx.load(made).graph.input] == ["x"]


@pytest.mark.parametrize("scheme", ["dynamic", "tensorrt"])
def test_products_inside_a_models_own_functions_are_quantized_too(tmp_path: Path, scheme: str) -> None:
    call = helper.make_node("Block", ["a", "two"], ["b"], "call", domain="mine")
    nodes = _two_products(call)
    source = _file(tmp_path / "m.onnx", nodes, _TWO)
    model = onnx.load(source)
    body = [helper.make_node("MatMul", ["i", "w"], ["m"]), helper.make_node("Relu", ["m"], ["o"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "Block", ["i", "w"], ["o"], body, opsets))
    onnx.save(model, source)
    assert len(prepared_model(source).groups) == 3
    assert _whole(source, tmp_path / "out.onnx", scheme) > 0.999
    assert [entry.domain for entry in onnx.load(tmp_path / "out.onnx").opset_import if entry.domain] in (
        [],
        ["com.microsoft"],  # what ONNX Runtime's quantizer writes
    )
    assert _quantized(source, tmp_path / "out").fp16 is not None


def test_an_operator_of_a_runtime_is_named_with_its_remedy_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    own = helper.make_node("QuickGelu", ["a"], ["b"], "quick", domain="com.microsoft")
    source = _file(tmp_path / "m.onnx", _two_products(own), _TWO)
    with pytest.raises(UserError, match=r"'quick' is a com.microsoft.QuickGelu.*give the file as it"):
        _quantized(source, tmp_path / "out")
    assert _whole(source, tmp_path / "out.onnx", "u8s8") > 0.999


def test_what_onnxruntime_computes_under_onnx_s_own_name_is_quantized_for_it(tmp_path: Path) -> None:
    norm = helper.make_node("SimplifiedLayerNormalization", ["a", "scale"], ["b"], "norm", epsilon=1e-5)
    weights = {**_TWO, "scale": np.ones(WIDTH, np.float32)}
    source = _file(tmp_path / "m.onnx", _two_products(norm), weights)
    assert _whole(source, tmp_path / "out.onnx", "u8s8") > 0.999
    with pytest.raises(UserError, match=r"'norm' is a onnxruntime\.Simplified"):
        _quantized(source, tmp_path / "out")


def test_a_loop_stays_in_fp32_and_what_modelopt_cannot_convert_is_named(tmp_path: Path) -> None:
    scalar = [("i", TensorProto.INT64), ("go", TensorProto.BOOL)]
    state = helper.make_tensor_value_info("s", _FLOAT, ["n", WIDTH])
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["s", "one"], ["t"], "inner"),
            helper.make_node("Identity", ["go"], ["on"], "same"),
        ],
        "body",
        [*(helper.make_tensor_value_info(name, kind, []) for name, kind in scalar), state],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", _FLOAT, ["n", WIDTH]),
        ],
    )
    loop = helper.make_node("Loop", ["times", "yes", "a"], ["b"], "loop", body=body)
    weights = {**_TWO, "times": np.int64(2), "yes": np.array(True)}
    source = _file(tmp_path / "m.onnx", _two_products(loop), weights, shape=["n", WIDTH])
    outcome = _quantized(source, tmp_path / "out")
    assert outcome.passed
    assert fidelity(tmp_path / "out" / "model.onnx", source, _batches()).min_cosine > 0.99
    assert "'loop' (Loop) holds a graph of its own, whose types no longer fit" in outcome.fp16_left_out
    fp8 = Settings(scheme="fp8", methods=("max",), evaluations=2)
    with pytest.raises(UserError, match=r"'loop' \(Loop\) holds a graph of its own"):
        _quantized(source, tmp_path / "out", load_target("l4"), settings=fp8)
    loop.input[1] = ""  # until the count ends, as TensorFlow writes it; ModelOpt fails on the gap
    source = _file(tmp_path / "m.onnx", _two_products(loop), weights, shape=["n", WIDTH])
    with pytest.raises(UserError, match=r"'loop' \(Loop\) holds a graph of its own.*export the model"):
        _quantized(source, tmp_path / "gap")


def test_operator_sets_that_only_a_branch_uses_stay_declared() -> None:
    branch = helper.make_graph([helper.make_node("Gelu", ["a"], ["b"], domain="com.microsoft")], "b", [], [])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "main", [], [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=[*opsets, helper.make_opsetid("unused", 1)])
    keep_used_opsets(model)
    assert [entry.domain for entry in model.opset_import] == ["", "com.microsoft"]


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    broken = {**_TWO, "two": np.full((WIDTH, WIDTH), np.nan, np.float32)}
    source = _file(tmp_path / "m.onnx", _two_products(_RELU), broken)
    with pytest.raises(UserError, match=r"weights of 'two/MatMul' in m\.onnx hold NaN"):
        prepared_model(source)


def test_a_metric_judges_a_model_that_gives_classes_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"], "one/MatMul"),
        helper.make_node("ArgMax", ["a"], ["y"], "classes", axis=1),
    ]
    source = _file(tmp_path / "m.onnx", nodes, {"one": _TWO["one"]})
    model = onnx.load(source)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, ["n", 1]))
    onnx.save(model, source)
    with pytest.raises(UserError, match="no float output to compare; give --metric"):
        _quantized(source, tmp_path / "out")
    assert _quantized(source, tmp_path / "out", metric=lambda _: 1.0).passed


def test_a_metric_that_opens_an_fp8_file_as_onnxruntime_cannot_is_told_how(tmp_path: Path) -> None:
    def metric(path: Path) -> float:
        if any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node):
            raise RuntimeError("Transpose")
        return 1.0

    source = _file(tmp_path / "m.onnx", _two_products(_RELU), _TWO)
    fp8 = Settings(scheme="fp8", methods=("max",), evaluations=2)
    with pytest.raises(UserError, match=r"RuntimeError: Transpose; .*'session.disable_quant_qdq', '1'"):
        _quantized(source, tmp_path / "out", load_target("l4"), settings=fp8, metric=metric)
    with pytest.raises(UserError, match="RuntimeError: Transpose; mend it"):
        _quantized(source, tmp_path / "out", metric=metric)


@pytest.mark.parametrize(("scheme", "asked", "meant"), [("u8s8", "fp16", "fp32"), ("fp8", "fp32", "fp16")])
def test_a_plan_that_asks_for_what_its_scheme_does_not_compute_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, asked: str, meant: str
) -> None:
    plan = f'source_sha256 = ""\nscheme = "{scheme}"\nhigh_precision = "{asked}"\ngroup = []\n'
    (tmp_path / "plan.toml").write_text(plan)
    given = ["quantize", "m.onnx", "--data", "x.npz", "--output", str(tmp_path / "out")]
    assert exit_code([*given, "--precision-plan", str(tmp_path / "plan.toml")]) == 2
    assert f'set high_precision = "{meant}"' in " ".join(capsys.readouterr().err.split())


def test_an_edited_plan_tells_what_it_reaches_now_and_an_absent_node_what_there_is(tmp_path: Path) -> None:
    source = _file(tmp_path / "m.onnx", _two_products(_RELU), _TWO)
    found = whole_plan(prepared_model(source), "tensorrt", high_precision="fp16")
    before = msgspec.structs.replace(found, summary="what it reached before")
    outcome = _quantized(source, tmp_path / "out", plan=before.with_precisions({"two/MatMul"}))
    written = plan_from_file(tmp_path / "out" / "plan.toml")
    assert written == outcome.search.chosen
    assert written.summary == f"tensorrt: keeps {outcome.kept:.4f} of FP32, cosine {outcome.cosine:.4f}"
    strange = PlanGroup(name="x", nodes=("zzz",), precision="int8")
    with pytest.raises(UserError, match=r"'zzz' .*; name one of them, such as one/MatMul, two/MatMul"):
        _quantized(source, tmp_path / "no", plan=msgspec.structs.replace(before, group=(strange,)))


def _tied() -> list[onnx.NodeProto]:
    relu = helper.make_node("Relu", ["a"], ["b"], "relu")
    first, _, last = _two_products(relu)
    last.input[1] = "one"
    return [first, relu, last]


def _read_by_a_branch() -> list[onnx.NodeProto]:
    value = helper.make_tensor_value_info("t", _FLOAT, ["n", WIDTH])
    yes = helper.make_graph([helper.make_node("MatMul", ["a", "one"], ["t"], "inner")], "yes", [], [value])
    no = helper.make_graph([helper.make_node("Relu", ["a"], ["t"], "other")], "no", [], [value])
    choice = helper.make_node("If", ["always"], ["b"], "choice", then_branch=yes, else_branch=no)
    return _two_products(choice)


@pytest.mark.parametrize(
    "nodes",
    [_tied(), _read_by_a_branch(), [helper.make_node("MatMul", ["x", "one"], ["y"], "alone")]],
    ids=["tied", "branch", "alone"],
)
def test_smoothing_changes_nothing_in_fp32_whoever_else_reads_a_weight(
    tmp_path: Path, nodes: list[onnx.NodeProto]
) -> None:
    weights = {**_TWO, "always": np.array(True)}
    source = _file(tmp_path / "m.onnx", nodes, weights)
    save_deterministic(smoothed(prepared_model(source), _batches(), 0.5).model, tmp_path / "smooth.onnx")
    assert fidelity(tmp_path / "smooth.onnx", source, _batches()).max_abs < 1e-4


def test_a_table_that_a_branch_reads_too_stays_whole() -> None:
    value = helper.make_tensor_value_info("y", _FLOAT, None)
    look_up = helper.make_node("Gather", ["table", "ids"], ["y"], "inner")
    branch = helper.make_graph([look_up], "branch", [], [value])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "outer"),
        helper.make_node("If", ["always"], ["y"], "choice", then_branch=branch, else_branch=branch),
    ]
    tables = [numpy_helper.from_array(_matrix(300, WIDTH), name) for name in ("table", "own")]
    nodes.append(helper.make_node("Gather", ["own", "ids"], ["other"], "own"))
    graph = helper.make_graph(nodes, "main", [], [value], tables)
    assert quantize_tables(helper.make_model(graph), "int8") == ["own"]
