"""If these fail, an image student learns from images that it may not see, or not from its teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import StudentConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.distill import image_student as room  # noqa: E402
from edgeglm.distill.image_student import (  # noqa: E402
    fit_image_student,
    front_activations,
    image_student,
    image_targets,
)
from edgeglm.models.students import StudentImageTower  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402

CONFIG = StudentConfig(
    size="edge-xs", inherit="", resolution=32, image_epochs=1, image_batch_size=32, image_learning_rate=3e-3
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    return PairSet.open(write_synthetic_pairs(tmp_path_factory.mktemp("pairs"), size=32))


def teacher_of(pairs: PairSet) -> Any:
    """What a teacher might say, twice: the mean colour of a picture, of length one: [2, N, 8]."""
    colour = torch.from_numpy(np.array(pairs.images)).float().mean((1, 2)) / 255
    lift = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize((colour - colour.mean(0)) @ lift, dim=1)
    return torch.stack([rows, rows])


def fitted(pairs: PairSet, teacher_VND: Any, config: StudentConfig = CONFIG):
    anchors = torch.eye(8)[:6]
    concept_N = torch.full((len(pairs),), -1)
    with seeded(0, threads=1):
        tower = image_student(config, embedding_dim=8, inherit=None)
        curve = fit_image_student(
            tower,
            pairs,
            teacher_VND,
            anchors,
            concept_N,
            config,
            seed=0,
            view_seed=0,
            progress=QuietProgress(),
        )
    return tower, curve


def test_held_images_leave_no_trace_and_equal_seeds_give_equal_bits(
    pairs: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 3)
    teacher = teacher_of(pairs)
    other = teacher.clone()
    held = pairs.by_role("held")
    assert len(held) > 0
    other[:, held] = -teacher[:, held]
    images = np.array(pairs.images)
    images[held] = 0
    blind = with_pictures(pairs, images)
    states = [fitted(*given)[0].state_dict() for given in ((pairs, teacher), (blind, other))]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def with_pictures(pairs: PairSet, images: np.ndarray) -> PairSet:
    """The same set with other pictures."""
    return PairSet(
        path=pairs.path,
        images=images,
        rows=pairs.rows,
        tracks=pairs.tracks,
        licences=pairs.licences,
        summary=pairs.summary,
    )


def test_the_student_comes_near_its_teacher(pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 60)
    tower, curve = fitted(pairs, teacher_of(pairs))
    assert curve[-1] < 0.5 * curve[0]
    assert not tower.training


def test_a_cached_front_is_what_the_tower_would_make(pairs: PairSet) -> None:
    torch.manual_seed(0)
    config = msgspec.structs.replace(CONFIG, inherit="efficientnet-lite0")
    tower = image_student(config, embedding_dim=8, inherit=None).eval()
    used = torch.tensor([1, 4, 7])
    pixels = front_activations(tower, pairs, used, 2, None, resolution=32, seed=5)
    cached = front_activations(tower, pairs, used, 2, 3, resolution=32, seed=5)
    assert pixels.shape == (2, 3, 3, 32, 32)
    with torch.no_grad():
        for view in range(2):
            assert isinstance(tower, StudentImageTower)
            expected = tower.trunk.front(pixels[view].float(), 3)
            torch.testing.assert_close(cached[view].float(), expected, atol=2e-2, rtol=2e-2)
    assert not torch.equal(pixels[0], pixels[1]), "view 0 is the plain picture"


def test_frozen_blocks_stay_as_they_were(pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 2)
    config = msgspec.structs.replace(CONFIG, inherit="efficientnet-lite0", frozen_blocks=3)
    torch.manual_seed(0)
    with seeded(0, threads=1):
        before = image_student(config, embedding_dim=8, inherit=None).state_dict()
    tower, _ = fitted(pairs, teacher_of(pairs), config)
    changed = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("trunk.stem.", "trunk.blocks.0.", "trunk.blocks.1.", "trunk.blocks.2.")
    assert not [name for name in changed if name.startswith(frozen)]
    assert any(name.startswith("trunk.blocks.3.") for name in changed)


def test_the_mean_of_the_teachers_views_is_asked_for_in_any_number_of_views() -> None:
    said_VND = torch.nn.functional.normalize(torch.randn(3, 5, 8), dim=-1)
    targets = image_targets(said_VND, msgspec.structs.replace(CONFIG, views=6))
    assert targets.shape == (7, 5, 8)
    torch.testing.assert_close(targets.norm(dim=-1), torch.ones(7, 5))
    torch.testing.assert_close(targets[4], torch.nn.functional.normalize(said_VND.sum(0), dim=-1))
    same = image_targets(said_VND, msgspec.structs.replace(CONFIG, views=2, image_target="each"))
    assert torch.equal(same, said_VND)


def test_a_copy_that_the_teacher_never_saw_has_no_target_of_its_own() -> None:
    with pytest.raises(UserError, match=r"at most 2, or teacher\.views higher"):
        image_targets(torch.zeros(3, 5, 8), msgspec.structs.replace(CONFIG, views=3, image_target="each"))
