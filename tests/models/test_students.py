"""If these fail, a student gives a text or a picture another embedding on a device than in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.models.student_shapes import STUDENTS, student_shape  # noqa: E402
from edgeglm.models.students import (  # noqa: E402
    MASKED,
    StudentImageTower,
    StudentTextTower,
    student_image_tower,
)


@pytest.fixture(scope="module")
def text() -> StudentTextTower:
    torch.manual_seed(0)
    tower = StudentTextTower(STUDENTS["edge-xs"], vocabulary=50, max_length=12, embedding_dim=16).eval()
    torch.nn.init.normal_(tower.places, std=0.5)
    return tower


@pytest.fixture(scope="module")
def image() -> StudentImageTower:
    torch.manual_seed(0)
    return StudentImageTower(STUDENTS["edge-xs"], resolution=32, embedding_dim=16).eval()


def ids(*rows: list[int]) -> Any:
    return torch.tensor(rows)


def test_masked_tokens_change_nothing(text: StudentTextTower) -> None:
    mask = ids([1, 1, 1, 0, 0])
    with torch.no_grad():
        one = text(ids([2, 7, 3, 0, 0]), mask)
        other = text(ids([2, 7, 3, 41, 9]), mask)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 8])
def test_padding_a_text_changes_nothing(length: int, text: StudentTextTower) -> None:
    tokens = torch.arange(4, 4 + length)[None]
    with torch.no_grad():
        alone = text(tokens, torch.ones_like(tokens))
        wide = torch.nn.functional.pad(tokens, (0, 12 - length))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 12 - length))
        torch.testing.assert_close(text(wide, mask), alone, atol=1e-5, rtol=0)


def test_the_order_of_words_matters(text: StudentTextTower) -> None:
    with torch.no_grad():
        one, other = text(ids([5, 9], [9, 5]), ids([1, 1], [1, 1]))
    assert float((one - other).abs().max()) > 1e-3


def test_a_text_of_nothing_but_padding_is_no_nan(text: StudentTextTower) -> None:
    with torch.no_grad():
        assert torch.isfinite(text(ids([0, 0]), ids([0, 0]))).all()


def test_the_mask_stays_within_fp16() -> None:
    assert torch.isfinite(2 * torch.tensor(MASKED).half())


def test_where_something_is_drawn_matters(image: StudentImageTower) -> None:
    with torch.no_grad():
        activation = torch.rand_like(image.trunk(torch.ones(1, 3, 32, 32))[0])
        one, other = image.head(activation), image.head(activation.flip(2, 3))
    assert float((one - other).abs().max()) > 1e-2, "an average would not tell them apart"
    torch.testing.assert_close(one.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("size", sorted(STUDENTS))
@pytest.mark.parametrize("resolution", [31, 64])
def test_every_size_takes_every_resolution(size: str, resolution: int) -> None:
    tower = student_image_tower(STUDENTS[size], resolution=resolution, embedding_dim=8).eval()
    with torch.no_grad():
        assert tower(torch.rand(1, 3, resolution, resolution)).shape == (1, 8)


def test_an_unknown_size_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'edge-s'\?"):
        student_shape("edges")


def test_the_exported_towers_are_the_towers_at_any_batch_and_length(
    text: StudentTextTower, image: StudentImageTower, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    pixels = [{"pixels": torch.rand(batch, 3, 32, 32)} for batch in (2, 1, 5)]
    onnx_from_module(image, pixels[0], tmp_path / "image.onnx", dynamic_axes={"pixels": {0: "batch"}})
    assert assert_parity(image, tmp_path / "image.onnx", pixels, atol=1e-4).max_abs < 1e-4
    tokens = []
    for batch, length in ((2, 5), (1, 2), (4, 12)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        tokens.append({"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask})
    free = {0: "batch", 1: "length"}
    axes = {"input_ids": free, "attention_mask": free}
    onnx_from_module(text, tokens[0], tmp_path / "text.onnx", dynamic_axes=axes)
    assert assert_parity(text, tmp_path / "text.onnx", tokens, atol=1e-4).max_abs < 1e-4
