from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.calibration.sets import (
    Candidates,
    calibration_set_from_arrays,
    open_calibration_set,
    random_calibration_set,
    stratified_draw,
)
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import UserError

PREPROCESSING: dict[str, Any] = {"image": {"resolution": 4}}


def _candidates(
    count: int = 40, evaluation: tuple[str, ...] = ("e1", "e2"), *, bad: float = 0.0
) -> Candidates:
    pixels = np.random.default_rng(0).random((count, 3, 4, 4), dtype=np.float32) + np.float32(bad)
    return Candidates(
        ids=[f"set/{i}" for i in range(count)],
        strata=["noto" if i % 4 else "openmoji" for i in range(count)],
        digests=[sha256_bytes(bytes([i])) for i in range(count)],
        tensors=lambda chosen: {"pixels": pixels[list(chosen)]},
        evaluation_digests=evaluation,
    )


def test_one_seed_gives_one_set_and_another_seed_another(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibration_set_from_arrays(
            tmp_path / name, {"image": _candidates()}, preprocessing=PREPROCESSING, samples=12, seed=seed
        )
        digests.append([sha256_file(tmp_path / name / f) for f in ("image.npz", "calibration.json")])
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_the_record_proves_what_was_drawn(tmp_path: Path) -> None:
    calibration_set_from_arrays(
        tmp_path, {"image": _candidates()}, preprocessing=PREPROCESSING, samples=12, batch_size=5
    )
    opened = open_calibration_set(tmp_path)
    part = opened.record.towers["image"]
    assert opened.record.source == "training"
    assert part.strata == {"noto": 6, "openmoji": 6}
    assert part.disjointness.evaluation_samples == 2
    assert part.disjointness.overlap == 0
    assert [len(feeds["pixels"]) for feeds in opened.batches("image")] == [5, 5, 2]
    assert [len(feeds["pixels"]) for feeds in opened.batches("image", 7)] == [5, 2]
    first = int(part.samples[0].id.removeprefix("set/"))
    np.testing.assert_array_equal(
        opened.batches("image")[0]["pixels"][0], _candidates().tensors([first])["pixels"][0]
    )


def test_a_sample_that_the_evaluation_uses_is_refused(tmp_path: Path) -> None:
    leaked = _candidates(evaluation=tuple(sha256_bytes(bytes([i])) for i in range(40)))
    with pytest.raises(UserError, match="evaluation samples too"):
        calibration_set_from_arrays(tmp_path, {"image": leaked}, preprocessing=PREPROCESSING, samples=4)


def test_noise_is_refused_unless_asked_for_and_then_recorded(tmp_path: Path) -> None:
    tensors = {"image": {"pixels": np.zeros((4, 3, 4, 4), np.float32)}}
    with pytest.raises(UserError, match="random data"):
        random_calibration_set(tmp_path, tensors, preprocessing=PREPROCESSING)
    random_calibration_set(tmp_path, tensors, preprocessing=PREPROCESSING, allow_random=True)
    assert open_calibration_set(tmp_path).record.source == "random"


def test_an_altered_set_is_noticed(tmp_path: Path) -> None:
    written = calibration_set_from_arrays(
        tmp_path, {"image": _candidates()}, preprocessing=PREPROCESSING, samples=8
    )
    data = bytearray((tmp_path / "image.npz").read_bytes())
    data[300] ^= 1
    (tmp_path / "image.npz").write_bytes(data)
    with pytest.raises(UserError, match="altered"):
        written.batches("image")


@pytest.mark.parametrize("content", [None, b"{", b"{}", b'{"schema_version": 1}'])
def test_a_broken_record_is_a_users_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(UserError, match="no calibration record"):
        open_calibration_set(tmp_path)


def test_nan_and_single_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        calibration_set_from_arrays(
            tmp_path, {"image": _candidates(bad=float("nan"))}, preprocessing=PREPROCESSING, samples=4
        )
    with pytest.raises(UserError, match="at least 2"):
        calibration_set_from_arrays(tmp_path, {"image": _candidates(1)}, preprocessing=PREPROCESSING)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(0, 70), st.integers(0, 5))
def test_a_draw_repeats_nobody_and_starves_no_stratum(strata: list[str], count: int, seed: int) -> None:
    drawn = stratified_draw(strata, count, seed=seed)
    assert len(set(drawn)) == len(drawn) == min(count, len(strata))
    sizes = Counter(strata)
    for end in range(len(drawn) + 1):  # what a limit, a split or a curve takes
        taken = Counter(strata[i] for i in drawn[:end])
        for stratum, size in sizes.items():
            assert taken[stratum] >= min(size, end // len(sizes))


def test_every_prefix_of_a_written_set_is_stratified(tmp_path: Path) -> None:
    calibration_set_from_arrays(tmp_path, {"image": _candidates()}, preprocessing=PREPROCESSING, samples=12)
    samples = open_calibration_set(tmp_path).record.towers["image"].samples
    assert [sample.stratum for sample in samples] == ["noto", "openmoji"] * 6
