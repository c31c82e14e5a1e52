from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.index.opening import FolderSource, added_to_index, built_index
from edgeglm.index.picture_files import metadata_from_jsonl
from edgeglm.index.pictures import thumbnail_of
from edgeglm.index.records import metadata_of
from edgeglm.index.vector_index import VectorIndex, header_of
from edgeglm.index.writer import IndexWriter
from scripts.fixtures.colours import COLOURS, colour_bundle, colour_tower, picture

QUIET = QuietProgress()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts: dict[str, bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=1.0 if variant == "fp32" else 2.0)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    return colour_bundle(tmp_path_factory.mktemp("bundle") / "colours", **parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "shop" / name).mkdir(parents=True)
        (tmp_path / "shop" / name / f"{name}.png").write_bytes(picture(colour))
    (tmp_path / "shop" / "notes.txt").write_text("no picture, and none by its name")
    return tmp_path / "shop"


def build(bundle: Path, folder: Path, output: Path, **given):
    with open_bundle(bundle) as opened:
        return built_index(opened, FolderSource(folder=folder, **given), output, QUIET)


def add(bundle: Path, folder: Path, index: Path, **given):
    with open_bundle(bundle) as opened:
        return added_to_index(opened, FolderSource(folder=folder, **given), index, QUIET)


def test_a_folder_is_found_by_colour_with_its_names_and_pictures(bundle: Path, folder: Path, tmp_path: Path):
    extra = tmp_path / "more.jsonl"
    extra.write_text(json.dumps({"image": "red/red.png", "text": "a red thing", "price": 3}) + "\n\n")
    counts = build(bundle, folder, tmp_path / "index", metadata=metadata_from_jsonl(extra))
    assert (counts.added, counts.skipped) == (3, {})
    with VectorIndex(tmp_path / "index") as index:
        (match,) = index.search(np.array([[1.0, 0.1, 0.1]], np.float32), 1)[0]
        assert match.id == "shop/red/red.png"
        assert match.metadata["text"] == "a red thing"
        assert match.metadata["folder"] == "shop/red"
        assert match.metadata["price"] == 3
        data = index.picture(match.id)
        assert data is not None
        with Image.open(io.BytesIO(data)) as kept:
            assert (kept.format, kept.size) == ("WEBP", (9, 9))
        assert index.header.bundle == "colours"


def test_adding_again_embeds_only_what_has_changed_and_prunes_what_is_gone(
    bundle: Path, folder: Path, tmp_path: Path
):
    index = tmp_path / "index"
    build(bundle, folder, index)
    again = add(bundle, folder, index)
    assert (again.added, again.replaced, again.unchanged) == (0, 0, 3)
    (folder / "red" / "red.png").write_bytes(picture((0, 0, 255)) + b" ")
    (folder / "new.png").write_bytes(picture((250, 0, 0)))
    (folder / "green" / "green.png").unlink()
    changed = add(bundle, folder, index, prune=True)
    assert (changed.added, changed.replaced, changed.unchanged, changed.removed) == (1, 1, 1, 1)
    with VectorIndex(index) as found:
        assert found.search(np.array([[1.0, 0.0, 0.0]], np.float32), 1)[0][0].id == "shop/new.png"
        assert sorted(entry.id for entry in found.view().entries) == [
            "shop/blue/blue.png",
            "shop/new.png",
            "shop/red/red.png",
        ]


def said_of(index: Path) -> dict[str, dict[str, object]]:
    with VectorIndex(index) as found:
        return {entry.id: metadata_of(entry.metadata) for entry in found.view().entries}


