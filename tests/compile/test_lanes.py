"""Lanes under a real TensorRT parser and builder: what the passes write must not only satisfy themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds on x86-64 hosts only")

from onnx import TensorProto, helper  # noqa: E402

from edgeglm.compile.builder import EnginePlan, engine_from_onnx  # noqa: E402
from edgeglm.engines.plan import ShapeRange  # noqa: E402
from edgeglm.export.lanes import checked_lane, lane_problems  # noqa: E402
from edgeglm.export.lowering import lane_a_from_onnx, lane_b  # noqa: E402
from edgeglm.export.rewrites import rewrite  # noqa: E402
from edgeglm.targets.schema import load_target  # noqa: E402
from scripts.fixtures.planted import cast_to_fp16  # noqa: E402
from tests.calibration.towers import image_tower, text_tower  # noqa: E402
from tests.export.blocks import WIDTH, block  # noqa: E402

TOKENS = ShapeRange(min=(1, 1), opt=(4, 6), max=(8, 8))
PROFILES = {
    "image": {"pixels": ShapeRange(min=(1, -1, -1, -1), opt=(4, -1, -1, -1), max=(8, -1, -1, -1))},
    "text": {"input_ids": TOKENS, "attention_mask": TOKENS},
}


def built(path: Path, tower: str, precision: str) -> EnginePlan:
    return engine_from_onnx(
        path,
        targets=[load_target("a10")],
        library="tensorrt-rtx",
        precision=precision,
        profiles=[PROFILES[tower]],
    )


@pytest.mark.parametrize(("tower", "model"), [("image", image_tower()), ("text", text_tower())])
def test_a_lane_a_file_parses_and_builds(tower: str, model: Any, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "b.onnx")
    lane_a_from_onnx(tmp_path / "b.onnx", tmp_path / "a.onnx")
    assert built(tmp_path / "a.onnx", tower, "fp32").metadata.size_bytes > 1000


@pytest.mark.parametrize("int8", [False, True])
def test_a_lane_b_file_in_fp16_parses_and_builds_strongly_typed(int8: bool, tmp_path: Path) -> None:
    """The block of attention, its scale before the first product, with and without Q/DQ."""
    model = lane_b(block(int8=int8)).model
    assert rewrite(model).count("attention-scale") == 1
    half = cast_to_fp16(model)
    for name in ("x", "y"):  # FP32 outside, as the variants of a bundle
        value = next(v for v in (*half.graph.input, *half.graph.output) if v.name == name)
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    last = half.graph.node[-1]
    last.output[0] = "y_half"
    half.graph.node.append(helper.make_node("Cast", ["y_half"], ["y"], name="out/Cast", to=TensorProto.FLOAT))
    onnx.save(half, tmp_path / "b.onnx")
    assert lane_problems(half, "B") == ()
    checked_lane(tmp_path / "b.onnx", "B", target=load_target("jetson-orin-nano"))
    engine = engine_from_onnx(
        tmp_path / "b.onnx",
        targets=[load_target("a10")],
        library="tensorrt-rtx",
        precision="int8" if int8 else "fp16",
        profiles=[{"x": ShapeRange(min=(1, 6, WIDTH), opt=(4, 6, WIDTH), max=(8, 6, WIDTH))}],
    )
    assert engine.metadata.onnx_sha256
