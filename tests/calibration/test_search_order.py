"""What orders a search, and what it says of itself: times where they can be taken, else a roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import int8_by_plan
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.outcome import Outcome, Settings
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.roofline_gains import roofline_gains
from edgeglm.calibration.schemes import SCHEMES
from edgeglm.calibration.search_report import Evaluated, swiftest_first
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import EdgeglmError
from edgeglm.targets.schema import load_target
from tests.calibration.towers import tower_tensors


def test_the_roofline_sees_what_moves_and_not_only_weights(fp32_dir: Path) -> None:
    """The depthwise convolution has a 4th of the projection's weights and reads and writes as much."""
    prepared = prepared_model(fp32_dir / "image.onnx")
    for target in ("t4", "jetson-orin-nano", "jetson-agx"):
        gains = roofline_gains(prepared, load_target(target))
        assert set(gains) == {"stem/Conv", "depthwise/Conv", "project/Conv"}
        assert gains["depthwise/Conv"] > 0.5 * gains["project/Conv"] > 0


def test_a_search_for_another_machine_says_that_the_roofline_ordered_it(
    fp32_dir: Path, tmp_path: Path
) -> None:
    outcome = quantize_onnx(
        fp32_dir / "image.onnx",
        Batches(tower_tensors("image", 16), 4),
        tmp_path / "out",
        target=load_target("t4"),
        settings=Settings(methods=("max",), evaluations=2),
    )
    assert outcome.search.order == "roofline"
    assert outcome.search.timings == ()
    assert outcome.search.evaluations[0].saved == 1.0
    assert outcome.speedup is None


def test_a_scheme_whose_quantizer_fails_is_left_out_and_named(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = int8_by_plan

    def failing(prepared: Any, out: Path, plan: PrecisionPlan, ranges: Any) -> None:
        if plan.scheme in broken:
            raise EdgeglmError(f"cannot quantize by {plan.scheme}")
        made(prepared, out, plan, ranges)

    monkeypatch.setattr("edgeglm.calibration.search.int8_by_plan", failing)
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 1.5)

    def found(folder: str) -> Outcome:
        return quantize_onnx(
            fp32_dir / "text.onnx",
            Batches(tower_tensors("text", 16), 4),
            tmp_path / folder,
            target=load_target("cpu"),
            settings=Settings(methods=("max",), evaluations=4),
        )

    broken = {"dynamic", "dynamic-reduced"}
    outcome = found("one")
    assert outcome.passed
    assert set(outcome.search.unmade) < broken
    assert "cannot quantize by dynamic" in next(iter(outcome.search.unmade.values()))
    broken = set(SCHEMES)
    with pytest.raises(EdgeglmError, match="cannot quantize by dynamic"):
        found("none")


def test_where_nothing_is_faster_the_time_of_every_scheme_is_printed(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 0.62)
    texts: dict[str, Any] = {**tower_tensors("text", 16)}
    np.savez(tmp_path / "data.npz", **texts)
    arguments = ["quantize", str(fp32_dir / "text.onnx"), "--data", str(tmp_path / "data.npz")]
    assert exit_code([*arguments, "--output", str(tmp_path / "out"), "--method", "max"]) == 3
    said = capsys.readouterr()
    assert said.out.count("0.62") == 3  # dynamic, u8s8 and s8s8
    assert "use the FP32 model on this machine" in said.err


def _chosen(source: Path, out: Path, *, seed: int, monkeypatch: pytest.MonkeyPatch, gate: float) -> Any:
    """Search with speeds that differ by what timings of one file differ by, and no more."""
    random = np.random.default_rng(seed)
    jittered = lambda _: float(1.5 * random.uniform(0.96, 1.04))  # noqa: E731
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: jittered)
    settings = Settings(gate=gate, evaluations=24)
    batches = Batches(tower_tensors("text", 32), 4)
    outcome = quantize_onnx(source, batches, out, target=load_target("cpu"), settings=settings)
    assert outcome.search.chosen is not None
    return outcome.search.chosen.scheme, outcome.search.chosen.int8_nodes


@pytest.mark.parametrize("gate", [0.9, 0.999])
def test_the_choice_does_not_depend_on_what_a_clock_is_off_by(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: float
) -> None:
    found = [
        _chosen(fp32_dir / "text.onnx", tmp_path / "out", seed=seed, monkeypatch=monkeypatch, gate=gate)
        for seed in range(5)
    ]
    assert found.count(found[0]) == 5


def test_what_is_clearly_faster_is_chosen_before_what_keeps_more() -> None:
    slow, level, fast = (
        Evaluated(
            step="scheme", scheme="u8s8", method="max", high=(), int8_share=1.0, saved=1.0, score=kept,
            kept=kept, cosine=kept, speedup=speedup, passed=True,
        )
        for kept, speedup in ((1.0, 1.4), (0.995, 1.9), (0.991, 2.0))
    )  # fmt: skip
    assert swiftest_first([slow, fast, level], by_score=True) == [level, fast, slow]
    assert swiftest_first([slow, fast, level]) == [fast, level, slow]
    untimed = [msgspec.structs.replace(one, speedup=None, saved=one.speedup) for one in (slow, fast, level)]
    assert [one.saved for one in swiftest_first(untimed, by_score=True)] == [2.0, 1.9, 1.4]


def test_every_part_is_ranked_on_demand_and_neighbours_say_that_they_were_measured_together(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 1.5)
    pictures: dict[str, Any] = {**tower_tensors("image", 16)}
    np.savez(tmp_path / "data.npz", **pictures)
    arguments = ["quantize", str(fp32_dir / "image.onnx"), "--data", str(tmp_path / "data.npz"), "--gate",
                 "0.5", "--method", "max", "--output", str(tmp_path / "out")]  # fmt: skip
    assert exit_code(arguments) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["search"]["ranking"] == []
    for evaluations, alone in ((12, True), (3, False)):
        assert exit_code([*arguments, "--rank", "--evaluations", str(evaluations)]) == 0
        search = json.loads((tmp_path / "out" / "report.json").read_text())["search"]
        ranked = {one["group"]: one["together"] for one in search["ranking"]}
        assert len(search["evaluations"]) <= evaluations
        plan = (tmp_path / "out" / "plan.toml").read_text()
        assert all(not others for others in ranked.values()) == alone
        assert ("together with" in plan) != alone
        assert "alone in INT8, the" in capsys.readouterr().out
