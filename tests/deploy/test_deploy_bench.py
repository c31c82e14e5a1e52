"""The bench of deploys: its page holds no figure that its rows do not, and each tower is changed alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from edgeglm.bundle.verify import open_bundle
from tests.deploy.helpers import real_bundle


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts/bench"))
    spec = importlib.util.spec_from_file_location("deploy_bench", repository / "scripts/bench/deploy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_rows_make(bench, repository):
    place = repository / "docs/bench/deploy.json"
    assert bench.page(json.loads(place.read_text())) == place.with_suffix(".md").read_text()


def test_each_tower_has_a_row_of_its_own(bench):
    towers = {
        "image": {"moved_bytes": 1005, "tower_bytes": 1000, "over": 0.005},
        "text": {"moved_bytes": 210, "tower_bytes": 200, "over": 0.05},
    }
    wire = {"commit": "c", "date": "d", "load_average": None, "first_bytes": 9, "nothing_changed_bytes": 1}
    said = bench.page({"command": "c", "machine": "m", "redeploy": {**wire, "towers": towers}})
    assert (
        "redeploy, the image tower changed: bytes on the wire over the tower's | 1,005 over 1,000: +0.50%"
        in said
    )
    assert (
        "redeploy, the text tower changed: bytes on the wire over the tower's | 210 over 200: +5.00%" in said
    )


def test_one_tower_is_changed_and_no_other_file(bench, tmp_path):
    path = real_bundle(tmp_path / "real")
    towers = bench.towers_of(path)
    assert towers == {kind: f"models/fp32/{kind}.onnx" for kind in ("image", "text")}
    for tower, name in towers.items():
        changed, size = bench.one_tower_changed(path, name, tmp_path / tower)
        with open_bundle(path) as before, open_bundle(changed) as after:
            assert size == before.manifest.files[name].size
            differing = {
                one
                for one, record in after.manifest.files.items()
                if record != before.manifest.files.get(one)
            }
        assert differing <= {name, "bom.cdx.json"}
        assert name in differing
