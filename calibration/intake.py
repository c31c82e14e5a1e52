"""Users' data for any model: an ``.npz``, a folder or a ``.jsonl`` to what a calibration set is drawn from.

- ``.npz``: one array for each input, samples along the first axis; an array ``stratum`` may name groups.
- folder of ``.npz`` files: the rows of all of them; a file's sub-folder is its stratum.
- folder of images: the sub-folder is the stratum, as in a folder of classes.
  Of a folder, hidden files and sets that were drawn into it are left out.
- ``.jsonl``: ``{"image": path, "text": words, "stratum": name}`` a line, paths relative to the file.

Only what is drawn is decoded; digests are read from files a block at a time.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import forget_pages, mapped_npz, native
from edgeglm.calibration.sets import RECORD_NAME, Candidates
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import decoded_image, model_input_from_pixels, pixels_from_image
from edgeglm.engines.protocol import TensorSpec

Array = npt.NDArray[Any]
_IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: What of a Reading, and besides, decides the tensors of samples of a kind.
_HEEDED = {
    "arrays": (),
    "files": ("resolution", "mean", "std"),
    "texts": ("max_length", "lowercase", "tokenizer"),
}
_SAMPLES = {"files": "pictures", "texts": "texts"}
_ALL_ROWS = 1 << 30
_MAPPED_BYTES = 1 << 20  # of mapped rows that count as this process's memory at a time


class Reading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images and texts become a model's inputs. Its digest is in the calibration record.

    Attributes:
        resolution: Side of images; 0 takes the model's own, where it is fixed.
        mean, std: Of the RGB channels, taken from values in [0, 1]; the model may do that itself.
        max_length: Most tokens of a text.
        lowercase: Whether texts are lowered first.
    """

    resolution: int = 0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_length: int = 32
    lowercase: bool = False


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    image: str | None = None
    text: str | None = None
    stratum: str = "all"


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One line or file. ``name`` is for messages and the record."""

    name: str
    stratum: str
    image: Path | None = None
    text: str | None = None


def candidates_from_data(
    data: Path,
    inputs: Sequence[TensorSpec],
    *,
    reading: Reading,
    tokenizer: Path | None = None,
    evaluation: Path | None = None,
) -> Candidates:
    """Return what a calibration set for a model with these inputs is drawn from.

    Args:
        data: An ``.npz``, a ``.jsonl`` or a folder.
        inputs: What the model takes.
        reading: How images and texts are read.
        tokenizer: A ``tokenizer.json``, for texts.
        evaluation: Data of the same kinds that no calibration sample may be in.

    Raises:
        UserError: No such data, it does not fit the inputs, or ``evaluation`` cannot be compared with it.
    """
    if min(reading.std) <= 0:
        raise UserError(f"std of {reading.std} cannot divide values; give three positive numbers")
    found = _read(data, inputs, reading, tokenizer)
    _require_heeded(data, found.digest_kind, reading, tokenizer)
    if evaluation is None:
        return found
    theirs = _read(evaluation, inputs, reading, tokenizer)
    if theirs.digest_kind != found.digest_kind:
        raise UserError(
            f"{data} is compared by the bytes of its {found.digest_kind} and {evaluation} by those of its "
            f"{theirs.digest_kind}, which never agree; give both in one form"
        )
    return replace(found, evaluation_digests=theirs.digests)


def _require_heeded(data: Path, kind: str, reading: Reading, tokenizer: Path | None) -> None:
    """Raise UserError for what would change nothing of such samples, and yet be recorded as done to them."""
    given = [name for name in reading.__struct_fields__ if getattr(reading, name) != getattr(Reading(), name)]
    given += [] if tokenizer is None else ["tokenizer"]
    ignored = [name for name in given if name not in _HEEDED[kind]]
    if ignored:
        option = f"--{ignored[0].replace('_', '-')}"
        how = "arrays are taken as they are" if kind == "arrays" else f"it is not for {_SAMPLES[kind]}"
        raise UserError(f"{option} would change nothing of {data}: {how}; leave it out")


def _read(data: Path, inputs: Sequence[TensorSpec], reading: Reading, tokenizer: Path | None) -> Candidates:
    """Return what is drawn from, compared with no evaluation yet."""
    if data.suffix == ".npz":
        return _from_arrays([(data, "all")], inputs, root=data.parent)
    if data.suffix == ".jsonl":
        return _from_samples(_lines(data), inputs, reading, tokenizer)
    if not data.is_dir():
        raise UserError(f"no calibration data at {data}; give an .npz, a .jsonl or a folder")
    files = _files_in(data)
    archives = [path for path in files if path.suffix == ".npz"]
    images = [path for path in files if path.suffix.lower() in _IMAGES]
    if archives and images:
        raise UserError(
            f"{data} holds {len(archives)} .npz and {len(images)} images, and a set is drawn from one kind; "
            "give the folder of either"
        )
    if archives:
        return _from_arrays([(path, _stratum(path, data)) for path in archives], inputs, root=data)
    if (data / "pairs.jsonl").is_file():
        return _from_samples(_lines(data / "pairs.jsonl"), inputs, reading, tokenizer)
    if not images:
        raise UserError(f"{data} holds no image and no .npz; give the folder of the samples")
    samples = [
        _Sample(name=path.relative_to(data).as_posix(), stratum=_stratum(path, data), image=path)
        for path in images
    ]
    return _from_samples(samples, inputs, reading, tokenizer)


def _files_in(data: Path) -> list[Path]:
    """Return the files under a folder but for hidden ones and those of sets that were drawn into it."""
    files = [
        path
        for path in sorted(data.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(data).parts)
    ]
    drawn = {path.parent for path in files if path.name == RECORD_NAME} - {data}
    return [path for path in files if path.parent not in drawn]


def _stratum(path: Path, root: Path) -> str:
    parent = path.parent.relative_to(root).as_posix()
    return "all" if parent == "." else parent


def _from_arrays(
    files: Sequence[tuple[Path, str]], inputs: Sequence[TensorSpec], *, root: Path
) -> Candidates:
    opened, starts = [], []
    ids: list[str] = []
    strata: list[str] = []
    digests: list[str] = []
    for path, group in files:
        arrays = mapped_npz(path)
        groups = arrays.pop("stratum", None)
        chosen = _matched(path, arrays, inputs)
        rows = len(next(iter(chosen.values())))
        if groups is not None and groups.shape != (rows,):
            raise UserError(
                f"{path}: stratum has the shape {list(groups.shape)}; name one of each of {rows} rows"
            )
        opened.append(chosen)
        starts.append(len(ids))
        kept = max(1, _MAPPED_BYTES // sum(array[:1].nbytes for array in chosen.values()))
        for row in range(rows):
            if row % kept == 0:
                forget_pages(chosen.values())
            ids.append(f"{path.relative_to(root).as_posix()}/{row}")
            strata.append(str(groups[row]) if groups is not None else group)
            parts = (native(chosen[name][row]).tobytes() for name in sorted(chosen))
            digests.append(sha256_bytes(b"".join(parts)))
        forget_pages(chosen.values())

    def tensors(positions: Sequence[int]) -> dict[str, Array]:
        found: dict[str, list[Array]] = {name: [] for name in opened[0]}
        for position in positions:
            number = bisect_right(starts, position) - 1
            for name, array in opened[number].items():
                found[name].append(np.array(native(array[position - starts[number]])))
            forget_pages(opened[number].values())  # row by row: a fault maps neighbours that nobody reads
        return {name: np.stack(values) for name, values in found.items()}

    return Candidates(
        ids=ids, strata=strata, digests=digests, tensors=tensors, evaluation_digests=(), digest_kind="arrays"
    )


def _matched(path: Path, arrays: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Return the arrays of the model's inputs in its order, checked for name, dtype and shape."""
    for name in arrays:
        if name not in {spec.name for spec in inputs}:
            raise unknown_name(f"array in {path.name}", name, [spec.name for spec in inputs])
    found: dict[str, Array] = {}
    for spec in inputs:
        if spec.name not in arrays:
            raise UserError(
                f"{path} has no array for the input {spec.name!r}, only "
                f"{', '.join(sorted(arrays)) or 'none'}; add it under that name"
            )
        array = arrays[spec.name]
        if array.dtype.name != spec.dtype:
            raise UserError(
                f"{path}: {spec.name} is {array.dtype.name}, and the model takes {spec}; "
                f"convert it with .astype('{spec.dtype}')"
            )
        fixed = [(axis, size) for axis, size in enumerate(spec.shape) if axis and isinstance(size, int)]
        if array.ndim != len(spec.shape) or any(array.shape[axis] != size for axis, size in fixed):
            raise UserError(
                f"{path}: {spec.name} has the shape {list(array.shape)}, "
                f"and the model takes {spec}; {_reshaping(array, spec)}"
            )
        found[spec.name] = array
    counts = {name: len(array) for name, array in found.items()}
    if not counts or min(counts.values()) == 0:
        raise UserError(f"{path} holds no sample; give at least two")
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: the inputs have different numbers of rows ({counts}); match them")
    return found


