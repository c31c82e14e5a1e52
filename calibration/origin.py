"""Where calibration samples came from, as plans and reports tell it."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeglm.calibration.sets import RECORD_NAME, CalibrationSet, Disjointness
from edgeglm.core.digest import sha256_file


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file was calibrated on.

    Attributes:
        source: "training", "random", or "arrays" for samples that were given without a record.
        set_sha256: Of the set's record, which holds the digest of every sample and of the preprocessing.
        disjointness: The proof against evaluation samples; None where there is no record.
    """

    source: Literal["training", "random", "arrays"] = "arrays"
    set_sha256: str = ""
    disjointness: Disjointness | None = None

    @property
    def sentence(self) -> str:
        """What a plan says of it."""
        if self.source == "arrays":
            return "samples without a record"
        words = "RANDOM NUMBERS, not samples" if self.source == "random" else "training samples"
        proof = self.disjointness
        held = (
            f", none among {proof.evaluation_samples} evaluation samples"
            if proof is not None and proof.evaluation_samples
            else ", not held against evaluation samples"
        )
        return f"{words}, set {self.set_sha256[:12]}{held if self.source == 'training' else ''}"


def origin_of(found: CalibrationSet, tower: str) -> Origin:
    """Return the origin of one tower's samples."""
    return Origin(
        source="random" if found.record.source == "random" else "training",
        set_sha256=sha256_file(found.folder / RECORD_NAME),
        disjointness=found.record.towers[tower].disjointness,
    )
