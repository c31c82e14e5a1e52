"""Calibration sets as artifacts: the exact tensors that a tower sees, and proof of where they came from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import Batches, mapped_npz, write_npz
from edgeglm.core.digest import sha256_bytes, sha256_file, sha256_json
from edgeglm.core.errors import UserError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

RECORD_NAME = "calibration.json"
SCHEMA = 1
MIN_SAMPLES = 2
ROWS_AT_ONCE = 32


class CalibrationSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One drawn sample: its id, its stratum, and the sha256 of its raw content (see the record)."""

    id: str
    stratum: str
    sha256: str


class Disjointness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The proof that calibration saw nothing of the evaluation.

    Attributes:
        evaluation_samples: How many digests of evaluation samples were compared.
        evaluation_sha256: Of their sorted list, so that anybody can repeat the comparison.
        overlap: How many are in the calibration set: 0.
    """

    evaluation_samples: int
    evaluation_sha256: str
    overlap: int


class Coverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of what the candidates vary in was drawn: one trait, such as "resolution" or "length".

    Attributes:
        drawn: Value -> samples of the set.
        candidates: How many values the candidates have.
        share: The share of all candidates whose value some drawn sample has.
    """

    drawn: dict[str, int]
    candidates: int
    share: float


class TowerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of one tower: ``<tower>.npz``, its tensors and the samples in their order."""

    file: str
    sha256: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    samples: tuple[CalibrationSample, ...]
    strata: dict[str, int]
    disjointness: Disjointness
    coverage: dict[str, Coverage] = {}

    @property
    def repeated(self) -> int:
        """How many samples say nothing that an earlier one does not: their content is the same."""
        return len(self.samples) - len({sample.sha256 for sample in self.samples})


class CalibrationRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``calibration.json``.

    Attributes:
        schema_version: Of this record.
        source: "training" for real samples, "random" for noise that a user asked for by name.
        drawn: How the samples were drawn, in words.
        seed: Of the draw.
        batch_size: Of the batches that ranges are found on.
        preprocessing_sha256: Of the canonical JSON of preprocessing.json.
        towers: Tower -> its part.
    """

    schema_version: int = SCHEMA
    source: str
    drawn: str
    seed: int
    batch_size: int
    preprocessing_sha256: str
    towers: dict[str, TowerRecord]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What one tower's samples are drawn from: training samples only.

    Attributes:
        ids: Names of the samples.
        strata: The stratum of each, such as its domain.
        digests: sha256 of each sample's raw content (pixels or caption), as in the evaluation's list.
        tensors: Makes the tower's inputs for chosen positions, in that order: name -> [n, ...].
        evaluation_digests: sha256 of every sample that any evaluation uses, made the same way.
        digest_kind: What digests are of, such as "files" or "texts": those of two kinds are never equal.
        traits: What else samples vary in, such as "length" or "resolution": name -> value of each.
        rows_at_once: How many samples ``tensors`` is asked for at a time; all chunks must have the
            same trailing shape.
    """

    ids: Sequence[str]
    strata: Sequence[str]
    digests: Sequence[str]
    tensors: Callable[[Sequence[int]], Tensors]
    evaluation_digests: Iterable[str]
    digest_kind: str = "content"
    traits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rows_at_once: int = ROWS_AT_ONCE


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """A written set, opened. Tensors are read a batch at a time."""

    folder: Path
    record: CalibrationRecord

    def batches(self, tower: str, limit: int | None = None) -> Batches:
        """Return the feeds of a tower in batches of the recorded size, ``limit`` samples at most.

        They are read when they are asked for. Raises UserError when the file is not the recorded one.
        """
        part = self.record.towers.get(tower)
        if part is None:
            raise UserError(f"the calibration set has no {tower!r}; it has {', '.join(self.record.towers)}")
        path = self.folder / part.file
        if not path.is_file() or sha256_file(path) != part.sha256:
            raise UserError(f"{path} was altered; draw the calibration set again")
        mapped = mapped_npz(path)
        arrays = {name: mapped[name] for name in part.tensors}
        return Batches(arrays, self.record.batch_size, stop=limit)


def calibration_set_from_arrays(
    folder: Path,
    towers: Mapping[str, Candidates],
    *,
    preprocessing: Mapping[str, Any],
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> CalibrationSet:
    """Draw ``samples`` for each tower, stratified and seeded, and write them into ``folder``.

    The same candidates and seed give the same bytes. Strata share the draw as evenly as their
    sizes allow; inside one, the seed decides.

    Args:
        folder: Gets ``<tower>.npz`` and ``calibration.json``.
        towers: "image" and "text", or one of them.
        preprocessing: The content of preprocessing.json.
        samples: For each tower; fewer where there are fewer.
        batch_size: Recorded, and used wherever the set is.
        seed: Of the draw.

    Raises:
        UserError: Too few samples, a sample that the evaluation uses, NaN, or a tensor that does not fit.
    """
    if batch_size < 1 or samples < MIN_SAMPLES:
        raise UserError(f"{samples} samples in batches of {batch_size}; give at least {MIN_SAMPLES} and 1")
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for tower, candidates in sorted(towers.items()):
        chosen = stratified_draw(candidates.strata, samples, seed=seed)
        if len(chosen) < MIN_SAMPLES:
            raise UserError(f"{len(chosen)} training samples for {tower}; give at least {MIN_SAMPLES}")
        drawn = tuple(
            CalibrationSample(
                id=candidates.ids[i], stratum=candidates.strata[i], sha256=candidates.digests[i]
            )
            for i in chosen
        )
        proof = _disjoint(tower, drawn, candidates.evaluation_digests)
        covered = {name: _coverage(values, chosen) for name, values in sorted(_traits(candidates).items())}
        step = max(1, candidates.rows_at_once)
        chunks = (candidates.tensors(chosen[i : i + step]) for i in range(0, len(chosen), step))
        records[tower] = _write_tower(folder, tower, chunks, drawn, proof, covered)
        if len({sample.sha256 for sample in drawn}) < MIN_SAMPLES:
            raise UserError(
                f"all {len(drawn)} samples drawn for {tower} are equal, so that ranges and cosines are those "
                "of one; give samples that differ"
            )
    return _write_record(
        folder,
        CalibrationRecord(
            source="training",
            drawn="stratified over the strata, each shuffled by the seed, taken in turn",
            seed=seed,
            batch_size=batch_size,
            preprocessing_sha256=sha256_json(dict(preprocessing)),
            towers=records,
        ),
    )


def random_calibration_set(
    folder: Path,
    tensors: Mapping[str, Tensors],
    *,
    preprocessing: Mapping[str, Any],
    allow_random: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> CalibrationSet:
    """Write noise as a calibration set, which the record then says. Refused unless asked for by name.

    Raises UserError without ``allow_random``: ranges found on noise are wrong for real inputs.
    """
    if not allow_random:
        raise UserError(
            "calibrating on random data gives ranges that real inputs do not have; "
            "give training data, or --allow-random-calibration"
        )
    folder.mkdir(parents=True, exist_ok=True)
    records = {}
    for tower, arrays in sorted(tensors.items()):
        count = len(next(iter(arrays.values())))
        digests = [_sample_digest(arrays, i) for i in range(count)]
        drawn = tuple(
            CalibrationSample(id=f"random/{i}", stratum="random", sha256=digests[i]) for i in range(count)
        )
        records[tower] = _write_tower(folder, tower, [arrays], drawn, _disjoint(tower, drawn, ()), {})
    return _write_record(
        folder,
        CalibrationRecord(
            source="random",
            drawn="random numbers, on the user's demand",
            seed=seed,
            batch_size=batch_size,
            preprocessing_sha256=sha256_json(dict(preprocessing)),
            towers=records,
        ),
    )


def open_calibration_set(folder: Path) -> CalibrationSet:
    """Open a written set. Raises UserError when the record is absent or cannot be read."""
    path = folder / RECORD_NAME
    try:
        record = msgspec.json.decode(path.read_bytes(), type=CalibrationRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(
            f"{path} is no calibration record ({error}); draw the calibration set again"
        ) from error
    if record.schema_version != SCHEMA:
        raise UserError(f"{path} has schema {record.schema_version}; update edgeglm")
    return CalibrationSet(folder=folder, record=record)


def stratified_draw(strata: Sequence[str], count: int, *, seed: int) -> list[int]:
    """Return at most ``count`` positions, one of each stratum in turn, so that every prefix is stratified.

    A small stratum gives all it has and the others fill up.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, stratum in enumerate(strata):
        members[stratum].append(position)
    random = np.random.default_rng(seed)
    queues = [random.permutation(members[stratum]) for stratum in sorted(members)]
    chosen: list[int] = []
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and len(chosen) < count:
                chosen.append(int(queue[turn]))
    return chosen


