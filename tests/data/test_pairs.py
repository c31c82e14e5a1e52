"""A pairs artifact opens whole, or is refused; and proves what evaluation may trust."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.data.pairs import PairSet
from tests.synthetic import write_synthetic_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic_pairs(tmp_path / "pairs", size=16)


def test_training_never_sees_a_held_or_unlabelled_text(folder: Path) -> None:
    pairs = PairSet.open(folder)
    assert pairs.images.shape == (128, 16, 16, 3)
    assert isinstance(pairs.images, np.memmap)
    texts = set(pairs.training_texts())
    unseen = {query.text for query in pairs.track("unseen").queries}
    assert len(unseen) == 8
    assert texts.isdisjoint(unseen)
    sizes = [len(pairs.by_role(role)) for role in ("labelled", "unlabelled", "held")]
    assert sum(sizes) == len(pairs)
    assert all(sizes)


def test_a_calibration_set_with_a_copy_of_an_evaluation_image_is_caught(folder: Path) -> None:
    images = np.load(folder / "images.npy")
    held = int(PairSet.open(folder).by_role("held")[0])
    labelled = PairSet.open(folder).by_role("labelled")
    images[labelled[3]] = images[held]
    np.save(folder / "images.npy", images)
    pairs = PairSet.open(folder)
    assert pairs.overlap(labelled.tolist()) == (labelled[3],)
    assert pairs.overlap([held]) == (held,)
    assert pairs.overlap(np.delete(labelled, 3).tolist()) == ()


@pytest.mark.parametrize(
    "name", ["images.npy", "pairs.jsonl", "tracks.json", "licences.json", "summary.json"]
)
def test_a_cut_or_missing_file_is_refused(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="make it again"):
        PairSet.open(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match="make it again"):
        PairSet.open(folder)


def test_a_track_that_points_outside_is_refused(folder: Path) -> None:
    tracks = json.loads((folder / "tracks.json").read_text())
    tracks[0]["queries"][0]["relevant"] = [10_000]
    (folder / "tracks.json").write_text(json.dumps(tracks))
    with pytest.raises(UserError, match="outside its gallery"):
        PairSet.open(folder)
