"""A quantized file as a TensorRT target parses it: held against its lane, lowered where that helps."""

from __future__ import annotations

from pathlib import Path

from edgeglm.core.errors import UserError
from edgeglm.export.graph import model_from_file
from edgeglm.export.lanes import lane_file, lane_problems
from edgeglm.targets.legality import check_lane
from edgeglm.targets.schema import Lane, Target


def legal_file(path: Path, target: Target) -> Lane | None:
    """Rewrite ``path`` for the lane that a target takes, if it is not legal there; return the lane.

    Lane B where the target takes it, else A. None for a CPU, whose ONNX Runtime takes any.

    Raises UserError that names the node when no rewriting makes it legal.
    """
    if target.kind == "cpu":
        return None
    lane: Lane = "B" if check_lane(target, "B").ok else "A"
    if problems := lane_problems(model_from_file(path), lane, target):
        lowered = path.with_name(f"{path.stem}-lane.onnx")
        try:
            lane_file(path, lowered, lane, target=target)
        except UserError as error:
            raise UserError(f"{target.name} cannot parse {path.name}: {problems[0]}; {error}") from error
        lowered.replace(path)
    return lane
