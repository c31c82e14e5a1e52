"""If this fails, a teacher that asks a classifier cannot be built, or names nobody for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.build.conftest import Project, Said
from tests.tiny_lite0 import put_lite0


def test_a_teacher_looks_through_a_classifier_too_beside_blocks_that_were_tuned(
    project: Project, cold: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_lite0(monkeypatch, tmp_path / "lite0")
    monkeypatch.setattr("edgeglm.adapt.alignment.MIN_IMAGE_STEPS", 2)
    lines = ('teacher.image=["efficientnet-lite0"]', "teacher.conse.weight=0.3",
             "teacher.conse.resolution=64", "teacher.image_blocks=2", "teacher.image_epochs=1",
             "quantize.candidates=[]")  # fmt: skip
    more = [part for line in lines for part in ("--set", line)]
    said = project.build("cpu", *more, output=tmp_path / "bundle")
    assert said.code == 0, said.err
    assert said.ran[:4] == ["backbones", "features", "image-tuning", "tuned-features"]
    report = (tmp_path / "bundle" / "report.html").read_text("utf-8")
    assert "EfficientNet-Lite0, 2 blocks tuned" in report
    assert "classes of EfficientNet-Lite0, 64 px" in report
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    stages = {one["name"]: one for one in manifest["stages"]}
    assert stages["teacher"]["config"]["conse"]["weight"] == 0.3
    assert "class-names" in (tmp_path / "bundle" / "NOTICE.md").read_text("utf-8")
    assert all(stage["reused"] for stage in project.build("cpu", *more, output=tmp_path / "b").json["stages"])
