"""What a user would lose if a shipped profile, or the reading of their own, were wrong."""

from __future__ import annotations

import importlib.resources
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.targets.description import TABLE_HEADER, describe_target, target_table_rows
from edgeglm.targets.legality import check_precision
from edgeglm.targets.schema import (
    Figure,
    Target,
    known_targets,
    load_target,
    members_of,
    resolve_target,
    resolved_from_toml,
    target_from_toml,
    toml_from_resolved,
)

PROMISED = {
    "jetson-agx", "jetson-agx-xavier", "jetson-agx-orin-32gb", "jetson-agx-orin-64gb", "jetson-agx-thor",
    "jetson-orin-nx", "jetson-orin-nano", "t4", "a10", "a100", "l4", "l40s", "h100", "h200", "b200",
    "rtx-pro-6000", "cpu",
}  # fmt: skip

OWN = """
name = "my-board"
title = "My board"
kind = "device"
arch = "aarch64"
builder = "tensorrt"
sm = 87
memory_gb = { value = 8, source = "label" }
bandwidth_gb_s = { value = 68, source = "label", verified = false }
precisions = ["fp16"]
lanes = ["B"]
"""


def test_every_promised_target_ships() -> None:
    assert set(known_targets()) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_shipped_profile_is_named_as_its_file_and_breaks_no_rule(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    for member in members_of(target):
        for precision in member.precisions:
            verdict = check_precision(member, precision)
            assert verdict.ok, f"{name} lists a precision that its hardware refuses: {verdict.reason}"


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_number_of_a_shipped_profile_has_a_source(name: str) -> None:
    def figures(value: object) -> list[Figure]:
        if isinstance(value, Figure):
            return [value]
        if isinstance(value, msgspec.Struct):
            return [f for key in value.__struct_fields__ for f in figures(getattr(value, key))]
        return []

    target = load_target(name)
    for figure in figures(target):
        assert figure.source.strip()
        doubtful = "memory" in figure.source or "derived" in figure.source
        assert not (doubtful and figure.verified), f"{name}: {figure} claims to be verified"
    if target.kind == "device":
        assert len(figures(target)) >= 4


def test_profiles_travel_inside_the_package() -> None:
    folder = importlib.resources.files("edgeglm.targets") / "profiles"
    assert (folder / "t4.toml").is_file()


def test_a_mistyped_target_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"known: .*did you mean 'jetson-agx'\?"):
        load_target("jetson-agz")


def test_the_users_own_profile_is_read_and_joins_a_family(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(OWN)
    (tmp_path / "fleet.toml").write_text(
        'name = "fleet"\ntitle = "Fleet"\nkind = "family"\nmembers = ["./mine.toml", "t4"]\n'
    )
    resolved = resolve_target(load_target(str(tmp_path / "fleet.toml")))
    assert [member.name for member in resolved.members] == ["my-board", "t4"]
    assert resolved.target.members == ("my-board", "t4"), "no path of this machine travels in a bundle"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("sm = 87", ""), "sm is missing"),
        (("sm = 87", 'sm = "8.7"'), r"sm: Expected `int"),
        (("sm = 87", "sm = 87\nspeed = 3"), "unknown target key 'speed'"),
        (('precisions = ["fp16"]', 'precisions = ["fp12"]'), "precisions"),
        (('builder = "tensorrt"', 'builder = "tensorrt-rtx"'), "does not build for sm = 87"),
        (("value = 8", "value = -8"), "memory_gb.value"),
        (("value = 8", "value = inf"), "memory_gb.value"),
        ((', source = "label" }', " }"), "memory_gb: .*source"),
        (('lanes = ["B"]', ""), "lanes is empty"),
        (('kind = "device"', 'kind = "family"'), "members"),
        (('kind = "device"', 'kind = "cpu"'), "cpu has no sm"),
        (('name = "my-board"', 'name = "../x"'), "name"),
        (('name = "my-board"', "name = "), "is not TOML"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_key_that_is_wrong(
    change: tuple[str, str], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(*change, 1))
    with pytest.raises(UserError, match=complaint) as caught:
        load_target(str(path))
    assert "mine.toml" in str(caught.value)


def test_a_profile_that_lacks_a_key_is_told_of_one_to_copy_from() -> None:
    with pytest.raises(UserError, match=r"missing required field .*; write it as .*t4\.toml does$") as caught:
        target_from_toml("", origin="mine.toml")
    example = str(caught.value).rpartition("write it as ")[2].removesuffix(" does")
    assert target_from_toml(Path(example).read_text("utf-8"), origin=example).name == "t4"


def test_a_missing_or_binary_profile_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no target profile"):
        load_target(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_target(str(tmp_path / "binary.toml"))


def test_a_family_inside_a_family_or_a_member_twice_is_refused() -> None:
    family = Target(name="f", title="F", kind="family", members=("jetson-agx",))
    with pytest.raises(UserError, match="itself a family"):
        members_of(family)
    with pytest.raises(UserError, match="twice"):
        members_of(msgspec.structs.replace(family, members=("t4", "t4")))


@pytest.mark.parametrize("name", ["jetson-agx", "t4", "cpu"])
def test_a_bundle_can_read_back_the_target_it_carries(name: str) -> None:
    resolved = resolve_target(load_target(name))
    assert resolved_from_toml(toml_from_resolved(resolved), origin="target.toml") == resolved


@settings(max_examples=50)
@given(st.text())
def test_no_text_crashes_the_profile_reader(text: str) -> None:
    with pytest.raises(UserError):
        target_from_toml(text, origin="x.toml")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, len(OWN) - 1), st.characters(codec="utf-8")), max_size=4))
def test_no_altered_profile_crashes_the_reader(edits: list[tuple[int, str]]) -> None:
    text = OWN
    for place, character in edits:
        text = text[:place] + character + text[place + 1 :]
    with suppress(UserError):
        assert target_from_toml(text, origin="x.toml").kind == "device"


def test_the_table_and_the_description_show_every_target_and_mark_doubt() -> None:
    rows = target_table_rows()
    assert {row[0] for row in rows} == PROMISED
    assert all(len(row) == len(TABLE_HEADER) for row in rows)
    lines = describe_target(load_target("jetson-agx-xavier"))
    assert ("SM", "7.2") in lines
    assert any(subject == "peak FP16 dense" and "unverified" in text for subject, text in lines)
    family = describe_target(load_target("jetson-agx"))
    assert sum(subject == "member" for subject, _ in family) == 4
