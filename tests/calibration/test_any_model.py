from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import int8_by_plan, ranges_from_batches
from edgeglm.calibration.demands import split_batches
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.plan import plan_from_toml, plan_to_toml
from edgeglm.calibration.precision import fidelity
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.schemes import METHODS, SCHEMES, cpu_schemes, x86_sums_16_bits
from edgeglm.calibration.smooth import smoothed
from edgeglm.cli.main import exit_code
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError
from edgeglm.engines.environment import cpu_flags
from edgeglm.targets.schema import load_target
from tests.calibration.towers import batches_of, plan_of, tower_tensors

CPU, T4 = load_target("cpu"), load_target("t4")
pytestmark = pytest.mark.usefixtures("every_scheme_pays")


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"fp8"}))
@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_scheme_stays_close_to_fp32_and_writes_the_same_bytes_twice(
    fp32_dir: Path, tmp_path: Path, tower: str, scheme: str
) -> None:
    source, batches = fp32_dir / f"{tower}.onnx", batches_of(tower)
    if tower == "image" and SCHEMES[scheme].activation == "dynamic":
        pytest.skip("convolutions have no dynamic scheme")
    before = sha256_file(source)
    prepared = prepared_model(source)
    plan = plan_of(source, scheme)
    ranges = ranges_from_batches(prepared, batches[:4], ("max",))
    for name in ("one", "two"):
        int8_by_plan(prepared, tmp_path / name, plan, ranges)
    onnx.checker.check_model(onnx.load(tmp_path / "one"), full_check=True)
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "two")
    assert sha256_file(source) == before
    exact = SCHEMES[scheme].reduced or not x86_sums_16_bits(cpu_flags())
    assert fidelity(tmp_path / "one", source, batches[4:]).min_cosine > (0.99 if exact else 0.9)


def test_every_method_gives_ranges_within_what_was_seen(fp32_dir: Path) -> None:
    prepared = prepared_model(fp32_dir / "image.onnx")
    for by_method in ranges_from_batches(prepared, batches_of("image"), METHODS).values():
        assert set(by_method) == set(METHODS)
        least, most = by_method["max"]
        assert all(least <= low < high <= most for low, high in by_method.values())


def test_ranges_do_not_depend_on_how_samples_are_batched(fp32_dir: Path) -> None:
    prepared = prepared_model(fp32_dir / "image.onnx")
    tensors = tower_tensors("image", 32)
    small = ranges_from_batches(prepared, Batches(tensors, 1), ("max",))
    large = ranges_from_batches(prepared, Batches(tensors, 32), ("max",))
    for name, found in small.items():
        np.testing.assert_allclose(found["max"], large[name]["max"], rtol=1e-4, atol=1e-5)


def test_quantize_writes_a_plan_that_gives_the_same_file_again(fp32_dir: Path, tmp_path: Path) -> None:
    source = fp32_dir / "text.onnx"
    first = quantize_onnx(source, batches_of("text"), tmp_path / "a", target=CPU)
    assert first.passed
    plan = plan_from_toml((tmp_path / "a" / "plan.toml").read_text(), origin="plan.toml")
    again = quantize_onnx(source, batches_of("text"), tmp_path / "b", target=CPU, plan=plan)
    assert again.sha256 == first.sha256 == sha256_file(tmp_path / "b" / "model.onnx")
    written = json.loads((tmp_path / "b" / "report.json").read_text())
    assert written["source_sha256"] == sha256_file(source)


def test_an_edited_plan_keeps_the_named_node_in_high_precision(fp32_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(fp32_dir / "text.onnx", "u8s8").with_precisions({"down/MatMul"})
    text = plan_to_toml(plan)
    assert plan_from_toml(text, origin="x") == plan
    out = tmp_path / "out"
    quantize_onnx(fp32_dir / "text.onnx", batches_of("text"), out, target=CPU, plan=plan)
    weights = {t.name: t.data_type for t in onnx.load(out / "model.onnx").graph.initializer}
    assert weights["down.w"] == onnx.TensorProto.FLOAT
    assert "up.w" not in weights


def test_a_metric_that_int8_ruins_brings_the_harmful_node_back(fp32_dir: Path, tmp_path: Path) -> None:
    def metric(path: Path) -> float:  # down alone is what hurts
        names = {t.name for t in onnx.load(path).graph.initializer}
        return 1.0 if "down.w" in names else 0.5

    report = quantize_onnx(
        fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU, metric=metric
    )
    assert report.passed
    assert report.search.ranking[0].group == "down/MatMul"
    assert report.search.ranking[0].lost == pytest.approx(0.5)
    assert report.search.chosen is not None
    assert list(report.search.chosen.int8_nodes) == ["up/MatMul"]


def test_the_search_keeps_within_its_number_of_evaluations(fp32_dir: Path, tmp_path: Path) -> None:
    calls: list[Path] = []

    def metric(path: Path) -> float:
        calls.append(path)
        return 1.0 if path.name == "image.onnx" else 0.1

    outcome = quantize_onnx(
        fp32_dir / "image.onnx",
        batches_of("image"),
        tmp_path / "out",
        target=CPU,
        metric=metric,
        settings=Settings(evaluations=7),
    )
    assert not outcome.passed
    assert len(outcome.search.evaluations) <= 7
    assert len(calls) <= 8  # FP32 once
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("searched", [True, False])
def test_a_score_of_nan_passes_no_gate(fp32_dir: Path, tmp_path: Path, searched: bool) -> None:
    """Rows of zeros have no cosine."""
    model = onnx.load(fp32_dir / "text.onnx")
    model.graph.node[-1].output[0] = "rows"
    model.graph.node.append(onnx.helper.make_node("Clip", ["rows", "large"], ["embedding"], "clip"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e6, np.float32), "large"))
    model.graph.node.append(onnx.helper.make_node("Sub", ["embedding", "large"], ["zeros"], "sub"))
    model.graph.output[0].name = "zeros"
    source = tmp_path / "model.onnx"
    onnx.save(model, source)
    plan = None if searched else plan_of(source, "u8s8")
    outcome = quantize_onnx(source, batches_of("text"), tmp_path / "out", target=CPU, plan=plan)
    assert not outcome.passed
    assert not (tmp_path / "out").exists()


