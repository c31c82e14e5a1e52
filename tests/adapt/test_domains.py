"""If these fail, unlabelled images do not help a teacher, or their names leak into it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.domains import (  # noqa: E402
    Domains,
    Statistics,
    concept_prototypes,
    mutual_neighbours,
    refuse_leakage,
)
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.recipe import DomainConfig, recipe_from_toml  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.domain_losses import covariance_distance, kernel_mean_distance  # noqa: E402
from tests.adapt.styles import CONFIG, Words, found_names, styled  # noqa: E402
from tests.adapt.teachers import teacher_of  # noqa: E402


def aligned(pairs: PairSet, features: Any, domain: DomainConfig | None) -> Alignment:
    config = CONFIG if domain is None else msgspec.structs.replace(CONFIG, domain=domain)
    concepts = Concepts.of(pairs)
    domains = None if domain is None else Domains.of(pairs, concepts)
    return teacher_of(features, concepts, Words(), config, domains=domains)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 80)
    monkeypatch.setattr(room, "MIN_PSEUDO_STEPS", 60)


@pytest.mark.parametrize(
    "domain",
    [
        DomainConfig(pseudo_label_rounds=2),
        DomainConfig(mmd_weight=4.0),
        DomainConfig(curriculum=1.0),
    ],
    ids=["pseudo-labels", "mmd", "curriculum"],
)
def test_each_way_brings_an_unlabelled_style_nearer(domain: DomainConfig, tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    plain = found_names(aligned(pairs, features, None), pairs)
    assert found_names(aligned(pairs, features, domain), pairs) > plain


@pytest.mark.parametrize(
    "domain",
    [DomainConfig(mmd_weight=4.0), DomainConfig(coral_weight=4.0), DomainConfig(dann_weight=4.0)],
    ids=["mmd", "coral", "dann"],
)
def test_each_term_makes_the_styles_harder_to_tell_apart(domain: DomainConfig, tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)

    def gap(made: Alignment) -> float:
        rows = torch.from_numpy(made.image_embeddings()[0])
        source, target = rows[made.concepts.image_N], rows[pairs.by_role("unlabelled")]
        distance = covariance_distance if domain.coral_weight else kernel_mean_distance
        return float(distance(source, target))

    assert gap(aligned(pairs, features, domain)) < 0.9 * gap(aligned(pairs, features, None))


def test_consistency_makes_views_of_an_unlabelled_image_agree(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    chosen = pairs.by_role("unlabelled")

    def agreement(made: Alignment) -> float:
        one, other = made.image_embeddings()[:, chosen]
        return float((one * other).sum(1).mean())

    plain = agreement(aligned(pairs, features, None))
    assert agreement(aligned(pairs, features, DomainConfig(consistency_weight=5.0))) > plain


def test_a_recipe_without_these_options_trains_the_very_same_teacher(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    one, other = aligned(pairs, features, None), aligned(pairs, features, DomainConfig())
    assert np.array_equal(one.image_embeddings(), other.image_embeddings())
    assert not DomainConfig().uses_unlabelled()
    assert not recipe_from_toml("", origin="here").teacher.domain.uses_unlabelled()


def test_the_names_of_unlabelled_images_change_nothing(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    rows = tuple(
        msgspec.structs.replace(row, text="x", captions=("x",), concept="x")
        if row.domain == "target"
        else row
        for row in pairs.rows
    )
    blind = dataclasses.replace(pairs, rows=rows)
    domain = DomainConfig(pseudo_label_rounds=1, mmd_weight=1.0, curriculum=0.5)
    seen, unseen = (aligned(one, features, domain) for one in (pairs, blind))
    assert np.array_equal(seen.image_embeddings(), unseen.image_embeddings())
    assert seen.pseudo_labels == unseen.pseudo_labels != [0]


def test_too_few_unlabelled_images_are_refused(tmp_path: Path) -> None:
    pairs, _ = styled(tmp_path)
    rows = tuple(
        msgspec.structs.replace(row, role="held") if row.role == "unlabelled" else row for row in pairs.rows
    )
    blind = dataclasses.replace(pairs, rows=rows)
    with pytest.raises(UserError, match=r"the pairs hold 0; give at least 8 .*or leave teacher\.domain out"):
        Domains.of(blind, Concepts.of(blind))


def test_a_copy_of_an_evaluation_image_among_those_that_train_is_refused(tmp_path: Path) -> None:
    pairs, _ = styled(tmp_path)
    images = np.array(pairs.images)
    rows = list(pairs.rows)
    rows[-1] = msgspec.structs.replace(rows[-1], role="held")
    images[-2] = images[-1]
    leaking = dataclasses.replace(pairs, images=images, rows=tuple(rows))
    with pytest.raises(UserError, match=r"1 of the images .*\(target/22\).*take the copies out of the data"):
        refuse_leakage(leaking, leaking.by_role("labelled", "unlabelled").tolist())


def test_only_those_who_choose_each_other_are_paired() -> None:
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 0.2, 0.9]])
    images, concepts = mutual_neighbours(image, text)
    assert images.tolist() == [0, 2]
    assert concepts.tolist() == [0, 2]
    prototype = torch.eye(3)[[1, 0, 2]]  # pictures speak against texts, and louder
    against = mutual_neighbours(torch.eye(3), 0.1 * text, prototype)
    assert against[1].tolist() == [1, 0, 2]


def test_prototypes_are_means_of_length_one() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = concept_prototypes(rows, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_a_style_of_a_single_picture_has_statistics_too(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    concepts = Concepts.of(pairs)
    domains = Domains.of(pairs, concepts)
    alone = dataclasses.replace(domains, domain_L=torch.tensor([0, *[1] * (len(domains.domain_L) - 1)]))
    statistics = Statistics(features, concepts, alone)
    first = features[0][concepts.image_N[:1]].float()
    moved = statistics.moved(first, alone.domain_L[:1], torch.ones(1))
    torch.testing.assert_close(moved[0], statistics.target_mean_F, atol=1e-2, rtol=0)


def test_the_curriculum_moves_a_style_to_the_statistics_of_the_target(tmp_path: Path) -> None:
    pairs, features = styled(tmp_path)
    concepts = Concepts.of(pairs)
    domains = Domains.of(pairs, concepts)
    statistics = Statistics(features, concepts, domains)
    source = features[0][concepts.image_N].float()
    moved = statistics.moved(source, domains.domain_L, torch.ones(len(source)))
    for domain in (0, 1):
        own = moved[domains.domain_L == domain]
        torch.testing.assert_close(own.mean(0), statistics.target_mean_F, atol=1e-2, rtol=0)
        torch.testing.assert_close(own.std(0), statistics.target_std_F, atol=2e-2, rtol=0)
    assert torch.equal(statistics.moved(source, domains.domain_L, torch.zeros(len(source))), source)
