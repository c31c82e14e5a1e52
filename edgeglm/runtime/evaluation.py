"""What a model reaches and costs on someone's pairs: embeddings for the evaluator, checks, times, memory.

Shapes: N items, T texts, D embedding dimensions, R resolution.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError
from edgeglm.data.transforms import (
    ImagePreprocessing,
    decoded_image,
    model_input_from_files,
    model_input_from_pixels,
    pixels_from_image,
)
from edgeglm.evaluate.evaluator import (
    ClassificationTask,
    Classifier,
    RetrievalTask,
    told_by_centroid,
    told_by_prompt,
)
from edgeglm.evaluate.teacher_towers import TeacherTowers
from edgeglm.runtime.retrieval import FloatRows, Retriever

Direction = Literal["text-to-image", "image-to-text"]
MAX_DEVIATION = 1e-3
MIN_COSINE = 0.98
MAX_DIFFERENCE = 0.05
_CHECKED = 64
_WARM_UP = 5


class Embedder(Protocol):
    """What is judged: a bundle's towers, or a teacher's."""

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D]."""

    def embed_text(self, texts: Sequence[str]) -> FloatRows:
        """Return float32 [T, D]."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image with its texts, and what it shows a case of ("" where that is not said)."""

    image: Path | bytes
    texts: tuple[str, ...]
    category: str = ""


class Percentiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Milliseconds of one call, preparation included, over so many calls."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    calls: int


class Checks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether training and deployment see the same.

    Attributes:
        images: How many were compared.
        side: Side of the pixels that training keeps.
        same_tensor: Images whose two tensors are equal, bit by bit.
        largest_difference: Of one value, in [0, 1].
        mean_difference: Of all values of the image that differs most.
        least_cosine: Of the two embeddings of one image.
        largest_deviation: Of an embedding's length from 1.
        passed: Whether embeddings have length one, and pixels and embeddings of the two ways agree.
    """

    images: int
    side: int
    same_tensor: int
    largest_difference: float
    mean_difference: float
    least_cosine: float
    largest_deviation: float
    passed: bool


class LengthChecks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a model that is not deployed: ``largest_deviation`` of an embedding's length from 1."""

    largest_deviation: float
    passed: bool

    @classmethod
    def of(cls, found: Sequence[Embedded]) -> LengthChecks:
        """Look at all lengths."""
        deviation = deviation_of(found)
        return cls(largest_deviation=deviation, passed=deviation <= MAX_DEVIATION)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One source of pairs through a bundle's towers: float32 [N, D] and [T, D], texts each once."""

    name: str
    items: tuple[Item, ...]
    image_ND: FloatRows
    texts: tuple[str, ...]
    text_TD: FloatRows


def embedded(retriever: Embedder, name: str, items: Sequence[Item]) -> Embedded:
    """Embed all images and all distinct texts; equal pictures share theirs.

    Raises UserError for what cannot be read, or for no pair.
    """
    texts = tuple(dict.fromkeys(text for item in items for text in item.texts))
    if not items or not texts:
        raise UserError(f"{name} holds no image with a text; give pairs of both")
    return Embedded(
        name=name,
        items=sharing_texts(items),
        image_ND=retriever.embed_images([item.image for item in items]),
        texts=texts,
        text_TD=retriever.embed_text(texts),
    )


