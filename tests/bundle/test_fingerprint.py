from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeglm.bundle.fingerprint import cross_agreement, fingerprint_of
from edgeglm.bundle.manifest import Manifest, SpaceRecord
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle


def written(folder: Path, sources, manifest: Manifest, **agreement: float) -> Manifest:
    measured = msgspec.structs.replace(manifest, space=SpaceRecord(agreement=agreement))
    with open_bundle(write_bundle(folder, sources=sources, manifest=measured)) as bundle:
        return bundle.manifest


def test_a_variant_shares_the_space_only_when_that_was_measured(tmp_path: Path, sources, manifest: Manifest):
    unmeasured = written(tmp_path / "a", sources, manifest)
    poor = written(tmp_path / "b", sources, manifest, int8=0.89)
    good = written(tmp_path / "c", sources, manifest, int8=0.95)
    for one in (unmeasured, poor):
        assert fingerprint_of(one, "int8") != fingerprint_of(one, "fp32")
    assert fingerprint_of(good, "int8") == fingerprint_of(good, "fp32") == fingerprint_of(poor, "fp32")
    assert good.space.agreement == {"int8": 0.95}


@pytest.mark.parametrize("name", ["models/fp32/text.onnx", "preprocessing.json", "tokenizer/tokenizer.json"])
def test_weights_preprocessing_and_tokenizer_each_make_another_space(
    name: str, tmp_path: Path, sources, manifest: Manifest
):
    one = written(tmp_path / "a", sources, manifest)
    other = written(tmp_path / "b", {**sources, name: sources[name] + b" "}, manifest)
    assert fingerprint_of(one, "fp32") != fingerprint_of(other, "fp32")


def test_a_report_or_a_date_makes_no_other_space(tmp_path: Path, sources, manifest: Manifest):
    one = written(tmp_path / "a", sources, manifest)
    later = msgspec.structs.replace(manifest, created="2027-01-01")
    other = written(tmp_path / "b", {**sources, "report.html": b"<html>2</html>"}, later)
    assert fingerprint_of(one) == fingerprint_of(other)


def test_a_manifest_from_before_there_were_spaces_still_has_them(packed: Path):
    with open_bundle(packed) as bundle:
        before = msgspec.structs.replace(bundle.manifest, space=SpaceRecord())
        assert fingerprint_of(before) == fingerprint_of(bundle.manifest)


def test_agreement_is_whole_for_the_same_queries_and_none_for_opposite_ones():
    random = np.random.default_rng(0)
    gallery = random.normal(size=(50, 8)).astype(np.float32)
    queries = random.normal(size=(5, 8)).astype(np.float32)
    assert cross_agreement(queries, queries, gallery) == 1.0
    assert cross_agreement(-queries, queries, gallery) == 0.0
    broken = queries.copy()
    broken[0, 0] = np.nan
    assert cross_agreement(broken, queries, gallery) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="cannot compare"):
        cross_agreement(queries[:2], queries, gallery)
