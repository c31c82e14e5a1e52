from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeglm.cli import main as cli
from tests.index.test_pictures import bundle, folder  # noqa: F401
from tests.runtime.test_retrieval import COLOURS, picture


def ran(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    found = cli.exit_code(["index", *map(str, arguments)])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out if code == 0 else captured.err


def test_a_day_with_an_index(
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    index = tmp_path / "shop.index"
    assert "3 pictures; 3 added" in ran(capsys, "build", bundle, folder, "--output", index)
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


def test_what_cannot_be_done_exits_with_2_and_a_remedy(
    bundle: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    index = tmp_path / "shop.index"
    ran(capsys, "build", bundle, folder, "--output", index)
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