def test_what_was_said_of_a_picture_stays_until_something_else_is_said(
    bundle: Path, folder: Path, tmp_path: Path
):
    index, shop = tmp_path / "index", "shop/red/red.png"
    build(
        bundle,
        folder,
        index,
        metadata={"red/red.png": {"text": "mine", "name": "R"}, "blue/blue.png": {"n": 1}},
    )
    assert add(bundle, folder, index, prune=True).unchanged == 3
    (folder / "red" / "red.png").write_bytes(picture((0, 0, 255)) + b" ")
    assert add(bundle, folder, index, metadata={"blue/blue.png": {"n": 2}}).replaced == 2
    (folder / "blue" / "blue.png").write_bytes(picture((0, 0, 255)) + b"  ")
    assert add(bundle, folder / "blue" / "blue.png", index).replaced == 1
    said = said_of(index)
    assert (said[shop]["text"], said[shop]["name"], said["shop/blue/blue.png"]["n"]) == ("mine", "R", 2)
    assert said[shop]["bytes"] == (folder / "red" / "red.png").stat().st_size
    assert add(bundle, folder, index).unchanged == 3
    assert add(bundle, folder, index, metadata={"red/red.png": {}}).replaced == 1
    assert "text" not in said_of(index)[shop]
    with pytest.raises(UserError, match=r"say nothing of .* call it 'red.png' there"):
        add(bundle, folder / "red" / "red.png", index, metadata={"red/red.png": {"text": "x"}})


def test_bad_files_stop_with_their_name_or_are_counted(bundle: Path, folder: Path, tmp_path: Path):
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(picture((1, 2, 3))[:40])
    (folder / "page.jpg").write_bytes(b"<script>alert(1)</script>")
    (folder / "link.png").symlink_to("/etc/hostname")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(picture((1, 2, 3)))
    with pytest.raises(UserError, match="--skip-bad"):
        build(bundle, folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    counts = build(bundle, folder, tmp_path / "index", skip_bad=True)
    assert counts.added == 3
    assert counts.skipped == {"link": 1, "name is not UTF-8": 1, "not a readable picture": 3}
    assert len(counts.examples) == 5


def test_a_folder_that_cannot_be_listed_is_told_and_nothing_of_it_is_pruned(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, scandir = tmp_path / "index", os.scandir
    build(bundle, folder, index)

    def closed(path: str) -> object:
        if Path(path).name == "red":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"shop/red: Permission denied, or give --skip-bad"):
        add(bundle, folder, index)
    with pytest.raises(UserError, match="leave --prune out"):
        add(bundle, folder, index, prune=True, skip_bad=True)
    assert add(bundle, folder, index, skip_bad=True).skipped == {"unreadable": 1}
    assert len(said_of(index)) == 3


@pytest.mark.parametrize("prefix", ["old/shop/", "/old//shop"])
def test_a_slash_too_many_in_a_prefix_does_not_keep_every_picture_twice(
    bundle: Path, folder: Path, tmp_path: Path, prefix: str
):
    index = tmp_path / "index"
    build(bundle, folder, index, prefix="old/shop")
    again = add(bundle, folder, index, prefix=prefix, prune=True)
    assert (again.unchanged, again.added, again.removed) == (3, 0, 0)


def test_a_folder_whose_name_is_not_utf8_is_told_how_it_can_be_taken(
    bundle: Path, folder: Path, tmp_path: Path
):
    odd = folder.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    with pytest.raises(UserError, match=r"the name of the folder, .* give another --prefix"):
        build(bundle, odd, tmp_path / "index", skip_bad=True)
    with pytest.raises(UserError, match=r"the prefix, .* give another --prefix"):
        build(bundle, odd, tmp_path / "index", prefix=odd.name)
    assert build(bundle, odd, tmp_path / "index", prefix="cafe").added == 3


@pytest.mark.parametrize("left", ["nothing", "no picture"])
def test_a_folder_whose_mount_is_not_there_prunes_nothing_unless_that_is_meant(
    bundle: Path, folder: Path, tmp_path: Path, left: str
):
    index = tmp_path / "index"
    build(bundle, folder, index)
    shutil.rmtree(folder)
    folder.mkdir()
    if left == "no picture":
        (folder / "MOUNT-HERE.txt").write_text("the share goes here")
    with pytest.raises(UserError, match="mount what belongs there, or give --allow-empty"):
        add(bundle, folder, index, prune=True)
    assert len(said_of(index)) == 3
    with pytest.raises(UserError, match=r"give a folder that does$"):
        add(bundle, folder, index, allow_empty=True)
    assert add(bundle, folder, index, prune=True, allow_empty=True).removed == 3
    assert said_of(index) == {}


def test_pictures_of_every_kind_are_taken(bundle: Path, tmp_path: Path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.new("I;16", (9, 9), 65535).save(folder / "deep.png")
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(folder / "clear.webp")
    frames = [Image.new("RGB", (9, 9), colour) for colour in COLOURS.values()]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    assert build(bundle, folder, tmp_path / "index").added == 4


def test_another_embedding_space_is_refused_and_the_way_out_named(bundle: Path, folder: Path, tmp_path: Path):
    index = tmp_path / "index"
    build(bundle, folder, index)
    with open_bundle(bundle) as opened, pytest.raises(UserError, match="use --variant fp32"):
        added_to_index(opened, FolderSource(folder=folder), index, QUIET, variant="int8")
    other = colour_bundle(
        tmp_path / "other",
        **{f"models/{v}/{t}.onnx": colour_tower(t, scale=3.0) + b"" for v in ("fp32",) for t in ("text",)},
        **{"models/fp32/image.onnx": colour_tower("image"), "models/int8/image.onnx": colour_tower("image")},
    )
    with pytest.raises(UserError, match=r"index build .*other FOLDER --output NEW"):
        add(other, folder, index)
    assert header_of(index).variant == "fp32"


def test_bad_input_leaves_no_index_behind(bundle: Path, folder: Path, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: build(bundle, tmp_path / "nowhere", tmp_path / "i"), "there is no folder"),
        (lambda: build(bundle, tmp_path / "bare", tmp_path / "i"), "holds no pictures"),
        (lambda: add(bundle, folder, tmp_path / "i"), "there is no index"),
    ]
    for call, why in cases:
        with pytest.raises(UserError, match=why):
            call()
        assert not (tmp_path / "i").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "a.png"}\n{"text": "no image"}\n')
    with pytest.raises(UserError, match="line 2"):
        metadata_from_jsonl(bad)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "red/../../secret.png", ".."])
