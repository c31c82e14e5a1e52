"""If these fail, the re-ranker changes an order before it learnt anything, or reads what is padding."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.models.reranker import FusedReranker, PatchTower  # noqa: E402
from edgeglm.models.student_shapes import student_shape  # noqa: E402
from edgeglm.models.students import student_image_tower  # noqa: E402


@pytest.fixture
def model() -> FusedReranker:
    torch.manual_seed(0)
    table = torch.randn(11, 6)
    return FusedReranker(table_VE=table, patches=4, channels=5, max_length=7, width=32, depth=2).eval()


def pair(batch: int, length: int):
    ids = torch.arange(batch * length).view(batch, length) % 11
    return torch.rand(batch, 4, 5), ids, torch.ones_like(ids), torch.rand(batch)


def test_before_it_learnt_anything_the_order_is_that_of_the_towers(model: FusedReranker) -> None:
    patches, ids, mask, cosine = pair(5, 3)
    assert torch.equal(model(patches, ids, mask, cosine), cosine[:, None])


def test_padding_changes_no_score(model: FusedReranker) -> None:
    torch.nn.init.normal_(model.judge.weight)
    patches, ids, mask, cosine = pair(2, 3)
    longer = torch.cat([ids, torch.full((2, 4), 9)], 1)
    seen = torch.cat([mask, torch.zeros(2, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(patches, longer, seen, cosine), model(patches, ids, mask, cosine))


@pytest.mark.parametrize("width", [1, 31, 96, 97, 100])
def test_any_width_is_shared_out_among_heads(width: int) -> None:
    model = FusedReranker(
        table_VE=torch.randn(11, 6), patches=4, channels=5, max_length=7, width=width, depth=1
    )
    assert model(*pair(2, 3)).shape == (2, 1)
    assert model.layers[0].heads == {96: 3, 100: 2}.get(width, 1)


def test_words_and_patches_both_decide(model: FusedReranker) -> None:
    torch.nn.init.normal_(model.judge.weight)
    patches, ids, mask, cosine = pair(2, 3)
    score = model(patches, ids, mask, cosine)
    assert not torch.allclose(model(patches, ids + 1, mask, cosine), score)
    assert not torch.allclose(model(patches + 0.5 * torch.rand_like(patches), ids, mask, cosine), score)


def test_the_students_table_is_not_trained_away_under_the_text_tower(model: FusedReranker) -> None:
    assert not model.tokens.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "tokens.weight")


@pytest.mark.parametrize("size", ["edge-xs", "edge-vit"])
def test_patches_are_what_the_tower_makes_its_embedding_of(size: str) -> None:
    torch.manual_seed(0)
    tower = student_image_tower(student_shape(size), resolution=32, embedding_dim=8).eval()
    pixels, cut = torch.rand(3, 3, 32, 32), PatchTower(tower).eval()
    with torch.no_grad():
        patches = cut(pixels)
        assert patches.shape[2] == student_shape(size).channels
        torch.testing.assert_close(cut.embedding(patches), tower(pixels))
