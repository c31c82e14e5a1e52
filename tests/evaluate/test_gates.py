"""If these fail, a bundle that lost accuracy is packed, or a good one is refused without a reason."""

from __future__ import annotations

import math

import pytest

from edgeglm.core.errors import GateError
from edgeglm.evaluate.gates import Gate, Verdict, ratio, require_at_least, require_ratio


def ratios(label: str, **kept: tuple[float, float]) -> tuple[Gate, ...]:
    return tuple(
        Gate(name=f"{label}, {track}", value=ratio(*both), threshold=0.99) for track, both in kept.items()
    )


def test_a_student_below_the_gate_stops_the_build_with_figures_and_remedy() -> None:
    with pytest.raises(GateError, match="longer") as caught:
        require_ratio("student / teacher", value=0.5, reference=0.6, minimum=0.96, remedy="train longer")
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "student / teacher is 0.8333 (0.5000 against 0.6000), and the gate asks for 0.96; train longer"
    )


def test_a_ratio_at_the_gate_passes() -> None:
    gate = require_ratio("s/t", value=0.96, reference=1.0, minimum=0.96, remedy="-")
    assert gate.passed
    assert gate.sentence() == "s/t: 0.9600 >= 0.96"


@pytest.mark.parametrize(("value", "reference"), [(math.nan, 0.5), (0.0, 0.0), (0.5, math.nan)])
def test_figures_that_cannot_be_compared_never_pass(value: float, reference: float) -> None:
    with pytest.raises(GateError, match="cannot be compared"):
        require_ratio("s/t", value=value, reference=reference, minimum=0.0, remedy="look")


def test_an_absolute_gate_says_its_figures() -> None:
    assert require_at_least("teacher mAP@10", 0.61, 0.6, remedy="-").passed
    with pytest.raises(GateError, match=r"teacher mAP@10 is 0\.5900, below the gate of 0\.6; add pairs"):
        require_at_least("teacher mAP@10", 0.59, 0.6, remedy="add pairs")


def test_a_candidate_is_left_out_for_its_failed_track_only_and_says_which() -> None:
    gates = ratios("int8 / fp32", catalogue=(0.6, 0.6), unseen=(0.2, 0.4))
    verdict = Verdict(candidate="int8", gates=gates)
    assert not verdict.passed
    assert verdict.worst.name == "int8 / fp32, unseen"
    assert verdict.sentence() == "int8 was left out: int8 / fp32, unseen: 0.5000 < 0.99"


def test_a_good_candidate_is_kept_and_its_worst_track_named() -> None:
    gates = ratios("fp16 / fp32", unseen=(0.4, 0.4), catalogue=(0.6, 0.5))
    verdict = Verdict(candidate="fp16", gates=gates)
    assert verdict.passed
    assert verdict.sentence() == "fp16 passed: fp16 / fp32, unseen: 1.0000 >= 0.99"


def test_a_candidate_that_was_not_measured_never_passes() -> None:
    assert not Verdict(candidate="int8", gates=()).passed
    assert "nothing was measured" in Verdict(candidate="int8", gates=()).sentence()
    missing = Verdict(candidate="int8", gates=ratios("x", unseen=(0.5, 0.0)))
    assert not missing.passed
    assert not Gate(name="x", value=math.nan, threshold=0.0).passed
