from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from edgeglm.cli import main as cli
from edgeglm.cli.cache import size_in_bytes
from edgeglm.cli.console import App, RichProgress, _columns_that_fit
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store, default_store_root
from edgeglm.core.words import human_bytes


def test_names_with_brackets_and_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    App().print("[bold] :apple: 12.5 /path/[x]")
    assert capsys.readouterr().out == "[bold] :apple: 12.5 /path/[x]\n"


def test_a_program_that_reads_a_line_gets_the_whole_of_it(capsys: pytest.CaptureFixture[str]):
    """A path was cut in two at the 160th column of a pipe."""
    path = f"/data/{'a long name of a folder/' * 12}receipt.json"
    App().print(f"chosen int8; {path}")
    App().note(f"all of it is kept: {path}")
    printed = capsys.readouterr()
    assert printed.out == f"chosen int8; {path}\n"
    assert printed.err == f"all of it is kept: {path}\n"


def test_a_log_gets_one_line_for_each_finished_piece_of_work():
    stream = io.StringIO()
    progress = RichProgress(RichConsole(file=stream, width=80))
    with progress.task("outer", 2) as outer:
        for _ in range(2):
            with progress.task("inner", 5) as inner:
                inner.advance(5)
                inner.note("loss 0.1")
            outer.advance()
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().startswith("outer: 2 steps in ")
    assert not progress.live


def test_a_terminal_gets_bars_that_are_gone_afterwards():
    stream = io.StringIO()
    progress = RichProgress(RichConsole(file=stream, width=100, force_terminal=True))
    with progress.task("fetching", 10) as task:
        assert progress.live
        with progress.task("nested"):
            task.advance(5)
            task.note("noto")
    assert not progress.live
    assert "fetching" in stream.getvalue()


def test_failed_work_takes_its_bar_off_the_screen():
    progress = RichProgress(RichConsole(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError), progress.task("failing", 1):
        raise RuntimeError
    assert not progress.live
    with progress.task("next"):
        assert progress.live


def test_json_prints_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    app = App(json=True)
    app.print("words")
    app.note("words")
    app.table(["a"], [("b",)])
    app.pairs([("a", "b")])
    app.emit({"path": Path("x"), "app": ("tuple",)})
    assert isinstance(app.progress, QuietProgress)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"path": "x", "app": ["tuple"]}
    assert captured.err == ""


def test_cache_lists_and_makes_room(capsys: pytest.CaptureFixture[str]):
    store = Store(default_store_root())

    def write(folder: Path) -> dict[str, int]:
        (folder / "data").write_bytes(b"x" * 1000)
        return {}

    store.put("a" * 64, "pairs", write)
    assert cli.exit_code(["cache", "list"]) == 0
    assert "pairs" in capsys.readouterr().out
    assert cli.exit_code(["cache", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["key"] == "a" * 64
    assert cli.exit_code(["cache", "gc", "--quota", "1GB"]) == 0
    assert "removed 0 entries" in capsys.readouterr().out
    assert cli.exit_code(["cache", "gc", "--quota", "0"]) == 0
    captured = capsys.readouterr()
    assert "removed 0 entries" in captured.out
    assert "are left, which running commands work with" in captured.err
    root = store.root
    del store  # whoever works with it has ended
    assert cli.exit_code(["cache", "gc", "--quota", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == entry["size_bytes"]
    assert cli.exit_code(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(root)
    assert Store(root).entries() == []


def test_a_command_has_one_store_that_holds_what_it_was_given():
    app = App()
    assert app.store() is dataclasses.replace(app, json=True).store()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("500 mb", 5 * 10**8),
        ("12", 12),
        ("12B", 12),
        ("2KiB", 2048),
    ],
)
def test_sizes_mean_what_their_units_say(text: str, size: int):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5QB", "5iB", "1e9", "5 GB extra"])
def test_an_unclear_size_removes_nothing(text: str):
    with pytest.raises(UserError, match="write it like 5GB"):
        size_in_bytes(text)


def test_sizes_are_told_in_decimal_units():
    assert [human_bytes(size) for size in (0, 999, 1000, 1_536_000, 5e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "5.0 GB",
    ]


def test_a_table_wider_than_the_terminal_is_printed_in_parts_that_repeat_the_first_column():
    headings, rows = ["target", ">a", ">b", "why"], [["jetson-agx", "1" * 20, "2" * 20, "word " * 40]]
    assert _columns_that_fit(headings, rows, 160) == [[0, 1, 2, 3]]
    assert _columns_that_fit(headings, rows, 80) == [[0, 1, 2], [0, 3]]
    assert _columns_that_fit(headings, rows, 10) == [[0, 1], [0, 2], [0, 3]], "too narrow for any: still all"
    assert _columns_that_fit(["alone"], [], 10) == [[0]]
