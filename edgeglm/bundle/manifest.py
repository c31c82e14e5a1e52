"""The manifest: what a bundle says of itself. It is read before any other byte is believed.

The content digest covers what decides behaviour, so that two builds of the same recipe agree in it
although they ran at other times, in other folders and for other minutes. It is the sha256 of
``{path: sha256}`` over these files:

    models/**            every ONNX file of every variant
    tokenizer/**         the tokenizer
    reranker/**          the fused re-ranker, where the recipe has one
    golden/**            raw golden inputs and reference outputs
    gallery/embeddings-*.npy, gallery/items.jsonl   what a query is compared with, and the rows' names
    preprocessing.json, calibration.json, precision_plan.json, recipe.toml, target.toml

and over nothing else: not the manifest (dates, timings, library versions), not signatures.json and
bom.cdx.json, not costs/** (figures about the models), not engines/** (plans
are not reproducible), not metrics.json and report.html (they hold latencies), not thumbnails,
licences.json or NOTICE.md (they change no answer).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from edgeglm.bundle.paths import check_names
from edgeglm.core.digest import canonical_json, sha256_listing
from edgeglm.core.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIGNATURES_NAME = "signatures.json"
"""Lies beside the manifest and is not listed in it, since it signs it."""
MAX_MANIFEST_BYTES = 32 << 20

_DECISIVE_FOLDERS = ("models/", "tokenizer/", "golden/", "reranker/")
_DECISIVE_FILES = frozenset(
    {
        "preprocessing.json",
        "calibration.json",
        "precision_plan.json",
        "recipe.toml",
        "target.toml",
        "gallery/items.jsonl",
    }
)

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Metrics = dict[str, Any]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all manifest records: immutable, every key known."""


class FileRecord(_Record, frozen=True, kw_only=True):
    """One file: hex sha256 and size in bytes."""

    sha256: Sha256
    size: Count


class TargetRecord(_Record, frozen=True, kw_only=True):
    """The target the bundle was made for. ``members`` are the boards of a family, ``facts`` what they are."""

    name: str
    description: str = ""
    members: tuple[str, ...] = ()
    facts: dict[str, Any] = {}


class TensorRecord(_Record, frozen=True, kw_only=True):
    """A named input or output of a tower; a free dimension is a word, as in ``["batch", 256]``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class TowerRecord(_Record, frozen=True, kw_only=True):
    """What every variant of one tower has in common. ``resolution`` is in pixels, images only."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    embedding_dim: Count
    parameters: Count
    resolution: Count | None = None


class VariantRecord(_Record, frozen=True, kw_only=True):
    """One set of towers that may be run.

    Attributes:
        name: "fp32", "fp16", "int8", ...
        files: ``{tower: path in the bundle}``.
        gate: "reference" for the one the others are measured against, "passed" for the rest; a
            candidate below the gate is not in the bundle and is listed in ``Manifest.left_out``.
        metrics: ``{track: {"map10": {"value": ...}, ...}}``, measured on these very files.
        latency: milliseconds by name, such as ``{"image_b1_ms": 3.1}``.
        lane: Which TensorRT versions parse the files: "A" those before 10, "B" the others.
    """

    name: str
    files: dict[str, str]
    gate: Literal["reference", "passed"]
    metrics: Metrics = {}
    latency: dict[str, float] = {}
    lane: Literal["A", "B"] = "B"


class LeftOutRecord(_Record, frozen=True, kw_only=True):
    """A candidate that did not pass, with the reason in words, and the figures of its best files if any."""

    name: str
    reason: str
    metrics: Metrics = {}


class StageRecord(_Record, frozen=True, kw_only=True):
    """The provenance of one stage. ``inputs`` and ``artifact`` are artifact digests.

    ``seconds`` are those of the run that made the artifact. Whether it was ``reused`` since is no part of a
    bundle: older bundles say it of every stage, always falsely, and are read.
    """

    name: str
    config: dict[str, Any]
    inputs: dict[str, Sha256]
    artifact: Sha256
    libraries: dict[str, str] = {}
    seconds: Seconds = 0.0
    reused: bool | msgspec.UnsetType = msgspec.UNSET
    metrics: Metrics = {}