def test_what_is_not_faster_than_fp32_is_not_written(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 0.9)
    outcome = quantize_onnx(fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU)
    assert not outcome.passed
    assert "faster than FP32" in outcome.search.reason
    assert not (tmp_path / "out").exists()


def test_a_tensorrt_target_gets_fp16_with_symmetric_quantizers(fp32_dir: Path, tmp_path: Path) -> None:
    outcome = quantize_onnx(fp32_dir / "image.onnx", batches_of("image"), tmp_path / "out", target=T4)
    assert outcome.passed
    assert outcome.search.chosen is not None
    assert outcome.search.chosen.scheme == "tensorrt"
    assert outcome.speedup is None
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
    zeros = {n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"}
    points = [numpy_helper.to_array(t) for t in graph.initializer if t.name in zeros]
    assert points
    assert all(p.dtype == np.int8 and not p.any() for p in points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"up/MatMul"', '"upp/MatMul"', 2), "did you mean 'up/MatMul'"),
        (lambda text: text.replace('"u8s8"', '"u8s9"'), "did you mean 'u8s8"),
        (lambda text: text.replace('source_sha256 = "', 'source_sha256 = "0'), "was made for the model 0"),
        (lambda text: text.replace('precision = "int8"', 'precision = "int7"'), "mend that line"),
        (lambda text: text.replace('precision = "int8"', 'precision = "high"'), "no INT8 node"),
        (lambda text: text + "nonsense", "mend that line"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_to_mend(
    fp32_dir: Path, tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text(change(plan_to_toml(plan_of(fp32_dir / "text.onnx", "u8s8"))))
    texts: dict[str, Any] = {**tower_tensors("text", 16)}
    np.savez(tmp_path / "data.npz", **texts)
    code = exit_code(
        ["quantize", str(fp32_dir / "text.onnx"), "--data", str(tmp_path / "data.npz"), "--output",
         str(tmp_path / "out"), "--precision-plan", str(tmp_path / "plan.toml")]
    )  # fmt: skip
    assert code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_gate_that_is_unmet_exits_with_3_prints_the_ranking_and_writes_nothing(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images: dict[str, Any] = {**tower_tensors("image", 16)}
    np.savez(tmp_path / "data.npz", **images)
    arguments = ["quantize", str(fp32_dir / "image.onnx"), "--data", str(tmp_path / "data.npz")]
    code = exit_code([*arguments, "--output", str(tmp_path / "out"), "--gate", "1.0", "--method", "max"])
    said = capsys.readouterr()
    assert code == 3
    assert "depthwise/Conv" in said.out
    assert "nothing was written" in said.err
    assert not (tmp_path / "out").exists()


def test_weights_have_seven_bits_where_eight_would_saturate() -> None:
    avx2 = cpu_schemes({"avx2"}, convolutions=False)
    assert {s.name for s in avx2} == {"dynamic-reduced", "u8s8-reduced", "s8s8-reduced"}
    assert not any(s.reduced for s in cpu_schemes({"avx2", "avx512_vnni"}, convolutions=True))
    assert cpu_schemes({"asimddp"}, convolutions=True)[0].name == "s8s8-chains"


@given(st.integers(1, 60), st.integers(1, 16), st.data())
def test_batches_hold_every_row_once_however_they_are_cut(count: int, size: int, data: st.DataObject) -> None:
    batches = Batches({"x": np.arange(count)}, size)
    assert np.concatenate([b["x"] for b in batches]).tolist() == list(range(count))
    cut = data.draw(st.integers(0, len(batches)))
    rows = [x for part in (batches[:cut], batches[cut:]) for b in part for x in b["x"].tolist()]
    assert rows == list(range(count))
    if count > 1:
        seen, held = split_batches(batches)
        assert [x for part in (seen, held) for b in part for x in b["x"].tolist()] == list(range(count))


@pytest.mark.parametrize("scheme", ["dynamic", "u8s8", "s8s8"])
def test_a_weight_whose_shape_is_noted_twice_is_turned_all_the_same(tmp_path: Path, scheme: str) -> None:
    """torch's exporter notes them among those of values, and quantizers turn the weights of a Gemm."""
    random = np.random.default_rng(0)
    float32, info = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], "linear/Gemm", transB=1)],
        "main",
        [info("x", float32, ["batch", 64])],
        [info("y", float32, ["batch", 32])],
        [numpy_helper.from_array(random.normal(size=(32, 64)).astype(np.float32), "w")],
        value_info=[info("w", float32, [32, 64])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    source = tmp_path / "linear.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), source)
    batches = Batches({"x": random.normal(size=(32, 64)).astype(np.float32)}, 8)
    plan = plan_of(source, scheme)
    assert quantize_onnx(source, batches, tmp_path / "out", target=CPU, plan=plan).passed


def test_smoothing_changes_nothing_in_fp32_and_moves_outliers_into_weights(
    fp32_dir: Path, tmp_path: Path
) -> None:
    prepared, batches = prepared_model(fp32_dir / "text.onnx"), batches_of("text")
    made = smoothed(prepared, batches[:4], 0.5)
    onnx.save(made.model, tmp_path / "smooth.onnx")
    assert fidelity(tmp_path / "smooth.onnx", fp32_dir / "text.onnx", batches).max_abs < 1e-4
    plan = plan_of(fp32_dir / "text.onnx", "u8s8", smooth=0.5)
    outcome = quantize_onnx(fp32_dir / "text.onnx", batches, tmp_path / "out", target=CPU, plan=plan)
    assert outcome.passed


def test_what_onnxruntime_makes_does_not_depend_on_modelopt_having_run(
    fp32_dir: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    before = HistogramCollector.collect_value
    quantize_onnx(fp32_dir / "image.onnx", batches_of("image"), tmp_path / "out", target=T4)
    assert HistogramCollector.collect_value is before


def test_fp8_is_made_for_targets_that_have_it_and_refused_elsewhere(fp32_dir: Path, tmp_path: Path) -> None:
    settings = Settings(scheme="fp8", evaluations=4)
    source, out = fp32_dir / "image.onnx", tmp_path / "out"
    outcome = quantize_onnx(source, batches_of("image"), out, target=load_target("l4"), settings=settings)
    assert outcome.passed
    kinds = {t.data_type for t in onnx.load(out / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in kinds
    entropy = Settings(scheme="fp8", methods=("entropy",))
    with pytest.raises(UserError, match="take the method max"):
        quantize_onnx(source, batches_of("image"), out, target=load_target("l4"), settings=entropy)
    for target in (CPU, T4):
        with pytest.raises(UserError, match=r"(?i)fp8"):
            quantize_onnx(source, batches_of("image"), tmp_path / "no", target=target, settings=settings)


def test_a_file_that_names_the_standard_domain_twice_is_quantized_all_the_same(
    fp32_dir: Path, tmp_path: Path
) -> None:
    model = onnx.load(fp32_dir / "text.onnx")
    model.opset_import.add(domain="ai.onnx", version=20)
    onnx.save(model, tmp_path / "twice.onnx")
    for scheme in ("dynamic", "u8s8"):
        plan = plan_of(tmp_path / "twice.onnx", scheme)
        batches, out = batches_of("text"), tmp_path / scheme
        assert quantize_onnx(tmp_path / "twice.onnx", batches, out, target=CPU, plan=plan).passed


def test_a_plan_that_does_not_pass_shows_its_reasons_and_what_to_edit(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(fp32_dir / "text.onnx", "u8s8")
    groups = tuple(msgspec.structs.replace(group, reason=f"for {group.name}") for group in plan.group)
    (tmp_path / "plan.toml").write_text(plan_to_toml(msgspec.structs.replace(plan, group=groups)))
    texts: dict[str, Any] = {**tower_tensors("text", 16)}
    np.savez(tmp_path / "data.npz", **texts)
    code = exit_code(
        ["quantize", str(fp32_dir / "text.onnx"), "--data", str(tmp_path / "data.npz"), "--output",
         str(tmp_path / "out"), "--precision-plan", str(tmp_path / "plan.toml"), "--gate", "1.0"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 3
    assert "for up/MatMul" in said.out
    assert 'set precision = "high"' in said.err.replace("\n", " ")


def test_the_device_gets_fp16_to_time_beside_int8(fp32_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = quantize_onnx(fp32_dir / "image.onnx", batches_of("image"), out, target=T4)
    assert found.fp16 is not None
    assert found.fp16.sha256 == sha256_file(out / "fp16.onnx")
    assert found.fp16.cosine > 0.999
    graph = onnx.load(out / "fp16.onnx").graph
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
    assert not any(node.op_type == "QuantizeLinear" for node in graph.node)
    old = load_target("jetson-agx-xavier")
    found = quantize_onnx(fp32_dir / "image.onnx", batches_of("image"), out, target=old)
    assert (found.fp16, found.passed) == (None, True)
    assert "chooses FP16 itself" in found.fp16_left_out
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "plan.toml", "report.json"]
