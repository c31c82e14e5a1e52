"""One's own data: a folder with ``pairs.jsonl``, or a Parquet file, to a pairs artifact. Stage "pairs"."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import DataConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.copies import LIKENESS, near_pairs, thumbnails_of
from edgeglm.data.icons import PairsConfig
from edgeglm.data.pairs import (
    KIND,
    Licence,
    Pair,
    PairSet,
    Query,
    Track,
    empty_images,
    pixels_sha256,
    write_pairs,
)
from edgeglm.data.records import BadRecords, Record, records_of, source_file
from edgeglm.data.splits import drawn_groups, hashed_order, joined_groups
from edgeglm.data.tracks import folded
from edgeglm.data.transforms import decoded_image, pixels_from_image

DOMAIN = "own"
UNLABELLED_DOMAIN = "unlabelled"
INPUT = "own"


def own_data_artifact(data: DataConfig) -> Artifact:
    """Hash the pair list and every image it names, where they lie; nothing is copied.

    The file that lists the pairs is ``provenance["source"]``. Raises UserError as ``records_of`` does,
    and where ``data.path`` is not set.
    """
    if data.path is None:
        raise UserError(f"data.source = {data.source!r} needs data.path; set it to your {data.source}")
    file = source_file(Path(data.path), data.source).resolve()
    files = {file.name: sha256_file(file)}
    for record in records_of(file, BadRecords(skip=data.skip_bad)):
        if isinstance(record.image, Path) and record.name not in files:
            files[record.name] = sha256_file(record.image)
    return Artifact(
        kind="own-data", path=file.parent, files=dict(sorted(files.items())), provenance={"source": file.name}
    )


class OwnPairsStage(Stage[PairsConfig]):
    """The input ``own`` (of ``own_data_artifact``) to a pairs artifact.

    One row an image; lines that name the same file give it more captions. ``data.unseen_fraction`` of the
    images with a text are held, drawn by a seeded hash in groups: images that look the same or have a common
    caption never straddle. Images without a text train as unlabelled ones, in a domain of their own, but
    for those that look like one with a text, which are left out. The track "held-out" asks for the held
    images by their captions. ``data.concepts`` takes that many images. The result does not depend on where
    the data lies, nor on the order of equal lines.
    """

    name = KIND
    code = (
        "edgeglm.data.copies",
        "edgeglm.data.folder",
        "edgeglm.data.languages",
        "edgeglm.data.pairs",
        "edgeglm.data.records",
        "edgeglm.data.splits",
        "edgeglm.data.tracks",
        "edgeglm.data.transforms",
    )
    libraries = ("numpy", "pillow", "pyarrow")

    def __init__(self, config: PairsConfig) -> None:
        # The artifact says where the data is; a path in the key would make a moved folder a new one.
        super().__init__(
            msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, path=None))
        )

    def requires(self, inputs: Inputs) -> None:
        """Check that the data is given."""
        if INPUT not in inputs:
            raise UserError("the stage pairs lacks its data; pass own_data_artifact(data) as 'own'")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Decode every image and write the artifact. Returns counts and seconds."""
        data, own = self.config.data, inputs[INPUT]
        bad = BadRecords(skip=data.skip_bad)
        started = time.perf_counter()
        images = _captioned(records_of(own.path / own.provenance["source"], bad))
        if data.concepts is not None:
            chosen = hashed_order(images, seed=self.config.seed, purpose="subset")[: data.concepts]
            images = {name: images[name] for name in sorted(chosen)}
        kept, digests = _write_images(images, out, data.image_size, bad, context)
        captions = {name: _captions(images[name]) for name in kept}
        count = sum(bool(texts) for texts in captions.values())
        if count < 2:
            raise UserError(
                f"{own.path} gives {count} usable pair{'' if count == 1 else 's'}; retrieval needs "
                "two at least, and to learn anything a few hundred, so add pairs"
            )
        alike = _alike(out, captions)
        left = {j for i, j in alike if captions[kept[i]] and not captions[kept[j]]}
        if left:
            whole = np.load(out / "images.npy", mmap_mode="r")
            _shorten(out, whole[[i for i in range(len(kept)) if i not in left]])
        names = [name for i, name in enumerate(kept) if i not in left]
        digests = [digest for i, digest in enumerate(digests) if i not in left]
        same = [(kept[i], kept[j]) for i, j in alike if not {i, j} & left]
        rows = _rows({name: captions[name] for name in names}, digests, same, self.config)
        rows = [_with_kinds(row, images[name]) for row, name in zip(rows, names, strict=True)]
        tracks = _held_out(rows, digests)
        summary = {
            "images": len(rows),
            "margin": data.margin,
            "unlabelled": sum(row.role == "unlabelled" for row in rows),
            "unlabelled_copies_left_out": len(left),
            "captions": sum(len(row.captions) for row in rows),
            "held": sum(row.role == "held" for row in rows),
            "shown": "all",  # every picture of one's own is in the bundle's gallery
            "skipped": dict(sorted(bad.counts.items())),
            "tracks": {t.name: {"queries": len(t.queries), "gallery": len(t.gallery)} for t in tracks},
        }
        licence = Licence(name=DOMAIN, version="", licence="not stated", attribution="the builder's own data")
        write_pairs(out, rows=rows, tracks=tracks, licences=[licence], summary=summary)
        return {**summary, "seconds": round(time.perf_counter() - started, 2)}

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        """Check the artifact as any reader would, and that no held caption or image is trained on."""
        pairs = PairSet.open(out)
        trained = {folded(text) for text in pairs.training_texts()}
        held = {folded(text) for row in pairs.rows if row.role == "held" for text in row.captions}
        assert held.isdisjoint(trained), "a held caption is trained on"
        training = pairs.by_role("labelled", "unlabelled").tolist()
        assert not pairs.overlap(training), "a held image is trained on"


