"""If these fail, hours are spent on a student that a board will refuse."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.build.student_fit import require_untrained_fit, untrained_fits
from edgeglm.core.artifact import Artifact, listing_of
from edgeglm.core.errors import UserError
from edgeglm.targets.costs import json_from_costs
from edgeglm.targets.schema import load_target, resolve_target
from tests.build.conftest import Project, Said
from tests.compile.test_preflight import COSTS


@pytest.fixture
def untrained(tmp_path: Path) -> Artifact:
    ops = {"Conv": 3, "LayerNormalization": 2, "Gelu": 1}
    costs = msgspec.structs.replace(COSTS, quantized=False, ops=ops)
    for tower in ("image", "text"):
        (tmp_path / f"{tower}.json").write_bytes(json_from_costs(costs))
    return Artifact(kind="student-fit", path=tmp_path, files=listing_of(tmp_path))


def test_every_variant_that_would_be_made_is_asked_for_every_board(untrained: Artifact) -> None:
    fits = untrained_fits(untrained, ("fp16", "int8"), resolve_target(load_target("jetson-agx")))
    taken = {
        fit.member: {other.variant for other in fits if other.member == fit.member and other.fits}
        for fit in fits
    }
    assert taken["jetson-agx-xavier"] == {"fp16-lane-a", "int8-lane-a"}
    assert {"fp16", "int8"} <= taken["jetson-agx-orin-64gb"]
    require_untrained_fit(fits)


def test_a_board_that_will_take_none_is_named_with_the_way_out(untrained: Artifact) -> None:
    fits = untrained_fits(untrained, (), resolve_target(load_target("t4")))
    with pytest.raises(UserError, match=r"^before anything is trained: t4 takes none of fp32: .*use fp16"):
        require_untrained_fit(fits)


def test_a_board_without_the_memory_is_named_too(tmp_path: Path, untrained: Artifact) -> None:
    nano = load_target("jetson-orin-nano")
    assert nano.memory_gb is not None
    small = msgspec.structs.replace(nano, memory_gb=msgspec.structs.replace(nano.memory_gb, value=0.2))
    with pytest.raises(UserError, match="take a smaller student or a board with more memory"):
        require_untrained_fit(untrained_fits(untrained, ("fp16",), resolve_target(small)))


def test_a_build_for_a_board_that_will_refuse_it_trains_nothing(project: Project, cold: Said) -> None:
    refused = ("--set", "quantize.candidates=[]", "--set", "seed=4321")  # a seed: no stage is in the store
    before = project.stored()
    said = project.build("t4", *refused)
    assert said.code == 2, said.err
    assert "before anything is trained: t4 takes none of fp32" in said.err
    assert project.stored() == before
    assert "student-fit" in before, "what the untrained student costs was recorded by the first build"
