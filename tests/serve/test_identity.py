from __future__ import annotations

import hashlib
from pathlib import Path

from edgeglm.bundle.verify import open_bundle
from edgeglm.serve.identity import identity_of
from scripts.fixtures.colours import colour_bundle
from tests.serve.conftest import PLAN


def test_a_bundle_without_a_precision_plan_sends_no_empty_header(tmp_path: Path):
    with open_bundle(colour_bundle(tmp_path / "bare")) as bundle:
        identity = identity_of(bundle, "fp32", "words")
        assert identity.facts["plan"] == ""
        assert "edgeglm-plan" not in dict(identity.pairs)
    planned = colour_bundle(tmp_path / "planned", **{"precision_plan.json": PLAN})
    with open_bundle(planned) as bundle:
        identity = identity_of(bundle, "int8", "words")
        plan = hashlib.sha256(PLAN).hexdigest()
        assert identity.facts["plan"] == plan
        assert (b"edgeglm-plan", plan.encode()) in identity.headers
        assert ("edgeglm-plan", plan) in identity.metadata
        assert b"edgeglm-plan: " + plan.encode() in identity.lines
