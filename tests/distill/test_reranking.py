"""If these fail, a re-ranker learns nothing of what a student confuses, or is asked of other images."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

import numpy as np  # noqa: E402

from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import RerankerConfig  # noqa: E402
from edgeglm.distill.reranking import Seen, candidates, fit_reranker  # noqa: E402
from edgeglm.models.reranker import FusedReranker  # noqa: E402

K, D, N, C = 8, 8, 4, 8
CONFIG = RerankerConfig(
    enabled=True, depth=1, width=32, candidates=8, steps=100, queries=8, negatives=8, learning_rate=3e-3
)


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Eight concepts, whose first patch says which; the student answers noise, the teacher is right."""
    generator = torch.Generator().manual_seed(0)
    names = torch.eye(K)
    patches = 0.1 * torch.rand(1, 2 * K, N, C, generator=generator)
    patches[0, :, 0] += names.repeat(2, 1)
    noise = unit(torch.randn(1 * 2 * K, D, generator=generator))
    return Seen(
        patch_VUNC=patches.half(),
        image_VUD=noise[None],
        target_UD=names.repeat(2, 1),
        concept_U=torch.cat([torch.arange(K), torch.full((K,), -1)]),
        domain_U=torch.tensor([0] * K + [1] * K),
        text_TD=unit(torch.randn(K, D, generator=generator)),
        said_TD=names,
        ids=[np.array([place]) for place in range(K)],
        right_TK=torch.eye(K, dtype=torch.bool),
    )


def fitted(seen: Seen, config: RerankerConfig) -> FusedReranker:
    torch.manual_seed(0)
    model = FusedReranker(table_VE=torch.eye(K), patches=N, channels=C, max_length=4, width=32, depth=1)
    fit_reranker(model, seen, config, pad=0, seed=0, progress=QuietProgress())
    return model


def right(model: FusedReranker, seen: Seen, style: int) -> float:
    """The share of the texts whose image of a style is put first."""
    pool = torch.nonzero(seen.domain_U == style).flatten()
    found = 0
    for text in range(K):
        ids = torch.full((len(pool), 1), text)
        cosine = seen.image_VUD[0, pool] @ seen.text_TD[text]
        with torch.no_grad():
            score = model(seen.patch_VUNC[0, pool].float(), ids, torch.ones_like(ids), cosine)[:, 0]
        found += int(score.argmax()) == text
    return found / K


def test_it_tells_apart_what_the_student_confuses(seen: Seen) -> None:
    model = fitted(seen, CONFIG)
    assert right(model, seen, 0) == 1.0
    assert right(model, seen, 1) == 1.0, "the teacher's similarities reach images without a label"


def test_the_same_seed_gives_the_same_re_ranker(seen: Seen) -> None:
    few = RerankerConfig(enabled=True, depth=1, width=32, steps=4, queries=4, negatives=4)
    one, other = (fitted(seen, few).judge.weight for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [1, 30, 31])
def test_it_learns_for_the_steps_of_the_recipe(
    seen: Seen, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def counted(*arguments):
        drawn.append(1)
        return candidates(*arguments)

    monkeypatch.setattr("edgeglm.distill.reranking.candidates", counted)
    fitted(seen, RerankerConfig(enabled=True, depth=1, width=32, steps=steps, queries=2, negatives=4))
    assert len(drawn) == steps


def test_candidates_are_the_students_first_ones_of_one_style(seen: Seen) -> None:
    pool, text_Q = torch.arange(K, 2 * K), torch.arange(3)
    config = RerankerConfig(candidates=6, negatives=4)
    found = candidates(seen, text_Q, 0, pool, config, np.random.default_rng(0))
    assert found.shape == (3, 4)
    for text, row in zip(text_Q.tolist(), found, strict=True):
        order = (seen.image_VUD[0, pool] @ seen.text_TD[text]).argsort(descending=True)
        best = set(pool[order[:6]].tolist())
        assert set(row.tolist()) <= best
        assert row[:2].tolist() == pool[order[:2]].tolist()
        assert len(set(row.tolist())) == 4
