"""The shell finalize that travels in a bundle: for boards whose Python is too old for the device half.

Xavier stays on JetPack 5 with TensorRT 8.5 and Python 3.8. What such a board lacks is worked out at
home: model inputs made of the golden inputs, the embeddings to expect, the shapes of the profiles.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.bundle.goldens import OUTPUTS, TEXTS, TOP_K
from edgeglm.bundle.manifest import Manifest, TensorRecord, VariantRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.preprocessing import Preprocessing
from edgeglm.compile.contract import precision_of, tower_profile
from edgeglm.compile.lane_record import pinned_nodes
from edgeglm.compile.route import ENOUGH, profile_bytes
from edgeglm.compile.trtexec import option_arguments
from edgeglm.core.digest import sha256_bytes, sha256_listing
from edgeglm.core.errors import UserError
from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import model_input_from_files
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.legality import options_refusal
from edgeglm.targets.schema import Lane, ResolvedTarget, Target

SCRIPT_NAME = "finalize.sh"
FOLDER = "shell"

_ANY_BATCH = "N"
"""Stands for the usual and the largest batch, which a board's options say."""
_LANES: tuple[Lane, ...] = ("A", "B")
_GOLDENS = 8
_GALLERY_ROWS = 500
_WORD = re.compile(r"[A-Za-z0-9._/:,+@-]+")
"""What a here-document of the script may hold: no blank, no newline, nothing that ends or expands it."""
_DEQUANTIZE = b"\x22\x10DequantizeLinear"
"""``NodeProto.op_type`` as it stands in an ONNX file: field 4, 16 characters. A device has no onnx."""


def jetsons(target: ResolvedTarget) -> list[Target]:
    """Return the members whose engines the script builds."""
    return [m for m in target.members if m.builder == "tensorrt" and m.arch == "aarch64" and m.sm]


def shell_sources(bundle: Bundle, target: ResolvedTarget) -> dict[str, bytes]:
    """Return the files of the shell finalize, ``{path in the bundle: content}``.

    Args:
        bundle: The bundle as written without them; write it again with these among its sources.
        target: Its target.

    Raises:
        UserError: no member of the target is a Jetson, the bundle has no goldens, or the manifest does
            not say what the towers take.
    """
    boards = jetsons(target)
    sms = sorted({member.sm for member in boards if member.sm})
    if not sms:
        raise UserError(f"{target.target.name} has no Jetson among its members; leave {SCRIPT_NAME} out")
    manifest = bundle.manifest
    feeds, files = _golden_feeds(bundle)
    lines, digests, models = [], {}, {}
    for variant in manifest.variants:
        if variant.gate == "reference" and len(manifest.variants) > 1:
            continue
        nodes = pinned_nodes(bundle, variant)
        for tower, model in sorted(variant.files.items()):
            expected = f"{FOLDER}/{variant.name}-{tower}.txt"
            recorded = _recorded(bundle, variant, tower, len(next(iter(feeds[tower].values()))))
            files[expected] = _expected(recorded)
            pins = f"{FOLDER}/{variant.name}-{tower}.fp32"
            if names := nodes.get(model, ()):
                files[pins] = "\n".join([*names, ""]).encode()
            near, nearest = f"{FOLDER}/{variant.name}-{tower}.near", _nearest(bundle, variant, recorded)
            if nearest is not None:
                files[near] = nearest
                digests[_gallery(variant)] = manifest.files[_gallery(variant)].sha256
            beside = (pins if names else "-", near if nearest is not None else "-")
            lines.append(_candidate(manifest, variant, tower, model, expected, beside, feeds[tower], bundle))
            digests[model] = models[model] = manifest.files[model].sha256
    digests.update({name: sha256_bytes(data) for name, data in files.items()})
    script = (importlib.resources.files("edgeglm.compile") / SCRIPT_NAME).read_text("utf-8")
    for mark, text in (
        ("NAME", _plain(manifest.name)),
        ("CONTENT", sha256_listing(models)),
        ("TARGET", _plain(target.target.name)),
        ("SMS", " ".join(map(str, sms))),
        ("OPTIONS", "\n".join(_options(boards))),
        ("DIGESTS", "\n".join(f"{digest}  {name}" for name, digest in sorted(digests.items()))),
        ("CANDIDATES", "\n".join(lines)),
    ):
        script = script.replace(f"@{mark}@", text)
    return {SCRIPT_NAME: script.encode(), **files}


