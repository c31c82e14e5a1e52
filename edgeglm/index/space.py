"""An index and a bundle belong together only within one embedding space."""

from __future__ import annotations

import datetime

from edgeglm import __version__
from edgeglm.bundle.fingerprint import fingerprint_of
from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.index.records import IndexHeader


def header_for(
    bundle: Bundle, variant: str, *, precision: str = "int8", thumbnail_side: int = 0
) -> IndexHeader:
    """Return the header of an index that a variant's image tower fills. Raises UserError without one."""
    manifest = bundle.manifest
    record = bundle.variant(variant)
    if "image" not in record.files:
        raise UserError(
            f"variant {record.name} of {manifest.name} has no image tower; take a bundle that has one"
        )
    return IndexHeader(
        space=fingerprint_of(manifest, record.name),
        dimensions=manifest.towers["image"].embedding_dim,
        bundle=manifest.name,
        content_digest=manifest.content_digest,
        target=manifest.target.name,
        variant=record.name,
        model=manifest.files[record.files["image"]].sha256,
        precision=precision,
        thumbnail_side=thumbnail_side,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        edgeglm=__version__,
    )


def require_index_space(header: IndexHeader, bundle: Bundle, variant: str, index: object) -> None:
    """Raise UserError unless the variant embeds in the index's space. The message names the way out."""
    manifest = bundle.manifest
    own = fingerprint_of(manifest, variant)
    if own == header.space:
        return
    fitting = [one.name for one in manifest.variants if fingerprint_of(manifest, one.name) == header.space]
    remedy = (
        f"use --variant {fitting[0]}"
        if fitting
        else f"index the pictures again with 'edgeglm index build {bundle.origin} FOLDER --output NEW'"
    )
    raise UserError(
        f"the index {index} holds embeddings of the space {header.space[:12]} (variant {header.variant} of "
        f"{header.bundle}), variant {variant} of {manifest.name} embeds in {own[:12]}: they cannot be "
        f"compared; {remedy}"
    )
