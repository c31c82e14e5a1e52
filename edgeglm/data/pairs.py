"""The pairs artifact: images with texts, who may train on what, and what is asked of them.

It is a folder: ``images.npy`` (uint8 [N, S, S, 3], RGB on white), ``pairs.jsonl`` (line i describes image
i), ``tracks.json`` (what is evaluated), ``licences.json`` (one entry a source), ``summary.json`` (counts).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.durable import take_place
from edgeglm.core.errors import UserError
from edgeglm.data.transforms import model_input_from_pixels

KIND = "pairs"
Role = Literal["labelled", "unlabelled", "held"]
Pixels = npt.NDArray[np.uint8]


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One image with its texts.

    ``role``: "labelled" image and text may train; "unlabelled" the image may, its text may not;
    "held" neither may, in any form. ``captions`` starts with ``text``; an image of which nobody said
    anything has neither. ``category`` and ``subcategory`` are empty where they are not known, and may train
    where the text may.
    """

    id: str
    text: str
    captions: tuple[str, ...]
    concept: str
    domain: str
    role: Role
    category: str = ""
    subcategory: str = ""


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text, and the indices of the images it should find."""

    text: str
    relevant: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


class Track(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One retrieval task: ``queries`` against the images of ``gallery`` (indices into the set).

    ``language`` is that of the queries where it is known, by its BCP 47 tag.
    """

    name: str
    title: str
    query_kind: Literal["names", "keywords"]
    queries: tuple[Query, ...]
    gallery: tuple[int, ...]
    language: str = ""


