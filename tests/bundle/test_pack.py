from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from edgeglm.bundle import atomic
from edgeglm.bundle.bom import BOM_NAME
from edgeglm.bundle.manifest import MANIFEST_NAME, Manifest
from edgeglm.bundle.pack import archive_path, write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_went_in_comes_out(packed, sources, tree):
    files = tree(packed)
    assert files.pop(MANIFEST_NAME)
    assert files.pop(BOM_NAME)
    assert files == sources
    assert leftovers(packed.parent) == []


def test_files_are_copied_from_paths_too(tmp_path, manifest, sources):
    model = tmp_path / "image.onnx"
    model.write_bytes(b"weights" * 1_000_000)
    model.chmod(0o444)
    path = write_bundle(
        tmp_path / "b", sources=sources | {"models/int8/image.onnx": model}, manifest=manifest, archive="none"
    )
    with open_bundle(path) as bundle:
        assert bundle.model("int8", "image").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("kind", ["tar.zst", "zip"])
def test_the_same_bundle_gives_the_same_archive_bytes(tmp_path, manifest, sources, kind):
    archives = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder = write_bundle(tmp_path / name / "b", sources=sources, manifest=manifest, archive=kind)
        archive = archive_path(folder, kind)
        assert archive is not None
        archives.append(archive.read_bytes())
        sources = dict(reversed(sources.items()))
        time.sleep(0.01)
    assert archives[0] == archives[1]


@pytest.mark.parametrize("kind", ["none", "tar.zst", "zip"])
def test_an_older_bundle_is_replaced(packed, manifest, sources, tree, kind):
    write_bundle(packed, sources=sources, manifest=manifest, archive=kind)
    del sources["report.html"]
    newer = msgspec.structs.replace(manifest, name="newer")
    write_bundle(packed, sources=sources, manifest=newer, archive=kind)
    assert open_bundle(packed).manifest.name == "newer"
    assert "report.html" not in tree(packed)
    assert leftovers(packed.parent) == []
    if (archive := archive_path(packed, kind)) is not None:
        with open_bundle(archive) as bundle:
            assert bundle.manifest.name == "newer"


def test_an_older_bundle_is_replaced_where_folders_cannot_be_exchanged(
    packed, manifest, sources, monkeypatch
):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    write_bundle(packed, sources=sources, manifest=msgspec.structs.replace(manifest, name="newer"))
    assert open_bundle(packed).manifest.name == "newer"
    assert leftovers(packed.parent) == []


def test_a_bundle_left_aside_by_a_killed_process_comes_back(packed, manifest, sources, tree):
    before = tree(packed)
    packed.rename(packed.with_name(f".{packed.name}.replaced"))
    with pytest.raises(ValueError, match="does not list"):
        write_bundle(packed, sources={"a": b""}, manifest=manifest)
    assert tree(packed) == before


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 1}', "[]", "not json"])
def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path, manifest, sources, tree, content):
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"beach")
    (folder / MANIFEST_NAME).write_text(content)
    before = tree(folder)
    with pytest.raises(UserError, match="not a bundle"):
        write_bundle(folder, sources=sources, manifest=manifest)
    assert tree(folder) == before


def test_a_file_or_link_in_the_way_is_never_replaced(tmp_path, packed, manifest, sources):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(packed)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="not a bundle"):
            write_bundle(tmp_path / name, sources=sources, manifest=manifest)
    (tmp_path / "new.zip").write_text("my tax return")
    with pytest.raises(UserError, match="not a bundle"):
        write_bundle(tmp_path / "new", sources=sources, manifest=manifest, archive="zip")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "new.zip").read_text() == "my tax return"


