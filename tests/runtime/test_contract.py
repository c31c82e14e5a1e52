"""What an engine is fed must be the callers' samples, in the shapes that it was made for."""

from __future__ import annotations

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import TensorSpec
from edgeglm.runtime.contract import TowerContract, TowerSource
from edgeglm.runtime.requests import Request

NAMES = ("input_ids", "attention_mask")


def contract(
    *, exact: bool, pad: bool = False, lengths: tuple[str | None, str | None] = ("L", "L")
) -> TowerContract:
    """A text tower with buckets of 8 and 16 ids, whose engine may have been made for these."""
    inputs = [
        TensorSpec(name=name, dtype="int64", shape=("B", length))
        for name, length in zip(NAMES, lengths, strict=True)
    ]
    engine = FakeEngine(inputs=inputs, outputs=[], function=lambda _: [])
    engine.exact_shapes = exact
    source = TowerSource(
        engine=lambda: engine,
        ragged={"input_ids": 7, "attention_mask": 0},
        length_buckets=(8, 16),
        pad_to_bucket=pad,
    )
    return TowerContract("text", engine, source)


def requests(tower: TowerContract, *lengths: int) -> list[Request]:
    placed = []
    for length in lengths:
        sample = {name: np.ones(length, np.int64) for name in NAMES}
        placed.append(Request("text", sample=sample))
        tower.place(placed[-1])
    return placed


@pytest.mark.parametrize("settings", [{"exact": True}, {"exact": False, "pad": True}])
@pytest.mark.parametrize(("lengths", "whole"), [((5,), 8), ((5, 3, 4), 8), ((9,), 16), ((8,), 8)])
def test_a_text_is_filled_up_to_its_bucket_with_company_and_alone(settings, lengths, whole):
    tower = contract(**settings)
    feeds = tower.feeds(requests(tower, *lengths))
    for name, filler in (("input_ids", 7), ("attention_mask", 0)):
        assert feeds[name].shape == (len(lengths), whole)
        for row, length in zip(feeds[name], lengths, strict=True):
            assert row.tolist() == [1] * length + [filler] * (whole - length)


@pytest.mark.parametrize(("lengths", "longest"), [((5,), 5), ((5, 3), 5)])
def test_an_engine_that_takes_any_shape_gets_no_filler_that_it_does_not_need(lengths, longest):
    tower = contract(exact=False)
    assert tower.feeds(requests(tower, *lengths))["input_ids"].shape == (len(lengths), longest)


@pytest.mark.parametrize("lengths", [("L", "L"), ("L", "M"), (None, None)])
def test_a_sample_whose_parts_differ_in_length_cannot_shift_its_neighbours_in_a_batch(lengths):
    tower = contract(exact=False, lengths=lengths)
    uneven = {"input_ids": np.ones(3, np.int64), "attention_mask": np.ones(5, np.int64)}
    with pytest.raises(UserError, match="3 in input_ids"):
        tower.place(Request("text", sample=uneven))
    assert tower.feeds(requests(tower, 3, 5))["input_ids"].sum() == 8 + 2 * 7


def test_an_input_without_a_second_axis_cannot_be_ragged():
    engine = FakeEngine(
        inputs=[TensorSpec(name="x", dtype="float32", shape=("B",))], outputs=[], function=lambda _: []
    )
    source = TowerSource(engine=lambda: engine, ragged={"x": 0}, length_buckets=(4,))
    with pytest.raises(UserError, match="has no axis 1 to be ragged; leave it out of ragged"):
        TowerContract("text", engine, source)


def test_a_range_for_an_input_that_the_tower_has_not_is_refused():
    spec = TensorSpec(name="x", dtype="int64", shape=("B", 2))
    engine = FakeEngine(inputs=[spec], outputs=[], function=lambda _: [])
    source = TowerSource(engine=lambda: engine, largest={"y": 3})
    with pytest.raises(UserError, match="has no input y; name one it takes"):
        TowerContract("text", engine, source)
