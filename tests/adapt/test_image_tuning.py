"""If these fail, an image tower is tuned on other pictures than it is used on, or more than was asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment as room  # noqa: E402
from edgeglm.adapt.backbones import GRID, LITE0_TAPS, Backbone, read_backbones  # noqa: E402
from edgeglm.adapt.features_stage import BackbonesConfig, BackbonesStage, FeaturesConfig, FeaturesStage  # noqa: E402
from edgeglm.adapt.image_tuning import TunedBlocks, front_maps  # noqa: E402
from edgeglm.build.adapting import adapt_teacher  # noqa: E402
from edgeglm.cli.main import exit_code  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import Recipe, recipe_from_file  # noqa: E402
from edgeglm.core.stage import Context  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.models.efficientnet_lite import SpatialLite0, lite0_trunk  # noqa: E402
from edgeglm.train import checkpoint  # noqa: E402
from tests.synthetic import COLOURS, drawn, write_synthetic_pairs  # noqa: E402
from tests.tiny_lite0 import put_lite0  # noqa: E402
from tests.tiny_towers import write_project  # noqa: E402


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with Lite0 for its image tower, and unlabelled pictures."""
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    (root / "data" / "unlabelled").mkdir()
    for i, colour in enumerate(COLOURS):
        for shape in ("circle", "ring"):
            picture = Image.fromarray(drawn(shape, colour, 32, target=True))
            picture.save(root / "data" / "unlabelled" / f"{shape}-{i}.png")
    return root