def _disjoint(tower: str, drawn: Sequence[CalibrationSample], evaluation: Iterable[str]) -> Disjointness:
    theirs = set(evaluation)
    known = sorted(theirs)
    shared = [sample.id for sample in drawn if sample.sha256 in theirs]
    if shared:
        raise UserError(
            f"{len(shared)} {tower} calibration samples are evaluation samples too "
            f"({', '.join(shared[:3])}); draw from the training split only"
        )
    return Disjointness(evaluation_samples=len(known), evaluation_sha256=sha256_json(known), overlap=0)


def _write_tower(
    folder: Path,
    tower: str,
    chunks: Iterable[Tensors],
    drawn: tuple[CalibrationSample, ...],
    proof: Disjointness,
    coverage: dict[str, Coverage],
) -> TowerRecord:
    path = folder / f"{tower}.npz"
    tensors = write_npz(path, chunks, len(drawn))
    return TowerRecord(
        file=path.name,
        sha256=sha256_file(path),
        tensors=tensors,
        samples=drawn,
        strata=dict(sorted(Counter(sample.stratum for sample in drawn).items())),
        disjointness=proof,
        coverage=coverage,
    )


def _traits(candidates: Candidates) -> dict[str, Sequence[str]]:
    return {"category": candidates.strata, **candidates.traits}


def _coverage(values: Sequence[str], chosen: Sequence[int]) -> Coverage:
    drawn = Counter(values[i] for i in chosen)
    every = Counter(values)
    share = sum(every[value] for value in drawn) / max(len(values), 1)
    return Coverage(drawn=dict(sorted(drawn.items())), candidates=len(every), share=round(share, 4))


def _write_record(folder: Path, record: CalibrationRecord) -> CalibrationSet:
    formatted = msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1)
    (folder / RECORD_NAME).write_bytes(formatted)
    return CalibrationSet(folder=folder, record=record)


def _sample_digest(arrays: Tensors, position: int) -> str:
    parts: Iterator[bytes] = (
        np.ascontiguousarray(arrays[name][position]).tobytes() for name in sorted(arrays)
    )
    return sha256_bytes(b"".join(parts))
