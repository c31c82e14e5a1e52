"""If these fail, an option of the recipe is read and then forgotten between the recipe and the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.stages import TeacherStage  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import recipe_from_toml  # noqa: E402
from edgeglm.core.stage import Context  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402
from tests.tiny_towers import write_bert  # noqa: E402

RECIPE = """
[teacher]
image = ["x"]
text = "{bert}"
embedding_dim = 16
hidden = 32
warmup_epochs = 1
epochs = 1
batch_size = 16
lora_epochs = 1
lora_batch_size = 16
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 12)
    monkeypatch.setattr(room, "MIN_PSEUDO_STEPS", 8)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 3)


def made(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], Any]:
    """Run the stage on drawn pairs, whose pixels are their features; return its record and embeddings."""
    bert = tmp_path / "bert"
    bert.mkdir()
    write_bert(bert)
    folder = write_synthetic_pairs(tmp_path / "pairs", size=8)
    pairs = PairSet.open(folder)
    plain = np.array(pairs.images, np.float16).reshape(len(pairs), -1) / 255
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "features.npy", np.stack([plain, plain * np.float16(0.98)]))
    config = recipe_from_toml(RECIPE.format(bert=bert), origin="here", overrides=overrides).teacher
    inputs = {
        "pairs": Artifact(kind="pairs", path=folder, files={"pairs.jsonl": "1"}),
        "features": Artifact(kind="features", path=tmp_path / "features", files={"features.npy": "2"}),
        "text": Artifact(kind="asset", path=bert, files={"config.json": "3", "tokenizer.json": "4"}),
    }
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    stage = TeacherStage(config, seed=0, max_length=12)
    artifact = stage(inputs, context).artifact
    return json.loads((artifact.path / "teacher.json").read_text()), np.load(
        artifact.path / "image_embeddings.npy"
    )


def test_every_kind_of_option_reaches_the_teacher(tmp_path: Path) -> None:
    record, embeddings = made(
        tmp_path,
        "teacher.domain.pseudo_label_rounds=2",
        "teacher.domain.pseudo_label_epochs=1",
        "teacher.domain.dann_weight=0.1",
        "teacher.domain.curriculum=0.5",
        "teacher.tuning=bottleneck",
        "teacher.tuned_blocks=1",
        "teacher.optimisation.schedule=exponential",
        "teacher.optimisation.adaptive_clip=0.1",
        "teacher.optimisation.accumulate=2",
    )
    assert set(record["curves"]) == {"warm-up", "lora", "heads", "pseudo-labels 1", "pseudo-labels 2"}
    assert len(record["pseudo_labels"]) == 2
    assert record["parameters"]["lora"] == 32 * 8 + 8 + 8 * 32 + 32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=2), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.tuned_blocks=7", "has 2 blocks; choose 1 to 2"),
        ('teacher.lora_targets=["none"]', r"has no such linear layer; choose from .*query"),
        ("teacher.domain.mmd=1", r"teacher\.domain\.mmd.*did you mean"),
        ("teacher.tuning=lroa", "teacher.tuning"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused_with_the_remedy(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, override)
