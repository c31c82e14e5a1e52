"""If these fail, the page that people judge a build by is broken, unsafe, or says something else."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from edgeglm.report import ReportData, render_report
from edgeglm.report.data import (
    Example,
    ExampleImage,
    SearchedRow,
    SearchPlot,
    StageRow,
    TrackNote,
    verdict_sentence,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("fixture.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> ReportData:
    report: ReportData = _fixture().sample_report()
    return report


class Page(HTMLParser):
    """Collects elements and checks that every one is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_says_what_the_build_found(data: ReportData) -> None:
    text = Page(render_report(data)).text
    for words in (
        "keeps 97.2 % of the teacher's mAP@10 with 8.3\u00d7 fewer parameters and 7.1\u00d7 the speed",
        data.digest,
        "0.612",
        "0.590 to 0.634",
        "18.5 / 110",
        "left out; layer norms of the text tower cost most",
        "SM 87 engines are built on the device",
        "CC-BY-4.0",
        "Twitter, Inc. and other contributors",
        "edgeglm build --target jetson-agx",
        "0 of 256 digests",
        "With one relevant image a query, mAP@10 equals MRR@10.",
        "crimson fruit",
        "not in the first 5",
        "3 min 34 s",
    ):
        assert words in text


def test_the_page_names_what_is_not_in_the_bundle_and_claims_no_fresh_measurement(data: ReportData) -> None:
    text = Page(render_report(data)).text
    assert "the older parser has no <Gelu>" in text
    assert "its figures and its time are those of the run that made it" in text
    assert "during this build" not in text
    assert "Left out" not in Page(render_report(msgspec.structs.replace(data, left_out=()))).text


def test_the_page_loads_nothing_and_runs_nothing(data: ReportData) -> None:
    html = render_report(data)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "url(" not in html
    assert "@import" not in html
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "default-src 'none'" in html


def test_hostile_text_stays_text(data: ReportData) -> None:
    evil = "\"><script>alert('x')</script>&<img src=x onerror=y>"
    calm = Page(render_report(data))

    def poisoned(value: Any) -> Any:
        if isinstance(value, str):
            return evil
        if isinstance(value, (list, tuple)):
            return type(value)(poisoned(item) for item in value)
        return value

    def poison(part: Any) -> Any:
        if isinstance(part, msgspec.Struct):
            keep = {"name", "main_track", "teacher", "student", "state"}
            fields = {name: getattr(part, name) for name in part.__struct_fields__}
            return msgspec.structs.replace(
                part, **{name: poison(value) for name, value in fields.items() if name not in keep}
            )
        if isinstance(part, tuple):
            return tuple(poison(item) for item in part)
        return poisoned(part)

    page = Page(render_report(poison(data)))
    assert not page.all("script")
    assert len(page.all("img")) == len(calm.all("img"))
    assert evil in page.text
    assert not [link for link in page.all("a") if not link["href"].startswith("#")]


def test_a_link_is_made_of_web_addresses_only(data: ReportData) -> None:
    assert 'href="https://github.com/googlefonts/noto-emoji"' in render_report(data)
    licence = msgspec.structs.replace(data.licences[0], url="javascript:alert(1)")
    assert "javascript:" not in render_report(msgspec.structs.replace(data, licences=(licence,)))


def test_the_same_data_gives_the_same_bytes(data: ReportData) -> None:
    again = msgspec.json.decode(msgspec.json.encode(data), type=ReportData)
    assert again == data
    assert render_report(again) == render_report(data)


def test_the_page_can_be_read_without_seeing_it(data: ReportData) -> None:
    page = Page(render_report(data))
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"].startswith("https://") or link["href"].removeprefix("#") in ids
    assert any("right" in image["alt"] for image in page.all("img")), "right images differ by colour only"


def test_every_chart_is_well_formed_and_described(data: ReportData) -> None:
    found = re.findall(r'<svg class="chart".*?</svg>', render_report(data), re.DOTALL)
    assert len(found) == 3
    for svg in found:
        root = ElementTree.fromstring(svg)
        assert root[0].tag == "title"
        assert "Student, FP32" in (root[1].text or "")
        _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
        for element in root.iter():
            for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= most + 1, "drawn outside of the chart"


