"""The bill of materials against CycloneDX's own JSON schema, as its library for Python ships it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgeglm.bundle.bom import BOM_NAME
from tests.skips import loud_skip

schemas = pytest.importorskip("jsonschema_rs")

VERSION, SHA256 = "11.12.0", "0e807521a921a5c3cb8ce1153f8a61d29eedfe76a46aac2796b7c6b573391a54"
_PLACE = "cyclonedx/schema/_res/{}.SNAPSHOT.schema.json"
_BESIDE = ("spdx", "jsf-0.82")


def _validator(folder: Path) -> Any:
    pinned = folder / "pinned.txt"
    pinned.write_text(f"cyclonedx-python-lib=={VERSION} --hash=sha256:{SHA256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--require-hashes",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, "-r", str(pinned)], capture_output=True, text=True, check=False)
    if done.returncode:
        loud_skip(f"SCHEMA NOT FETCHED: {done.stderr.strip().splitlines()[-1]}; nothing was validated")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        whole = json.loads(wheel.read(_PLACE.format("bom-1.6")))
        beside = {name: json.loads(wheel.read(_PLACE.format(name))) for name in _BESIDE}
    registry = schemas.Registry(
        [
            (f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", schema)
            for name, schema in beside.items()
        ]
    )
    return schemas.validator_for(whole, registry=registry)


@pytest.mark.assets
def test_the_bill_of_materials_is_valid_cyclonedx(packed: Path, tmp_path: Path):
    (tmp_path / "schema").mkdir()
    validator = _validator(tmp_path / "schema")
    document = json.loads((packed / BOM_NAME).read_bytes())
    assert [error.message for error in validator.iter_errors(document)] == []
    assert any(one["type"] == "machine-learning-model" for one in document["components"])
    document["components"][0]["type"] = "a kind of its own"
    assert not validator.is_valid(document), "the schema says something"