def test_metadata_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str):
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps({"image": name, "text": "mine"}) + "\n")
    with pytest.raises(UserError, match=r"line 1: .* leads out of the folder"):
        metadata_from_jsonl(lines)


def test_metadata_of_no_picture_are_counted_and_named(bundle: Path, folder: Path, tmp_path: Path):
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"image": "red/red.png", "n": 1}\n{"image": "rde/red.png", "n": 2}\n', "utf-8-sig")
    counts = build(bundle, folder, tmp_path / "index", metadata=metadata_from_jsonl(lines))
    assert (counts.added, counts.unmatched) == (3, 1)
    assert "'rde/red.png'" in counts.examples[0]


def test_one_picture_takes_the_place_of_its_former_self(bundle: Path, folder: Path, tmp_path: Path):
    index = tmp_path / "index"
    build(bundle, folder, index)
    (folder / "red" / "red.png").write_bytes(picture((0, 0, 255)) + b" ")
    counts = add(bundle, folder / "red" / "red.png", index)
    assert (counts.added, counts.replaced) == (0, 1)
    (folder / "new.png").write_bytes(picture((250, 0, 0)))
    assert add(bundle, folder / "new.png", index).added == 1
    with VectorIndex(index) as found:
        assert "shop/new.png" in {entry.id for entry in found.view().entries}
        assert len(found) == 4
    with pytest.raises(UserError, match="give a folder to prune"):
        add(bundle, folder / "new.png", index, prune=True)


def test_an_interrupted_command_keeps_its_lock_until_what_it_was_writing_is_written(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a second writer begins, and the fold that goes on in a thread replaces what that one wrote."""
    index = tmp_path / "index"
    build(bundle, folder, index)
    (folder / "red" / "red.png").write_bytes(picture((250, 1, 1)))
    write, locked = IndexWriter.add, []

    def slow(self: IndexWriter, *given: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        try:
            with IndexWriter(index, wait=0):
                locked.append(False)
        except UserError:
            locked.append(True)
        write(self, *given)

    monkeypatch.setattr(IndexWriter, "add", slow)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            add(bundle, folder, index)
    finally:
        signal.signal(signal.SIGINT, former)
    monkeypatch.undo()
    assert locked == [True]
    assert add(bundle, folder, index).unchanged == 3, "the record was written whole"


def test_a_large_picture_is_kept_small():
    small = Image.open(io.BytesIO(thumbnail_of(Image.new("RGB", (2000, 500), (9, 9, 9)), 192)))
    assert small.size == (192, 48)
