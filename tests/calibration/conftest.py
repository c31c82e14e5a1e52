from __future__ import annotations

from importlib.util import find_spec

import pytest

# The device half tests the sets alone; the other tests skip themselves there.
if find_spec("modelopt") and find_spec("onnx"):
    from tests.calibration.candidates import calibration
    from tests.calibration.towers import batches, fp32_dir

    __all__ = ["batches", "calibration", "fp32_dir"]


@pytest.fixture
def every_scheme_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small are not faster in INT8; who is faster is not what most of these tests ask."""
    for room in ("any_model", "towers"):
        monkeypatch.setattr(f"edgeglm.calibration.{room}.speedup_over", lambda *_, **__: lambda _: 1.5)