def _options(boards: Sequence[Target]) -> Iterator[str]:
    """Yield what each board's builder is asked for on each lane that it can have, the largest board first."""
    for member in sorted(boards, key=profile_bytes, reverse=True):
        options, least = member.engine or BuildOptions(), int(ENOUGH * profile_bytes(member) / 1024)
        for lane in _LANES:
            refusal = options_refusal(member, "tensorrt", (lane,))
            _, usual, largest = options.batch
            words = (
                ["no", refusal] if refusal else ["ok", str(usual), str(largest), *option_arguments(options)]
            )
            yield " ".join([str(member.sm), str(least), lane, *words])


def _golden_feeds(bundle: Bundle) -> tuple[dict[str, dict[str, npt.NDArray[Any]]], dict[str, bytes]]:
    """Return the golden inputs as model input, and the raw little-endian files that trtexec loads."""
    preprocessing = bundle.parsed("preprocessing.json", Preprocessing)
    images = [n for n in bundle.names("golden/inputs") if n.endswith((".png", ".jpg", ".jpeg", ".webp"))]
    texts = bundle.parsed(TEXTS, list[str])
    if not images or not texts:
        raise UserError(f"the bundle {bundle.origin} has no golden inputs; build it with [pack] goldens")
    pixels = model_input_from_files([bundle.file(n) for n in images[:_GOLDENS]], preprocessing.image)
    tokenizer = Tokenizer(bundle.tokenizer_path, lowercase=preprocessing.text.lowercase)
    ids, mask = tokenizer.encode(texts[:_GOLDENS], max_length=preprocessing.text.max_length)
    feeds: dict[str, dict[str, npt.NDArray[Any]]] = {
        "image": {"pixels": pixels},
        "text": {"input_ids": ids, "attention_mask": mask},
    }
    files = {}
    for name, array in (pair for tower in feeds.values() for pair in tower.items()):
        for lane in ("A", "B"):
            kept = array.astype(np.int32) if _narrowed(array, lane) else array
            files[_raw_name(name, array, lane)] = kept.astype(kept.dtype.newbyteorder("<")).tobytes()
    return feeds, files


def _narrowed(array: npt.NDArray[Any], lane: str) -> bool:
    """TensorRT before 10 has no 64-bit integers: it takes such an input as 32 bits wide."""
    return lane == "A" and array.dtype == np.int64


def _raw_name(name: str, array: npt.NDArray[Any], lane: str) -> str:
    return f"{FOLDER}/{name}{'.int32' if _narrowed(array, lane) else ''}.bin"


def _gallery(variant: VariantRecord) -> str:
    return f"gallery/embeddings-{variant.name}.npy"


def _nearest(bundle: Bundle, variant: VariantRecord, recorded: npt.NDArray[np.float32]) -> bytes | None:
    """Return where the gallery's numbers begin, and the rows nearest to each golden; None without a gallery.

    A board compares neighbours among the first rows only: its awk takes seconds for them, not minutes.
    """
    if _gallery(variant) not in bundle.manifest.files:
        return None
    gallery = bundle.gallery(variant.name).embeddings[:_GALLERY_ROWS]
    offset = bundle.manifest.files[_gallery(variant)].size - len(bundle.gallery_items()) * gallery[0].nbytes
    if bundle.file(_gallery(variant)).read_bytes()[offset : offset + gallery.nbytes] != gallery.tobytes():
        return None  # other numbers than float32, which no od of a board reads
    near = np.argsort(-(recorded @ gallery.T), axis=1, kind="stable")[:, :TOP_K]
    lines = [f"{offset} {len(gallery)} {gallery.shape[1]} {_gallery(variant)}"]
    return "\n".join([*lines, *(" ".join(map(str, row)) for row in near.tolist()), ""]).encode()


