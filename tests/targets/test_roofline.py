from __future__ import annotations

from xml.etree import ElementTree

import msgspec
import pytest

from edgeglm.core.errors import UserError
from edgeglm.targets.costs import GraphCosts, NodeCost, costs_from_json, json_from_costs
from edgeglm.targets.dla import check_dla
from edgeglm.targets.memory import MemoryNeed, check_memory
from edgeglm.targets.roofline import Machine, floor_of, machine_of
from edgeglm.targets.roofline_plot import Roof, roofline_svg
from edgeglm.targets.schema import known_targets, load_target


def graph(*nodes: NodeCost, weights: int = 0, io: int = 0) -> GraphCosts:
    return GraphCosts(
        opset=20, file_bytes=weights, length=32, inputs=(), outputs=(), ops={},
        weight_bytes=weights, io_bytes=io, live_bytes=0, nodes=nodes,
    )  # fmt: skip


def product(flops: int, precision: str = "fp16", **more: int) -> NodeCost:
    return NodeCost(name="m", op="MatMul", kind="matrix", precision=precision, flops=flops, **more)  # type: ignore[arg-type]


MACHINE = Machine(name="toy", rates={"fp16": 1e12, "int8": 2e12}, bandwidth=1e9)


def test_a_large_product_is_bound_by_compute_and_grows_with_the_batch():
    costs = graph(product(10**9), weights=1000)
    one, eight = floor_of(costs, MACHINE, 1), floor_of(costs, MACHINE, 8)
    assert one.binding == "compute"
    assert one.floor_ms == pytest.approx(1.0)
    assert eight.floor_ms == pytest.approx(8.0)


def test_the_drawing_holds_each_machine_and_each_graph_and_no_markup_of_theirs():
    machines = [machine_of(load_target(name)) for name in ("t4", "jetson-orin-nano", "cpu")]
    graphs = {"<b>image": graph(product(10**9), weights=10**6), "empty": graph()}
    roofs = [
        Roof(
            machine=one,
            floors=tuple(
                (name, floor_of(costs, one, batch)) for name, costs in graphs.items() for batch in (1, 8)
            ),
        )
        for one in machines
    ]
    drawn = ElementTree.fromstring(roofline_svg(roofs))
    titles = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("<b>image, batch 8, on t4: ") for title in titles)
    assert any(title.startswith("jetson-orin-nano, int8: ") for title in titles)
    assert not any("cpu" in title or "empty" in title for title in titles), "its peaks are not known"
    assert "no promise" in "".join(drawn.itertext())
    ElementTree.fromstring(roofline_svg([]))


def test_many_weights_are_bound_by_bandwidth_and_a_batch_shares_them():
    costs = graph(product(10**6), weights=10**6, io=1000)
    one, eight = floor_of(costs, MACHINE, 1), floor_of(costs, MACHINE, 8)
    assert one.binding == "bandwidth"
    assert one.floor_ms == pytest.approx(1.001)
    assert eight.floor_ms == pytest.approx(1.008)


def test_int8_halves_the_compute_of_fp16():
    fp16, int8 = (floor_of(graph(product(10**9, p)), MACHINE, 1) for p in ("fp16", "int8"))
    assert int8.compute_ms == pytest.approx(fp16.compute_ms / 2)


def test_an_unknown_rate_never_lifts_the_floor_above_what_is_possible():
    assert floor_of(graph(product(10**9, "fp32")), MACHINE, 1).compute_ms == pytest.approx(1.0)
    nothing = floor_of(graph(product(10**9, "fp8")), MACHINE, 1)
    assert (nothing.floor_ms, nothing.binding) == (0.0, "unknown")


def test_what_stays_in_a_cache_is_not_read_again():
    costs = graph(weights=10**6)
    warm = Machine(name="toy", rates={}, bandwidth=1e9, resident_bytes=600_000)
    assert floor_of(costs, warm, 1).memory_ms == pytest.approx(0.4)


