"""Where the target's GPU is at hand, its clock orders the plans, and what it times is what travels.

The clock is a stand-in here: it reads a speed off the file. ``tests/compile/test_clock.py`` has the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import whole_plan
from edgeglm.calibration.feeds import Batches, Feeds
from edgeglm.calibration.outcome import Outcome, Settings
from edgeglm.calibration.preparation import prepared_model
from edgeglm.cli.main import exit_code
from edgeglm.compile import clock as clocks
from edgeglm.compile.decision import Host
from edgeglm.core.errors import EdgeglmError
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.export.graph import model_from_file
from edgeglm.export.lanes import lane_problems
from edgeglm.targets.schema import load_target
from tests.calibration.towers import tower_tensors

T4 = load_target("t4")


def _quantized(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _int8_convolutions(model: onnx.ModelProto) -> set[str]:
    makers = {name: node for node in model.graph.node for name in node.output}
    return {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[1] in makers
        and makers[node.input[1]].op_type == "DequantizeLinear"
    }


@dataclass
class Clock:
    """Gives ``speed`` of a file by its number of quantizers; what it was shown is kept."""

    speed: Callable[[int], float]
    reference: Path | None = None
    feeds: Sequence[Feeds] = ()
    timed: list[onnx.ModelProto] = field(default_factory=list)

    def __call__(self, fp16: Path, feeds: Sequence[Feeds]) -> Callable[[Path], float]:
        self.reference, self.feeds = fp16, feeds
        assert _quantized(model_from_file(fp16)) == 0

        def measured(path: Path) -> float:
            model = model_from_file(path)
            self.timed.append(model)
            return self.speed(_quantized(model))

        return measured


def _found(fp32_dir: Path, out: Path, clock: Clock, *, gate: float = 0.9, **more: Any) -> Outcome:
    return quantize_onnx(
        fp32_dir / "image.onnx",
        Batches(tower_tensors("image", 32), 4),
        out,
        target=T4,
        settings=Settings(gate=gate, evaluations=16),
        clock=clock,
        **more,
    )


def test_the_file_that_travels_is_timed_beside_fp16_on_one_sample_and_on_a_batch(
    fp32_dir: Path, tmp_path: Path
) -> None:
    clock = Clock(lambda quantizers: 1.0 + quantizers / 10)
    outcome = _found(fp32_dir, tmp_path / "out", clock)
    assert [len(feed["pixels"]) for feed in clock.feeds] == [1, 4]
    half = onnx.TensorProto.FLOAT16
    for model in clock.timed:
        assert not lane_problems(model, "B", T4)
        assert any(w.data_type == half for w in model.graph.initializer), "FP16 beside INT8, as it travels"
    assert outcome.search.order == "timed"
    assert outcome.search.beside == "fp16"
    assert "x FP16's speed" in outcome.search.reason
    assert outcome.speedup == pytest.approx(1.0 + _quantized(clock.timed[-1]) / 10)
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert written.SerializeToString() == clock.timed[-1].SerializeToString()


def test_ranges_change_no_speed_so_that_one_engine_serves_all_methods(fp32_dir: Path, tmp_path: Path) -> None:
    clock = Clock(lambda _: 1.5)
    outcome = _found(fp32_dir, tmp_path / "out", clock)
    assert len({e.method for e in outcome.search.evaluations if e.step == "scheme"}) == 4
    assert {e.speedup for e in outcome.search.evaluations} == {1.5}
    assert len(clock.timed) == 2  # the whole model in the search, and the final file


def test_the_clock_and_not_the_roofline_picks_among_plans_that_pass(fp32_dir: Path, tmp_path: Path) -> None:
    """A GPU on which every quantizer costs time takes the plan with the fewest."""

    def metric(path: Path) -> float:
        """Only the last two together cost too much; alone, the first costs most."""
        found = _int8_convolutions(model_from_file(path))
        if {"depthwise/Conv", "project/Conv"} <= found:
            return 0.5
        return 0.95 if found == {"stem/Conv"} else 1.0

    slower = Clock(lambda quantizers: 2.0 / (1 + quantizers))
    faster = Clock(lambda quantizers: 1.0 + quantizers)
    few, many = (
        _found(fp32_dir, tmp_path / name, clock, metric=metric).search
        for name, clock in (("few", slower), ("many", faster))
    )
    assert [e.high for e in few.evaluations if e.passed] == [e.high for e in many.evaluations if e.passed]
    assert few.chosen is not None
    assert many.chosen is not None
    assert len(few.chosen.int8_nodes) == 1
    assert len(many.chosen.int8_nodes) == 2


def test_int8_that_is_slower_than_fp16_here_still_travels_and_is_called_so(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = Clock(lambda _: 0.8)
    stand_in.words = "tensorrt 10.13.0 on t4"  # type: ignore[attr-defined]
    monkeypatch.setattr(clocks, "gpu_clock", lambda *_, **__: stand_in)
    pictures: dict[str, Any] = {**tower_tensors("image", 16)}
    np.savez(tmp_path / "data.npz", **pictures)
    arguments = ["quantize", str(fp32_dir / "image.onnx"), "--data", str(tmp_path / "data.npz"), "--gate",
                 "0.5", "--method", "max", "--target", "t4", "--output", str(tmp_path / "out")]  # fmt: skip
    assert exit_code(arguments) == 0
    said = capsys.readouterr()
    assert "plans are timed by tensorrt 10.13.0 on t4" in said.err
    assert "0.80 x FP16's speed here" in said.out
    assert "fp16.onnx" in said.out
    assert "it is the faster of the two here" in said.out
    assert "roofline" not in said.out + said.err


def test_a_file_that_the_builder_refuses_is_never_chosen(fp32_dir: Path, tmp_path: Path) -> None:
    """With residual sums in INT8 a file has more quantizers than any of the search."""
    known: list[int] = []

    def speed(quantizers: int) -> float:
        if known and quantizers > known[0]:
            raise EdgeglmError("TensorRT cannot build it: node 'odd'")
        known.append(quantizers)
        return 1.5

    outcome = _found(fp32_dir, tmp_path / "out", Clock(speed))
    assert outcome.passed
    assert outcome.search.chosen is not None

    def refused(_: int) -> float:
        raise EdgeglmError("TensorRT cannot build it: node 'odd'")

    with pytest.raises(EdgeglmError, match="node 'odd'"):
        _found(fp32_dir, tmp_path / "none", Clock(refused))
    plan = whole_plan(prepared_model(fp32_dir / "image.onnx"), "tensorrt", "max", "fp16")
    with pytest.raises(EdgeglmError, match="node 'odd'"):
        _found(fp32_dir, tmp_path / "none", Clock(refused), plan=plan)
    assert not (tmp_path / "none").exists()


def test_a_build_shares_its_files_among_gpus_unless_the_targets_own_gpu_times_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeglm.build.quantize_stage import quantize_config
    from edgeglm.core.recipe import Recipe, recipe_from_toml

    def timed_on(name: str) -> Any:
        return quantize_config(Recipe(), load_target(name), ("fp16", "int8")).timed_on

    assert timed_on("h100") is None
    here = CudaDevice(name="NVIDIA H100", sm=90, memory_bytes=80 << 30)
    monkeypatch.setattr(clocks, "cuda_devices", lambda: (here,))
    monkeypatch.setattr(clocks, "this_host", lambda: Host(tensorrt="10.13.0", tensorrt_rtx=None, sms=(90,)))
    assert timed_on("h100").name == "h100"
    asked = recipe_from_toml("", origin="here", overrides=("engine.optimization_level=4",))
    with_options = quantize_config(asked, load_target("h100"), ("int8",)).timed_on
    assert with_options is not None
    assert with_options.engine is not None
    assert with_options.engine.optimization_level == 4, "engines are built as finalize builds them"
    assert timed_on("b200") is None
    assert timed_on("cpu") is None
