"""A person's own data either becomes pairs, or the very line that is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import DataConfig
from edgeglm.core.stage import Context, StageResult
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.data.records import BadRecords, records_of
from edgeglm.data.sources import pairs_inputs, pairs_stage
from tests.synthetic import drawn, write_synthetic_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic_folder(tmp_path / "own", count=40)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def built(
    path: Path, store: Store, *, source: str = "folder", skip_bad: bool = False, seed: int = 0
) -> StageResult:
    data = DataConfig(
        source="parquet" if source == "parquet" else "folder",
        path=str(path),
        image_size=24,
        skip_bad=skip_bad,
    )
    inputs = pairs_inputs(data, store, QuietProgress())
    return pairs_stage(data, seed=seed)(inputs, Context(store=store, progress=QuietProgress()))


def append(folder: Path, line: str) -> None:
    with (folder / "pairs.jsonl").open("a") as file:
        file.write(line + "\n")


def test_a_folder_becomes_pairs_with_a_tenth_held_out(folder: Path, store: Store) -> None:
    pairs = PairSet.open(built(folder, store).artifact)
    assert len(pairs) == 40
    assert len(pairs.by_role("held")) == 4
    track = pairs.track("held-out")
    assert sorted(track.gallery) == pairs.by_role("held").tolist()
    assert {query.text for query in track.queries}.isdisjoint(pairs.training_texts())


def test_a_moved_folder_is_reused_and_a_changed_image_is_not(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    built(folder, store)
    shutil.copytree(folder, tmp_path / "moved")
    assert built(tmp_path / "moved", store).reused
    Image.new("RGB", (9, 9)).save(tmp_path / "moved" / "images" / "red-circle.png")
    assert not built(tmp_path / "moved", store).reused


def test_copies_and_shared_captions_stay_on_one_side(folder: Path, store: Store) -> None:
    for i in range(10):
        shutil.copy(folder / "images" / "red-circle.png", folder / "images" / f"copy-{i}.png")
        append(folder, json.dumps({"image": f"images/copy-{i}.png", "text": f"copy number {i}"}))
        append(folder, json.dumps({"image": f"images/copy-{i}.png", "text": "a red circle"}))
    for seed in range(4):
        pairs = PairSet.open(built(folder, store, seed=seed).artifact)
        assert len(pairs) == 50
        assert not pairs.overlap(pairs.by_role("labelled").tolist())
        assert len({row.role for row in pairs.rows if "a red circle" in row.captions}) == 1


@pytest.mark.parametrize("way", ["again", "smaller", "jpeg"])
def test_what_looks_the_same_stays_on_one_side(tmp_path: Path, store: Store, way: str) -> None:
    folder = write_synthetic_folder(tmp_path / "large", count=40, size=320)
    for file in sorted((folder / "images").glob("*-square.png")):
        other = folder / "images" / f"second-{file.stem}{'.jpg' if way == 'jpeg' else '.png'}"
        with Image.open(file) as picture:
            scaled = picture.resize((280, 280), Image.Resampling.LANCZOS) if way == "smaller" else picture
            scaled.save(other, quality=85)
        append(folder, json.dumps({"image": f"images/{other.name}", "text": f"the {file.stem} once more"}))
    for seed in range(4):
        pairs = PairSet.open(built(folder, store, seed=seed).artifact)
        role = {row.id: row.role for row in pairs.rows}
        seconds = [name for name in role if "second-" in name]
        assert len(seconds) == 5
        for name in seconds:
            first = name.replace("second-", "").replace(".jpg", ".png")
            assert role[name] == role[first], "a copy of a held image would be trained on"


def test_pictures_without_a_text_train_unlabelled_and_copies_of_others_do_not(
    folder: Path, store: Store
) -> None:
    (folder / "unlabelled" / "more").mkdir(parents=True)
    for i, shape in enumerate(("circle", "square", "ring", "cross")):
        Image.fromarray(drawn(shape, "blue", 40, target=True)).save(folder / f"unlabelled/more/{i}.PNG")
    shutil.copy(folder / "images" / "red-circle.png", folder / "unlabelled" / "known.png")
    Image.fromarray(drawn("bar", "grey", 40, target=True)).save(folder / "images" / "lone.png")
    append(folder, json.dumps({"image": "images/lone.png"}))
    (folder / "unlabelled" / "readme.txt").write_text("no picture")
    pairs = PairSet.open(built(folder, store).artifact)
    unlabelled = [pairs.rows[i] for i in pairs.by_role("unlabelled").tolist()]
    assert {row.id for row in unlabelled} == {
        "own/images/lone.png", *(f"own/unlabelled/more/{i}.PNG" for i in range(4))
    }  # fmt: skip
    assert {row.domain for row in unlabelled} == {"unlabelled"}
    assert all(row.text == "" and row.captions == () for row in unlabelled)
    assert pairs.summary["unlabelled_copies_left_out"] == 1
    assert len(pairs.images) == len(pairs) == 45
    assert pairs.summary["held"] == 4


def test_hidden_files_are_no_unlabelled_pictures_and_a_browsers_jpeg_is_one(folder: Path) -> None:
    """What a Mac copies along ended the build as a picture that cannot be read; ``.jfif`` was passed over."""
    (folder / "unlabelled" / ".trash").mkdir(parents=True)
    for name in ("._one.png", ".trash/two.png"):
        (folder / "unlabelled" / name).write_bytes(b"\0\5\26\7")
    Image.fromarray(drawn("ring", "blue", 40)).save(folder / "unlabelled" / "one.JFIF", "JPEG")
    found = [record.name for record in records_of(folder / "pairs.jsonl", BadRecords(skip=False))]
    assert [name for name in found if name.startswith("unlabelled/")] == ["unlabelled/one.JFIF"]


def test_a_line_may_say_of_what_kind_its_picture_is(folder: Path, store: Store) -> None:
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    told = [{**line, "category": " round ", "subcategory": "a  circle"} for line in lines[:1]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*told, *lines[1:]])))
    pairs = PairSet.open(built(folder, store).artifact)
    kinds = {(row.category, row.subcategory) for row in pairs.rows}
    assert kinds == {("round", "a circle"), ("", "")}


def test_broken_json_names_its_line(folder: Path, store: Store) -> None:
    append(folder, '{"image": "images/red-circle.png", "text": ')
    with pytest.raises(UserError, match=r"pairs\.jsonl line 41"):
        built(folder, store)


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ('{"image": "images/absent.png", "text": "x"}', "missing image", "absent.png"),
        ('{"image": "images/cut.png", "text": "x"}', "corrupt image", "cut.png"),
        ('{"image": "images/red-circle.png", "text": "  "}', "empty caption", "line 41"),
        ('{"image": "images/red-circle.png", "text": "\\u200b"}', "empty caption", "line 41"),
        ('{"image": "", "text": "x"}', "missing image", "line 41"),
        ('{"image": 5, "text": "x"}', "broken line", "line 41"),
    ],
)
def test_a_bad_pair_is_named_or_skipped_and_counted(
    folder: Path, store: Store, line: str, reason: str, words: str
) -> None:
    whole = (folder / "images" / "red-circle.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    append(folder, line)
    with pytest.raises(UserError) as caught:
        built(folder, store)
    assert words in str(caught.value)
    assert "skip_bad" in str(caught.value)
    pairs = PairSet.open(built(folder, store, skip_bad=True).artifact)
    assert len(pairs) == len(pairs.images) == 40
    assert pairs.summary["skipped"] == {reason: 1}


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "images/../../secret.png", "link.png"])
def test_a_path_that_climbs_out_is_refused_even_when_skipping(
    folder: Path, store: Store, tmp_path: Path, image: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    append(folder, json.dumps({"image": image, "text": "x"}))
    with pytest.raises(UserError, match=r"line 41.*climbs out"):
        built(folder, store, skip_bad=True)


def test_one_pair_only_says_what_is_needed(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match=r"1 usable pair; retrieval needs two"):
        built(write_synthetic_folder(tmp_path / "one", count=1), store)


def test_one_caption_for_all_cannot_be_split(folder: Path, store: Store) -> None:
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({**line, "text": "A shape"}) for line in lines))
    with pytest.raises(UserError, match="share one caption"):
        built(folder, store)


def test_a_missing_folder_or_list_says_what_to_make(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match=r"no folder at .*pairs\.jsonl"):
        built(tmp_path / "absent", store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file at .*one JSON object a line"):
        built(tmp_path / "empty", store)
    (tmp_path / "pairs.csv").write_text("image,text\n")
    with pytest.raises(UserError, match=r"pairs\.csv is a file, .*name ends in \.parquet; give one of these"):
        built(tmp_path / "pairs.csv", store)
    with pytest.raises(UserError, match=r"needs data\.path"):
        pairs_inputs(DataConfig(source="folder"), store, QuietProgress())


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet_gives_the_same_pairs_as_the_folder(folder: Path, store: Store, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    images = [line["image"] for line in lines]
    if form != "path":
        images = [(folder / image).read_bytes() for image in images]
    if form == "struct":
        images = [{"bytes": image, "path": None} for image in images]
    table = pyarrow.table({"image": images, "text": [line["text"] for line in lines]})
    parquet.write_table(table, folder / "own.parquet")
    pairs = PairSet.open(built(folder / "own.parquet", store, source="parquet").artifact)
    assert {row.text for row in pairs.rows} == {line["text"] for line in lines}
    by_text = {row.text: pairs.images[i] for i, row in enumerate(pairs.rows)}
    reference = PairSet.open(built(folder, store).artifact)
    for i, row in enumerate(reference.rows):
        assert (reference.images[i] == by_text[row.text]).all()


def test_a_parquet_file_that_is_none_or_lacks_a_column_is_named(folder: Path, store: Store) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "junk.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(UserError, match=r"junk\.parquet is not a whole Parquet file"):
        built(folder / "junk.parquet", store, source="parquet")
    parquet.write_table(pyarrow.table({"picture": ["x"], "text": ["y"]}), folder / "other.parquet")
    with pytest.raises(UserError, match="no column 'image', only picture, text; rename"):
        built(folder / "other.parquet", store, source="parquet")


@pytest.mark.parametrize("said", [[0, 1, None], [0.0, 1.0, float("nan")], [b"0", b"1", None]])
def test_numbered_kinds_begin_at_zero_and_what_is_missing_is_none(tmp_path: Path, said: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [b"x", b"y", b"z"], "text": ["a", "b", "c"], "category": said})
    parquet.write_table(table, tmp_path / "own.parquet")
    found = records_of(tmp_path / "own.parquet", BadRecords(skip=False))
    assert [record.category for record in found] == ["0", "1", ""]


def test_a_line_may_number_its_kind_or_leave_it_open(folder: Path) -> None:
    append(folder, '{"image": "images/red-circle.png", "text": "x", "category": 0, "subcategory": null}')
    *_, last = records_of(folder / "pairs.jsonl", BadRecords(skip=False))
    assert (last.category, last.subcategory) == ("0", "")


def test_a_list_of_captions_is_not_called_empty(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [b"x"], "text": [["a", "b"]]}), tmp_path / "own.parquet")
    with pytest.raises(UserError, match="row 0: the caption is of type list; write one text a row"):
        list(records_of(tmp_path / "own.parquet", BadRecords(skip=False)))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(b'{"image":"a.png","text":"t"}')), max_size=5))
def test_no_line_escapes_as_a_traceback(tmp_path: Path, lines: list[bytes]) -> None:
    Image.fromarray(drawn("ring", "red", 8)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines))
    try:
        found = list(records_of(tmp_path / "pairs.jsonl", BadRecords(skip=False)))
    except UserError:
        return
    assert all(record.name == "a.png" for record in found)


@pytest.mark.parametrize(
    "other", ["cafe\u0301 8", "\uff43\uff41\uff46\u00e9 8", "caf\u00e9\u200b 8", "CAF\u00c9\u00a08"]
)
def test_one_text_in_two_encodings_stays_on_one_side(tmp_path: Path, store: Store, other: str) -> None:
    folder, rng = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        text = ("caf\u00e9 8", other)[i % 2].replace("8", str(i // 2))
        lines.append(json.dumps({"image": f"{i}.png", "text": text}))
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    pairs = PairSet.open(built(folder, store).artifact)
    roles = [row.role for row in sorted(pairs.rows, key=lambda row: int(row.id[4:-4]))]
    assert roles[::2] == roles[1::2]
    assert {len(query.relevant) for query in pairs.tracks[0].queries} == {2}
