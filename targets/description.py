"""A target in words, for a table or a page. Pure: the command line draws what this returns."""

from __future__ import annotations

from edgeglm.targets.schema import Figure, RuntimeVersion, Target, known_targets, load_target, members_of

TABLE_HEADER = ("target", "what", "SM", "memory", "bandwidth", "FP16", "INT8", "precisions", "builder")
UNVERIFIED = "*"
"""Marks a number that nobody has checked against its source."""


def target_table_rows() -> list[tuple[str, ...]]:
    """Return one row for each shipped target, in the columns of ``TABLE_HEADER``."""
    return [_row(load_target(name)) for name in known_targets()]


def describe_target(target: Target) -> list[tuple[str, str]]:
    """Return ``(subject, text)`` lines with every number, its source, and whether it was verified."""
    lines = [("name", target.name), ("title", target.title), ("kind", target.kind)]
    if target.kind == "family":
        lines += [("member", f"{member.name}: {member.title}") for member in members_of(target)]
        return [*lines, *(("note", note) for note in target.notes)]
    if target.arch:
        lines.append(("architecture", target.arch))
    if target.sm:
        lines.append(("SM", dotted_sm(target.sm)))
    for subject, figure, unit in (
        ("memory", target.memory_gb, "GB"),
        ("bandwidth", target.bandwidth_gb_s, "GB/s"),
        ("peak FP32 dense", target.peak.fp32_tflops, "TFLOPS"),
        ("peak FP16 dense", target.peak.fp16_tflops, "TFLOPS"),
        ("peak INT8 dense", target.peak.int8_tops, "TOPS"),
        ("peak FP8 dense", target.peak.fp8_tflops, "TFLOPS"),
    ):
        if figure:
            lines.append((subject, _with_source(figure, unit)))
    if target.dla:
        doubt = "" if target.dla.verified else ", unverified"
        lines.append(("DLA", f"{target.dla.cores} cores ({target.dla.source}{doubt})"))
    lines.append(("precisions", ", ".join(target.precisions)))
    if target.lanes:
        lines.append(("lanes", ", ".join(target.lanes)))
    lines.append(("builder", target.builder or ""))
    lines += [("runtime", _runtime_text(runtime)) for runtime in target.runtimes]
    return [*lines, *(("note", note) for note in target.notes)]


def dotted_sm(sm: int) -> str:
    """Return 87 as ``"8.7"`` and 120 as ``"12.0"``."""
    return f"{sm // 10}.{sm % 10}"


def _row(target: Target) -> tuple[str, ...]:
    if target.kind == "family":
        members = members_of(target)
        sms = ", ".join(dict.fromkeys(dotted_sm(member.sm) for member in members if member.sm))
        builders = ", ".join(dict.fromkeys(member.builder or "" for member in members))
        count = f"{target.title} ({len(members)} members)"
        return (target.name, count, sms, "", "", "", "", "per member", builders)
    return (
        target.name,
        target.title,
        dotted_sm(target.sm) if target.sm else "",
        _short(target.memory_gb, "GB"),
        _short(target.bandwidth_gb_s, "GB/s"),
        _short(target.peak.fp16_tflops, "TFLOPS"),
        _short(target.peak.int8_tops, "TOPS"),
        ", ".join(target.precisions),
        target.builder or "",
    )


def _short(figure: Figure | None, unit: str) -> str:
    return f"{figure.value:g} {unit}{'' if figure.verified else UNVERIFIED}" if figure else ""


def _with_source(figure: Figure, unit: str) -> str:
    return f"{figure.value:g} {unit} ({figure.source}{'' if figure.verified else ', unverified'})"


def _runtime_text(runtime: RuntimeVersion) -> str:
    parts = [f"{runtime.library} {runtime.version}"]
    if runtime.jetpack:
        parts.append(f"JetPack {runtime.jetpack}" + (f" (L4T {runtime.l4t})" if runtime.l4t else ""))
    if runtime.cuda:
        parts.append(f"CUDA {runtime.cuda}")
    if runtime.python:
        parts.append(f"Python {runtime.python}")
    if runtime.lane:
        parts.append(f"lane {runtime.lane}")
    if runtime.dla:
        parts.append("DLA")
    if not runtime.verified:
        parts.append("unverified")
    return ", ".join(parts)
