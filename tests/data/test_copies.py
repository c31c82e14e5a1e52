"""If these fail, a copy of a picture that is judged on is trained on, or two pictures pass for one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from edgeglm.data.copies import LIKENESS, near_pairs, thumbnails_of
from edgeglm.data.transforms import pixels_from_image
from tests.synthetic import COLOURS, SHAPES, drawn


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def test_a_picture_scaled_or_encoded_again_is_found_and_no_other() -> None:
    names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    pictures = [Image.fromarray(drawn(shape, colour, 320)) for shape, colour in names]
    plain = thumbnails_of(np.stack([pixels_from_image(one, 144) for one in pictures]), range(len(names)))
    assert [(i, j) for i, j in near_pairs(plain, plain, tolerance=LIKENESS) if i != j] == []
    for change in (
        lambda one: encoded(one, 85),
        lambda one: one.resize((280, 280), Image.Resampling.LANCZOS),
    ):
        made = np.stack([pixels_from_image(change(one), 144) for one in pictures])
        found = set(near_pairs(thumbnails_of(made, range(len(names))), plain, tolerance=LIKENESS))
        assert found == {(i, i) for i in range(len(names))}


def test_pictures_of_any_size_have_thumbnails() -> None:
    for side in (3, 16, 20, 50, 145):
        images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
        bright, colours = thumbnails_of(images, [2, 0])
        assert len(bright) == len(colours) == 2
        assert np.isfinite(bright).all()
        assert list(near_pairs((bright, colours), (bright, colours))) == [(0, 0), (1, 1)]
    assert list(near_pairs((bright[:0], colours[:0]), (bright, colours))) == []
