"""Engines with buckets, really built by TensorRT-RTX; only a GPU can run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds on x86-64 hosts only")

from edgeglm.compile.builder import engine_from_onnx
from edgeglm.compile.contract import tower_profiles
from edgeglm.engines.profiles import ProfileChoice, is_fixed, whole_ranges
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import load_target

Tower = Callable[..., Path]


def test_a_text_tower_is_built_with_a_bucket_for_each_batch_and_length(tmp_path: Path, text_tower: Tower):
    options = BuildOptions(usual_batch=4)
    engine = engine_from_onnx(
        text_tower(tmp_path / "text.onnx"),
        targets=[load_target("a10"), load_target("l4")],
        library="tensorrt-rtx",
        precision="fp16",
        profiles=tower_profiles("text", options.batch, (1, 8, 16), options.buckets),
        options=options,
    )
    profiles = whole_ranges(engine.metadata)
    assert [profile["input_ids"].max for profile in profiles if is_fixed(profile)] == [
        (batch, length) for length in (8, 12, 16) for batch in (1, 4, 32)
    ]
    choice = ProfileChoice(profiles, engine.metadata.inputs, engine.metadata.outputs)
    assert choice.bucket_batches == (1, 4, 32)
    assert choice.of({"input_ids": (3, 12), "attention_mask": (3, 12)}) is not None
    assert choice.of({"input_ids": (3, 5), "attention_mask": (3, 5)}) == (
        0,
        {"input_ids": (3, 5), "attention_mask": (3, 5)},
    ), "any other shape still runs"


def test_an_image_tower_is_built_with_a_bucket_for_each_batch(tmp_path: Path, image_tower: Tower):
    engine = engine_from_onnx(
        image_tower(tmp_path / "image.onnx"),
        targets=[load_target("t4")],
        library="tensorrt-rtx",
        precision="fp16",
        profiles=tower_profiles("image", BuildOptions().batch, (1, 8, 16), BuildOptions().buckets),
    )
    assert [bucket["pixels"] for bucket in engine.metadata.buckets] == [(n, 3, 4, 4) for n in (1, 8, 32)]
    assert len(engine.metadata.profiles) == 1, "each profile would put the weights into the plan again"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (BuildOptions(), (1, 8, 32)),
        (BuildOptions(usual_batch=1, largest_batch=64), (1, 64)),
        (BuildOptions(bucket_batches=()), ()),
        (BuildOptions(bucket_batches=(16, 4, 99)), (4, 16, 32)),
    ],
)
def test_the_batches_of_buckets_can_be_chosen(options: BuildOptions, expected: tuple[int, ...]):
    assert options.buckets == expected
