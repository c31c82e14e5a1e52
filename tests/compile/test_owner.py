from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgeglm.compile.owner import alone
from edgeglm.core.errors import UserError


def test_a_bundle_on_a_medium_that_nobody_can_write_is_refused_with_the_way_to_finalize_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It said to choose another folder, for which finalize has no option."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    with (
        pytest.raises(UserError, match="Read-only file system; link the bundle into"),
        alone(tmp_path / "demo.bundle.finalized"),
    ):
        pass
