"""What ``edgeglm inspect`` shows of a bundle, as plain rows; the command line draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeglm.bundle.fingerprint import fingerprint_of
from edgeglm.bundle.manifest import Manifest, Metrics
from edgeglm.bundle.opened import Bundle
from edgeglm.core.words import human_bytes


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled list of (label, value)."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; every row is as long as ``columns``, of which those with ">" in front are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def inspect_rows(bundle: Bundle) -> tuple[tuple[Section, ...], tuple[Table, ...]]:
    """Return the sections and tables that describe a bundle, with the variants' table first."""
    manifest = bundle.manifest
    about = Section(
        title="bundle",
        rows=(
            ("name", manifest.name),
            ("created", manifest.created),
            ("edgeglm", manifest.edgeglm),
            ("schema", str(manifest.schema_version)),
            ("files", f"{len(manifest.files)}, {human_bytes(manifest.size)}"),
            ("content digest", manifest.content_digest),
            ("verified", "yes" if bundle.verified else "no"),
            ("signature", bundle.signature.words),
            ("space", fingerprint_of(manifest)),
            ("seeds", ", ".join(f"{name}={seed}" for name, seed in sorted(manifest.seeds.items()))),
        ),
    )
    target = Section(
        title="target",
        rows=(
            ("name", manifest.target.name),
            ("description", manifest.target.description),
            ("members", ", ".join(manifest.target.members) or "itself"),
            *((name.replace("_", " "), _words(value)) for name, value in manifest.target.facts.items()),
        ),
    )
    engines = [name.removeprefix("engines/") for name in bundle.names("engines") if name.endswith(".plan")]
    parts = Section(
        title="parts",
        rows=(
            ("engines", ", ".join(engines) or "none, built on the device"),
            ("gallery", f"{len(bundle.names('gallery/thumbnails'))} thumbnails"),
            ("goldens", f"{len(bundle.names('golden/inputs'))} input files"),
        ),
    )
    tables = (
        _variants(manifest),
        _accuracy(manifest),
        _towers(manifest),
        _stages(manifest),
        _licences(manifest),
    )
    sections = tuple(
        Section(title=section.title, rows=tuple(row for row in section.rows if row[1]))
        for section in (about, target, parts)
    )
    return sections, tuple(table for table in tables if table.rows)


def _variants(manifest: Manifest) -> Table:
    timings = sorted({name for variant in manifest.variants for name in variant.latency})
    rows = [
        (
            f"{variant.name} (default)" if variant.name == manifest.default_variant else variant.name,
            variant.lane,
            variant.gate,
            human_bytes(sum(manifest.files[name].size for name in variant.files.values())),
            *(f"{variant.latency[name]:.2f}" if name in variant.latency else "-" for name in timings),
        )
        for variant in manifest.variants
    ]
    filler = ("-",) * (1 + len(timings))
    rows += [(left.name, "-", f"left out: {left.reason}", *filler) for left in manifest.left_out]
    shown = (f">{name.removesuffix('_ms').replace('_', ' ')} ms" for name in timings)
    return Table(
        title="variants",
        columns=("variant", "lane", "gate", ">size", *shown),
        rows=tuple(rows),
    )


def _accuracy(manifest: Manifest) -> Table:
    named = {variant.name: variant.metrics for variant in manifest.variants}
    named |= {f"{left.name}, left out": left.metrics for left in manifest.left_out}
    measured = {name: metrics for name, metrics in named.items() if metrics}
    tracks = list(dict.fromkeys(track for metrics in measured.values() for track in metrics))
    return Table(
        title="mAP@10",
        columns=("track", *(f">{name}" for name in measured)),
        rows=tuple((track, *(_map10(metrics, track) for metrics in measured.values())) for track in tracks),
    )


def _map10(metrics: Metrics, track: str) -> str:
    measured: Any = metrics.get(track)
    value = measured.get("map10") if isinstance(measured, dict) else None
    value = value.get("value") if isinstance(value, dict) else value
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def _towers(manifest: Manifest) -> Table:
    return Table(
        title="towers",
        columns=("tower", ">parameters", ">embedding", ">resolution", "inputs", "outputs"),
        rows=tuple(
            (
                name,
                f"{tower.parameters:,}",
                str(tower.embedding_dim),
                "-" if tower.resolution is None else f"{tower.resolution} px",
                "\n".join(f"{t.name} {t.dtype} {_words(t.shape)}" for t in tower.inputs),
                "\n".join(f"{t.name} {t.dtype} {_words(t.shape)}" for t in tower.outputs),
            )
            for name, tower in sorted(manifest.towers.items())
        ),
    )


def _stages(manifest: Manifest) -> Table:
    return Table(
        title="stages",
        columns=("stage", ">seconds", "artifact"),
        rows=tuple(
            (stage.name, f"{stage.seconds:.1f}", f"{stage.artifact[:16]}\u2026") for stage in manifest.stages
        ),
    )


def _licences(manifest: Manifest) -> Table:
    return Table(
        title="licences",
        columns=("source", "version", "licence", "attribution"),
        rows=tuple((item.name, item.version, item.licence, item.attribution) for item in manifest.licences),
    )


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
