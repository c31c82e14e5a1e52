"""What orders a search, and what it says of itself: times where they can be taken, else a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import prepared_model
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.roofline_gains import roofline_gains
from edgeglm.cli.main import exit_code
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
