"""If this fails, a bundle's report and timings are of another image tower than the teacher had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.build.conftest import Project, Said
from tests.tiny_lite0 import put_lite0


def test_a_build_with_tuned_pictures_reports_and_times_the_tuned_tower(
    project: Project, cold: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_lite0(monkeypatch, tmp_path / "lite0")
    monkeypatch.setattr("edgeglm.adapt.alignment.MIN_IMAGE_STEPS", 2)
    lines = ('teacher.image=["efficientnet-lite0"]', "teacher.image_blocks=2", "teacher.image_epochs=1",
             "quantize.candidates=[]")  # fmt: skip
    more = [part for line in lines for part in ("--set", line)]
    said = project.build("cpu", *more, output=tmp_path / "bundle")
    assert said.code == 0, said.err
    assert said.ran[:4] == ["backbones", "features", "image-tuning", "tuned-features"]
    assert "EfficientNet-Lite0, 2 blocks tuned" in (tmp_path / "bundle" / "report.html").read_text("utf-8")
    stages = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["stages"]
    assert {"image-tuning", "tuned-features"} <= {stage["name"] for stage in stages}
    assert all(stage["reused"] for stage in project.build("cpu", *more, output=tmp_path / "b").json["stages"])
