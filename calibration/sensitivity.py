"""Which nodes cost most when they alone are INT8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from edgeglm.calibration.policy import Int8Policy, excluding, nodes_of_policy
from edgeglm.calibration.precision import fidelity, int8_from_fp32

Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Mean cosine to FP32 with one group of nodes in INT8, the most harmful group first."""

    policy: Int8Policy
    damage: tuple[tuple[str, float], ...]


def worst_nodes(
    onnx_path: Path,
    seen: Sequence[Feeds],
    held_out: Sequence[Feeds],
    *,
    policy: Int8Policy,
    keep: int,
    evaluations: int,
    scratch: Path,
) -> Sensitivity:
    """Rank nodes by the damage each does alone, and return ``policy`` without the ``keep`` worst.

    Bounded by a number of files, not by time, so that it repeats: with fewer ``evaluations`` than
    nodes, neighbours in graph order are measured together. ``keep`` counts nodes; a group goes whole.

    Args:
        onnx_path: FP32 model.
        seen: Batches that ranges are found on.
        held_out: Batches that the cosine is measured on.
        policy: Where INT8 is wished.
        keep: How many nodes return to high precision.
        evaluations: The most files to make.
        scratch: An existing folder.
    """
    model = onnx.load(onnx_path)
    nodes = nodes_of_policy(model, policy)
    size = -(-len(nodes) // max(1, evaluations))
    groups = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    damage: list[tuple[float, list[str]]] = []
    for group in groups:
        alone = excluding(policy, [name for name in nodes if name not in group])
        out = scratch / "sensitivity.onnx"
        int8_from_fp32(onnx_path, out, seen, policy=alone, high_precision="fp32")
        damage.append((fidelity(out, onnx_path, held_out).mean_cosine, group))
    damage.sort(key=lambda item: item[0])
    worst: list[str] = []
    for _, group in damage:
        if len(worst) >= keep or len(worst) + len(group) >= len(nodes):
            break
        worst.extend(group)
    ranked = tuple((name, cosine) for cosine, group in damage for name in group)
    return Sensitivity(policy=excluding(policy, worst), damage=ranked)