class Licence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be said about one source."""

    name: str
    version: str
    licence: str
    attribution: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """An open pairs artifact. ``images`` is memory-mapped, uint8 [N, S, S, 3]."""

    path: Path
    images: Pixels
    rows: tuple[Pair, ...]
    tracks: tuple[Track, ...]
    licences: tuple[Licence, ...]
    summary: dict[str, Any]

    @classmethod
    def open(cls, source: Artifact | Path) -> PairSet:
        """Open a pairs artifact or its folder. Raises UserError if it is not whole or not consistent."""
        path = source.path if isinstance(source, Artifact) else source
        try:
            rows = msgspec.json.Decoder(Pair).decode_lines((path / "pairs.jsonl").read_bytes())
            pairs = cls(
                path=path,
                images=np.load(path / "images.npy", mmap_mode="r", allow_pickle=False),
                rows=tuple(rows),
                tracks=msgspec.json.decode((path / "tracks.json").read_bytes(), type=tuple[Track, ...]),
                licences=msgspec.json.decode((path / "licences.json").read_bytes(), type=tuple[Licence, ...]),
                summary=msgspec.json.decode((path / "summary.json").read_bytes()),
            )
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise UserError(f"{path} is not a pairs artifact: {error}; make it again") from error
        pairs.check()
        return pairs

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    @property
    def image_size(self) -> int:
        """S, the side of every image in pixels."""
        return int(self.images.shape[1])

    @property
    def margin(self) -> float:
        """Share of the side of what a model is shown that is background, on each of the four sides."""
        return float(self.summary.get("margin", 0.0))

    def shown(
        self, chosen: Sequence[int] | npt.NDArray[np.int64], resolution: int
    ) -> npt.NDArray[np.float32]:
        """Return the chosen images as a model is shown them on a device: float32 [n, 3, R, R] in [0, 1]."""
        return model_input_from_pixels(np.asarray(self.images[chosen]), resolution, margin=self.margin)

    def by_role(self, *roles: Role, domain: str | None = None) -> npt.NDArray[np.int64]:
        """Return the indices of the images with one of ``roles`` (and of one domain), int64, ascending."""
        chosen = (
            i
            for i, row in enumerate(self.rows)
            if row.role in roles and (domain is None or row.domain == domain)
        )
        return np.fromiter(chosen, np.int64)

    def training_texts(self) -> tuple[str, ...]:
        """Return every distinct caption that training may see: those of labelled rows, sorted."""
        return tuple(sorted({text for row in self.rows if row.role == "labelled" for text in row.captions}))

    def track(self, name: str) -> Track:
        """Return the track of that name; KeyError if there is none."""
        for track in self.tracks:
            if track.name == name:
                return track
        raise KeyError(f"no track {name!r}; there are {[track.name for track in self.tracks]}")

    @cached_property
    def image_sha256(self) -> tuple[str, ...]:
        """The sha256 of the pixels of each image, in order."""
        return tuple(pixels_sha256(image) for image in self.images)

    def evaluation_images(self) -> frozenset[int]:
        """Return the images that no training or calibration may touch in any form: role "held"."""
        return frozenset(self.by_role("held").tolist())

    def shown_images(self) -> list[int]:
        """Return the images that a bundle's gallery shows, ascending.

        All of one's own (``summary["shown"] == "all"``), so that each can be found; else those of the tracks'
        galleries. What is evaluated stays with the tracks.
        """
        if self.summary.get("shown") == "all":
            return list(range(len(self)))
        return sorted({image for track in self.tracks for image in track.gallery})

    def overlap(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """Return which of ``chosen`` images equal an evaluation image, by index or by pixels.

        An empty answer proves a calibration set disjoint from evaluation, copies included.
        """
        held = self.evaluation_images()
        held_digests = {self.image_sha256[i] for i in held}
        return tuple(i for i in chosen if i in held or self.image_sha256[i] in held_digests)

    def check(self) -> None:
        """Raise UserError unless shapes, counts and indices agree and no held text is trained on."""
        count = len(self.rows)
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[0] != count or shape[3] != 3:
            raise UserError(
                f"{self.path}: images are {self.images.dtype} {shape} for {count} lines; make it again"
            )
        if shape[1] != shape[2]:
            raise UserError(f"{self.path}: images are {shape[1]} by {shape[2]}, not square; make it again")
        for row in self.rows:
            if row.role == "unlabelled" and not row.text and not row.captions:
                continue
            if not row.captions or row.captions[0] != row.text or not all(row.captions):
                raise UserError(f"{self.path}: {row.id} has no proper captions; make it again")
        for track in self.tracks:
            gallery = set(track.gallery)
            if len(gallery) != len(track.gallery) or not gallery <= set(range(count)):
                raise UserError(f"{self.path}: the gallery of {track.name} is wrong; make it again")
            for query in track.queries:
                if not gallery.issuperset(query.relevant):
                    raise UserError(
                        f"{self.path}: {query.text!r} of {track.name} seeks an image outside its gallery; "
                        "make it again"
                    )


def pixels_sha256(image: Pixels) -> str:
    """Return the sha256 of the pixels of one image, whatever its memory layout."""
    return sha256_bytes(np.ascontiguousarray(image).tobytes())


def write_pairs(
    out: Path,
    *,
    rows: Sequence[Pair],
    tracks: Sequence[Track],
    licences: Sequence[Licence],
    summary: dict[str, Any],
) -> None:
    """Write everything but ``images.npy`` into the folder of a pairs artifact."""
    encoder = msgspec.json.Encoder(order="deterministic")
    (out / "pairs.jsonl").write_bytes(encoder.encode_lines(rows))
    (out / "tracks.json").write_bytes(encoder.encode(tracks))
    (out / "licences.json").write_bytes(msgspec.json.format(encoder.encode(licences), indent=1))
    (out / "summary.json").write_bytes(msgspec.json.format(encoder.encode(summary), indent=1))


def empty_images(out: Path, *, count: int, size: int) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Create ``images.npy`` in a folder as a writable map, uint8 [count, size, size, 3]."""
    made = np.lib.format.open_memmap(
        out / "images.npy", mode="w+", dtype=np.uint8, shape=(count, size, size, 3)
    )
    take_place(out / "images.npy")
    return made
