"""If these fail, a re-ranker does not travel with its bundle, or orders something else than was evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.runtime.reranking import Reranker
from edgeglm.runtime.retrieval import Retriever
from tests.build.conftest import Project, Said

ON = ("enabled=true", "depth=1", "width=32", "steps=4", "queries=4", "negatives=4", "candidates=6")


@pytest.fixture(scope="module")
def reranked(project: Project, cold: Said) -> tuple[Said, Path]:
    place = project.root / "bundles" / "reranked"
    settings = [part for line in ON for part in ("--set", f"reranker.{line}")]
    said = project.build("cpu", *settings, output=place)
    assert said.code == 0, said.err
    return said, place


def test_one_line_of_the_recipe_adds_two_stages_and_trains_nothing_else_again(
    reranked: tuple[Said, Path],
) -> None:
    assert reranked[0].ran == ["reranker", "reranker-evaluation", "pack"]


def test_the_bundle_says_what_it_adds_and_costs_on_every_track(reranked: tuple[Said, Path]) -> None:
    found = json.loads((reranked[1] / "metrics.json").read_text())["reranker"]
    assert found["candidates"] == 6
    assert found["latency_ms"]["reranker"] > 0
    for track in found["tracks"].values():
        assert 0 <= track["with"] <= 1
        assert track["without"] == pytest.approx(track["with"] / track["ratio"]["value"], abs=1e-9)


def test_without_it_is_what_the_towers_reach_although_few_are_ordered_anew(
    reranked: tuple[Said, Path],
) -> None:
    found = json.loads((reranked[1] / "metrics.json").read_text())
    for name, track in found["reranker"]["tracks"].items():
        alone = found["export"][name]["map10"]["value"]
        assert track["without"] == pytest.approx(alone, abs=1e-6), name


def test_the_console_and_the_report_say_so_too(reranked: tuple[Said, Path]) -> None:
    said, place = reranked
    found = json.loads((place / "metrics.json").read_text())["reranker"]
    row = next(row for row in said.json["rows"] if row["title"] == "Re-ranker")
    page = (place / "report.html").read_text()
    section = page[page.index('<section id="second-look"') :].partition("</section>")[0]
    assert "6 pictures" in section
    for name, track in found["tracks"].items():
        assert f"{name} {track['without']:.3f} -> {track['with']:.3f}" in row["note"]
        assert f"{track['ratio']['low']:.3f}\u2013{track['ratio']['high']:.3f}" in section


def test_run_orders_the_first_ones_anew_and_says_through_which_file(
    project: Project, reranked: tuple[Said, Path]
) -> None:
    query = ("run", reranked[1], "--query", "a red circle", "-k", "10", "--json")
    plain, anew = project.edgeglm(*query), project.edgeglm(*query, "--rerank")
    assert plain.code == anew.code == 0, anew.err
    assert anew.json["model"].endswith("reranker/model.onnx")
    first, again = ([hit["id"] for hit in said.json["hits"]] for said in (plain, anew))
    assert sorted(first[:6]) == sorted(again[:6])
    assert first[6:] == again[6:], "what was not looked at again keeps its place"
    scores = [hit["score"] for hit in anew.json["hits"][:6]]
    assert scores == sorted(scores, reverse=True)


def test_the_re_ranker_is_part_of_what_the_bundle_answers_for(
    project: Project, reranked: tuple[Said, Path], bundle: Path
) -> None:
    assert project.edgeglm("verify", reranked[1]).code == 0
    with open_bundle(reranked[1]) as one, open_bundle(bundle) as other:
        assert one.manifest.content_digest != other.manifest.content_digest
        patches = np.load(one.file("reranker/patches.npy"))
        assert len(patches) == len(one.gallery_items())
        assert patches.dtype == np.float16


def test_a_bundle_without_one_says_how_to_get_it(project: Project, cold: Said, bundle: Path) -> None:
    said = project.edgeglm("run", bundle, "--query", "a red circle", "--rerank")
    assert said.code == 2
    assert "reranker.enabled=true" in said.err
    said = project.edgeglm("run", bundle, "--image", "x.png", "--rerank")
    assert said.code == 2
    assert "--query" in said.err


def test_patches_of_another_gallery_are_refused(
    reranked: tuple[Said, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_bundle(reranked[1]) as opened, Retriever(opened) as retriever, Reranker(opened) as reranker:
        monkeypatch.setattr(reranker, "_patches", reranker._patches[:-1])
        with pytest.raises(UserError, match="rows for"):
            reranker.search_text(retriever, "a red circle")
