from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeglm.bundle as bundle_module
import edgeglm.bundle.manifest as manifest_module
from edgeglm.bundle.manifest import (
    FileRecord,
    Manifest,
    content_digest,
    decides_behaviour,
    manifest_bytes,
    manifest_from_bytes,
)
from edgeglm.bundle.pack import absolute_paths_in, write_bundle
from edgeglm.bundle.paths import check_names, name_problem
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError


def record(content: str) -> FileRecord:
    return FileRecord(sha256=content * 64, size=1)


def test_content_digest_ignores_what_changes_from_build_to_build():
    files = {"models/fp32/image.onnx": record("a"), "recipe.toml": record("b")}
    noise = (
        "engines/x.plan",
        "report.html",
        "metrics.json",
        "gallery/thumbnails/1.png",
        "licences.json",
        "NOTICE.md",
    )
    assert content_digest(files) == content_digest(files | {name: record("c") for name in noise})


@pytest.mark.parametrize(
    "name",
    [
        "models/int8/text.onnx",
        "tokenizer/tokenizer.json",
        "preprocessing.json",
        "golden/inputs/000.png",
        "golden/outputs.npz",
        "calibration.json",
        "precision_plan.json",
        "recipe.toml",
        "target.toml",
        "gallery/embeddings-int8.npy",
        "gallery/items.jsonl",
    ],
)
def test_content_digest_changes_with_every_file_that_decides_an_answer(name):
    assert decides_behaviour(name)
    assert content_digest({name: record("a")}) != content_digest({name: record("b")})


def test_two_builds_at_other_times_in_other_folders_agree_in_the_content_digest(tmp_path, manifest, sources):
    later = msgspec.structs.replace(manifest, created="2027-01-01", stages=())
    one = write_bundle(tmp_path / "here" / "a", sources=sources, manifest=manifest)
    other = write_bundle(
        tmp_path / "there" / "b", sources=sources | {"metrics.json": b'{"ms": 3}'}, manifest=later
    )
    first, second = open_bundle(one).manifest, open_bundle(other).manifest
    assert first.content_digest == second.content_digest
    assert first.files["metrics.json"] != second.files["metrics.json"]


def test_a_recipe_with_the_build_folder_in_it_is_not_packed(tmp_path, manifest, sources):
    sources["recipe.toml"] = f'[data]\npath = "{tmp_path}"\n'.encode()
    with pytest.raises(ValueError, match="absolute paths"):
        write_bundle(tmp_path / "b", sources=sources, manifest=manifest)
    assert absolute_paths_in('a = ["x/y", {b = "C:\\\\data"}]\nc = 1') == ["C:\\data"]


def test_a_newer_schema_is_refused_with_its_number(packed: Path):
    path = packed / "manifest.json"
    newer = json.loads(path.read_bytes()) | {"schema_version": 3, "shape_of_things": "to come"}
    path.write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"bundle schema 3 is newer .*\(1\); upgrade edgeglm$"):
        open_bundle(packed)


def test_a_bundle_of_before_that_says_what_was_reused_is_read_and_nothing_says_it_anew(packed: Path):
    written = (packed / "manifest.json").read_bytes()
    tree = json.loads(written)
    assert all("reused" not in stage for stage in tree["stages"])
    older = tree | {"stages": [stage | {"reused": False} for stage in tree["stages"]]}
    assert manifest_from_bytes(json.dumps(older).encode(), "m").stages[0].name == "teacher"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("default_variant", "fp8", "default variant 'fp8'"),
        ("created", "yesterday", "no ISO date"),
        ("content_digest", "0" * 64, "content digest does not fit"),
        ("schema_version", 0, "schema_version"),
        ("surprise", 1, "unknown field `surprise`"),
        ("towers", {}, "does not list"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(packed: Path, key, value, message):
    tree = json.loads((packed / "manifest.json").read_bytes()) | {key: value}
    with pytest.raises(UserError, match=message):
        manifest_from_bytes(json.dumps(tree).encode(), "m")


def test_a_value_that_json_would_lose_is_not_written(manifest: Manifest):
    variant = msgspec.structs.replace(manifest.variants[0], metrics={"map10": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest_bytes(msgspec.structs.replace(manifest, variants=(variant,), default_variant="fp32"))


@pytest.mark.parametrize(
    "name",
    [
        "", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\b", "C:x", "a\0b", "a\nb", "nul",
        "a/CON.txt", "a.", "a ", "e\u0301", "\ud800", "x" * 101, "a/" * 80 + "b", "\u202egnp",
    ],
)  # fmt: skip
def test_a_name_that_could_leave_the_bundle_or_mean_two_files_is_refused(name):
    assert name_problem(name) is not None
    with pytest.raises(UserError):
        check_names([name], "m")


@pytest.mark.parametrize("names", [["a", "a"], ["A/x", "a/X"], ["a", "a/b"], ["straße", "STRASSE"]])
def test_names_that_fall_together_on_another_file_system_are_refused(names):
    with pytest.raises(UserError, match=r"twice|differs only in case|as the folder"):
        check_names(names, "m")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_no_accepted_name_leaves_its_folder(name):
    if name_problem(name) is None:
        joined = Path("/root-of-bundle") / name
        assert joined.is_relative_to("/root-of-bundle")
        assert ".." not in joined.parts


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_manifest_is_read_or_refused_and_never_crashes(data):
    manifest = _small_manifest()
    mutated = bytearray(manifest)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        length = data.draw(st.integers(0, 8))
        mutated[at : at + length] = data.draw(st.binary(max_size=8))
    with suppress(UserError):
        assert manifest_from_bytes(bytes(mutated), "m").schema_version == 1


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.floats(),
        lambda c: st.dictionaries(st.text(max_size=5), c, max_size=3),
        max_leaves=5,
    )
)
def test_any_json_in_place_of_a_manifest_is_refused(tree):
    with pytest.raises(UserError):
        manifest_from_bytes(json.dumps(tree).encode(), "m")


def test_a_deeply_nested_manifest_is_refused():
    deep = b'{"schema_version": 1, "name": ' + b"[" * 100_000
    with pytest.raises(UserError, match="not a bundle manifest"):
        manifest_from_bytes(deep, "m")


def _small_manifest() -> bytes:
    from edgeglm.bundle.manifest import TargetRecord, TowerRecord, VariantRecord

    name = "models/fp32/image.onnx"
    files = {name: record("a"), "metrics.json": record("b")}
    return manifest_bytes(
        Manifest(
            name="small",
            created="2026-11-23",
            edgeglm="0.1.0",
            target=TargetRecord(name="cpu"),
            default_variant="fp32",
            variants=(VariantRecord(name="fp32", files={"image": name}, gate="reference"),),
            towers={"image": TowerRecord(inputs=(), outputs=(), embedding_dim=4, parameters=1)},
            files=files,
            content_digest=content_digest(files),
        )
    )


def test_the_described_layout_names_all_that_decides_an_answer():
    described = f"{manifest_module.__doc__}"
    decisive = [*manifest_module._DECISIVE_FOLDERS, *manifest_module._DECISIVE_FILES]
    assert [name for name in decisive if name not in described] == []
    layout = f"{bundle_module.__doc__}"
    assert [name for name in decisive if name.partition("/")[0] not in layout] == []
