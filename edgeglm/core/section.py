"""What every table of a recipe is made of."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec

_MOST = sys.float_info.max  # infinity is a float, but nothing that can be computed with, or written as JSON

Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
#: Of what is dropped: of 1 nothing would be left to learn from.
Dropped = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0.0, le=_MOST)]
Weight = Annotated[float, msgspec.Meta(ge=0.0, le=_MOST)]
#: What every generator of random numbers takes.
Seed = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all recipe tables: immutable, every key known."""
