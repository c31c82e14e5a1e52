"""Golden inputs: raw pictures and texts with what the makers' machine made of them.

They are raw, so that decoding, resizing and tokenising are tested on the device too.

    golden/inputs/*.png      pictures, in the order of their names
    golden/inputs/texts.json a JSON list of texts
    golden/outputs.npz       "image" float32 [N, D] and "text" float32 [M, D] of the reference variant;
                             "image-<variant>" and "text-<variant>" of each other one
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.evaluate.parity import cosine_rows

FloatRows = npt.NDArray[np.float32]

TEXTS = "golden/inputs/texts.json"
OUTPUTS = "golden/outputs.npz"
TOP_K = 10
LEAST_COSINE = 0.99
"""Of any golden embedding with the one from home; ``finalize.sh`` asks the same of a board without Python."""
LEAST_AGREEMENT = 0.9
"""Of the ``TOP_K`` nearest gallery rows, on average."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """The golden inputs of a bundle. ``images`` are raw files, ``texts`` as a user types them."""

    images: tuple[Path, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """How near this machine comes to the recorded outputs.

    Attributes:
        variant: Whose outputs were compared.
        images: How many pictures.
        texts: How many texts.
        image_cosine_min: Cosine of the worst picture's embedding with the recorded one.
        image_cosine_mean: Mean over the pictures.
        text_cosine_min: Cosine of the worst text's embedding.
        text_cosine_mean: Mean over the texts.
        top_k: How many neighbours were compared.
        top_k_agreement: Mean share of the ``top_k`` nearest gallery rows that stay the same, over
            all golden pictures and texts; the least one is ``top_k_agreement_min``.
        top_k_agreement_min: The share for the worst query.
    """

    variant: str
    images: int
    texts: int
    image_cosine_min: float
    image_cosine_mean: float
    text_cosine_min: float
    text_cosine_mean: float
    top_k: int
    top_k_agreement: float
    top_k_agreement_min: float

    def agrees(self, *, cosine: float = LEAST_COSINE, top_k: float = LEAST_AGREEMENT) -> bool:
        """Say whether the worst cosine and the mean top-k agreement reach these thresholds."""
        # One by one: min() would lose a NaN, and a NaN agrees with nothing.
        near = self.image_cosine_min >= cosine and self.text_cosine_min >= cosine
        return near and self.top_k_agreement >= top_k


def golden_sources(
    images: Sequence[bytes], texts: Sequence[str], outputs: Mapping[str, FloatRows]
) -> dict[str, bytes]:
    """Return the files of the goldens, ``{path in the bundle: content}``, for ``write_bundle``.

    Args:
        images: Raw PNG files, N of them.
        texts: M texts.
        outputs: "image" [N, D] and "text" [M, D] of the reference variant, and optionally
            "image-<variant>", "text-<variant>". The same arrays give the same bytes.
    """
    sizes = {"image": len(images), "text": len(texts)}
    for name, rows in outputs.items():
        if rows.ndim != 2 or len(rows) != sizes[name.partition("-")[0]] or not np.isfinite(rows).all():
            raise ValueError(f"golden output {name!r} has shape {rows.shape} or NaN; inputs are {sizes}")
    if not outputs.keys() >= sizes.keys():
        raise ValueError(f"golden outputs need 'image' and 'text', there are {sorted(outputs)}")
    files = {f"golden/inputs/{number:03d}.png": data for number, data in enumerate(images)}
    return {**files, TEXTS: msgspec.json.encode(list(texts)), OUTPUTS: _npz_bytes(outputs)}


def goldens(bundle: Bundle) -> Goldens:
    """Return the golden inputs of a bundle. Raises UserError if it has none."""
    names = [name for name in bundle.names("golden/inputs") if name.endswith(_PICTURES)]
    return Goldens(
        images=tuple(bundle.file(name) for name in names), texts=tuple(bundle.parsed(TEXTS, list[str]))
    )


def golden_check(
    bundle: Bundle,
    embed_images: Callable[[list[Path]], FloatRows],
    embed_texts: Callable[[list[str]], FloatRows],
    *,
    variant: str | None = None,
    top_k: int = TOP_K,
) -> GoldenResult:
    """Embed the golden inputs anew and compare them with the recorded outputs.

    Args:
        bundle: An opened bundle.
        embed_images: Raw picture files -> float32 [N, D], such as ``Retriever.embed_images``.
        embed_texts: Texts -> float32 [M, D], such as ``Retriever.embed_text``.
        variant: Which variant the two functions run; its own outputs are the reference if they were
            recorded, else those of the reference variant.
        top_k: Neighbours to compare, among the bundle's gallery of that variant, or among the
            golden pictures of a bundle without one.

    Raises:
        UserError: the bundle has no goldens, or they do not fit together.
    """
    inputs, name = goldens(bundle), bundle.variant(variant).name
    recorded = _recorded(bundle)
    images = recorded.get(f"image-{name}", recorded["image"])
    texts = recorded.get(f"text-{name}", recorded["text"])
    made_images, made_texts = embed_images(list(inputs.images)), embed_texts(list(inputs.texts))
    for kind, made, kept in (("image", made_images, images), ("text", made_texts, texts)):
        if made.shape != kept.shape or len(kept) == 0:
            shapes = f"{kind} is {list(kept.shape)}, this machine made {list(made.shape)}"
            raise bundle.broken(OUTPUTS, shapes)
    if images.shape[1] != texts.shape[1]:
        raise bundle.broken(OUTPUTS, f"pictures have {images.shape[1]} dimensions, texts {texts.shape[1]}")
    has_gallery = f"gallery/embeddings-{name}.npy" in bundle.manifest.files
    gallery = bundle.gallery(name).embeddings if has_gallery else images
    k = min(top_k, len(gallery))
    agreement = _top_k_agreement(
        np.concatenate([made_images, made_texts]), np.concatenate([images, texts]), gallery, k
    )
    image_cosines, text_cosines = cosine_rows(made_images, images), cosine_rows(made_texts, texts)
    return GoldenResult(
        variant=name,
        images=len(images),
        texts=len(texts),
        image_cosine_min=float(image_cosines.min()),
        image_cosine_mean=float(image_cosines.mean()),
        text_cosine_min=float(text_cosines.min()),
        text_cosine_mean=float(text_cosines.mean()),
        top_k=k,
        top_k_agreement=float(agreement.mean()),
        top_k_agreement_min=float(agreement.min()),
    )


def _top_k_agreement(made: FloatRows, kept: FloatRows, gallery: FloatRows, k: int) -> npt.NDArray[np.float64]:
    shares = np.zeros(len(made))
    for row, (one, other) in enumerate(zip(made @ gallery.T, kept @ gallery.T, strict=True)):
        if not np.isfinite(one).all():
            continue
        best = set(np.argsort(-other, kind="stable")[:k].tolist())
        shares[row] = len(best & set(np.argsort(-one, kind="stable")[:k].tolist())) / k
    return shares


def _recorded(bundle: Bundle) -> dict[str, FloatRows]:
    path = bundle.file(OUTPUTS)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_OUTPUT_BYTES:
                raise bundle.broken(OUTPUTS, f"it expands to more than {_MAX_OUTPUT_BYTES} bytes")
        with np.load(path, allow_pickle=False) as stored:
            rows = {name: np.asarray(stored[name], dtype=np.float32) for name in stored.files}
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, SyntaxError, MemoryError, TypeError) as error:
        raise bundle.broken(OUTPUTS, error) from error
    if not {"image", "text"} <= rows.keys() or any(array.ndim != 2 for array in rows.values()):
        raise bundle.broken(OUTPUTS, f"it holds {sorted(rows)} where 'image' and 'text' rows are needed")
    return rows


def _npz_bytes(arrays: Mapping[str, FloatRows]) -> bytes:
    """Write an .npz without the clock in it: ``numpy.savez`` leaves dates to the zip library."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            rows = np.ascontiguousarray(arrays[name], dtype=np.float32)
            np.lib.format.write_array(content, rows, version=(1, 0))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), content.getvalue())
    return buffer.getvalue()
