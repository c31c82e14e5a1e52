"""The folders of extracted archives, in processes that end in whatever manner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeglm.bundle.archive import archive_from_folder
from edgeglm.bundle.manifest import MANIFEST_NAME, manifest_from_bytes
from edgeglm.bundle.verify import open_bundle
from scripts.fixtures.colours import colour_bundle

OPENS = """
import os, sys
from pathlib import Path
from edgeglm.bundle.verify import open_bundle
bundle = open_bundle(Path(sys.argv[1]))
assert bundle.file("tokenizer/tokenizer.json").is_file()
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = colour_bundle(tmp_path / "colours")
    manifest = manifest_from_bytes((folder / MANIFEST_NAME).read_bytes(), "it")
    archive_from_folder(folder, [*manifest.files, MANIFEST_NAME], tmp_path / "colours.zip", "zip")
    return tmp_path / "colours.zip"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go, in this process and in others."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


def ran(archive: Path, script: str) -> int:
    return subprocess.run([sys.executable, "-c", OPENS + script, str(archive)], timeout=60).returncode


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit"])
def test_a_process_that_ends_with_an_archive_open_leaves_no_folder(archive, place, end):
    assert ran(archive, end) in (0, 3)
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_when_the_next_archive_is_opened(archive, place):
    assert ran(archive, "os.kill(os.getpid(), 9)") == -9
    [left] = place.iterdir()
    with open_bundle(archive) as bundle:
        assert not left.exists()
        assert list(place.iterdir()) == [bundle.temporary]
    assert not list(place.iterdir())


def test_an_archive_that_is_in_use_keeps_its_folder_when_another_is_opened(archive, place):
    with open_bundle(archive) as bundle:
        assert ran(archive, "") == 0
        with open_bundle(archive) as other:
            assert other.temporary != bundle.temporary
        assert bundle.file("tokenizer/tokenizer.json").is_file()
    assert not list(place.iterdir())


def test_a_forked_child_that_ends_takes_nothing_from_its_parent(archive, place):
    script = """
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    assert bundle.file("tokenizer/tokenizer.json").is_file()
"""
    assert ran(archive, script) == 0
    assert not list(place.iterdir())


def test_closing_a_bundle_gives_its_lock_back(archive, place):
    before = len(list(Path("/proc/self/fd").iterdir()))
    bundle = open_bundle(archive)
    bundle.close()
    bundle.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list(place.iterdir())