def _expected(recorded: npt.NDArray[np.float32]) -> bytes:
    numbers = (f"{value:.8g}" for value in recorded.reshape(-1))
    return "\n".join([str(recorded.shape[1]), *numbers, ""]).encode()


def _recorded(bundle: Bundle, variant: VariantRecord, tower: str, rows: int) -> npt.NDArray[np.float32]:
    with np.load(bundle.file(OUTPUTS), allow_pickle=False) as stored:
        name = f"{tower}-{variant.name}" if f"{tower}-{variant.name}" in stored.files else tower
        return np.asarray(stored[name], dtype=np.float32)[:rows]


def _candidate(
    manifest: Manifest,
    variant: VariantRecord,
    tower: str,
    model: str,
    expected: str,
    beside: tuple[str, str],
    feeds: Mapping[str, npt.NDArray[Any]],
    bundle: Bundle,
) -> str:
    longest = bundle.preprocessing.text.max_length
    profile = tower_profile(tower, BuildOptions().batch, (1, max(1, longest // 2), longest))
    inputs = {tensor.name: tensor for tensor in manifest.towers[tower].inputs}
    if inputs.keys() != feeds.keys():
        raise UserError(
            f"the manifest of {manifest.name} does not say what the {tower} tower takes; build it again"
        )
    shapes = {end: _shapes(profile, inputs, end) for end in ("min", "opt", "max")}
    one = ",".join(f"{name}:{_written((1, *array.shape[1:]))}" for name, array in feeds.items())
    goldens = ",".join(f"{name}:{_written(array.shape)}" for name, array in feeds.items())
    loaded = ",".join(f"{name}:{_raw_name(name, array, variant.lane)}" for name, array in feeds.items())
    words = (
        [
            variant.name, tower, variant.lane, _built_precision(bundle, variant, model), model,
            str(manifest.files[model].size), expected, *beside, shapes["min"], shapes["opt"], shapes["max"],
            one, goldens, loaded,
        ]
    )  # fmt: skip
    if odd := [word for word in words if not _WORD.fullmatch(word) or ".." in word.split("/")]:
        raise UserError(f"{odd[0]!r} cannot stand in a shell script; name the variant and its files plainly")
    return " ".join(words)


def _built_precision(bundle: Bundle, variant: VariantRecord, model: str) -> str:
    """Return what trtexec is asked for: a tower of an INT8 variant may have stayed as it was.

    Told ``--int8`` of a graph without Q/DQ and without a calibration cache, trtexec makes ranges up
    (``setTensorDynamicRange`` in its ``sampleEngines.cpp``): the engine would answer nonsense.
    """
    precision = precision_of(variant.name)
    if precision == "int8" and _DEQUANTIZE not in bundle.file(model).read_bytes():
        return "fp16"
    return precision


def _shapes(profile: Mapping[str, ShapeRange], inputs: Mapping[str, TensorRecord], end: str) -> str:
    words = []
    for name, shapes in profile.items():
        asked = getattr(shapes, end)
        own = inputs[name].shape
        whole = [fixed if isinstance(fixed, int) else size for size, fixed in zip(asked, own, strict=True)]
        if end != "min" and not isinstance(own[0], int):
            whole[0] = _ANY_BATCH
        words.append(f"{name}:{_written(whole)}")
    return ",".join(words)


def _written(shape: Any) -> str:
    return "x".join(str(size) for size in shape)


def _plain(text: str) -> str:
    """Return a name as it may stand between single quotes in a shell and in JSON."""
    return "".join(character for character in text if character.isalnum() or character in " ._-")


def write_with_shell(bundle: Bundle, target: ResolvedTarget) -> dict[str, Path | bytes]:
    """Return all sources of a bundle with the shell finalize among them, to be written again."""
    kept: dict[str, Path | bytes] = {
        name: bundle.file(name) for name in bundle.manifest.files if name != "bom.cdx.json"
    }
    return {**kept, **shell_sources(bundle, target)}
