from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeglm.cli import main as cli
from edgeglm.index.writer import IndexWriter
from scripts.fixtures.colours import COLOURS, picture
from tests.index.test_pictures import bundle, folder  # noqa: F401


def ran(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    found = cli.exit_code(["index", *map(str, arguments)])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out if code == 0 else captured.err


@pytest.fixture
def index(
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """An index of the three pictures."""
    made = tmp_path / "shop.index"
    assert "3 pictures; 3 added" in ran(capsys, "build", bundle, folder, "--output", made)
    return made


def test_a_day_with_an_index(
    index: Path,
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    found = json.loads(ran(capsys, "search", index, bundle, "--query", "green", "-k", 2, "--json"))
    assert found["hits"][0]["id"] == "shop/green/green.png"
    assert (found["rows"], found["precision"], found["variant"]) == (3, "int8", "fp32")
    query = tmp_path / "query.png"
    query.write_bytes(picture((0, 0, 200)))
    shown = ran(capsys, "search", index, bundle, "--image", query, "-k", 1, "--where", "kind=png")
    assert "shop/blue/blue.png" in shown
    assert "unchanged" in ran(capsys, "add", index, bundle, folder)
    removed = json.loads(ran(capsys, "remove", index, "shop/red/red.png", "nobody", "--json"))
    assert (removed["removed"], removed["unknown"], removed["rows"]) == (1, 1, 2)
    assert "removed 1 rows, 1 left" in ran(capsys, "remove", index, "--where", "folder=shop/blue")


def test_a_check_tells_the_files_that_are_not_as_they_were_written(
    index: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert "3 rows, as they were written" in ran(capsys, "check", index)
    assert json.loads(ran(capsys, "check", index, "--json"))["damaged"] == []
    (file,) = index.glob("gen-*/exact.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is damaged: exact.npy; restore the index from a copy" in ran(capsys, "check", index, code=2)


def test_a_log_that_could_not_be_folded_is_told(
    index: Path,
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgeglm.index.writer.write_generation", full)
    monkeypatch.setattr(IndexWriter.__init__, "__kwdefaults__", {"fold_bytes": 1, "wait": 1.0})
    for number in range(24):  # a log that is longer than half of what it would be folded into
        (folder / f"{number}.png").write_bytes(picture((number, 2, 3)))
    for arguments in (("add", index, bundle, folder), ("remove", index, "shop/1.png")):
        assert cli.exit_code(["index", *map(str, arguments)]) == 0
        assert "the log could not be folded: " in capsys.readouterr().err
    told = json.loads(ran(capsys, "remove", index, "shop/red/red.png", "--json"))
    assert "free some space" in told["unfolded"]


def test_an_empty_folder_prunes_nothing_unless_that_is_said(
    index: Path,
    bundle: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "mount" / "shop").mkdir(parents=True)
    asked = ("add", index, bundle, tmp_path / "mount" / "shop")
    assert "or give --allow-empty" in ran(capsys, *asked, "--prune", code=2)
    assert "give --prune too" in ran(capsys, *asked, "--allow-empty", code=2)
    assert "0 pictures; 0 added, 3 removed" in ran(capsys, *asked, "--prune", "--allow-empty")


def test_what_cannot_be_done_exits_with_2_and_a_remedy(
    index: Path,
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    for arguments, why in (
        (("build", bundle, folder, "--output", index), "edgeglm index add"),
        (("search", index, bundle), "either --query TEXT or --image FILE"),
        (("search", index, bundle, "--query", "a\udcff"), "no Unicode"),
        (("search", index, bundle, "--query", "red", "--variant", "int8"), "use --variant fp32"),
        (("search", index, bundle, "--query", "red", "--where", "kind"), "field=value"),
        (("search", index, bundle, "--query", "red", "--where", "knd=png"), "did you mean 'kind'"),
        (("remove", index), "either IDS or --where"),
        (("remove", tmp_path / "none", "a"), "edgeglm index build"),
    ):
        assert why in ran(capsys, *arguments, code=2)
    assert len(COLOURS) == 3


def test_a_caption_that_the_terminal_has_no_letters_for_ends_no_search(
    index: Path,
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Such as Chinese under a locale of ISO 8859-1; what --json prints is UTF-8 for whoever reads it."""
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"image": "red/red.png", "text": "红苹果 é"}\n', "utf-8")
    ran(capsys, "add", index, bundle, folder, "--metadata", lines)
    command = [sys.executable, "-m", "edgeglm.cli.main", "index", "search", str(index), str(bundle)]
    for more in ((), ("--json",)):
        done = subprocess.run(
            [*command, "--query", "red", "-k", "1", *more],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "iso-8859-1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if more:
            assert json.loads(done.stdout.decode("utf-8"))["hits"][0]["metadata"]["text"] == "红苹果 é"
        else:
            assert "??? é" in done.stdout.decode("iso-8859-1")
