"""What the report shows, as plain data. The build fills it in; the page only draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from edgeglm.evaluate.retrieval import Interval, TrackMetrics


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of the report: immutable, every field known."""


class Fact(Part, frozen=True):
    """A labelled line of text, for records whose fields the report need not know."""

    label: str
    value: str


class TrackNote(Part, frozen=True):
    """A track as a reader meets it.

    Attributes:
        name: Key in each stage's metrics.
        title: Short column heading, such as ``"Catalogue, names"``.
        description: What is asked of what, in a sentence.
        one_relevant: Whether every query has one right image, so that mAP@10 equals MRR@10.
    """

    name: str
    title: str
    description: str = ""
    one_relevant: bool = False


class Tower(Part, frozen=True):
    """What one tower of a stage costs.

    Attributes:
        name: ``"image"`` or ``"text"``.
        detail: Architecture and resolution, such as ``"EfficientNet-Lite0, 128 px"``.
        parameters: All weights, embeddings counted.
        size_bytes: Size of its file.
        latency_ms_1: Median milliseconds of one call with batch 1; None if not measured.
        latency_ms_8: Median milliseconds of one call with batch 8; None if not measured.
    """

    name: str
    detail: str = ""
    parameters: int | None = None
    size_bytes: int | None = None
    latency_ms_1: float | None = None
    latency_ms_8: float | None = None


class StageRow(Part, frozen=True):
    """One row of the growing table.

    Attributes:
        name: The stage's name, unique in the report.
        title: What a reader sees, such as ``"Student, FP32"``.
        seconds: How long it took in the run that made it.
        metrics: ``{track name: metrics}``; empty for a stage that is not evaluated.
        towers: Costs; empty for a stage without models.
        kept: False for a candidate that was left out by its gate.
        note: A short remark, such as why it was left out.
    """

    name: str
    title: str
    seconds: float
    metrics: Mapping[str, TrackMetrics] = {}
    towers: tuple[Tower, ...] = ()
    kept: bool = True
    note: str = ""

    @property
    def parameters(self) -> int | None:
        """Parameters of all towers, or None if one is unknown."""
        return _total_int([tower.parameters for tower in self.towers])

    @property
    def size_bytes(self) -> int | None:
        """Bytes of all towers' files, or None if one is unknown."""
        return _total_int([tower.size_bytes for tower in self.towers])

    @property
    def latency_ms_1(self) -> float | None:
        """Milliseconds of all towers together at batch 1, or None if one is unknown."""
        return _total([tower.latency_ms_1 for tower in self.towers])

    @property
    def latency_ms_8(self) -> float | None:
        """Milliseconds of all towers together at batch 8, or None if one is unknown."""
        return _total([tower.latency_ms_8 for tower in self.towers])


class ExampleImage(Part, frozen=True):
    """A retrieved image: its PNG, JPEG or WebP bytes, what it shows, its score, and whether it is right."""

    image: bytes
    label: str
    score: float
    right: bool


class Example(Part, frozen=True):
    """A query with its first images, best first; of a hard one the image it wanted, and that one's rank."""

    query: str
    images: tuple[ExampleImage, ...]
    track: str = ""
    wanted: ExampleImage | None = None
    rank: int = 0