def _reshaping(array: Array, spec: TensorSpec) -> str:
    """Say how an array can fit an input; samples lie along the input's own first axis."""
    if not spec.shape:
        return "it has no axis for samples, so store its value in the model as a constant"
    if array.ndim == len(spec.shape) + 1:
        size = spec.shape[0] if isinstance(spec.shape[0], int) else "N"
        return f"join the samples along its first axis (numpy.concatenate) and give --batch-size {size}"
    return "reshape it"


def _lines(path: Path) -> list[_Sample]:
    if not path.is_file():
        raise UserError(f"no file at {path}; give a .jsonl")
    decoder, samples = msgspec.json.Decoder(_Line), []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                parsed = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UserError(
                    f'{path} line {number}: {error}; write {{"image": path, "text": words}}'
                ) from error
            image = None if parsed.image is None else path.parent / parsed.image
            name = parsed.image or parsed.text or f"line {number}"
            samples.append(_Sample(name=name, stratum=parsed.stratum, image=image, text=parsed.text))
    if not samples:
        raise UserError(f"{path} holds no sample; write one JSON object a line")
    return samples


def _from_samples(
    samples: Sequence[_Sample],
    inputs: Sequence[TensorSpec],
    reading: Reading,
    tokenizer: Path | None,
) -> Candidates:
    pictures = [spec for spec in inputs if spec.dtype.startswith("float") and len(spec.shape) == 4]
    tokens = [spec for spec in inputs if spec.dtype.startswith("int")]
    if len(pictures) == 1 and len(inputs) == 1:
        return _images(samples, pictures[0], reading)
    if tokens and len(tokens) == len(inputs):
        return _texts(samples, tokens, reading, tokenizer)
    listed = ", ".join(str(spec) for spec in inputs)
    raise UserError(f"images and texts cannot fill the inputs {listed}; give an .npz with these arrays")


