"""The towers of a bundle as a runner takes them: raw text and image files in, an embedding out."""

from __future__ import annotations

import contextlib
import importlib
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.data.tokenization import Tokenizer, is_unicode
from edgeglm.data.transforms import ImagePreprocessing, model_input_from_files
from edgeglm.engines.profiles import default_length_buckets as default_length_buckets
from edgeglm.engines.protocol import Engine
from edgeglm.runtime.contract import Prepare, TowerSource
from edgeglm.runtime.requests import Sample

EngineMaker = Callable[[Path, int], Engine]

# Characters. A tower reads some tens of words, and a tokenizer takes the whole text apart first: this much
# English takes WordPiece 14 ms, and the slowest that was found, Chinese with ever new characters, 37 (best of
# 21 on a busy machine). Texts of one preparation call wait for each other that long.
MAX_TEXT = 40_960


def sources_from_bundle(
    bundle: Bundle,
    *,
    engine: EngineMaker,
    variant: str | None = None,
    threads: int = 2,
    length_buckets: Sequence[int] | None = None,
) -> dict[str, TowerSource]:
    """Describe the towers of one variant, by name.

    Args:
        bundle: An opened bundle, which must stay open as long as the towers are used.
        engine: Makes an engine from (ONNX file, threads).
        variant: Which one; the bundle's default for None.
        threads: Threads inside an operator, for each engine.
        length_buckets: Lengths up to which texts share a batch; None for ``default_length_buckets``.

    Raises:
        UserError: An unknown variant, or a bundle that does not say how its inputs are made.
    """
    record = bundle.variant(variant)
    preprocessing = bundle.preprocessing
    sources = {}
    for tower, name in record.files.items():
        make = _maker(engine, bundle, name, threads)
        if tower == "text":
            limit = preprocessing.text.max_length
            tokenizer = Tokenizer(bundle.tokenizer_path, lowercase=preprocessing.text.lowercase)
            buckets = tuple(length_buckets) if length_buckets else default_length_buckets(limit)
            if max(buckets) != limit:  # a model takes no more: its warm-up would fail over a longer one
                remedy = f"add a bucket of {limit}" if max(buckets) < limit else f"let {limit} be the longest"
                raise UserError(
                    f"the longest length bucket is {max(buckets)} and texts have up to {limit} ids; {remedy}"
                )
            sources[tower] = TowerSource(
                engine=make,
                prepare=text_preparation(tokenizer, limit),
                ragged={"input_ids": tokenizer.pad_id, "attention_mask": 0},
                length_buckets=buckets,
                largest={"input_ids": tokenizer.largest_id, "attention_mask": 1},
            )
        else:
            prepare = image_preparation(preprocessing.image) if tower == "image" else None
            sources[tower] = TowerSource(engine=make, prepare=prepare)
    return sources


def text_preparation(tokenizer: Tokenizer, max_length: int) -> Prepare:
    """Return what makes ``{"input_ids": int64 [L], "attention_mask": int64 [L]}`` of each text."""
    ones = np.ones(max_length, np.int64)

    def prepare(texts: Sequence[object]) -> Sequence[Sample | EdgeglmError]:
        is_text = [_is_text(text) for text in texts]
        good = [str(text) for text, fits in zip(texts, is_text, strict=True) if fits]
        ids, mask = tokenizer.encode(good, max_length=max_length)
        lengths = mask.sum(axis=1)
        rows = iter(
            {"input_ids": row[:length], "attention_mask": ones[:length]}
            for row, length in zip(ids, lengths, strict=True)
        )
        return [next(rows) if fits else _not_a_text(text) for text, fits in zip(texts, is_text, strict=True)]

    return prepare


def image_preparation(preprocessing: ImagePreprocessing) -> Prepare:
    """Return what makes ``{"pixels": float32 [3, R, R]}`` of each image file, given as bytes or a path."""
    _load_decoders()

    def one(image: object) -> Sample | EdgeglmError:
        try:
            if isinstance(image, (bytes, bytearray, memoryview)):
                return {"pixels": model_input_from_files([_bytes_of(image)], preprocessing)[0]}
            if isinstance(image, Path):
                if _is_no_file(image):  # to open a pipe may wait for ever, and a device may have no end
                    return UserError(f"{image} is a pipe or a device; give the bytes that come from it")
                return {"pixels": model_input_from_files([image], preprocessing)[0]}
        except EdgeglmError as error:
            return error
        return UserError(f"an image is a {type(image).__name__}; give the bytes of a file, or its Path")

    return lambda images: [one(image) for image in images]


def _load_decoders() -> None:
    """Import what decodes the usual files, or the first picture would wait for it."""
    with contextlib.suppress(ImportError):  # texts are served without; a picture is told what is missing
        importlib.import_module("PIL.ImageOps")
        importlib.import_module("PIL.Image").preinit()


def _bytes_of(image: bytes | bytearray | memoryview) -> bytes:
    try:
        return bytes(image)
    except ValueError as error:
        raise UserError("an image is a memoryview that was released; keep it until the answer") from error


def _is_no_file(path: Path) -> bool:
    """Say whether a path names what is neither a file nor a folder. What is not there is told elsewhere."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_text(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_TEXT and bool(text.strip()) and is_unicode(text)


def _not_a_text(text: object) -> UserError:
    if isinstance(text, str) and len(text) > MAX_TEXT:
        return UserError(f"a text of {len(text)} characters is over the limit of {MAX_TEXT}; shorten it")
    if isinstance(text, str) and text.strip():
        return UserError("a text is no Unicode; give what can be written as UTF-8")
    if isinstance(text, str):
        return UserError("a text is empty; give it a word")
    return UserError(f"a text is a {type(text).__name__}; give a str")


def _maker(engine: EngineMaker, bundle: Bundle, name: str, threads: int) -> Callable[[], Engine]:
    """Return what makes an engine of a file, be it for an instance that is replaced after days.

    By then another bundle may lie there, whose answers would pass for those of this one.
    """
    return lambda: engine(bundle.unchanged(name), threads)
