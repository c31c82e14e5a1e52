"""If these fail, a user whose build was killed loses work, or finds half a bundle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.artifact import Artifact
from tests.build.conftest import Project, Said
from tests.tiny_towers import RECIPE

End = Callable[[subprocess.Popen[str], signal.Signals], tuple[str, str]]


def wait_for(kind: str, project: Project, process: subprocess.Popen[str]) -> None:
    """Wait until a stage is stored; fail if the build ends first."""
    limit = time.monotonic() + 120
    while kind not in project.stored():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_build_killed_and_interrupted_in_another_folder_ends_in_the_same_bundle(
    project: Project, cold: Said, end: End, tmp_path: Path
) -> None:
    for part in ("vit", "bert", "data"):
        shutil.copytree(project.root / part, tmp_path / part)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(root=tmp_path))
    other = Project(tmp_path, tmp_path / "store")
    bundle = tmp_path / "out" / "bundle"
    command = other.arguments("build", "cpu", "--threads", "1", "--output", str(bundle))

    process = other.process(*command)
    wait_for("backbones", other, process)
    end(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    first = other.stored()
    assert {"pairs", "backbones"} <= first
    assert not bundle.parent.exists(), "nothing is written before all of it is there"

    process = other.process(*command)
    wait_for("distil-text", other, process)
    _, words = end(process, signal.SIGINT)
    assert process.returncode == 130
    assert "run the same command again to resume" in words
    assert "Traceback" not in words
    second = other.stored()
    assert not bundle.parent.exists()

    said = other.build("cpu", output=bundle)
    assert said.code == 0, said.err
    assert set(said.ran).isdisjoint(second), "what was stored is not made again"
    assert said.json["content_digest"] == cold.json["content_digest"]
    with open_bundle(bundle) as opened:
        assert opened.manifest.content_digest == cold.json["content_digest"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert list((other.store / "scratch").iterdir()) == [], "what the killed build left is swept"


def test_a_stage_whose_files_were_damaged_is_made_again(project: Project, cold: Said, bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        digest = {stage.name: stage.artifact for stage in opened.manifest.stages}["teacher-evaluation"]
    stored = [
        Artifact(kind="", path=entry.parent, files=json.loads(entry.read_text())["files"])
        for entry in (project.store / "entries").glob("*/entry.json")
    ]
    for entry in stored:
        if entry.digest == digest:
            metrics = entry.path / "files" / "metrics.json"
            metrics.chmod(0o644)
            metrics.write_text("{}")
    said = project.build("cpu")
    assert said.code == 0, said.err
    assert said.ran == ["teacher-evaluation"], "it gives what it gave, so nothing after it runs"
    assert said.json["content_digest"] == cold.json["content_digest"]
