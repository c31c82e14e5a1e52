"""What INT8 saves of each node by a target's roofline: the order of a search where nothing can be timed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx

from edgeglm.calibration.preparation import Prepared
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.costs import costs_from_onnx
from edgeglm.targets.costs import NodeCost
from edgeglm.targets.roofline import Machine, machine_of
from edgeglm.targets.schema import Target, members_of

_FP32_BYTES, _FP16_BYTES, _INT8_BYTES = 4, 2, 1
_INTEGER_GAIN = 2.0  # of INT8 over FP16 products where a profile has no rate: only ratios matter


def roofline_gains(prepared: Prepared, target: Target) -> Mapping[str, float]:
    """Return node -> seconds at batch 1 that INT8 saves over FP16, each node by itself.

    A node takes the longer of its products at the peak rate and its bytes at the full bandwidth (weights
    and activations in its own precision). A family goes by its first member. Nodes whose shapes are
    unknown are left out.
    """
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    model.graph.ClearField("value_info")
    with tempfile.TemporaryDirectory(prefix="edgeglm-roofline-") as folder:
        path = save_deterministic(model, Path(folder) / "fp32.onnx")
        costs = costs_from_onnx(path)
    machine = machine_of(members_of(target)[0])
    wanted = {node for group in prepared.groups for node in group.nodes}
    gains = {
        node.name: _seconds(node, machine, "fp16") - _seconds(node, machine, "int8")
        for node in costs.nodes
        if node.name in wanted and node.flops
    }
    return {name: gain for name, gain in gains.items() if gain > 0}


def _seconds(node: NodeCost, machine: Machine, precision: str) -> float:
    slow = machine.rates.get("fp16") or machine.rates.get("int8") or 1e12
    fast = machine.rates.get("int8") or _INTEGER_GAIN * slow
    size = _INT8_BYTES if precision == "int8" else _FP16_BYTES
    moved = (node.weight_bytes + node.bytes_fixed + node.bytes) * size / _FP32_BYTES
    return max(
        (node.flops_fixed + node.flops) / (fast if precision == "int8" else slow),
        moved / machine.bandwidth if machine.bandwidth else 0.0,
    )
