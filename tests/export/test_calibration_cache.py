"""If these fail, TensorRT 8.5 or the DLA quantizes with other ranges than were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edgeglm.core.errors import UserError
from edgeglm.export.calibration_cache import (
    HEADER,
    cache_from_file,
    cache_from_ranges,
    cache_from_text,
    cache_text,
    implicit_from_qdq,
    write_cache,
)
from scripts.fixtures.graphs import answers, graph_model, normal

N = helper.make_node
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)
RANGES = st.dictionaries(NAMES, st.floats(0, 2.0**127, width=32), max_size=8)


@given(RANGES)
def test_what_is_written_is_read_back(ranges: dict[str, float]):
    cache = cache_from_ranges(ranges)
    again = cache_from_text(cache_text(cache))
    assert again == cache
    assert list(again.scales) == list(ranges)
    for name, largest in ranges.items():
        assert again.ranges[name] == pytest.approx(largest, rel=1e-6, abs=1e-42)


@given(st.text(max_size=200))
def test_any_text_is_a_cache_or_is_refused(text: str):
    for candidate in (text, f"{HEADER}\n{text}"):
        try:
            found = cache_from_text(candidate)
        except UserError:
            continue
        assert cache_from_text(cache_text(found)) == found


def test_the_form_is_that_of_tensorrt(tmp_path: Path):
    path = write_cache(
        cache_from_ranges({"pixels": 1.0, "(Unnamed Layer* 3) [Shuffle]_output": 0.0}), tmp_path / "c"
    )
    assert path.read_bytes() == (
        b"TRT-8503-EntropyCalibration2\npixels: 3c010204\n(Unnamed Layer* 3) [Shuffle]_output: 00000000\n"
    )
    native = "TRT-8401-EntropyCalibration2\ninput: 3caa54fc\n366: 0\ntower: a:0: 3d5c11b5\n"
    (tmp_path / "native").write_text(native)
    found = cache_from_file(tmp_path / "native")
    assert found.scales["input"] == pytest.approx(0.0207925, rel=1e-5)
    assert found.scales["366"] == 0.0
    assert found.scales["tower: a:0"] == pytest.approx(0.0537278, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_0 2.0\n", "begins with"),
        (f"{HEADER}\nx 3c010204\n", "line 2"),
        (f"{HEADER}\nx: 3c01020g\n", "line 2"),
        (f"{HEADER}\nx: 3c010204\nx: 3c010204\n", "line 3: x is there twice"),
        (f"{HEADER}\nx: 7f800000\n", "scale of x is inf"),
        (f"{HEADER}\nx: bf800000\n", "scale of x is -1"),
    ],
)
def test_a_broken_line_is_named(text: str, message: str):
    with pytest.raises(UserError, match=message):
        cache_from_text(text)


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), -1.0])
def test_a_range_that_is_none_is_refused(largest: float):
    with pytest.raises(UserError, match="calibrate with samples"):
        cache_from_ranges({"x": largest})
    with pytest.raises(UserError, match="rename it"):
        cache_from_ranges({"two\nlines": 1.0})


def test_a_graph_with_quantizers_becomes_a_plain_one_and_its_cache():
    nodes = [
        N("QuantizeLinear", ["x", "s", "z"], ["q"]),
        N("DequantizeLinear", ["q", "s", "z"], ["d"]),
        N("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        N("MatMul", ["d", "wd"], ["m"]),
        N("QuantizeLinear", ["m", "s", "z"], ["mq"]),
        N("DequantizeLinear", ["mq", "s", "z"], ["y"]),
    ]
    weights: dict[str, Any] = {
        "s": np.float32(0.05), "z": np.int8(0), "w": np.arange(-24, 24, dtype=np.int8).reshape(8, 6),
        "ws": np.linspace(0.01, 0.02, 6, dtype=np.float32), "wz": np.zeros(6, np.int8),
    }  # fmt: skip
    model = graph_model(nodes, weights)
    plain, cache = implicit_from_qdq(model)
    onnx.checker.check_model(plain, full_check=True)
    assert cache.ranges == {"x": pytest.approx(6.35), "m": pytest.approx(6.35)}
    assert {node.op_type for node in plain.graph.node} == {"MatMul", "Identity"}
    x = normal(2, 4, 8)
    np.testing.assert_allclose(
        answers(plain, {"x": x})[0], x @ (weights["w"] * weights["ws"]), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UserError, match="quantizes no activation"):
        implicit_from_qdq(plain)
