"""What a build makes its candidates of, and a task that judges them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeglm.calibration.sets import CalibrationSet, Candidates, calibration_set_from_arrays
from edgeglm.calibration.variants import Metrics, Verdict
from edgeglm.core.digest import sha256_bytes, sha256_file
from tests.calibration.towers import tower_tensors


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    towers = {}
    for tower in ("image", "text"):
        tensors = tower_tensors(tower, 16)
        towers[tower] = Candidates(
            ids=[str(i) for i in range(16)],
            strata=["all"] * 16,
            digests=[sha256_bytes(f"{tower}{i}".encode()) for i in range(16)],
            tensors=lambda chosen, tensors=tensors: {k: v[list(chosen)] for k, v in tensors.items()},  # type: ignore[misc]
            evaluation_digests=(),
        )
    folder = tmp_path_factory.mktemp("set")
    return calibration_set_from_arrays(folder, towers, preprocessing={}, samples=16, batch_size=4)


class Measured:
    """An evaluation that gives each pair of precisions a score, and remembers the files it saw."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores
        self.files: list[tuple[str, dict[str, str]]] = []

    def __call__(self, variant: str, files: Mapping[str, Path]) -> dict[str, Any]:
        self.files.append((variant, {tower: sha256_file(path) for tower, path in files.items()}))
        label = ",".join(
            "int8" if b"QuantizeLinear" in files[t].read_bytes() else "-" for t in ("image", "text")
        )
        return {"map10": 1.0 if variant == "fp32" else self.scores.get(label, 1.0)}


def judge(metrics: Metrics, baseline: Metrics) -> Verdict:
    kept = metrics["map10"] / baseline["map10"]
    return Verdict(passed=kept >= 0.99, score=kept, reason=f"kept {kept:.2f}")