class LicenceRecord(_Record, frozen=True, kw_only=True):
    """A source whose terms travel with the bundle."""

    name: str
    version: str
    licence: str
    attribution: str
    url: str | None = None


class SpaceRecord(_Record, frozen=True, kw_only=True):
    """In which embedding space each variant's vectors live.

    Attributes:
        agreement: ``{variant: mean top-10 agreement of its queries with the reference's}``.
        gate: The agreement from which a variant shares the reference's space.
        fingerprints: ``{variant: fingerprint}``, filled in by ``write_bundle``.
    """

    agreement: dict[str, Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]] = {}
    gate: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.9
    fingerprints: dict[str, Sha256] = {}


class Manifest(_Record, frozen=True, kw_only=True):
    """The whole manifest.

    ``files``, ``content_digest`` and the fingerprints of ``space`` are filled in by ``write_bundle``.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    name: str
    created: str
    edgeglm: str
    target: TargetRecord
    default_variant: str
    variants: tuple[VariantRecord, ...]
    towers: dict[str, TowerRecord]
    left_out: tuple[LeftOutRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    licences: tuple[LicenceRecord, ...] = ()
    seeds: dict[str, int] = {}
    space: SpaceRecord = SpaceRecord()
    files: dict[str, FileRecord] = {}
    content_digest: str = ""

    @property
    def size(self) -> int:
        """Bytes of all listed files together."""
        return sum(record.size for record in self.files.values())


class _Version(msgspec.Struct):
    """The one field that every schema has."""

    schema_version: int


def decides_behaviour(name: str) -> bool:
    """Say whether the file of this name enters the content digest."""
    return (
        name.startswith(_DECISIVE_FOLDERS)
        or name in _DECISIVE_FILES
        or (name.startswith("gallery/embeddings-") and name.endswith(".npy"))
    )


def content_digest(files: Mapping[str, FileRecord]) -> str:
    """Return the hex sha256 over names and contents of the files that decide behaviour."""
    return sha256_listing({name: r.sha256 for name, r in files.items() if decides_behaviour(name)})


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest, indented, keys in the order of their declaration, files by name.

    Raises ValueError for a manifest that would not be read back (NaN, missing files, bad names).
    """
    ordered = msgspec.structs.replace(manifest, files=dict(sorted(manifest.files.items())))
    canonical_json(msgspec.to_builtins(ordered))  # refuses NaN, which the encoder would turn into null
    data = msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n"
    try:
        manifest_from_bytes(data, "the manifest")
    except UserError as error:
        raise ValueError(str(error)) from error
    return data


def manifest_from_bytes(data: bytes, origin: str) -> Manifest:
    """Parse and check a manifest. Raises UserError that names the key, or the newer schema."""
    remedy = "the bundle is damaged, get it again"
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{origin} is larger than {MAX_MANIFEST_BYTES} bytes; {remedy}")
    try:
        found = msgspec.json.decode(data, type=_Version).schema_version
        if found > SCHEMA_VERSION:
            raise UserError(
                f"{origin}: bundle schema {found} is newer than this edgeglm understands "
                f"({SCHEMA_VERSION}); upgrade edgeglm"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin} is not a bundle manifest: {error}; {remedy}") from error
    _check(manifest, origin, remedy)
    return manifest


def _check(manifest: Manifest, origin: str, remedy: str) -> None:
    check_names((MANIFEST_NAME, SIGNATURES_NAME, *manifest.files), origin)
    if manifest.content_digest != content_digest(manifest.files):
        raise UserError(f"{origin}: the content digest does not fit the listed files; {remedy}")
    try:
        datetime.datetime.fromisoformat(manifest.created.replace("Z", "+00:00"))
    except ValueError as error:
        raise UserError(f"{origin}: created is {manifest.created!r}, no ISO date; {remedy}") from error
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) != len(names) or manifest.default_variant not in names:
        raise UserError(
            f"{origin}: default variant {manifest.default_variant!r} is not one of the distinct "
            f"variants {names}; {remedy}"
        )
    for variant in manifest.variants:
        for tower, name in variant.files.items():
            if tower not in manifest.towers or name not in manifest.files:
                raise UserError(
                    f"{origin}: variant {variant.name!r} names {name!r} for tower {tower!r}, "
                    f"which the manifest does not list; {remedy}"
                )
