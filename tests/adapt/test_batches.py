"""If these fail, a step trains on other images or captions than it should, or forgets what is replayed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgeglm.adapt import batches as room  # noqa: E402
from edgeglm.adapt.batches import Replay, batches_in_pass, batches_of  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402


def concepts_of(own: int, others: int, *, first: int = 1000) -> Concepts:
    """Every image is of a concept of its own, with one caption."""
    image_N = torch.cat([torch.arange(own), torch.arange(first, first + others)])
    count = own + others
    return Concepts(
        image_N=image_N,
        concept_N=torch.arange(count),
        texts=tuple(f"text {i}" for i in range(count)),
        captions=tuple((i,) for i in range(count)),
    )


def test_of_very_many_concepts_those_of_the_batch_always_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_CONCEPTS", 10)
    own = torch.tensor([97, 3, 97])
    chosen = room._taking_part(own, 100, np.random.default_rng(0))
    assert {3, 97} <= set(chosen.tolist())
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert 10 <= len(chosen) <= 12
    assert room._taking_part(own, 10, np.random.default_rng(0)).tolist() == list(range(10))


@pytest.mark.parametrize(("own", "near"), [(0, 0), (5, 5), (40, 15), (95, 15)])
def test_ones_own_concepts_are_told_apart_by_each_other(
    own: int, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_CONCEPTS", 20)
    chosen = room._taking_part(torch.tensor([97]), 100, np.random.default_rng(0), own=own)
    assert int((chosen < own).sum()) == near, "three quarters, or all that there are"
    assert 97 in chosen.tolist()
    assert near + min(100 - own, 20 - near) <= len(chosen) <= near + min(100 - own, 20 - near) + 1


@given(
    own=st.integers(1, 60),
    others=st.integers(1, 60),
    size=st.integers(1, 24),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 99),
)
def test_a_pass_goes_through_ones_own_images_once_and_replays_its_share(
    own: int, others: int, size: int, share: float, seed: int
) -> None:
    concepts, replay = concepts_of(own, others), Replay(first=1000, concepts=own, share=share)
    found = list(batches_of(concepts, size=size, views=3, rng=np.random.default_rng(seed), replay=replay))
    assert len(found) == batches_in_pass(concepts, size, replay)
    shown = torch.cat([batch.image_B for batch in found])
    ours = shown[shown < 1000].tolist()
    assert len(ours) == len(set(ours)), "none twice"
    assert len(ours) > own - replay.own(size), "but for a rest shorter than a batch, all"
    for batch in found:
        replayed = batch.image_B[batch.image_B >= 1000].tolist()
        assert (
            len(replayed) == len(set(replayed)) == min(replay.others(len(ours) // len(found), size), others)
        )
        assert len(batch.image_B) <= size
        assert torch.equal(concepts.image_N[batch.place_B], batch.image_B)
        assert torch.equal(batch.chosen_C[batch.concept_B], concepts.concept_N[batch.place_B])
        assert torch.equal(batch.caption_C, batch.chosen_C), "each concept's own caption"


@pytest.mark.parametrize(
    ("own", "size", "share", "expected"),
    [
        (384, 512, 0.25, 128),
        (6, 512, 0.25, 2),
        (1, 512, 0.25, 1),
        (3, 8, 0.0, 0),
        (2, 8, 0.75, 6),
        (1, 8, 0.9, 7),
    ],
)
def test_a_short_batch_replays_the_same_share(own: int, size: int, share: float, expected: int) -> None:
    concepts, replay = concepts_of(own, 400), Replay(first=1000, concepts=own, share=share)
    batch = next(batches_of(concepts, size=size, views=1, rng=np.random.default_rng(0), replay=replay))
    assert int((batch.image_B >= 1000).sum()) == expected


def test_without_a_replay_all_images_are_alike() -> None:
    concepts = concepts_of(5, 7)
    (batch,) = batches_of(concepts, size=12, views=1, rng=np.random.default_rng(0))
    assert sorted(batch.image_B.tolist()) == concepts.image_N.tolist()
    assert batches_in_pass(concepts, 4) == 3
