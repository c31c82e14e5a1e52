"""The profile of a call: the wrong one would answer slowly, or not at all."""

from __future__ import annotations

import pytest

from edgeglm.engines.plan import PlanMetadata, ShapeRange, TensorRecord
from edgeglm.engines.profiles import ProfileChoice, default_length_buckets, whole_ranges


def text(batch: int, length: int) -> dict[str, ShapeRange]:
    shape = ShapeRange(min=(batch, length), opt=(batch, length), max=(batch, length))
    return {"ids": shape, "mask": shape}


ANY = ShapeRange(min=(1, 1), opt=(8, 8), max=(32, 24))
PROFILES = ({"ids": ANY, "mask": ANY}, text(8, 8), text(1, 8), text(32, 8), text(1, 24), text(8, 24))
TENSORS = [TensorRecord(name=name, dtype="int64", shape=(-1, -1)) for name in ("ids", "mask")]
OUTPUT = [TensorRecord(name="embedding", dtype="float32", shape=(-1, 4))]
CHOICE = ProfileChoice(PROFILES, TENSORS, OUTPUT)


@pytest.mark.parametrize(
    ("batch", "length", "expected"),
    [
        (1, 8, (2, (1, 8))),
        (8, 8, (1, (8, 8))),
        (4, 8, (1, (8, 8))),
        (3, 8, (0, (3, 8))),
        (16, 8, (3, (32, 8))),
        (9, 8, (0, (9, 8))),
        (5, 24, (5, (8, 24))),
        (5, 23, (0, (5, 23))),
        (32, 24, (0, (32, 24))),
        (33, 8, None),
        (1, 25, None),
    ],
)
def test_a_call_takes_the_tightest_bucket_then_the_profile_for_any_shape(batch, length, expected):
    found = CHOICE.of({"ids": (batch, length), "mask": (batch, length)})
    assert (found and (found[0], found[1]["ids"])) == expected
    assert CHOICE.of({"ids": (batch, length), "mask": (batch, length)}) == found


def test_the_batches_of_the_buckets_are_known_to_a_runner():
    assert CHOICE.bucket_batches == (1, 8, 32)
    assert ProfileChoice(PROFILES[:1], TENSORS, OUTPUT).bucket_batches == ()


def test_inputs_whose_shape_is_fixed_are_in_every_profile():
    scale = TensorRecord(name="scale", dtype="float32", shape=(4,))
    digest = "a" * 64
    record = PlanMetadata(
        library="tensorrt",
        library_version="10.3.0",
        sms=(87,),
        onnx_sha256=digest,
        plan_sha256=digest,
        size_bytes=1,
        profiles=PROFILES[:2],
        precision="fp16",
        inputs=(*TENSORS, scale),
        outputs=tuple(OUTPUT),
    )
    assert [ranges["scale"].max for ranges in whole_ranges(record)] == [(4,), (4,)]


def test_length_buckets_grow_by_half_at_most_and_end_at_the_longest():
    assert default_length_buckets(32) == (8, 12, 16, 24, 32)
    assert default_length_buckets(6) == (6,)
