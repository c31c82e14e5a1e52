"""If these fail, a teacher is aligned with the wrong captions, or is not what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt import text_teacher  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.text_teacher import TextTeacher, enable_lora, merge_lora  # noqa: E402
from edgeglm.core.errors import EdgeglmError, UserError  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.models.projection import ProjectionHead, ScaledHeads  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from tests.adapt.teachers import CONFIG, loaded, teacher_of  # noqa: E402


@pytest.fixture
def teacher(bert: Path, tmp_path: Path) -> TextTeacher:
    return loaded(bert, tmp_path)


def test_concepts_hold_what_may_train_and_nothing_else(pairs: PairSet) -> None:
    concepts = Concepts.of(pairs)
    assert set(concepts.image_N.tolist()) == set(pairs.by_role("labelled").tolist())
    assert concepts.texts == pairs.training_texts()
    held = {text for row in pairs.rows if row.role == "held" for text in row.captions}
    trained = {text for row in pairs.rows if row.role == "labelled" for text in row.captions}
    assert not (held - trained) & set(concepts.texts)
    for image, concept in zip(concepts.image_N.tolist(), concepts.concept_N.tolist(), strict=True):
        said = {concepts.texts[i] for i in concepts.captions[concept]}
        assert said == set(pairs.rows[image].captions)
    assert len(concepts) == len(set(concepts.concept_N.tolist()))
    names = [concepts.texts[i] for i in concepts.names().tolist()]
    assert names == [pairs.rows[i].text for i in sorted_by_concept(pairs)]


def sorted_by_concept(pairs: PairSet) -> list[int]:
    first: dict[str, int] = {}
    for i in pairs.by_role("labelled").tolist():
        first.setdefault(pairs.rows[i].concept, i)
    return [first[name] for name in sorted(first)]


def test_one_concept_is_too_few(pairs: PairSet, tmp_path: Path) -> None:
    row = pairs.rows[int(pairs.by_role("labelled")[0])]
    single = PairSet(path=tmp_path, images=pairs.images[:1], rows=(row,), tracks=(), licences=(), summary={})
    with pytest.raises(UserError, match="give at least two different captions"):
        Concepts.of(single)


def test_features_of_a_text_do_not_hang_on_its_company(teacher: TextTeacher) -> None:
    texts = ["a red circle", "red", "apple river stone cloud window", "blue ring"]
    together = teacher.all_features(texts)
    with torch.no_grad():
        for text, row in zip(texts, together, strict=True):
            torch.testing.assert_close(teacher.features([text])[0], row, atol=1e-5, rtol=0)


def test_lora_trains_little_and_names_the_layers_that_there_are(teacher: TextTeacher) -> None:
    with pytest.raises(UserError, match=r"names q_proj, .*choose from .*query, value"):
        enable_lora(teacher, msgspec.structs.replace(CONFIG, lora_targets=("q_proj", "value")))
    parameters = enable_lora(teacher, CONFIG)
    trained = sum(parameter.numel() for parameter in parameters)
    assert trained == 2 * 2 * 2 * 8 * 32, "layers, targets, factors, rank, width"
    assert all(parameter.requires_grad for parameter in parameters)


def test_the_merged_tower_is_the_adapted_one(teacher: TextTeacher) -> None:
    texts = ["a red circle", "blue", "river stone"]
    plain = teacher.all_features(texts)
    for parameter in enable_lora(teacher, CONFIG):
        torch.nn.init.normal_(parameter, std=0.05)
    adapted = teacher.all_features(texts)
    assert float((adapted - plain).abs().max()) > 1e-3
    assert merge_lora(teacher, texts) < 1e-5
    torch.testing.assert_close(teacher.all_features(texts), adapted, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in teacher.tower.named_modules())
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())


def test_a_merge_that_changes_what_was_trained_is_refused(
    teacher: TextTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parameter in enable_lora(teacher, CONFIG):
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(text_teacher, "_MERGE_ATOL", -1.0)
    with pytest.raises(EdgeglmError, match="merging LoRA changes features"):
        merge_lora(teacher, ["a red circle"])


def aligned(
    bert: Path, scratch: Path, pairs: PairSet, config: TeacherConfig, *, widths: tuple[int, ...] = ()
) -> Alignment:
    scratch.mkdir()
    colours = np.array(pairs.images, np.float32).reshape(len(pairs), -1) / 255
    features = torch.from_numpy(np.stack([colours, colours + 0.01]))
    return teacher_of(features, Concepts.of(pairs), loaded(bert, scratch), config, widths=widths)


def test_an_ensemble_of_backbones_learns_a_scale_for_each_and_is_exported_with_it(
    bert: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeglm.adapt.teacher_export import exported_teacher

    monkeypatch.setattr(room, "MIN_STEPS", 8)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 2)
    config = msgspec.structs.replace(CONFIG, ensemble="scaled")
    whole = int(np.prod(pairs.images.shape[1:]))
    made = aligned(bert, tmp_path / "two", pairs, config, widths=(256, whole - 256))
    assert isinstance(made.image_head, ScaledHeads)
    scales = made.image_head.scales.detach()
    assert float(scales.sum()) == pytest.approx(1.0)
    assert not torch.equal(scales, torch.tensor([0.5, 0.5])), "the scales were to learn"
    assert exported_teacher(made, made.image_head, made.text_head, tmp_path)["image"] < 1e-4
    alone = aligned(bert, tmp_path / "one", pairs, config, widths=(whole,))
    assert isinstance(alone.image_head, ProjectionHead), "one backbone needs no scale"


def test_the_same_seed_gives_the_same_teacher_with_lora_and_merge(
    bert: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 8)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 2)
    one, other = (aligned(bert, tmp_path / name, pairs, CONFIG) for name in ("one", "other"))
    assert np.array_equal(one.image_embeddings(), other.image_embeddings())
    assert torch.equal(one.text.all_features(["a red ring"]), other.text.all_features(["a red ring"]))
    assert set(one.curves) == {"warm-up", "lora", "heads"}
    assert one.image_embeddings().shape == (2, len(pairs), 16)
    np.testing.assert_allclose(np.linalg.norm(one.image_embeddings(), axis=2), 1.0, atol=1e-5)


def test_without_lora_the_text_tower_stays_as_it_was(
    bert: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 40)
    config = msgspec.structs.replace(CONFIG, lora_epochs=0)
    alignment = aligned(bert, tmp_path / "one", pairs, config)
    (tmp_path / "plain").mkdir()
    plain = loaded(bert, tmp_path / "plain")
    assert torch.equal(alignment.text.all_features(["red"]), plain.all_features(["red"]))
    assert set(alignment.curves) == {"warm-up"}
    curve = alignment.curves["warm-up"]
    assert curve[-1] < 0.8 * curve[0]
    assert alignment.trainable == 0
