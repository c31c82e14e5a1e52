"""How a picture and a text become model input, as a bundle says it. Opening one needs no NumPy."""

from __future__ import annotations

import msgspec

from edgeglm.data.tokenization import TextPreprocessing
from edgeglm.data.transforms import ImagePreprocessing


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``preprocessing.json``: how a picture and a text become model input."""

    image: ImagePreprocessing
    text: TextPreprocessing
