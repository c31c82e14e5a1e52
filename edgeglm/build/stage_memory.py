"""A stage of a build that runs out of memory, told as what to lower in the recipe."""

from __future__ import annotations

from typing import Any

from edgeglm.core.stage import Context, Inputs, Stage, StageResult
from edgeglm.train.memory import memory_advice

#: What makes a stage large. A training within a stage knows better and speaks first.
_LOWER = {
    "pairs": "data.image_size or data.concepts",
    "backbones": "teacher.resolution, or take a smaller teacher.image",
    "features": "teacher.views, or take a smaller teacher.image",
    "pretraining": "teacher.pretraining.batch_size or teacher.pretraining.max_length",
    "image-tuning": "teacher.image_blocks or teacher.views",
    "tuned-features": "teacher.views, or take a smaller teacher.image",
    "auxiliary-pairs": "data.image_size, or name fewer teacher.auxiliary.icons",
    "auxiliary-features": "teacher.views, or name fewer teacher.auxiliary.icons",
    "teacher": "teacher.views or data.concepts",
    "teacher-evaluation": "data.concepts",
    "targets": "student.corpus or data.concepts",
    "distil-text": "student.corpus or student.text_batch_size",
    "distil-image": "student.views or student.resolution",
    "distil-evaluation": "student.resolution or data.concepts",
    "reranker": "reranker.candidates or reranker.width",
    "student-search": "student.resolution or student.corpus",
    "quantize": "quantize.calibration_samples or student.resolution",
}
_ANY = "--threads, or take a smaller student.size"


def run_stage(stage: Stage[Any], inputs: Inputs, context: Context) -> StageResult:
    """Run a stage, or take it from the store. Raises UserError where memory does not suffice."""
    with memory_advice(f"the stage {stage.name}", _LOWER.get(stage.name, _ANY)):
        return stage(inputs, context)
