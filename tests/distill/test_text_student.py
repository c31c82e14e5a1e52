"""If these fail, a text student starts or learns from something else than its teacher's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import StudentConfig  # noqa: E402
from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.distill import text_student as room  # noqa: E402
from edgeglm.distill.text_student import (  # noqa: E402
    fit_text_student,
    length_batches,
    padded,
    principal_components,
    text_student,
)
from edgeglm.models.students import StudentTextTower  # noqa: E402
from tests.tiny_towers import SPECIAL, WORDS, write_wordpiece  # noqa: E402


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=300),
    size=st.integers(1, 32),
    seed=st.integers(0, 3),
)
def test_batches_show_each_text_once_and_leave_out_less_than_one_batch(
    lengths: list[int], size: int, seed: int
) -> None:
    pool = np.arange(len(lengths))
    batches = list(length_batches(pool, np.array(lengths), size, np.random.default_rng(seed)))
    shown = torch.cat(batches).tolist()
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(pool.tolist())
    assert len(pool) - len(shown) < size
    assert all(len(batch) == size for batch in batches) or len(pool) < size


def test_batches_of_like_length_bear_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 4096)
    batches = [b.numpy() for b in length_batches(np.arange(4096), lengths, 64, np.random.default_rng(1))]
    padding = sum(int(lengths[b].max()) * len(b) - int(lengths[b].sum()) for b in batches)
    assert padding < 0.15 * lengths.sum()
    order = [int(lengths[batch].mean()) for batch in batches]
    assert order != sorted(order), "short and long ones come mixed"


def test_rows_are_padded_at_their_end_and_masked_there() -> None:
    ids, mask = padded([np.array([5, 6, 7]), np.array([8])], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_principal_components_do_not_change_sign_with_the_order_of_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 6, generator=generator) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    found = principal_components(table, 3)
    assert torch.equal(found, principal_components(table.clone(), 3))
    # A slight change of the data, as another library would make, is a slight change of the result.
    torch.testing.assert_close(found, principal_components(table + 1e-5, 3), atol=1e-3, rtol=0)
    values = torch.linalg.svdvals((table - table.mean(0)).double())[:3]
    ratios = (found.double().norm(dim=0) / found.double().norm(dim=0)[0]).sort(descending=True).values
    torch.testing.assert_close(ratios, values / values[0], atol=1e-4, rtol=0)
    assert float(found.std()) == pytest.approx(1.0, abs=1e-4)


def test_a_vocabulary_narrower_than_the_student_still_starts_it() -> None:
    config = StudentConfig(size="edge-xs", max_length=8)
    tower = text_student(config, embedding_dim=4, words_WD=torch.randn(30, 4))
    assert tower.tokens.weight.shape == (30, 48)
    assert torch.isfinite(tower.tokens.weight).all()


@dataclass(frozen=True)
class Lesson:
    """Texts, and what a teacher that adds its words up says to them."""

    tokenizer: Tokenizer
    texts: list[str]
    words_WD: Any
    teacher_TD: Any

    def taught(self, **changes: Any) -> tuple[StudentTextTower, list[float]]:
        """Train a student on it."""
        torch.manual_seed(1)
        config = StudentConfig(size="edge-xs", max_length=8, text_batch_size=16, text_epochs=1, **changes)
        tower = text_student(config, embedding_dim=16, words_WD=self.words_WD)
        arguments = (tower, self.tokenizer, self.texts, self.teacher_TD, self.teacher_TD[:5], config)
        return tower, fit_text_student(*arguments, captions=len(WORDS), seed=0, progress=QuietProgress())

    def said(self, tower: StudentTextTower) -> Any:
        """Return what a student says to the texts."""
        ids, mask = (torch.from_numpy(array) for array in self.tokenizer.encode(self.texts, max_length=8))
        with torch.no_grad():
            return tower(ids, mask)


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lesson:
    monkeypatch.setattr(room, "MIN_STEPS", 60)
    torch.manual_seed(0)
    tokenizer = Tokenizer(write_wordpiece(tmp_path / "tokenizer.json"))
    words_WD = torch.nn.functional.normalize(torch.randn(len(SPECIAL) + len(WORDS), 16), dim=1)
    texts = [f"a {word}" for word in WORDS] + [f"{one} {two}" for one in WORDS[:6] for two in WORDS[8:12]]
    rows = [words_WD[tokenizer.encode([text])[0][0][1:-1]].sum(0) for text in texts]
    teacher_TD = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return Lesson(tokenizer=tokenizer, texts=texts, words_WD=words_WD, teacher_TD=teacher_TD)


def test_the_student_comes_near_its_teacher(lesson: Lesson) -> None:
    tower, curve = lesson.taught()
    assert curve[-1] < 0.3 * curve[0]
    assert not tower.training
    assert float((lesson.said(tower) * lesson.teacher_TD).sum(1).mean()) > 0.8


def test_texts_stand_to_each_other_more_as_for_the_teacher_where_that_is_asked(lesson: Lesson) -> None:
    def apart(tower: StudentTextTower) -> float:
        """Return how far what texts are to each other is from what they are to the teacher."""
        rows_TD = lesson.said(tower)
        return float((rows_TD @ lesson.teacher_TD.T - lesson.teacher_TD @ lesson.teacher_TD.T).abs().mean())

    asked, unasked = (lesson.taught(text_relation=weight, distance_weight=0.1)[0] for weight in (4.0, 0.0))
    assert apart(asked) < apart(unasked)
