"""edgeglm: take a pretrained teacher to a verified bundle on an edge device.

As a library, for training loops of one's own: ``from_pretrained`` and ``AdaptiveLR``. They are imported on
first use, because a device has no torch; their types are in the stub beside this file.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "from_pretrained": "edgeglm.adapt.library",
    "PretrainedModel": "edgeglm.adapt.library",
    "AdaptiveLR": "edgeglm.train.schedules",
}


def __getattr__(name: str) -> Any:
    """Return what training needs."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeglm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