@pytest.fixture(autouse=True)
def lite0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Few steps, and the weights that stand for the published ones."""
    for name, value in (("MIN_STEPS", 12), ("MIN_LORA_STEPS", 4), ("MIN_IMAGE_STEPS", 4)):
        monkeypatch.setattr(room, name, value)
    return put_lite0(monkeypatch, tmp_path / "lite0")


def recipe(project: Path, *more: str) -> Recipe:
    few = ("teacher.image_epochs=1", "teacher.image_batch_size=16", 'teacher.image=["efficientnet-lite0"]')
    return recipe_from_file(project / "recipe.toml", overrides=[*few, *more])


def context(store: Path) -> Context:
    return Context(store=Store(store), progress=QuietProgress(), threads=1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairSet, Any]:
    """Pairs, and the features that the stages cache of two views."""
    folder = tmp_path_factory.mktemp("cached")
    inputs = {"pairs": artifact(write_synthetic_pairs(folder / "pairs", size=32))}
    with pytest.MonkeyPatch.context() as patch:
        put_lite0(patch, folder / "lite0")
        here, image = context(folder / "store"), {"image-0": artifact(folder / "lite0")}
        made = BackbonesStage(BackbonesConfig(image=("efficientnet-lite0",), resolution=32))(image, here)
        inputs["backbones"] = made.artifact
        found = FeaturesStage(FeaturesConfig(views=1, seed=3))(inputs, here).artifact
    return PairSet.open(inputs["pairs"]), torch.from_numpy(np.load(found.path / "features.npy"))


@pytest.mark.parametrize(("blocks", "column"), [(3, 0), (8, 5)])
def test_before_a_step_the_blocks_say_of_every_view_what_was_cached(
    cached: tuple[PairSet, Any], lite0: dict[str, Any], tmp_path: Path, blocks: int, column: int
) -> None:
    pairs, features = cached
    other = torch.ones(*features.shape[:2], column, dtype=features.dtype)
    tower = SpatialLite0(lite0_trunk(lite0, taps=LITE0_TAPS), GRID).eval()
    chosen = [4, 1, 7]
    maps = front_maps(
        tower, blocks, pairs, chosen, tmp_path, views=2, seed=3, resolution=32, threads=1,
        progress=QuietProgress(),
    )  # fmt: skip
    whole = torch.cat([other, features, other], dim=2)
    tuned = TunedBlocks(tower, blocks, whole, maps, chosen, column=column)
    view_B, image_B = torch.tensor([0, 1, 1]), torch.tensor(chosen)
    told = tuned.read(view_B, image_B)
    expected = whole[view_B, image_B].float()
    assert torch.allclose(told, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    told.sum().backward()
    moved = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in tower.named_parameters() if name.startswith(last(blocks))}


def last(blocks: int) -> tuple[str, ...]:
    return tuple(f"trunk.blocks.{index}." for index in range(16 - blocks, 16))


def artifact(path: Path) -> Any:
    from edgeglm.core.artifact import Artifact, listing_of

    return Artifact(kind=path.name, path=path, files=listing_of(path), provenance={})


def features_of(folder: Path, pixels: Any) -> Any:
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

    with OnnxRuntimeEngine(folder / "image-0.onnx", threads=1) as engine:
        return engine.infer({"pixels": pixels})["features"]


def test_a_teacher_of_tuned_pictures_is_delivered_whole_and_reused(project: Path, tmp_path: Path) -> None:
    store = context(tmp_path / "store")
    wanted = recipe(project, "teacher.image_blocks=4", "teacher.image_rate=0.01")
    tuned = adapt_teacher(wanted, tmp_path / "tuned", store)
    made = {result.stage: result.artifact for result in tuned.results}
    assert list(made)[-4:] == ["image-tuning", "tuned-features", "teacher", "teacher-evaluation"]
    (backbone,) = read_backbones(tmp_path / "tuned")
    assert isinstance(backbone, Backbone)
    assert backbone.title == "EfficientNet-Lite0, 4 blocks tuned"
    pixels = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    before, after = (features_of(folder, pixels) for folder in (made["backbones"].path, tmp_path / "tuned"))
    last_tap = 320 * GRID**2
    assert np.abs(before[:, :last_tap] - after[:, :last_tap]).max() > 1e-2
    assert np.allclose(before[:, last_tap:], after[:, last_tap:]), "the tap before the tuned blocks"
    again = adapt_teacher(wanted, tmp_path / "again", store)
    assert all(result.reused for result in again.results)


def test_unlabelled_pictures_take_part_and_a_killed_tuning_ends_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("mmd_weight=1.0", "consistency_weight=0.1", "curriculum=1.0", "pseudo_label_rounds=1")
    domain = [f"teacher.domain.{option}" for option in options]
    wanted = recipe(project, "teacher.image_blocks=2", "teacher.image_epochs=2", *domain,
                    "teacher.optimisation.checkpoint_epochs=1")  # fmt: skip
    write = checkpoint.Checkpoint.write

    class Killed(BaseException):
        pass

    def killing(self: Any, state: Any) -> bool:
        written = write(self, state)
        if self.path.name == "images.pt":
            raise Killed
        return written

    monkeypatch.setattr(checkpoint.Checkpoint, "write", killing)
    with pytest.raises(Killed):
        adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    monkeypatch.setattr(checkpoint.Checkpoint, "write", write)
    shutil.copytree(tmp_path / "two", tmp_path / "one", ignore=lambda *_: ["checkpoints"])
    whole = adapt_teacher(wanted, tmp_path / "whole", context(tmp_path / "one"))
    measured = next(r for r in whole.results if r.stage == "image-tuning").artifact.provenance["measured"]
    assert len(measured["pseudo_labels"]) == 2, "once for the heads, once for the pictures"
    assert set(measured["curves"]) == {"warm-up", "pseudo-labels 1", "images"}
    resumed = adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert resumed.teacher.digest == whole.teacher.digest
    assert not list((tmp_path / "two" / "checkpoints").glob("*/*")), "nothing is left of them"


def test_a_tower_whose_blocks_are_not_known_is_refused_with_the_way_out(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    arguments = ["adapt", "--recipe", str(project / "recipe.toml"), "--set", "teacher.image_blocks=2"]
    assert exit_code([*arguments, "--output", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("set teacher.image_blocks to 0, or add efficientnet-lite0 to teacher.image")
    assert not (tmp_path / "out").exists()


def test_blocks_that_diverge_name_their_own_rate_and_the_heads_before_them_stay(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    more = {"image": json.dumps(["efficientnet-lite0"]), "image_blocks": 2, "image_rate": 1e30,
            "image_batch_size": 16}  # fmt: skip
    options = [part for key, value in more.items() for part in ("--set", f"teacher.{key}={value}")]
    arguments = ["adapt", "--recipe", str(project / "recipe.toml"), "--threads", "1", *options]
    assert exit_code([*arguments, "--output", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("lower teacher.image_rate")
    assert "warm-up.pt" in said