def sharing_texts(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items, each with the texts of all that have the very same pixels.

    No model tells such pictures apart, so that what is right for one is right for all, as in a build.
    """
    pixels = [_pixel_digest(item.image) for item in items]
    texts_of: dict[str, dict[str, None]] = {}
    for digest, item in zip(pixels, items, strict=True):
        texts_of.setdefault(digest, {}).update(dict.fromkeys(item.texts))
    return tuple(
        replace(item, texts=tuple(texts_of[digest])) for digest, item in zip(pixels, items, strict=True)
    )


def _pixel_digest(image: Path | bytes) -> str:
    decoded = decoded_image(image)
    return sha256_bytes(repr((decoded.mode, decoded.size)).encode() + decoded.tobytes())


def retrieval_task(found: Embedded, direction: Direction) -> RetrievalTask:
    """Ask for the images by their texts, or for the texts by their images.

    A text that several images have is answered by all of them, and belongs to the category of the first of
    them that has one.
    """
    images_of: dict[str, list[int]] = {text: [] for text in found.texts}
    for place, item in enumerate(found.items):
        for text in item.texts:
            images_of[text].append(place)
    if direction == "text-to-image":
        return RetrievalTask(
            name=found.name,
            query_QD=found.text_TD,
            gallery_GD=found.image_ND,
            relevant=list(images_of.values()),
            category_Q=[
                _first_category(found.items[place] for place in places) for places in images_of.values()
            ],
        )
    asked = [place for place, item in enumerate(found.items) if item.texts]
    place_of = {text: place for place, text in enumerate(found.texts)}
    return RetrievalTask(
        name=found.name,
        query_QD=found.image_ND[asked],
        gallery_GD=found.text_TD,
        relevant=[[place_of[text] for text in found.items[place].texts] for place in asked],
        category_Q=[found.items[place].category for place in asked],
    )


def _first_category(items: Iterable[Item]) -> str:
    return next((item.category for item in items if item.category), "")


def classification_task(
    found: Embedded, retriever: Embedder, classifier: Classifier, prompt: str
) -> ClassificationTask | None:
    """Tell the category of every image that has one; None where fewer than two are told apart.

    Args:
        found: The embeddings.
        retriever: Embeds the prompts.
        classifier: By the text of the category, or by the mean of the category's other images.
        prompt: What is asked, with ``{}`` for the category's name.
    """
    known = [place for place, item in enumerate(found.items) if item.category]
    classes = tuple(sorted({found.items[place].category for place in known}))
    if len(classes) < 2:
        return None
    place_of = {one: place for place, one in enumerate(classes)}
    true_N = np.array([place_of[found.items[place].category] for place in known], dtype=np.int64)
    image_ND = found.image_ND[known]
    if classifier == "centroid":
        told = told_by_centroid(image_ND, true_N)
    else:
        told = told_by_prompt(image_ND, retriever.embed_text([prompt.replace("{}", one) for one in classes]))
    return ClassificationTask(name=found.name, true_N=true_N, told_N=told, classes=classes)


def headed_task(found: Embedded, teacher: TeacherTowers, task: str) -> ClassificationTask | None:
    """Tell the category of every image that has one by the teacher's own classifier; None where none has.

    A category that it never learned is a class too, and is never told. Raises UserError without a classifier
    of that task.
    """
    known = [place for place, item in enumerate(found.items) if item.category]
    if not known:
        return None
    told = teacher.told_by_head(task, [found.items[place].image for place in known])
    learned = teacher.classes[task]
    said = [found.items[place].category for place in known]
    classes = (*learned, *sorted(set(said) - set(learned)))
    place_of = {one: place for place, one in enumerate(classes)}
    true_N = np.array([place_of[one] for one in said], dtype=np.int64)
    return ClassificationTask(name=found.name, true_N=true_N, told_N=told, classes=classes)


def deviation_of(found: Sequence[Embedded]) -> float:
    """Return how far the length of an embedding is from 1 at most."""
    lengths = [np.linalg.norm(part, axis=1) for one in found for part in (one.image_ND, one.text_TD)]
    return float(np.abs(np.concatenate(lengths) - 1.0).max())


def checks_of(
    found: Sequence[Embedded], retriever: Retriever, preprocessing: ImagePreprocessing, *, side: int
) -> Checks:
    """Compare what training and deployment make of the first images, and look at all lengths.

    Training keeps pixels of ``side`` and makes the model's input of those; a device makes it of the file.
    """
    chosen = [item for one in found for item in one.items][:_CHECKED]
    files: Any = [item.image for item in chosen]
    deployed = np.concatenate([model_input_from_files([file], preprocessing) for file in files])
    background = preprocessing.background
    kept = [
        pixels_from_image(decoded_image(file, background=background), side, background=background)
        for file in files
    ]
    trained = model_input_from_pixels(np.stack(kept), preprocessing.resolution, margin=preprocessing.margin)
    rows = [retriever.embed_model_input("image", {"pixels": pixels}) for pixels in (deployed, trained)]
    cosine = float((rows[0] * rows[1]).sum(axis=1).min())
    deviation = deviation_of(found)
    apart = np.abs(deployed - trained)
    mean = float(apart.mean(axis=(1, 2, 3)).max())
    return Checks(
        images=len(chosen),
        side=side,
        same_tensor=int((deployed == trained).all(axis=(1, 2, 3)).sum()),
        largest_difference=float(apart.max()),
        mean_difference=mean,
        least_cosine=cosine,
        largest_deviation=deviation,
        passed=deviation <= MAX_DEVIATION and cosine >= MIN_COSINE and mean <= MAX_DIFFERENCE,
    )


def latencies(found: Embedded, retriever: Embedder, calls: int) -> dict[str, Percentiles]:
    """Time one text and one image a call, from the raw text and the file on, the two by turns."""
    asked: dict[str, Callable[[int], object]] = {
        "text": lambda turn: retriever.embed_text([found.texts[turn % len(found.texts)]]),
        "image": lambda turn: retriever.embed_images([found.items[turn % len(found.items)].image]),
    }
    times: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(-_WARM_UP, calls):
        for name, call in asked.items():
            started = time.perf_counter()
            call(turn)
            if turn >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(times_ms: Sequence[float]) -> Percentiles:
    """Return the three percentiles, linear between calls."""
    p50, p90, p99 = np.percentile(np.asarray(times_ms), [50, 90, 99])
    return Percentiles(p50_ms=float(p50), p90_ms=float(p90), p99_ms=float(p99), calls=len(times_ms))


def peak_bytes() -> int:
    """Return the most memory that this process had resident so far, Python and its libraries counted."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
