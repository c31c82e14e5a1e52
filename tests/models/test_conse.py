"""If these fail, pictures are placed where a classifier did not say, or texts beside other axes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from edgeglm.models.conse import ConseImageHead, ConseTextHead, learned_head  # noqa: E402
from edgeglm.models.projection import ProjectionHead, normalized  # noqa: E402

FEATURES, CLASSES, TEXT, DIMENSIONS = 5, 7, 24, 8
NAMED = torch.tensor([0, 1, 3, 4, 6])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def heads(weight: float, *, dimensions: int = DIMENSIONS) -> tuple[ConseImageHead, ConseTextHead, Tensor]:
    """Return both heads and the features of the names of the classes."""
    torch.manual_seed(0)
    image, text = (
        ProjectionHead(width, dimensions, hidden=8, input_dropout=0.0, dropout=0.0)
        for width in (FEATURES, TEXT)
    )
    texts_TE = torch.randn(50, TEXT)
    said = ConseTextHead(text, weight=weight)
    shown = ConseImageHead(
        image, NAMED, classes=CLASSES, dimensions=dimensions, weight=weight, temperature=1.0
    )
    said.standardise(texts_TE)
    shown.standardise(torch.randn(40, FEATURES + CLASSES))
    names_CE = texts_TE[: len(NAMED)]
    shown.call(said.names(names_CE))
    return shown.eval(), said.eval(), names_CE


def pictures_of(head: ConseImageHead, sure: float = 50.0) -> Tensor:
    """Return features of a picture of each named class, of which the classifier is sure."""
    logits = torch.zeros(len(NAMED), CLASSES)
    logits[:, NAMED] = head.centre + sure * torch.eye(len(NAMED))
    rows: Tensor = torch.cat([torch.randn(len(NAMED), FEATURES), logits], 1)
    return rows


def test_a_picture_is_where_the_name_of_its_class_is_though_nothing_was_learned() -> None:
    shown, said, names_CE = heads(1e4)
    found = shown(pictures_of(shown)) @ said(names_CE).T
    assert found.argmax(1).tolist() == list(range(len(NAMED)))
    assert float(found.diagonal().min()) > 0.6, "the names' mean is taken off, and there are five"


def test_between_two_names_is_who_is_taken_for_both() -> None:
    shown, _, _ = heads(1e4)
    both = pictures_of(shown, sure=0.0)[:1]
    both[:, FEATURES + NAMED[:2]] += 50.0
    expected = normalized(shown.names[:2].mean(0, keepdim=True))
    torch.testing.assert_close(shown(both), expected, atol=1e-3, rtol=0)


def test_a_class_that_may_not_be_named_changes_nothing() -> None:
    shown, _, _ = heads(1.0)
    rows = pictures_of(shown)
    others = rows.clone()
    left_out = [k for k in range(CLASSES) if k not in NAMED.tolist()]
    others[:, [FEATURES + k for k in left_out]] = 1e3
    assert torch.equal(shown(rows), shown(others))


def test_what_the_classifier_says_of_every_picture_counts_for_none() -> None:
    shown, _, _ = heads(1.0)
    sample = torch.randn(40, FEATURES + CLASSES)
    shown.standardise(sample)
    before = shown(sample)
    loud = sample + F.one_hot(torch.tensor(FEATURES + 3), FEATURES + CLASSES) * 20
    shown.standardise(loud)
    torch.testing.assert_close(shown(loud), before, atol=1e-4, rtol=0)


def test_weight_says_how_much_it_counts_and_rows_have_length_one() -> None:
    for weight in (0.0, 0.3, 5.0):
        shown, said, names_CE = heads(weight)
        rows = pictures_of(shown)
        found = shown(rows)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(rows)))
        told = normalized(shown.names)
        learned = shown.learned(rows[:, :FEATURES])
        torch.testing.assert_close(found, normalized(learned + weight * told), atol=1e-4, rtol=0)
        torch.testing.assert_close(said(names_CE).norm(dim=1), torch.ones(len(rows)))


def test_more_dimensions_than_a_text_has_features_stay_empty_and_finite() -> None:
    shown, said, names_CE = heads(1e4, dimensions=2 * TEXT)
    assert torch.equal(said.axes[:, TEXT:], torch.zeros(TEXT, TEXT))
    found = shown(pictures_of(shown)) @ said(names_CE).T
    assert torch.isfinite(found).all()
    assert found.argmax(1).tolist() == list(range(len(NAMED)))


def test_what_was_found_in_the_data_is_kept_with_the_weights_and_nothing_of_it_trains() -> None:
    shown, said, _ = heads(1.0)
    assert set(shown.state_dict()) >= {"named", "centre", "names"}
    assert set(said.state_dict()) >= {"mean", "axes"}
    trained = {name.partition(".")[0] for head in (shown, said) for name, _ in head.named_parameters()}
    assert trained == {"learned"}
    assert learned_head(shown) is shown.learned
    assert learned_head(shown.learned) is shown.learned
