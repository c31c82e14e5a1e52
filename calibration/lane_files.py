"""A quantized file as a TensorRT target parses it: held against its lane, lowered where that helps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeglm.core.errors import UserError
from edgeglm.export.graph import model_from_file
from edgeglm.export.lanes import lane_file, lane_problems
from edgeglm.targets.legality import check_lane
from edgeglm.targets.schema import Lane, Target


def legal_file(path: Path, target: Target, *, keep_fp32: Sequence[str] = ()) -> tuple[str, ...]:
    """Rewrite ``path`` for the lane that a target takes, if it is not legal there.

    Lane B where the target takes it, else A, whose builder chooses FP16 itself: what it must keep in FP32 is
    returned, ``keep_fp32`` among it. A CPU's ONNX Runtime takes any file.

    Raises UserError that names the node when no rewriting makes it legal.
    """
    if target.kind == "cpu":
        return ()
    lane: Lane = "B" if check_lane(target, "B").ok else "A"
    if problems := lane_problems(model_from_file(path), lane, target):
        lowered = path.with_name(f"{path.stem}-lane.onnx")
        try:
            made = lane_file(path, lowered, lane, target=target, keep_fp32=keep_fp32)
        except UserError as error:
            raise UserError(f"{target.name} cannot parse {path.name}: {problems[0]}; {error}") from error
        lowered.replace(path)
        return made.fp32_nodes if lane == "A" else ()
    return ()