def test_an_empty_folder_may_become_a_bundle(tmp_path, manifest, sources):
    (tmp_path / "empty").mkdir()
    assert open_bundle(write_bundle(tmp_path / "empty", sources=sources, manifest=manifest)).verified


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped"])
def test_a_source_name_that_leaves_the_bundle_is_refused(tmp_path, manifest, sources, name):
    with pytest.raises(ValueError, match="escaped"):
        write_bundle(tmp_path / "deep" / "b", sources=sources | {name: b"x"}, manifest=manifest)
    assert not (tmp_path / "escaped").exists()
    assert not (tmp_path / "deep" / "b").exists()


def test_a_missing_source_leaves_nothing_behind(tmp_path, manifest, sources):
    with pytest.raises(UserError, match=r"cannot read .*gone\.onnx"):
        write_bundle(
            tmp_path / "b", sources=sources | {"models/x": tmp_path / "gone.onnx"}, manifest=manifest
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/edgeglm/b", "/dev/null/b", "file/b"])
def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path, manifest, sources, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*; nothing was changed there"):
        write_bundle(tmp_path / place, sources=sources, manifest=manifest)


@pytest.mark.parametrize("kind", ["none", "tar.zst", "zip"])
def test_a_full_disk_leaves_the_older_bundle_untouched(packed, manifest, sources, tree, kind):
    write_bundle(packed, sources=sources, manifest=manifest, archive=kind)
    before = tree(packed.parent)
    sources["models/int8/image.onnx"] = os.urandom(200_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="free some space"):
            write_bundle(packed, sources=sources, manifest=manifest, archive=kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(packed.parent) == before


def test_a_full_disk_while_the_archive_is_written_leaves_the_older_bundle_untouched(
    packed, manifest, sources, tree, monkeypatch
):
    before = tree(packed.parent)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgeglm.bundle.pack.archive_from_folder", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_bundle(packed, sources=sources, manifest=manifest, archive="zip")
    assert tree(packed.parent) == before


WRITER = """
import sys, pathlib, msgspec
from edgeglm.bundle.manifest import Manifest
from edgeglm.bundle.pack import write_bundle
destination, template = map(pathlib.Path, sys.argv[1:])
manifest = msgspec.json.decode(template.read_bytes(), type=Manifest)
files = {name: b"#" * 5000 for name in manifest.files}
number = 0
while True:
    number += 1
    newer = msgspec.structs.replace(manifest, name=f"n{number}")
    write_bundle(destination, sources=files, manifest=newer, archive="zip")
    print(number, flush=True)
"""


@contextmanager
def endless_writer(packed: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Replace the bundle again and again in another process, which is killed at the end."""
    template = packed.parent / "template.json"
    if not template.exists():
        template.write_bytes((packed / MANIFEST_NAME).read_bytes())
    command = [sys.executable, "-c", WRITER, str(packed), str(template)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        try:
            yield writer
        finally:
            writer.kill()


def written(writer: subprocess.Popen[bytes], count: int) -> list[bytes]:
    assert writer.stdout is not None
    return [writer.stdout.readline() for _ in range(count)]


def test_kill_9_at_any_moment_leaves_a_whole_bundle(packed, manifest, sources):
    for number in range(5):
        with endless_writer(packed) as writer:
            assert written(writer, 1) == [b"1\n"]
            time.sleep(0.003 * number)  # now it is somewhere in the next ones
        assert open_bundle(packed).verified
        with open_bundle(packed.with_name(f"{packed.name}.zip")) as bundle:
            assert bundle.verified
    write_bundle(packed, sources=sources, manifest=manifest)
    assert leftovers(packed.parent) == []


def test_two_writers_at_once_leave_one_whole_bundle(packed):
    with endless_writer(packed) as one, endless_writer(packed) as other:
        assert written(one, 3) == written(other, 3) == [b"1\n", b"2\n", b"3\n"]
    assert open_bundle(packed).verified


def test_a_bundle_without_its_variant_files_is_not_written(tmp_path: Path, manifest: Manifest, sources):
    del sources["models/int8/text.onnx"]
    with pytest.raises(ValueError, match="int8"):
        write_bundle(tmp_path / "b", sources=sources, manifest=manifest)
    assert list(tmp_path.iterdir()) == []
