"""The report page: one HTML file without anything external, the same bytes for the same data."""

from __future__ import annotations

from html import escape
from importlib import resources

from edgeglm.evaluate.retrieval import CUTOFF, ONE_RELEVANT_NOTE
from edgeglm.report import charts, figures, sections
from edgeglm.report.data import Fact, ReportData, kept_least, ratios

# The browser itself refuses anything that is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_report(data: ReportData) -> str:
    """Return the whole page as UTF-8 text. Sections without data are left out.

    Every text of ``data`` is escaped. The page holds no script, loads nothing, follows the reader's
    light or dark scheme, fits a phone, prints, and reads in order without its style sheet.
    """
    found = [
        ("stages", "Stages", sections.stages(data)),
        ("recall", "Recall", sections.recall(data)),
        ("plots", "Plots", _plots(data)),
        ("examples", "Examples", sections.examples(data)),
        ("hard", "Hardest queries", sections.hard(data)),
        ("gates", "Gates", sections.gates(data)),
        ("left-out", "Left out", sections.facts_section(data.left_out)),
        ("towers", "Towers", sections.towers(data)),
        ("second-look", "Re-ranker", sections.second_look(data)),
        ("engines", "Engines", sections.engines(data)),
        ("calibration", "Calibration", sections.facts_section(data.calibration)),
        ("licences", "Licences", sections.licences(data)),
        ("made", "How it was made", _made(data)),
        ("notes", "Notes", _notes(data)),
    ]
    present = [(key, title, body) for key, title, body in found if body]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>{body}</section>\n'
        for key, title, body in present
    )
    style = resources.files("edgeglm.report").joinpath("page.css").read_text("utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(data.bundle)} for {escape(data.target)} - edgeglm report</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n"
        f"{_header(data, [(key, title) for key, title, _ in present])}"
        f"<main>\n{_cards(data)}{body}</main>\n"
        f'<footer><p>edgeglm report of bundle <span class="mono">{escape(data.digest)}</span>. '
        "All figures were measured by the stages that led to it. A stage whose inputs and code have not "
        "changed is not run again: its figures and its time are those of the run that made it.</p></footer>\n"
        "</body>\n</html>\n"
    )


def _header(data: ReportData, links: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in links)
    ids = (("Target", data.target), ("Default variant", data.default_variant))
    pairs = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in ids)
    return (
        f'<header><div><p class="eyebrow">edgeglm report</p><h1>{escape(data.bundle)}</h1>'
        f'<p class="verdict">{escape(data.verdict)}</p>'
        f'<dl class="ids">{pairs}<div><dt>Content digest</dt>'
        f'<dd class="mono">{escape(data.digest)}</dd></div></dl>'
        f'<nav aria-label="Sections"><ul>{items}</ul></nav></div></header>\n'
    )


def _cards(data: ReportData) -> str:
    teacher, student = data.stage(data.teacher), data.stage(data.student)
    if teacher is None or student is None:
        return ""
    found = ratios(teacher, student, data.main_track)
    score = student.metrics[data.main_track].map10.value if data.main_track in student.metrics else None
    title = next((track.title for track in data.tracks if track.name == data.main_track), data.main_track)
    least = kept_least(teacher, student, data.tracks) if len(data.tracks) > 1 else None
    worst = (least[0].title, least[1]) if least else ("", None)
    cards = [
        (figures.rate(score), f"student mAP@10, {title}"),
        (figures.percent(found.kept), f"of the teacher kept, {title}"),
        (figures.percent(worst[1]), f"kept at the least: {worst[0]}"),
        (figures.times(found.fewer_parameters), f"fewer parameters, {figures.count(student.parameters)}"),
        (figures.times(found.faster), f"faster, {figures.milliseconds(student.latency_ms_1)} ms a pair"),
        (figures.size(student.size_bytes), f"both towers, {student.title}"),
    ]
    items = "".join(
        f"<li><strong>{escape(value)}</strong><span>{escape(label)}</span></li>"
        for value, label in cards
        if value != figures.ABSENT
    )
    return f'<ul class="cards" aria-label="Key figures">{items}</ul>\n'


def _plots(data: ReportData) -> str:
    title = next((track.title for track in data.tracks if track.name == data.main_track), data.main_track)
    drawn = [
        (
            "wide",
            "Accuracy per stage",
            "mAP@10 with 95 % bootstrap intervals",
            charts.accuracy_chart(data),
            [track.title for track in data.tracks],
        ),
        (
            "",
            "Latency per stage",
            "one call of each tower, summed; shorter is better",
            charts.latency_chart(data.stages),
            ["batch 1", "batch 8"],
        ),
        (
            "",
            "Accuracy against latency",
            f"mAP@10, {title}; up and to the left is better",
            charts.tradeoff_chart(data),
            [stage.title for stage in charts.tradeoff_stages(data)],
        ),
        (
            "wide",
            "Students to choose from",
            "" if data.search is None else f"latency: {data.search.judged}",
            charts.search_chart(data.search),
            ["on the front of accuracy, latency and size", "beaten by another"],
        ),
    ]
    parts = "".join(
        f'<figure class="card {kind}"><figcaption>{heading}<small>{escape(what)}</small></figcaption>'
        f'<div class="pan" tabindex="0" role="group" aria-label="{heading}, chart">{chart}</div>'
        f"{charts.legend(labels) if labels else ''}</figure>"
        for kind, heading, what, chart, labels in drawn
        if chart
    )
    return f'<div class="plots">{parts}</div>' if parts else ""


def _made(data: ReportData) -> str:
    said = "A command line that makes this bundle; of paths it names the last part."
    command = f"<p>{said}</p><pre><code>{escape(data.command)}</code></pre>" if data.command else ""
    facts = (*data.made, Fact(label="Content digest", value=data.digest))
    return f'<div class="card">{command}{sections.facts(facts)}</div>'


def _notes(data: ReportData) -> str:
    notes = [
        f"mAP@{CUTOFF} is the mean over queries of trec_eval's map_cut.{CUTOFF}: the precision at each right "
        f"image among the first {CUTOFF}, summed and divided by all right images of the query. "
        f"{ONE_RELEVANT_NOTE}",
        "R@k is the share of queries with at least one right answer among the first k. Image to text ranks "
        "all query texts for each image that answers one.",
        "Intervals are 95 % bootstrap intervals over queries; they say nothing about other seeds or data.",
        *data.notes,
    ]
    return f'<div class="card"><ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul></div>'
