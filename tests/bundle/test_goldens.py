from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from edgeglm.bundle.goldens import golden_check, golden_sources, goldens
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError

ZEROS = np.zeros((2, 4), dtype=np.float32)


def recorded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path / "golden" / "outputs.npz") as stored:
        return dict(stored)


def test_goldens_are_raw_inputs_in_order(packed):
    inputs = goldens(open_bundle(packed))
    assert [image.read_bytes() for image in inputs.images] == [b"png one", b"png two"]
    assert inputs.texts == ("red apple", "dog", "sun")


def test_a_machine_that_computes_the_same_agrees_wholly(packed):
    outputs = recorded(packed)
    result = golden_check(
        open_bundle(packed), lambda _: outputs["image"], lambda _: outputs["text"], variant="fp32"
    )
    assert (result.images, result.texts, result.variant, result.top_k) == (2, 3, "fp32", 10)
    assert result.image_cosine_min == pytest.approx(1)
    assert result.text_cosine_mean == pytest.approx(1)
    assert result.top_k_agreement == result.top_k_agreement_min == 1
    assert result.agrees()


def test_a_variant_is_held_against_its_own_outputs_where_they_are_recorded(packed):
    outputs = recorded(packed)
    bundle = open_bundle(packed)
    own = golden_check(bundle, lambda _: outputs["image"], lambda _: outputs["text-int8"])
    assert own.variant == "int8"
    assert own.agrees()
    assert not golden_check(bundle, lambda _: outputs["image"], lambda _: outputs["text"]).agrees()


def test_one_wrong_text_is_seen_in_the_worst_cosine(packed):
    outputs = recorded(packed)
    wrong = outputs["text"].copy()
    wrong[1] *= -1
    result = golden_check(
        open_bundle(packed), lambda _: outputs["image"], lambda _: wrong, variant="fp32", top_k=3
    )
    assert result.text_cosine_min == pytest.approx(-1)
    assert result.text_cosine_mean == pytest.approx(1 / 3)
    assert result.top_k_agreement_min == 0
    assert result.top_k_agreement == pytest.approx(4 / 5)


def test_nan_never_agrees(packed):
    outputs = recorded(packed)
    bad = np.full_like(outputs["text"], np.nan)
    assert not golden_check(open_bundle(packed), lambda _: outputs["image"], lambda _: bad).agrees()


def test_a_bundle_without_gallery_compares_neighbours_among_the_goldens(tmp_path, manifest, sources):
    lean = {name: data for name, data in sources.items() if not name.startswith("gallery/")}
    path = write_bundle(tmp_path / "lean", sources=lean, manifest=manifest)
    outputs = recorded(path)
    result = golden_check(open_bundle(path), lambda _: outputs["image"], lambda _: outputs["text-int8"])
    assert result.top_k == 2
    assert result.agrees()


def test_embeddings_of_another_width_are_refused(packed):
    outputs = recorded(packed)
    with pytest.raises(UserError, match=r"image is \[2, 4\], this machine made \[2, 3\]"):
        golden_check(open_bundle(packed), lambda _: outputs["image"][:, :3], lambda _: outputs["text"])


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_broken_outputs_are_a_clear_error(tmp_path, manifest, sources, data):
    path = write_bundle(tmp_path / "b", sources=sources | {"golden/outputs.npz": data}, manifest=manifest)
    with pytest.raises(UserError, match=r"cannot read golden/outputs\.npz"):
        golden_check(open_bundle(path), lambda _: ZEROS, lambda _: ZEROS)


def test_pickled_outputs_are_never_unpickled(tmp_path, manifest, sources):
    buffer = io.BytesIO()
    np.savez(buffer, image=np.array([{}], dtype=object), text=np.array([{}], dtype=object))
    path = write_bundle(
        tmp_path / "b", sources=sources | {"golden/outputs.npz": buffer.getvalue()}, manifest=manifest
    )
    with pytest.raises(UserError, match="allow_pickle"):
        golden_check(open_bundle(path), lambda _: ZEROS, lambda _: ZEROS)


def test_the_same_outputs_give_the_same_bytes_and_wrong_ones_are_not_packed():
    rows = np.eye(2, 3, dtype=np.float32)
    assert golden_sources([b"a", b"b"], ["x", "y"], {"image": rows, "text": rows}) == golden_sources(
        [b"a", b"b"], ["x", "y"], {"text": rows.copy(), "image": np.asfortranarray(rows)}
    )
    for outputs in (
        {"image": rows},
        {"image": rows, "text": rows * np.nan},
        {"image": rows[:1], "text": rows},
    ):
        with pytest.raises(ValueError, match="golden output"):
            golden_sources([b"a", b"b"], ["x", "y"], outputs)


def test_towers_of_different_spaces_are_said_and_not_a_crash(tmp_path: Path, manifest, sources):
    files = golden_sources(
        [b"png"], ["red"], {"image": np.ones((1, 3), np.float32), "text": np.ones((1, 4), np.float32)}
    )
    kept = {n: d for n, d in sources.items() if not n.startswith(("golden/", "gallery/"))}
    path = write_bundle(tmp_path / "odd", sources={**kept, **files}, manifest=manifest)
    with open_bundle(path) as bundle, pytest.raises(UserError, match="pictures have 3 dimensions, texts 4"):
        golden_check(bundle, lambda _: np.ones((1, 3), np.float32), lambda _: np.ones((1, 4), np.float32))
