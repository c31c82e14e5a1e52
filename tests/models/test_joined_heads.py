"""Joined heads: what several said together stays what the one embedding says."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from edgeglm.models.joined_heads import JoinedHeads, common_axes  # noqa: E402
from edgeglm.models.projection import ProjectionHead  # noqa: E402


def heads(count: int, *, features: int, dimensions: int) -> list[ProjectionHead]:
    torch.manual_seed(count + features)
    made = [
        ProjectionHead(features, dimensions, hidden=8, input_dropout=0.0, dropout=0.0) for _ in range(count)
    ]
    return [head.eval().requires_grad_(False) for head in made]


def test_a_similarity_is_the_mean_of_what_the_members_say_where_all_axes_are_kept() -> None:
    images, texts = torch.randn(9, 5), torch.randn(7, 6)
    image_heads, text_heads = heads(3, features=5, dimensions=4), heads(3, features=6, dimensions=4)
    sides = [torch.cat([h(x) for h in hs], 1) for hs, x in ((image_heads, images), (text_heads, texts))]
    axes = common_axes(sides, 12)
    found = JoinedHeads(image_heads, axes)(images) @ JoinedHeads(text_heads, axes)(texts).T
    said = torch.stack([i(images) @ t(texts).T for i, t in zip(image_heads, text_heads, strict=True)])
    torch.testing.assert_close(found, said.mean(0), atol=1e-5, rtol=0)


def test_as_wide_as_one_member_it_keeps_what_they_agree_on_and_drops_what_no_row_uses() -> None:
    """Rows that span four of twelve dimensions lose nothing along four axes, whichever side spans them."""
    spanned = torch.linalg.qr(torch.randn(12, 4)).Q
    images, texts = torch.randn(30, 4) @ spanned.T, torch.randn(2, 4) @ spanned.T
    axes = common_axes([images, texts], 4)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close((images @ axes) @ (texts @ axes).T, images @ texts.T, atol=1e-4, rtol=0)


def test_a_side_with_few_rows_decides_as_much_as_one_with_many() -> None:
    many, few = torch.zeros(1000, 3), torch.zeros(2, 3)
    many[:, 0], few[:, 1] = 1.0, 1.1
    axes = common_axes([many, few], 1)
    assert abs(float(axes[1, 0])) == pytest.approx(1.0), "a thousand pictures outvoted two names"