def _captioned(records: Iterator[Record]) -> dict[str, list[Record]]:
    """Collect the captions of each image; images given as bytes are known by their content."""
    images: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        name = record.name if isinstance(record.image, Path) else sha256_bytes(record.image)[:32]
        images[name].append(record)
    return images


def _captions(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.text for record in records if record.text is not None))


def _with_kinds(row: Pair, records: Sequence[Record]) -> Pair:
    """Add the first category and subcategory that some line of the image names."""
    category = next((record.category for record in records if record.category), "")
    subcategory = next((record.subcategory for record in records if record.subcategory), "")
    return msgspec.structs.replace(row, category=category, subcategory=subcategory)


def _alike(out: Path, captions: Mapping[str, Sequence[str]]) -> list[tuple[int, int]]:
    """Return the places of images that look the same, both ways round."""
    images = np.load(out / "images.npy", mmap_mode="r")
    small = thumbnails_of(images, range(len(captions)))
    return [(i, j) for i, j in near_pairs(small, small, tolerance=LIKENESS) if i != j]


def _write_images(
    images: Mapping[str, Sequence[Record]], out: Path, size: int, bad: BadRecords, context: Context
) -> tuple[list[str], list[str]]:
    """Write ``images.npy`` of those that can be decoded; return their names and pixel digests."""

    def pixels_of(name: str) -> npt.NDArray[np.uint8] | UserError:
        try:
            return pixels_from_image(decoded_image(images[name][0].image), size)
        except UserError as error:
            return error

    kept: list[str] = []
    digests: list[str] = []
    array = empty_images(out, count=max(len(images), 1), size=size)
    names = iter(images)
    with (
        context.progress.task("decode images", len(images)) as task,
        ThreadPoolExecutor(max(context.threads, 1)) as pool,
    ):
        while batch := list(islice(names, 64)):  # bounds what is decoded but not yet written
            for name, pixels in zip(batch, pool.map(pixels_of, batch), strict=True):
                task.advance()
                if isinstance(pixels, UserError):
                    bad.add("corrupt image", f"{images[name][0].where}: {pixels}")
                    continue
                array[len(kept)] = pixels
                kept.append(name)
                digests.append(pixels_sha256(pixels))
    array.flush()
    if len(kept) < len(array):
        _shorten(out, array[: len(kept)])
    return kept, digests


def _shorten(out: Path, used: npt.NDArray[np.uint8]) -> None:
    """Replace ``images.npy`` by its used part."""
    with (out / "shorter.npy").open("wb") as file:
        np.save(file, used)
    (out / "shorter.npy").replace(out / "images.npy")


def _rows(
    captions: Mapping[str, Sequence[str]],
    digests: Sequence[str],
    alike: Sequence[tuple[str, str]],
    config: PairsConfig,
) -> list[Pair]:
    links: list[Sequence[str]] = [
        [name, f"\0pixels {digest}", *(f"\0text {folded(text)}" for text in captions[name])]
        for name, digest in zip(captions, digests, strict=True)
    ]
    groups = joined_groups([*links, *alike])
    sizes: dict[str, int] = defaultdict(int)
    for name, texts in captions.items():
        if texts:
            sizes[groups[name]] += 1
    if len(sizes) < 2:
        raise UserError(
            "all images share one caption or one picture, so none can be held out for evaluation; "
            "add pairs that differ"
        )
    fraction = min(config.data.unseen_fraction, 0.5)
    held = drawn_groups(sizes, fraction, seed=config.seed, purpose="held-out")

    def row(name: str, texts: Sequence[str]) -> Pair:
        if not texts:
            unlabelled = {"text": "", "captions": (), "concept": f"{UNLABELLED_DOMAIN}/{name}"}
            where = {"domain": UNLABELLED_DOMAIN, "role": "unlabelled"}
            return msgspec.convert({"id": f"{DOMAIN}/{name}", **unlabelled, **where}, Pair)
        return Pair(
            id=f"{DOMAIN}/{name}",
            text=texts[0],
            captions=tuple(texts),
            concept=folded(texts[0]),
            domain=DOMAIN,
            role="held" if groups[name] in held else "labelled",
        )

    return [row(name, texts) for name, texts in captions.items()]


def _held_out(rows: Sequence[Pair], digests: Sequence[str]) -> list[Track]:
    """Ask for the held images by each of their captions; equal pictures are equally right."""
    gallery = [i for i, row in enumerate(rows) if row.role == "held"]
    by_digest: dict[str, set[int]] = defaultdict(set)
    for i in gallery:
        by_digest[digests[i]].add(i)
    relevant: dict[str, set[int]] = defaultdict(set)
    written: dict[str, str] = {}
    for i in gallery:
        for text in rows[i].captions:
            relevant[folded(text)] |= by_digest[digests[i]]
            written.setdefault(folded(text), text)
    if not gallery:
        return []
    return [
        Track(
            name="held-out",
            title="Own images held out of training, asked for by their captions",
            query_kind="names",
            queries=tuple(
                Query(text=written[key], relevant=tuple(sorted(found)))
                for key, found in sorted(relevant.items())
            ),
            gallery=tuple(gallery),
        )
    ]
