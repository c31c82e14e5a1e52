"""If these fail, somebody's own CLIP, SigLIP or Chinese-CLIP does not become a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.bundle.verify import open_bundle  # noqa: E402
from edgeglm.runtime.retrieval import Retriever  # noqa: E402
from tests.build.conftest import Project  # noqa: E402
from tests.models.test_pretrained_hf import DUAL  # noqa: E402
from tests.tiny_towers import SPECIAL, WORDS, write_project, write_wordpiece  # noqa: E402

KINDS = ("clip", "siglip", "chinese-clip", "vit-bert")
#: As the README has it, and no tuning of a text tower whose linear layers have other names.
AS_DOCUMENTED = ("--set", "teacher.resolution=0", "--set", "teacher.lora_epochs=0")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of its own, beside whose towers lie the dual encoders, each with a tokenizer that fits."""
    root = tmp_path_factory.mktemp("own-teachers")
    write_project(root)
    for kind in KINDS:
        folder = DUAL[kind](root / kind)
        # Their vocabularies of 60 are larger than the tokenizer's, as in real checkpoints with spare rows.
        write_wordpiece(folder / "tokenizer.json")
        assert len(SPECIAL) + len(WORDS) < 60
        config = json.loads((folder / "config.json").read_text())
        # CLIP reads a text at its end token, which must be one that the tokenizer writes.
        config["text_config"] |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        (folder / "config.json").write_text(json.dumps(config))
    return Project(root, tmp_path_factory.mktemp("own-teachers-store"))


def towers(spec: str) -> tuple[str, ...]:
    """Return the README's options that take both towers from one place."""
    return ("--set", f'teacher.image=["{spec}"]', "--set", f'teacher.text="{spec}"', *AS_DOCUMENTED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dual_encoder_in_a_folder_becomes_a_teacher(kind: str, own: Project, tmp_path: Path) -> None:
    arguments = ["adapt", "--recipe", str(own.root / "recipe.toml"), "--threads", "1", "--json"]
    said = own.edgeglm(*arguments, *towers(str(own.root / kind)), "--output", tmp_path / "teacher")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "teacher" / "metrics.json").read_text())["held-out"]
    assert 0.0 < found["map10"]["value"] <= 1.0
    backbones = json.loads((tmp_path / "teacher" / "backbones.json").read_text())
    assert [backbone["resolution"] for backbone in backbones] == [32], "its own, as teacher.resolution=0 asks"
    rows = np.load(tmp_path / "teacher" / "image_embeddings.npy")[0]
    assert rows.std(axis=0).max() > 1e-3, "it tells pictures apart"


def test_a_checkpoint_of_the_hub_goes_all_the_way_to_a_bundle(
    own: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, Any]] = []

    def snapshot_download(name: str, *, revision: str | None, local_dir: Path, **_: Any) -> str:
        """Stand for the network alone: write what the hub would."""
        asked.append((name, revision))
        shutil.copytree(own.root / "clip", local_dir, dirs_exist_ok=True)
        (Path(local_dir) / ".cache").mkdir()
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    options = towers("hf:somebody/clip@v1")
    said = own.build("cpu", *options, output=tmp_path / "bundle")
    assert said.code == 0, said.err
    assert set(asked) == {("somebody/clip", "v1")}
    with open_bundle(tmp_path / "bundle") as bundle:
        assert {"somebody/clip"} <= {record.name for record in bundle.manifest.licences}
        with Retriever(bundle, threads=1) as retriever:
            assert len(retriever.search_text("a red circle", 3).hits) == 3
    asked.clear()
    again = own.build("cpu", *options, output=tmp_path / "bundle")
    assert again.ran == []
    assert asked == [], "what was fetched once is in the store"
