"""If these fail, a command removes what a user keeps in the folder that it is told to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.bundle.atomic import require_ours
from edgeglm.core.errors import UserError


@pytest.mark.parametrize("held", [None, (), ("record.json",), ("record.json", "data.npz")])
def test_a_folder_is_written_if_it_is_absent_empty_or_ours(
    tmp_path: Path, held: tuple[str, ...] | None
) -> None:
    out = tmp_path / "out"
    if held is not None:
        out.mkdir()
    for name in held or ():
        (out / name).touch()
    require_ours(out, "record.json", ("data.npz",), inputs=[tmp_path / "out.npz", tmp_path])
    assert {path.name for path in out.glob("*")} == set(held or ())


@pytest.mark.parametrize("held", [("data.npz",), ("thesis.txt",), ("record.json", "thesis.txt")])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, held: tuple[str, ...]) -> None:
    for name in held:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{held[-1]}.*choose another --output"):
        require_ours(tmp_path, "record.json", ("data.npz",))


def test_a_folder_with_an_input_in_it_is_refused_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for given in (tmp_path / "out", tmp_path / "out" / "a" / "model.onnx", tmp_path / "link" / "model.onnx"):
        with pytest.raises(UserError, match="lies in"):
            require_ours(tmp_path / "out", "record.json", (), inputs=[given])


def test_a_file_and_a_link_are_no_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="no folder"):
            require_ours(tmp_path / name, "record.json", ())