class GateRow(Part, frozen=True):
    """A gate and how it went. An optional gate that fails leaves its candidate out.

    ``interval`` is the 95 % bootstrap interval of the value, where there is one.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    required: bool = True
    consequence: str = ""
    interval: Interval | None = None


class SearchedRow(Part, frozen=True):
    """A student of a search: the mAP@10 of its short training, and what an image and a text cost.

    ``latency_ms`` is what the budget was held against, ``here_ms`` what it took on the host.
    """

    size: str
    resolution: int
    map10: float
    latency_ms: float
    here_ms: float
    parameters: int
    file_bytes: int
    front: bool = False
    chosen: bool = False

    @property
    def label(self) -> str:
        """Its size, and the side of its images."""
        return f"{self.size} at {self.resolution}"


class SearchPlot(Part, frozen=True):
    """The search that a budget asked for; ``judged`` says what latency is."""

    judged: str
    teacher_map10: float
    queries: int
    students: tuple[SearchedRow, ...]


class SecondLookRow(Part, frozen=True):
    """mAP@10 of a track by the towers alone and with the re-ranker, and their ratio where there is one."""

    track: str
    without: float
    reranked: float
    ratio: Interval | None = None


class SecondLook(Part, frozen=True):
    """What a re-ranker adds and costs: milliseconds of one call for all its ``candidates``, one thread."""

    candidates: int
    milliseconds: float
    text_milliseconds: float
    rows: tuple[SecondLookRow, ...]


class EngineRow(Part, frozen=True):
    """An engine for one member of the target: built here, or left to the device, and why."""

    member: str
    engine: str
    state: Literal["built", "deferred", "refused"]
    reason: str = ""
    size_bytes: int | None = None


class LicenceRow(Part, frozen=True):
    """A weight or image set that the bundle is made of."""

    name: str
    version: str
    licence: str
    attribution: str
    url: str = ""


class ReportData(Part, frozen=True):
    """The whole report. Everything but ``bundle``, ``target``, ``digest``, tracks and stages may be empty.

    Attributes:
        bundle: The bundle's name.
        target: The target's name and, if it helps, its title.
        digest: The manifest's content digest (hex).
        default_variant: The variant ``edgeglm run`` takes on this kind of machine.
        verdict: One sentence for the head of the page; see :func:`verdict_sentence`.
        main_track: Name of the track in the plots' headline and the scatter.
        teacher: Name of the teacher's stage row, for the ratio figures.
        student: Name of the student's stage row.
        tracks: In the order of the columns.
        stages: In the order of the build.
        search: The students that a budget chose among, if one was given.
        second_look: What the re-ranker adds and costs, if the recipe has one.
        left_out: Variants that are not in the bundle, each with the reason.
        calibration: The calibration record.
        command: A command line that makes the bundle.
        made: Versions, seed, kind of machine.
        notes: Remarks; those on mAP@10 are added by the page.
    """

    bundle: str
    target: str
    digest: str
    default_variant: str
    verdict: str
    main_track: str
    teacher: str
    student: str
    tracks: tuple[TrackNote, ...]
    stages: tuple[StageRow, ...]
    examples: tuple[Example, ...] = ()
    hard: tuple[Example, ...] = ()
    gates: tuple[GateRow, ...] = ()
    left_out: tuple[Fact, ...] = ()
    search: SearchPlot | None = None
    second_look: SecondLook | None = None
    calibration: tuple[Fact, ...] = ()
    engines: tuple[EngineRow, ...] = ()
    licences: tuple[LicenceRow, ...] = ()
    command: str = ""
    made: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()

    def stage(self, name: str) -> StageRow | None:
        """Return the row of that name, or None."""
        return next((row for row in self.stages if row.name == name), None)


class Ratios(Part, frozen=True):
    """A student against its teacher; None where a figure is missing."""

    kept: float | None
    fewer_parameters: float | None
    faster: float | None


def ratios(teacher: StageRow, student: StageRow, track: str) -> Ratios:
    """Compare mAP@10 on ``track``, parameters, and latency at batch 1."""
    scores = [row.metrics[track].map10.value if track in row.metrics else None for row in (teacher, student)]
    return Ratios(
        kept=_quotient(scores[1], scores[0]),
        fewer_parameters=_quotient(teacher.parameters, student.parameters),
        faster=_quotient(teacher.latency_ms_1, student.latency_ms_1),
    )


def kept_least(
    teacher: StageRow, student: StageRow, tracks: Sequence[TrackNote]
) -> tuple[TrackNote, float] | None:
    """Return the track on which the student keeps least of its teacher's mAP@10, and the share."""
    found = [(ratios(teacher, student, track.name).kept, track) for track in tracks]
    known = [(kept, track) for kept, track in found if kept is not None]
    if not known:
        return None
    kept, track = min(known, key=lambda pair: pair[0])
    return track, kept


def verdict_sentence(
    teacher: StageRow, student: StageRow, track: str, tracks: Sequence[TrackNote] = ()
) -> str:
    """Say the ratios in a sentence, the worst track's too; what was not measured is left out of it."""
    found = ratios(teacher, student, track)
    cost = []
    if found.fewer_parameters is not None:
        cost.append(f"{found.fewer_parameters:.1f}\u00d7 fewer parameters")
    if found.faster is not None:
        cost.append(f"{found.faster:.1f}\u00d7 the speed")
    if found.kept is None:
        return "The student was not measured against its teacher."
    said = f"The student keeps {_percent(found.kept)} of the teacher's mAP@10"
    said += f" with {' and '.join(cost)}" if cost else ""
    least = kept_least(teacher, student, tracks)
    if least is None or least[0].name == track:
        return f"{said}."
    return f"{said}; where it keeps least, on \u201c{least[0].title}\u201d, {_percent(least[1])}."


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _total_int(values: list[int | None]) -> int | None:
    total = _total([*values])
    return None if total is None else int(total)
