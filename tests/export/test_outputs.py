"""If these fail, a disk that fills up costs the model that lay where the new one was to go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgeglm.core.errors import UserError
from edgeglm.export.outputs import write_file


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_file(tmp_path / "model.onnx", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        write_file(old, b"new")
    assert (old.read_bytes(), list(tmp_path.iterdir())) == (b"old", [old])


def test_a_written_file_keeps_its_mode_and_a_link_its_aim(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "real.onnx").chmod(0o640)
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    write_file(tmp_path / "link.onnx", b"new")
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").read_bytes() == b"new"
    assert (tmp_path / "real.onnx").stat().st_mode & 0o777 == 0o640
    assert write_file(Path(os.devnull), b"gone").is_char_device()