def _images(samples: Sequence[_Sample], spec: TensorSpec, reading: Reading) -> Candidates:
    channels, *sides = spec.shape[1:]
    fixed = {size for size in sides if isinstance(size, int)}
    if (isinstance(channels, int) and channels != 3) or len(fixed) > 1:
        raise UserError(
            f"pictures are read as three channels of a square, and the model takes {spec}; "
            "give an .npz with these arrays"
        )
    side = next(iter(fixed), reading.resolution)
    if not side:
        raise UserError(f"{spec} has no fixed size; give --resolution")
    if reading.resolution not in (0, side):
        raise UserError(f"{spec} takes images of {side}, not {reading.resolution}; leave --resolution out")
    paths = []
    for sample in samples:
        if sample.image is None or not sample.image.is_file():
            raise UserError(f"{sample.name} has no image that exists; mend its path")
        paths.append(sample.image)
    mean, std = (np.asarray(v, np.float32).reshape(3, 1, 1) for v in (reading.mean, reading.std))

    def tensors(positions: Sequence[int]) -> dict[str, Array]:
        pixels = np.stack([pixels_from_image(decoded_image(paths[i]), side) for i in positions])
        return {spec.name: ((model_input_from_pixels(pixels, side) - mean) / std).astype(spec.dtype)}

    return Candidates(
        ids=[sample.name for sample in samples],
        strata=[sample.stratum for sample in samples],
        digests=[sha256_file(path) for path in paths],
        tensors=tensors,
        evaluation_digests=(),
        digest_kind="files",
        traits={"resolution": [_size_of(path) for path in paths]},
    )


def _size_of(path: Path) -> str:
    """Return ``640x480`` from an image's header, without decoding it."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return f"{image.width}x{image.height}"
    except Exception:  # what Pillow raises on damaged and on very large files has no base
        return "unreadable"  # decoding says why, if it is drawn


def _texts(
    samples: Sequence[_Sample],
    specs: Sequence[TensorSpec],
    reading: Reading,
    tokenizer: Path | None,
) -> Candidates:
    if tokenizer is None:
        raise UserError("texts need a tokenizer; give --tokenizer tokenizer.json")
    backend = Tokenizer(tokenizer, lowercase=reading.lowercase)
    texts = []
    for sample in samples:
        if not sample.text or not sample.text.strip():
            raise UserError(f"{sample.name} has no text; write one, or leave the line out")
        texts.append(sample.text)
    makers: dict[str, Callable[[Array, Array], Array]] = {
        "input_ids": lambda ids, _: ids,
        "attention_mask": lambda _, mask: mask,
        "token_type_ids": lambda ids, _: np.zeros_like(ids),
        "position_ids": lambda ids, _: np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    for spec in specs:
        if spec.name not in makers:
            raise unknown_name("token input", spec.name, makers, "give an .npz with these arrays")

    def tensors(positions: Sequence[int]) -> dict[str, Array]:
        ids, mask = backend.encode([texts[i] for i in positions], max_length=reading.max_length)
        return {spec.name: makers[spec.name](ids, mask).astype(spec.dtype) for spec in specs}

    return Candidates(
        ids=[sample.name for sample in samples],
        strata=[sample.stratum for sample in samples],
        digests=[sha256_bytes(text.encode()) for text in texts],
        tensors=tensors,
        evaluation_digests=(),
        digest_kind="texts",
        traits={"words": [str(len(text.split())) for text in texts]},
        rows_at_once=_ALL_ROWS,  # padded together, to one length; token ids are small
    )
