"""Numbers as callers have them: numpy's scalars are as good as Python's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return the Python number of a scalar of numpy's, alone or in a tuple; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(plain(one) for one in value)
    return value


def make_plain(settings: Any) -> None:
    """Make the numbers of a frozen dataclass plain, for whoever writes or hands them on."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))
