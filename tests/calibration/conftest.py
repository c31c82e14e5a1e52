from __future__ import annotations

from importlib.util import find_spec

# The device half tests the sets alone; the other tests skip themselves there.
if find_spec("modelopt") and find_spec("onnx"):
    from tests.calibration.towers import batches, fp32_dir

    __all__ = ["batches", "fp32_dir"]
