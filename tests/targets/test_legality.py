"""A plan that a device cannot run must be refused on the host, with the nearest plan that works."""

from __future__ import annotations

import msgspec
import pytest

from edgeglm.core.errors import UserError
from edgeglm.targets.legality import (
    PRECISIONS,
    check_lane,
    check_opset,
    check_precision,
    legal_precisions,
    require_precision,
)
from edgeglm.targets.schema import Target, known_targets, load_target, members_of


@pytest.mark.parametrize(
    ("target", "precision", "fact", "nearest"),
    [
        ("jetson-agx-orin-64gb", "fp8", "SM 8.7 has no FP8", "int8"),
        ("t4", "fp32", "does not support FP32 GEMM on SM 7.5", "fp16"),
        ("a10", "fp8", "SM 8.6 has no FP8", "int8"),
        ("h100", "fp4", "SM 9.0 has no FP4", "fp8"),
        ("jetson-agx-xavier", "bf16", "SM 7.2 has no BF16", "fp16"),
        ("jetson-agx", "fp8", "jetson-agx-orin-32gb", "int8"),
    ],
)
def test_an_illegal_precision_names_the_fact_and_the_nearest_legal_choice(
    target: str, precision: str, fact: str, nearest: str
) -> None:
    verdict = check_precision(load_target(target), precision)
    assert not verdict.ok
    assert fact in verdict.reason
    assert verdict.nearest == nearest
    assert f"use {nearest}" in verdict.reason.rpartition(";")[2]
    with pytest.raises(UserError, match="use "):
        require_precision(load_target(target), precision)


def test_one_member_that_refuses_decides_for_the_family() -> None:
    verdict = check_precision(load_target("jetson-agx"), "fp8")
    answers = {member.target: member.ok for member in verdict.members}
    assert answers == {
        "jetson-agx-xavier": False,
        "jetson-agx-orin-32gb": False,
        "jetson-agx-orin-64gb": False,
        "jetson-agx-thor": True,
    }
    assert "thor" not in verdict.reason


def test_native_tensorrt_takes_fp32_on_turing_though_tensorrt_rtx_does_not() -> None:
    assert check_precision(load_target("t4"), "fp32", library="tensorrt").ok


@pytest.mark.parametrize("name", known_targets())
def test_the_default_candidates_are_legal_on_every_target(name: str) -> None:
    assert {"fp16", "int8"} <= set(legal_precisions(load_target(name)))


@pytest.mark.parametrize("name", known_targets())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_refusal_offers_something_that_is_itself_legal(name: str, precision: str) -> None:
    target = load_target(name)
    verdict = check_precision(target, precision)
    if not verdict.ok:
        assert verdict.nearest is not None
        assert check_precision(target, verdict.nearest).ok


def test_a_profile_of_ones_own_can_only_narrow_the_hardware() -> None:
    narrow = msgspec.structs.replace(load_target("l4"), precisions=("fp16",))
    assert "does not list int8" in check_precision(narrow, "int8").reason
    boastful: Target = msgspec.structs.replace(load_target("a10"), precisions=("fp8", "fp16"))
    assert not check_precision(boastful, "fp8").ok


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'fp16'"):
        check_precision(load_target("t4"), "fp61")


def test_xavier_takes_lane_a_only() -> None:
    refused = check_lane(load_target("jetson-agx-xavier"), "B")
    assert not refused.ok
    assert "8.5.2" in refused.reason
    assert refused.nearest == "A"
    assert check_lane(load_target("jetson-agx-xavier"), "A").ok
    assert check_lane(load_target("jetson-agx"), "B").target == "jetson-agx-xavier"
    assert check_lane(load_target("cpu"), "B").ok


def test_the_oldest_release_on_a_board_decides_the_opset() -> None:
    orin = load_target("jetson-agx-orin-64gb")
    assert check_opset(orin, 20).ok
    refused = check_opset(orin, 21)
    assert not refused.ok
    assert "10.3.0" in refused.reason
    assert refused.nearest == "opset 20"
    assert check_opset(load_target("jetson-agx-thor"), 24).ok
    assert not check_opset(load_target("jetson-agx-xavier"), 17, lane="A").ok
    assert check_opset(load_target("jetson-agx"), 21).nearest == "opset 20"


@pytest.mark.parametrize("name", known_targets())
def test_every_known_target_resolves_to_devices(name: str) -> None:
    assert all(member.kind != "family" for member in members_of(load_target(name)))
