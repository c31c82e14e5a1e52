"""If these fail, a student that should inherit its teacher's layers starts from something else."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("transformers", reason="the host half is not installed")

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.models.heirs import inherit_text  # noqa: E402
from edgeglm.models.student_shapes import StudentShape  # noqa: E402
from edgeglm.models.students import StudentTextTower  # noqa: E402

WIDTH = 32


def bert(layers: int) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=16,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def heir(
    layers: int, *, factor: int = WIDTH, width: int = WIDTH, vocabulary: int = 40, feedforward: int = 0
) -> StudentTextTower:
    shape = StudentShape(
        blocks=1,
        channels=1,
        factor=factor,
        width=width,
        layers=layers,
        heads=2,
        heir=True,
        feedforward=feedforward,
    )
    return StudentTextTower(shape, vocabulary=vocabulary, max_length=12, embedding_dim=WIDTH).eval()


def test_an_heir_of_all_layers_says_what_its_teacher_says() -> None:
    teacher, tower = bert(2).requires_grad_(False), heir(2).requires_grad_(False)
    assert inherit_text(tower, teacher) == [0, 1]
    torch.nn.init.eye_(tower.project.weight)
    torch.nn.init.zeros_(tower.project.bias)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    hidden = teacher(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(
        tower(ids, mask), torch.nn.functional.normalize(mean, dim=1), atol=2e-4, rtol=1e-3
    )


def test_a_trimmed_heir_takes_the_rows_of_its_own_entries() -> None:
    teacher, tower = bert(1).requires_grad_(False), heir(1, vocabulary=3).requires_grad_(False)
    kept = torch.tensor([2, 7, 30])
    inherit_text(tower, teacher, kept)
    rows = tower.widen(tower.tokens.weight)
    torch.testing.assert_close(rows, teacher.embeddings.word_embeddings.weight[kept], atol=1e-4, rtol=1e-3)


def test_layers_are_taken_evenly_from_the_first_on() -> None:
    assert inherit_text(heir(2), bert(6)) == [0, 3]
    assert inherit_text(heir(1), bert(6)) == [0]


def test_a_narrower_heir_takes_the_units_that_weigh_most_in_their_order() -> None:
    teacher = bert(1).requires_grad_(False)
    rise, fall = (teacher.encoder.layer[0].intermediate.dense, teacher.encoder.layer[0].output.dense)
    silent = [unit for unit in range(4 * WIDTH) if unit not in (3, 40, 99)]
    fall.weight[:, silent] = 0.0
    tower = heir(1, feedforward=3).requires_grad_(False)
    inherit_text(tower, teacher)
    layer: Any = tower.layers[0]
    torch.testing.assert_close(layer.rise.weight, rise.weight[[3, 40, 99]])
    torch.testing.assert_close(layer.fall.weight, fall.weight[:, [3, 40, 99]])
    inner = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(  # what was left out said nothing
        layer.fall(torch.nn.functional.gelu(layer.rise(inner))),
        fall(torch.nn.functional.gelu(rise(inner))),
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_heir_wider_inside_than_its_teacher_is_refused() -> None:
    with pytest.raises(UserError, match=r"128 units and the student's 129.*'edge-s'"):
        inherit_text(heir(1, feedforward=129), bert(1))


def test_a_teacher_of_another_width_or_kind_is_refused_with_a_size_that_works() -> None:
    with pytest.raises(UserError, match=r"32 wide and the student's 64.*'edge-s'"):
        inherit_text(heir(1, width=64), bert(1))
    with pytest.raises(UserError, match="no layers of BERT"):
        inherit_text(heir(1), torch.nn.Linear(2, 2))
