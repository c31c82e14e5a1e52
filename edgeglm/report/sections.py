"""The sections of the report page, each from the data to a piece of HTML; "" where there is nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE, Interval
from edgeglm.report import figures
from edgeglm.report.data import Example, Fact, ReportData, StageRow

_ENGINE_BADGES = {"built": "good", "deferred": "wait", "refused": "bad"}


def stages(data: ReportData) -> str:
    """Return the growing table: cost and accuracy of every stage, in the order of the build."""
    if not data.stages:
        return ""
    tracks = (f"{escape(track.title)}<small>mAP@10</small>" for track in data.tracks)
    rows = "".join(_stage_row(data, stage) for stage in data.stages)
    described = "".join(
        f"<dt>{escape(track.title)}</dt><dd>{escape(track.description)}{_asked(data, track.name)}"
        f"{' ' + ONE_RELEVANT_NOTE if track.one_relevant else ''}</dd>"
        for track in data.tracks
    )
    table = _table(
        "Each stage with what it cost and what it left of the accuracy; below each mAP@10 its 95 % interval. "
        "Latency, size and parameters are of both towers together, embeddings counted.",
        _words("Stage")
        + _numbers("Time", *tracks, "Latency, ms<small>batch 1 / 8</small>", "Size", "Parameters"),
        rows,
        "Stages",
        dense=True,
    )
    card = f'<div class="card below"><h3>Tracks</h3><dl class="facts">{described}</dl></div>'
    return table + (card if described else "")


def _stage_row(data: ReportData, stage: StageRow) -> str:
    note = f"<small>{escape(stage.note)}</small>" if stage.note else ""
    left = "" if stage.kept else ' <span class="badge bad">left out</span>'
    scores = "".join(
        _interval_cell(stage.metrics[track.name].map10 if track.name in stage.metrics else None)
        for track in data.tracks
    )
    latency = figures.ABSENT
    if stage.latency_ms_1 is not None:
        latency = f"{figures.milliseconds(stage.latency_ms_1)} / {figures.milliseconds(stage.latency_ms_8)}"
    return (
        f'<tr{"" if stage.kept else " class=out"}><th scope="row">{escape(stage.title)}{left}{note}</th>'
        f'<td class="n">{figures.duration(stage.seconds)}</td>{scores}'
        f'<td class="n">{latency}</td><td class="n">{figures.size(stage.size_bytes)}</td>'
        f'<td class="n">{figures.count(stage.parameters)}</td></tr>'
    )


def _interval_cell(interval: Interval | None) -> str:
    if interval is None:
        return f'<td class="n">{figures.ABSENT}</td>'
    low, high, value = (100 * min(1, max(0, x)) for x in (interval.low, interval.high, interval.value))
    meter = (
        f'<span class="meter" aria-hidden="true"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<b style="left:{value:.1f}%"></b></span>'
    )
    bounds = f"{figures.rate(interval.low)}\u2013{figures.rate(interval.high)}"
    return f'<td class="n">{figures.rate(interval.value)}{meter}<small>{bounds}</small></td>'


def _bounds(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"<small>{interval.low:.3f}\u2013{interval.high:.3f}</small>"


def _asked(data: ReportData, track: str) -> str:
    for stage in data.stages:
        if track in stage.metrics:
            found = stage.metrics[track]
            return f" {found.queries:,} queries over a gallery of {found.gallery:,}."
    return ""


def recall(data: ReportData) -> str:
    """Return R@1 and R@10 in both directions, grouped by track."""
    groups = []
    for track in data.tracks:
        measured = [stage for stage in data.stages if track.name in stage.metrics]
        if not measured:
            continue
        groups.append(f'<tr class="group"><th scope="rowgroup" colspan="5">{escape(track.title)}</th></tr>')
        for stage in measured:
            found = stage.metrics[track.name]
            cells = (found.r1, found.r10, found.r1_i2t, found.r10_i2t)
            columns = "".join(f'<td class="n">{figures.percent(cell)}</td>' for cell in cells)
            groups.append(f'<tr><th scope="row">{escape(stage.title)}</th>{columns}</tr>')
    if not groups:
        return ""
    ways = ("text to image", "image to text")
    head = _words("Stage") + _numbers(*(f"R@{k}<small>{way}</small>" for way in ways for k in (1, 10)))
    return _table(
        "Share of queries with a right answer among the first 1 and 10.", head, "".join(groups), "Recall"
    )


def examples(data: ReportData) -> str:
    """Return the grid of example retrievals, the right images outlined and ticked."""
    if not data.examples:
        return ""
    items = "".join(_example(example) for example in data.examples)
    return (
        '<p class="lead">Queries drawn at random, failures included, with the first images and their cosine. '
        "Right images are outlined in green and marked with a tick.</p>"
        f'<ul class="examples">{items}</ul>'
    )


def hard(data: ReportData) -> str:
    """Return the grid of the worst failures, each with the image that was wanted."""
    if not data.hard:
        return ""
    items = "".join(_example(example) for example in data.hard)
    return (
        '<p class="lead">The queries whose right image scores furthest below the first answer, the worst '
        "first. The image that was wanted comes last, outlined in green, with its rank.</p>"
        f'<ul class="examples">{items}</ul>'
    )


def _example(example: Example) -> str:
    first = next((rank for rank, image in enumerate(example.images, 1) if image.right), None)
    kind, text = ("good", f"right at {first}") if first == 1 else ("wait", f"right at {first}")
    if first is None and example.wanted is not None:
        kind, text = "bad", f"right at {example.rank:,}"
    elif first is None:
        kind, text = "bad", f"not in the first {len(example.images)}"
    shown = example.images if first or example.wanted is None else (*example.images, example.wanted)
    hits = "".join(
        f'<li{" class=right" if image.right else ""}><img src="{data_uri(image.image)}" '
        f'alt="{escape(image.label)}{", right" if image.right else ""}">'
        f"<b>{'✓ ' if image.right else ''}{image.score:.2f}</b><bdi>{escape(image.label)}</bdi></li>"
        for image in shown
    )
    track = f' <small class="mono">{escape(example.track)}</small>' if example.track else ""
    return (
        f'<li><p class="query"><span><q><bdi>{escape(example.query)}</bdi></q>{track}</span>'
        f'<span class="badge {kind}">{text}</span></p><ol class="hits">{hits}</ol></li>'
    )


def data_uri(image: bytes) -> str:
    """Return a ``data:`` URI of PNG, JPEG or WebP bytes; ValueError for anything else."""
    for magic, kind in ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp")):
        if image.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    raise ValueError(f"an example image starts with {image[:4]!r}, expected PNG, JPEG or WebP")


def gates(data: ReportData) -> str:
    """Return what was asked of the accuracy, what passed, and what was left out for it."""
    rows = "".join(
        f'<tr><th scope="row">{escape(gate.name)}</th><td class="n">{gate.value:.4f}'
        f"{_bounds(gate.interval)}</td>"
        f'<td class="n">≥ {gate.threshold:g}</td>'
        f"<td>{_badge('good', 'passed') if gate.passed else _badge('bad', 'failed')}</td>"
        f"<td>{'required' if gate.required else 'optional'}</td><td>{escape(gate.consequence)}</td></tr>"
        for gate in data.gates
    )
    head = _words("Gate") + _numbers("Value", "Asked") + _words("Outcome", "Kind", "Consequence")
    caption = "A required gate that fails stops the build; an optional one leaves its candidate out."
    return _table(caption, head, rows, "Gates") if rows else ""


def towers(data: ReportData) -> str:
    """Return the cost of each tower by itself."""
    rows = "".join(
        f'<tr><th scope="row">{escape(stage.title)}</th><td>{escape(tower.name)}</td>'
        f'<td>{escape(tower.detail)}</td><td class="n">{figures.count(tower.parameters)}</td>'
        f'<td class="n">{figures.size(tower.size_bytes)}</td>'
        f'<td class="n">{figures.milliseconds(tower.latency_ms_1)}</td>'
        f'<td class="n">{figures.milliseconds(tower.latency_ms_8)}</td></tr>'
        for stage in data.stages
        for tower in stage.towers
    )
    costs = ("Parameters", "Size", "Batch 1, ms", "Batch 8, ms")
    head = _words("Stage", "Tower", "What it is") + _numbers(*costs)
    return _table("Each tower by itself; embeddings counted.", head, rows, "Towers") if rows else ""


def second_look(data: ReportData) -> str:
    """Return what the re-ranker adds on each track, and what it costs."""
    found = data.second_look
    if found is None:
        return ""
    titles = {track.name: track.title for track in data.tracks}
    rows = "".join(
        f'<tr><th scope="row">{escape(titles.get(row.track, row.track))}</th>'
        f'<td class="n">{figures.rate(row.without)}</td><td class="n">{figures.rate(row.reranked)}</td>'
        f'<td class="n">{figures.rate(None if row.ratio is None else row.ratio.value)}'
        f"{_bounds(row.ratio)}</td></tr>"
        for row in found.rows
    )
    head = _words("Track") + _numbers("Towers alone", "Re-ranked", "Ratio")
    took, beside = map(figures.milliseconds, (found.milliseconds, found.text_milliseconds))
    caption = (
        f"mAP@10 in FP32. {found.candidates} pictures ordered anew take {took} ms beside {beside} ms "
        "of the text tower. Where the interval holds 1, it adds nothing that can be told from chance."
    )
    return _table(caption, head, rows, "Re-ranker")


def engines(data: ReportData) -> str:
    """Return which engines were built here and which are left to the device, and why."""
    rows = "".join(
        f'<tr><th scope="row">{escape(engine.member)}</th><td>{escape(engine.engine)}</td>'
        f"<td>{_badge(_ENGINE_BADGES[engine.state], engine.state)}</td>"
        f'<td class="n">{figures.size(engine.size_bytes)}</td><td>{escape(engine.reason)}</td></tr>'
        for engine in data.engines
    )
    head = _words("Device", "Engine", "State") + _numbers("Size") + _words("Why")
    caption = "A deferred engine is built on the device by finalize, from the ONNX files in the bundle."
    return _table(caption, head, rows, "Engines") if rows else ""


def licences(data: ReportData) -> str:
    """Return the licences and attributions of every weight and image set."""
    rows = "".join(
        f'<tr><th scope="row">{_link(entry.name, entry.url)}</th><td>{escape(entry.version)}</td>'
        f"<td>{escape(entry.licence)}</td><td>{escape(entry.attribution)}</td></tr>"
        for entry in data.licences
    )
    head = _words("Source", "Version", "Licence", "Attribution")
    return _table("What the bundle is made of, and whom to credit.", head, rows, "Licences") if rows else ""


def facts_section(found: Sequence[Fact]) -> str:
    """Return a card with labelled lines."""
    return f'<div class="card">{facts(found)}</div>' if found else ""


def facts(found: Iterable[Fact]) -> str:
    """Return labelled lines as a description list."""
    lines = "".join(f"<dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}</dd>" for fact in found)
    return f'<dl class="facts">{lines}</dl>'


def _badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{text}</span>'


def _link(text: str, url: str) -> str:
    if not url.startswith(("https://", "http://")):
        return escape(text)
    return f'<a href="{escape(url)}" rel="noreferrer">{escape(text)}</a>'


def _words(*heads: str) -> str:
    """Return the heads of columns of words."""
    return "".join(f'<th scope="col">{head}</th>' for head in heads)


def _numbers(*heads: str) -> str:
    """Return the heads of columns of numbers."""
    return "".join(f'<th scope="col" class="n">{head}</th>' for head in heads)


def _table(caption: str, head: str, rows: str, label: str, *, dense: bool = False) -> str:
    kind = "scroll dense" if dense else "scroll"
    return (
        f'<div class="{kind}" tabindex="0" role="group" aria-label="{label}, table"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
