"""If these fail, pictures of other domains get other names than their own, or teach nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402
from torch import Tensor  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.auxiliary import Auxiliary, auxiliary_beside  # noqa: E402
from edgeglm.adapt.domains import Domains, cached  # noqa: E402
from edgeglm.core.recipe import AuxiliaryConfig, DomainConfig, TeacherConfig  # noqa: E402
from edgeglm.data.pairs import Pair, PairSet  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from tests.adapt.teachers import CONFIG, loaded, teacher_of  # noqa: E402

WIDTH = 24


def others_of(texts: list[str], path: Path) -> PairSet:
    rows = tuple(
        Pair(id=f"x/{i}", text=text, captions=(text,), concept=text, domain="x", role="labelled")
        for i, text in enumerate(texts)
    )
    images = np.zeros((len(rows), 16, 16, 3), np.uint8)
    return PairSet(path=path, images=images, rows=rows, tracks=(), licences=(), summary={})


def features_of(pairs: PairSet) -> Tensor:
    colours_NP = torch.from_numpy(np.array(pairs.images, np.float32).reshape(len(pairs), -1) / 255)
    random_PF = torch.randn(colours_NP.shape[1], WIDTH, generator=torch.Generator().manual_seed(0))
    plain_NF = (colours_NP - colours_NP.mean(0)) @ random_PF
    views: Tensor = torch.stack([plain_NF, plain_NF + 0.01])
    return views


def test_ones_own_concepts_and_texts_keep_their_numbers(pairs: PairSet, tmp_path: Path) -> None:
    concepts = Concepts.of(pairs)
    caption = concepts.texts[concepts.captions[2][0]]
    others = others_of(["river stone", caption, "cloud", "river stone"], tmp_path)
    made = auxiliary_beside(concepts, len(pairs), others, torch.zeros(2, 4, WIDTH), share=0.25).concepts
    count = len(concepts.image_N)
    assert torch.equal(made.image_N[:count], concepts.image_N)
    assert made.texts[: len(concepts.texts)] == concepts.texts
    assert made.captions[: len(concepts)] == concepts.captions
    assert made.image_N[count:].tolist() == list(range(len(pairs), len(pairs) + 4))
    new = len(concepts)
    assert made.concept_N[count:].tolist() == [new, 2, new + 1, new], "a known name is the known concept"
    assert [made.texts[own[0]] for own in made.captions[new:]] == ["river stone", "cloud"]


def test_features_of_both_kinds_are_read_in_the_order_that_was_asked(pairs: PairSet, tmp_path: Path) -> None:
    concepts, own = Concepts.of(pairs), features_of(pairs)
    others = others_of(["river", "cloud", "stone"], tmp_path)
    more = torch.arange(2 * 3 * WIDTH, dtype=torch.float16).reshape(2, 3, WIDTH)
    auxiliary = auxiliary_beside(concepts, len(pairs), others, more, share=0.0)
    view_B, image_B = torch.tensor([0, 1, 1, 0]), torch.tensor([len(pairs) + 2, 3, len(pairs), 5])
    found = auxiliary.read(cached(own), view_B, image_B)
    assert found.dtype == torch.float32
    expected = torch.stack([more[0, 2].float(), own[1, 3], more[1, 0].float(), own[0, 5]])
    assert torch.equal(found, expected)
    assert torch.equal(auxiliary.read(cached(own), view_B[1:2], image_B[1:2]), own[1, 3][None])
    assert torch.equal(auxiliary.read(cached(own), view_B[:1], image_B[:1]), more[0, 2][None].float())


def taught(
    bert: Path, scratch: Path, pairs: PairSet, config: TeacherConfig, *, auxiliary: bool, domain: bool = False
) -> tuple[Alignment, Tensor]:
    """Align a teacher, beside other pictures or not; return which of those it finds too."""
    scratch.mkdir()
    texts = ["river", "stone", "cloud", "window", "apple"]
    generator = torch.Generator().manual_seed(1)
    plain = features_of(pairs)[0].std() * torch.randn(len(texts), WIDTH, generator=generator)
    more = torch.stack([plain, plain + 0.01])
    concepts = Concepts.of(pairs)
    beside: Auxiliary | None = None
    if auxiliary:
        others = others_of(texts, scratch)
        beside = auxiliary_beside(concepts, len(pairs), others, more, share=config.auxiliary.replay)
    alignment = teacher_of(
        features_of(pairs),
        concepts,
        loaded(bert, scratch),
        config,
        domains=Domains.of(pairs, concepts) if domain else None,
        auxiliary=beside,
    )
    with torch.no_grad():
        image_ND = alignment.image_head(plain)
        text_ND = alignment.text_head(alignment.text.all_features(texts))
    return alignment, (image_ND @ text_ND.T).argmax(1) == torch.arange(len(texts))


def test_what_auxiliary_pictures_teach_is_learned_and_replay_keeps_it(
    bert: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 60)
    base = msgspec.structs.replace(CONFIG, lora_epochs=0, epochs=6, hidden=64, learning_rate=5e-3)
    base = msgspec.structs.replace(base, input_dropout=0.0, dropout=0.0)
    right = {}
    for name, replay in (("without", None), ("forgotten", 0.0), ("replayed", 0.5)):
        table = AuxiliaryConfig(icons=("x",), epochs=60, replay=replay or 0.0)
        config = msgspec.structs.replace(base, auxiliary=table)
        alignment, found = taught(bert, tmp_path / name, pairs, config, auxiliary=replay is not None)
        right[name] = float(found.float().mean())
        assert set(alignment.curves) == {"warm-up"} | ({"auxiliary"} if replay is not None else set())
    assert right["replayed"] > 0.8
    assert right["replayed"] >= right["forgotten"] > right["without"] + 0.2


def test_every_phase_goes_on_with_them_and_pseudo_labels_stay_ones_own(
    bert: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, least in (("MIN_STEPS", 12), ("MIN_LORA_STEPS", 2), ("MIN_PSEUDO_STEPS", 4)):
        monkeypatch.setattr(room, name, least)
    domain = DomainConfig(mmd_weight=1.0, curriculum=0.5, pseudo_label_rounds=1, pseudo_label_epochs=1)
    config = msgspec.structs.replace(
        CONFIG, domain=domain, auxiliary=AuxiliaryConfig(icons=("x",), epochs=2, replay=0.25)
    )
    alignment, _ = taught(bert, tmp_path / "one", pairs, config, auxiliary=True, domain=True)
    assert set(alignment.curves) == {"auxiliary", "warm-up", "lora", "heads", "pseudo-labels 1"}
    assert alignment.image_embeddings().shape[1] == len(pairs)
    own = Concepts.of(pairs)
    assert alignment.domains is not None
    _, concept_P = alignment._matched(own, alignment.domains)
    assert len(concept_P)
    assert int(concept_P.max()) < len(own)
    again, _ = taught(bert, tmp_path / "two", pairs, config, auxiliary=True, domain=True)
    assert np.array_equal(alignment.image_embeddings(), again.image_embeddings()), "the same seed"