def test_activations_are_no_part_of_the_floor_but_of_the_indication():
    costs = graph(product(10**6, bytes=10**6), weights=1000)
    floor = floor_of(costs, MACHINE, 1)
    assert floor.floor_ms < 0.01 < 1.0 <= floor.unfused_ms


@pytest.mark.parametrize("name", known_targets())
def test_every_device_has_the_figures_for_a_floor(name: str):
    target = load_target(name)
    floor = floor_of(graph(product(10**9), weights=10**6), machine_of(target), 1)
    assert (floor.floor_ms > 0) == (target.kind == "device")


def test_recorded_costs_come_back_the_same_and_broken_ones_are_said():
    costs = graph(product(5, flops_fixed=3, weight_bytes=2), weights=7)
    assert costs_from_json(json_from_costs(costs), "x") == costs
    assert costs.flops(2) == 13
    with pytest.raises(UserError, match="x holds no recorded costs"):
        costs_from_json(b'{"schema":1}', "x")


def test_memory_to_build_is_four_times_the_weights():
    nano = load_target("jetson-orin-nano")
    assert check_memory(nano, 1_000_000_000).ok
    verdict = check_memory(nano, 2_000_000_000)
    assert not verdict.ok
    assert "jetson-orin-nano has 8 GB, building needs 8.31 GB" in verdict.reason
    assert verdict.reason.endswith("take a smaller student or a board with more memory")
    assert MemoryNeed(weights=100).build > MemoryNeed(weights=100).run


def test_a_family_has_the_memory_of_its_smallest_member():
    verdict = check_memory(load_target("jetson-agx"), 9_000_000_000)
    assert (verdict.ok, verdict.target) == (False, "jetson-agx-xavier")
    assert len(verdict.members) == 4


def test_a_cpu_is_not_refused_for_memory_that_nobody_knows():
    assert check_memory(load_target("cpu"), 10**12).ok


@pytest.mark.parametrize(
    ("name", "ok", "words"),
    [
        ("jetson-agx-xavier", True, "2 DLA cores, with TensorRT 8.5.2 of JetPack 5.1"),
        ("jetson-orin-nano", False, "has no DLA; use its GPU"),
        ("jetson-agx-thor", False, "has no DLA; use its GPU"),
        ("jetson-agx", False, "jetson-agx-thor has no DLA"),
        ("t4", False, "t4 has no DLA"),
    ],
)
def test_a_dla_is_refused_with_the_fact(name: str, ok: bool, words: str):
    verdict = check_dla(load_target(name))
    assert verdict.ok == ok
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("precision", "ops", "lane", "words"),
    [
        ("fp32", {"Conv": 3}, "B", "a DLA computes in fp16 and int8, not in fp32; use fp16"),
        (
            "fp16",
            {"MatMul": 3, "Gelu": 1},
            "B",
            "a DLA has no Gelu, MatMul; use the GPU, or add --useDLACore=0",
        ),
        (
            "int8",
            {"Conv": 3},
            "A",
            "TensorRT 8.5 takes no Q/DQ nodes; give trtexec the FP16 graph with --int8",
        ),
    ],
)
def test_a_graph_that_a_dla_does_not_take_is_refused_with_the_fact(precision, ops, lane, words: str):
    costs = msgspec.structs.replace(graph(product(1)), ops=ops, quantized=precision == "int8")
    verdict = check_dla(load_target("jetson-agx-orin-64gb"), precision=precision, costs=costs, lane=lane)
    assert not verdict.ok
    assert words in verdict.reason


def test_a_dla_that_one_jetpack_leaves_out_is_told_by_release():
    orin = check_dla(load_target("jetson-agx-orin-64gb"))
    assert orin.ok
    assert "8.5.2 of JetPack 5.1, 10.3.0 of JetPack 6.1 - 6.2.2" in orin.reason
    assert "10.16.2 brings no compiler for them" in orin.reason
    convolutions = msgspec.structs.replace(graph(product(1)), ops={"Conv": 2})
    assert check_dla(load_target("jetson-agx-xavier"), precision="fp16", costs=convolutions, lane="A").ok
