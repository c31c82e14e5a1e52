"""If these fail, the README's picture of results is wrong or missing."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from edgeglm.report import results_picture
from edgeglm.report.data import Example, ExampleImage

GREEN, GREY = (26, 138, 78), (224, 228, 234)


def image(size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "orange").save(buffer, "PNG")
    return buffer.getvalue()


def example(*right: bool, query: str = "a cat") -> Example:
    images = tuple(ExampleImage(image=image(), label="cat", score=0.5, right=flag) for flag in right)
    return Example(query=query, images=images)


def colours(png: bytes) -> set[tuple[int, int, int]]:
    with Image.open(io.BytesIO(png)) as opened:
        found = opened.convert("RGB").getcolors(1 << 20)
    assert found is not None
    return {colour for _, colour in found if isinstance(colour, tuple)}  # type: ignore[misc]


def test_right_images_are_framed_in_green_and_wrong_ones_are_not() -> None:
    assert GREEN in colours(results_picture([example(True, False)]))
    wrong = colours(results_picture([example(False, False)]))
    assert GREEN not in wrong
    assert GREY in wrong


def test_the_same_examples_give_the_same_bytes() -> None:
    examples = [example(True, False), example(False, True)]
    assert results_picture(examples, title="t") == results_picture(examples, title="t")


def test_long_queries_and_odd_shapes_stay_inside() -> None:
    odd = Example(
        query="a very long query " * 30,
        images=(ExampleImage(image=image((300, 7)), label="long " * 50, score=-0.1, right=False),),
    )
    with Image.open(io.BytesIO(results_picture([odd, example(True)], thumbnail=64, scale=1))) as opened:
        assert opened.size[0] < 400
        assert opened.getpixel((opened.width - 2, 30)) == (255, 255, 255)


def test_a_picture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        results_picture([])
