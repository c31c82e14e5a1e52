"""Weights read out of a package: a damaged one must be named as such."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.models.published import lite0_state


def test_damaged_weights_of_lite0_say_to_fetch_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.models.published.asset_member", lambda *_: b"cut off")
    source = Artifact(kind="asset", path=tmp_path, files={})
    with pytest.raises(UserError, match="fetch them again"):
        lite0_state(source)
