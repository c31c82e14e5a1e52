"""Which embedding space a variant's vectors live in.

Two vectors may be compared only within one space: the same weights, the same preprocessing, the same
tokenizer. A precision variant shares the space of the reference only when it was measured that its
queries find the reference's neighbours, and the measurement is kept in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeglm.bundle.manifest import FileRecord, Manifest, SpaceRecord, VariantRecord
from edgeglm.core.digest import sha256_json
from edgeglm.core.errors import unknown_name

FloatRows = npt.NDArray[np.float32]
TOP_K = 10


def weights_fingerprint(files: Mapping[str, FileRecord], variant: VariantRecord) -> str:
    """Return the digest of a variant's own space: its towers, the preprocessing, the tokenizer."""
    others = ("preprocessing.json", "tokenizer/tokenizer.json")
    return sha256_json(
        {
            "towers": {tower: files[name].sha256 for tower, name in variant.files.items()},
            **{name: files[name].sha256 for name in others if name in files},
        }
    )


def space_record(
    files: Mapping[str, FileRecord], variants: tuple[VariantRecord, ...], measured: SpaceRecord
) -> SpaceRecord:
    """Return the record with the fingerprint of every variant filled in.

    A variant whose measured agreement reaches the gate has the reference's, any other its own.
    """
    reference = next((variant for variant in variants if variant.gate == "reference"), None)
    shared = weights_fingerprint(files, reference) if reference else ""
    fingerprints = {
        variant.name: shared
        if reference and measured.agreement.get(variant.name, 0.0) >= measured.gate
        else weights_fingerprint(files, variant)
        for variant in variants
    }
    if reference:
        fingerprints[reference.name] = shared
    return SpaceRecord(agreement=measured.agreement, gate=measured.gate, fingerprints=fingerprints)


def fingerprint_of(manifest: Manifest, variant: str | None = None) -> str:
    """Return the fingerprint of a variant's space. Raises UserError if unknown."""
    name = variant or manifest.default_variant
    known = {record.name: record for record in manifest.variants}
    if name not in known:
        raise unknown_name("variant", name, known)
    return manifest.space.fingerprints.get(name) or weights_fingerprint(manifest.files, known[name])


def cross_agreement(queries: FloatRows, reference_queries: FloatRows, gallery: FloatRows) -> float:
    """Return how far a variant's queries find the reference's neighbours in the reference's gallery.

    Args:
        queries: float32 [N, D], embedded by the variant.
        reference_queries: float32 [N, D], the same inputs by the reference.
        gallery: float32 [G, D], by the reference.

    Returns:
        The mean share of the ten nearest rows that are the same, 0 for rows that are not finite.
    """
    if queries.shape != reference_queries.shape or len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"cannot compare {queries.shape} with {reference_queries.shape} on {gallery.shape}")
    k = min(TOP_K, len(gallery))
    shares = []
    for one, other in zip(queries @ gallery.T, reference_queries @ gallery.T, strict=True):
        if not np.isfinite(one).all():
            shares.append(0.0)
            continue
        best = set(np.argsort(-other, kind="stable")[:k].tolist())
        shares.append(len(best & set(np.argsort(-one, kind="stable")[:k].tolist())) / k)
    return float(np.mean(shares))