def test_what_a_budget_chose_among_is_drawn_with_its_front(data: ReportData) -> None:
    assert "Students to choose from" not in render_report(data)
    shared: dict[str, Any] = {"here_ms": 1.0, "parameters": 2_000_000, "file_bytes": 8_000_000}
    search = SearchPlot(
        judged="measured here",
        teacher_map10=0.9,
        queries=400,
        students=(
            SearchedRow(size="edge-xs", resolution=48, map10=0.41, latency_ms=1.9, front=True, **shared),
            SearchedRow(
                size="edge-s", resolution=64, map10=0.47, latency_ms=4.4, front=True, chosen=True, **shared
            ),
            SearchedRow(size="slow", resolution=64, map10=0.45, latency_ms=5.0, **shared),
        ),
    )
    page = render_report(msgspec.structs.replace(data, search=search))
    (svg,) = [
        found for found in re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL) if "slow" in found
    ]
    root = ElementTree.fromstring(svg)
    assert root[1].text == "edge-xs at 48 0.410 at 1.9 ms; edge-s at 64 0.470 at 4.4 ms, chosen"
    (front,) = [each for each in root.iter() if each.tag == "polyline"]
    assert len(front.attrib["points"].split()) == 2, "a student that is slower and worse is no choice"
    assert [each.text for each in root.iter() if (each.text or "").startswith("chosen")] == [
        "chosen: edge-s at 64"
    ]
    assert "slow at 64: 0.450, 5 ms, 8.0 MB" in page
    assert "latency: measured here" in page


def test_the_hardest_queries_show_what_they_wanted_and_at_which_rank(data: ReportData) -> None:
    assert "Hardest queries" not in render_report(data)
    lost = next(one for one in data.examples if not any(image.right for image in one.images))
    wanted = msgspec.structs.replace(lost.images[0], label="the lost one", right=True, score=0.11)
    hard = msgspec.structs.replace(lost, wanted=wanted, rank=1204)
    page = render_report(msgspec.structs.replace(data, hard=(hard,)))
    assert "right at 1,204" in page
    section = page.partition('id="hard"')[2].partition("</section>")[0]
    assert section.count("<li class=right>") == 1
    assert section.rindex("the lost one") > section.rindex(lost.images[-1].label)


def test_a_bare_report_has_no_empty_sections() -> None:
    bare = ReportData(
        bundle="b",
        target="cpu",
        digest="0" * 64,
        default_variant="fp32",
        verdict="Nothing was measured.",
        main_track="t",
        teacher="teacher",
        student="student",
        tracks=(TrackNote(name="t", title="T"),),
        stages=(StageRow(name="pairs", title="Pairs", seconds=1),),
    )
    page = Page(render_report(bare))
    assert [attributes["id"] for attributes in page.all("section")] == ["stages", "made", "notes"]
    assert not page.all("svg")


def test_unknown_image_bytes_are_refused_and_not_embedded(data: ReportData) -> None:
    image = ExampleImage(image=b"<svg onload=x>", label="x", score=0.0, right=False)
    with pytest.raises(ValueError, match="expected PNG, JPEG or WebP"):
        render_report(msgspec.structs.replace(data, examples=(Example(query="x", images=(image,)),)))


def test_the_verdict_leaves_out_what_was_not_measured(data: ReportData) -> None:
    teacher, student = data.stage("teacher"), data.stage("student")
    assert teacher is not None
    assert student is not None
    quick = msgspec.structs.replace(student, towers=())
    assert verdict_sentence(teacher, quick, data.main_track) == (
        "The student keeps 97.2 % of the teacher's mAP@10."
    )
    blind = msgspec.structs.replace(student, metrics={})
    assert "not measured" in verdict_sentence(teacher, blind, data.main_track)


@pytest.mark.system
def test_a_browser_fits_the_page_on_a_phone(
    data: ReportData, tmp_path: Path, require_system: Callable[[str], str]
) -> None:
    """Nothing but the scrolling tables, charts and command may be wider than the screen."""
    chromium = require_system("chromium")
    measure = (
        "<script>parent.document.title=[...document.querySelectorAll('body *')].filter(e=>"
        "!e.closest('.scroll,.pan,pre')&&e.getBoundingClientRect().right>"
        "document.documentElement.clientWidth+1).map(e=>e.tagName+'.'+e.className).join(' ')||'fits'</script>"
    )
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_report(data))
    inner = escape(html.replace("</body>", f"{measure}</body>"))
    page = tmp_path / "report.html"  # no window is as narrow as a phone, but a frame may be
    page.write_text(f'<meta charset="utf-8"><iframe style="width:320px" srcdoc="{inner}"></iframe>', "utf-8")
    found = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=500,900",
                "--dump-dom",
                page.as_uri(),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
    assert "<title>fits</title>" in found.stdout


def test_letters_that_turn_the_direction_turn_their_own_text_alone(data: ReportData) -> None:
    turned = "\u202egpj.evil"
    images = tuple(msgspec.structs.replace(image, label=turned) for image in data.examples[0].images)
    example = msgspec.structs.replace(data.examples[0], query=turned, images=images)
    page = render_report(msgspec.structs.replace(data, examples=(example,), hard=()))
    outside = re.sub(r'<bdi>[^<]*</bdi>|alt="[^"]*"', "", page)
    assert "\u202e" in page
    assert "\u202e" not in outside, "what follows would be read backwards"
