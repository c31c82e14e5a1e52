"""If these fail, further pairs of heads learn from another text tower than the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.beginning import Beginning, decisive, phase_checkpoints  # noqa: E402
from edgeglm.adapt.conse import NamedClasses  # noqa: E402
from edgeglm.adapt.further_heads import further_alignments, joined_heads, member_seed  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.core.stage import Context  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.core.teacher_config import ConseConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.models.conse import ConseTextHead  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from tests.adapt.teachers import CONFIG, loaded  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402
from tests.tiny_towers import write_bert  # noqa: E402

NAMES = ("river", "stone", "cloud", "window", "apple", "tree")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 8)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 4)


def test_where_classes_are_called_beside_a_tuned_tower_every_pair_reads_both_towers(tmp_path: Path) -> None:
    pairs = PairSet.open(write_synthetic_pairs(tmp_path / "pairs", size=16))
    config = msgspec.structs.replace(
        CONFIG, conse=ConseConfig(weight=3.0), heads=3, embedding_dim=32, lora_learning_rate=0.05
    )
    generator = torch.Generator().manual_seed(0)
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    used: list[Path] = []
    (tmp_path / "text").mkdir()
    beginning = Beginning(
        features_VNF=torch.randn(2, len(pairs), 12 + len(NAMES), generator=generator),
        text=loaded(write_bert(tmp_path / "bert"), tmp_path / "text"),
        concepts=Concepts.of(pairs),
        domains=None,
        kinds=(),
        tasks=(),
        widths=(),
        auxiliary=None,
        named=NamedClasses(classes=len(NAMES), place=tuple(range(len(NAMES))), names=NAMES),
        progress=QuietProgress(),
    )
    with seeded(0, threads=1):
        first = beginning.alignment(
            config, seed=0, checkpoints=phase_checkpoints({}, config, context, used), first_state=False
        )
        first.run()
        others = list(further_alignments(beginning, config, {}, context, used, seed=0))
    assert [list(other.curves) for other in others] == [["warm-up"], ["warm-up"]]
    heads = [one.text_head for one in (first, *others)]
    called = [head for head in heads if isinstance(head, ConseTextHead)]
    assert len(called) == 3
    assert not torch.equal(called[1].learned.direct.weight, called[2].learned.direct.weight)
    for other in called[1:]:  # what is not learned is the same in all of them
        torch.testing.assert_close(other.axes, called[0].axes)
    image, said = joined_heads([(one.image_head, one.text_head) for one in (first, *others)], first)
    pictures = torch.cat([torch.zeros(len(NAMES), 12), 50 * torch.eye(len(NAMES))], 1)
    with torch.no_grad():
        text_CD = said(first.text.all_features(NAMES))
        assert text_CD.shape == (len(NAMES), 32), "three pairs are joined as wide as one"
        assert (image(pictures) @ text_CD.T).argmax(1).tolist() == list(range(len(NAMES)))


def test_another_teachers_seed_is_no_seed_of_this_ones_pairs() -> None:
    seeds = [member_seed(seed, member) for seed in range(4) for member in range(1, 9)]
    assert len(set(seeds)) == len(seeds)
    assert [member_seed(seed, 1) for seed in range(4)] == [0, 1, 2, 3]
    assert all(0 <= seed < 1 << 32 for seed in seeds)


def test_more_pairs_train_no_phase_of_the_first_anew() -> None:
    two, four = (TeacherConfig(heads=count) for count in (2, 4))
    for phase in ("auxiliary", "warm-up", "lora", "heads", "pseudo-labels 1"):
        assert decisive(two, phase) == decisive(four, phase)
