"""If these fail, a change of our code leaves in the store what the code before it made."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.build.export_stage import ExportStage
from edgeglm.build.quantize_stage import QuantizeStage
from edgeglm.build.reranker_stage import RerankerStage
from edgeglm.build.student_choice import SmallestStudentStage
from edgeglm.build.student_fit import StudentFitStage
from edgeglm.build.student_search import StudentSearchStage
from edgeglm.core.stage import Stage
from edgeglm.distill.student_stage import StudentStage


@pytest.mark.parametrize(
    "stage",
    [ExportStage, QuantizeStage, RerankerStage, SmallestStudentStage, StudentFitStage, StudentSearchStage],
)
def test_what_exports_hangs_on_the_exporter(stage: type[Stage[Any]]) -> None:
    assert "edgeglm.export" in stage.code


def test_a_search_hangs_on_all_that_a_student_does_and_on_the_metric() -> None:
    assert {*StudentStage.code, "edgeglm.evaluate.retrieval"} <= set(StudentSearchStage.code)
