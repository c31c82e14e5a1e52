from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.core.errors import UserError
from edgeglm.targets.schema import TENSORRT_RTX_SMS, known_targets, load_target
from edgeglm.targets.support import Evidence, evidence_from_toml, strongest, support_page


def seen(rung: str, *targets: str) -> Evidence:
    return Evidence(targets=targets, rung=rung, what="x", where="y")  # type: ignore[arg-type]


def test_the_page_says_what_the_profiles_and_the_evidence_say_today(repository: Path):
    evidence = evidence_from_toml(repository / "docs/support-evidence.toml")
    page = (repository / "docs/support-matrix.md").read_text("utf-8")
    assert page == support_page(evidence), "run scripts/support-matrix"
    for name in known_targets():
        assert f"\n| {name} |" in page


def test_every_piece_of_evidence_is_in_the_repository(repository: Path):
    for item in evidence_from_toml(repository / "docs/support-evidence.toml"):
        assert (repository / item.where).is_file(), item.where


def test_nothing_is_said_to_be_built_that_no_builder_here_serves(repository: Path):
    for item in evidence_from_toml(repository / "docs/support-evidence.toml"):
        if item.rung == "built":
            assert all(load_target(name).sm in TENSORRT_RTX_SMS for name in item.targets)


def test_a_family_stands_where_its_weakest_member_does():
    family = load_target("jetson-agx")
    three = seen("device", *family.members[1:])
    assert strongest(family, (three,)) == "checked"
    assert strongest(family, (three, seen("onnxruntime", family.members[0]))) == "onnxruntime"
    assert strongest(load_target("jetson-agx-thor"), (three,)) == "device"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[evidence]]\n", "mend the list"),
        ('[[evidence]]\ntargets=["t5"]\nrung="gpu"\nwhat="x"\nwhere="y"\n', "unknown target 't5'"),
        ('[[evidence]]\ntargets=["t4"]\nrung="hearsay"\nwhat="x"\nwhere="y"\n', "mend the list"),
    ],
)
def test_evidence_that_cannot_be_read_is_said(text: str, words: str, tmp_path: Path):
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        evidence_from_toml(tmp_path / "e.toml")
