"""Bundles that were written once keep opening. A fixture is added for each schema and never changed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from edgeglm.bundle.fingerprint import fingerprint_of
from edgeglm.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, content_digest, manifest_from_bytes
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.runtime.retrieval import Retriever

FIXTURES = Path(__file__).parent / "fixtures"
DIGESTS = {1: "099ef701a63d80258b972346ab3eda2386a721a8868a233919922102bf7cfe49"}


def test_every_schema_so_far_has_a_fixture():
    assert {int(path.stem.removeprefix("schema-")) for path in FIXTURES.glob("*.zip")} == set(DIGESTS)
    assert set(DIGESTS) == set(range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("schema", sorted(DIGESTS))
def test_an_old_bundle_opens_and_answers_as_it_did(schema: int):
    with open_bundle(FIXTURES / f"schema-{schema}.zip") as bundle:
        assert bundle.manifest.content_digest == DIGESTS[schema]
        assert content_digest(bundle.manifest.files) == DIGESTS[schema]
        with Retriever(bundle) as retriever:
            assert retriever.search_text("green", 1).hits[0].id == "set/green"


def test_a_manifest_from_before_lanes_and_spaces_still_opens():
    with zipfile.ZipFile(FIXTURES / "schema-1.zip") as archive:
        tree = json.loads(archive.read(MANIFEST_NAME))
    del tree["space"]
    for variant in tree["variants"]:
        del variant["lane"]
    manifest = manifest_from_bytes(json.dumps(tree).encode(), "old")
    assert {variant.lane for variant in manifest.variants} == {"B"}
    assert len(fingerprint_of(manifest)) == 64


def test_a_bundle_of_tomorrow_is_refused_with_its_version(tmp_path: Path):
    with zipfile.ZipFile(FIXTURES / "schema-1.zip") as archive:
        tree = json.loads(archive.read(MANIFEST_NAME))
    tree |= {"schema_version": SCHEMA_VERSION + 1, "something": "new"}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"schema {SCHEMA_VERSION + 1} is newer .* upgrade edgeglm"):
        open_bundle(tmp_path)
