"""If these fail, a user's build does not end in a bundle that is what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from edgeglm.build.tower_scores import TowerScores
from edgeglm.bundle.fingerprint import fingerprint_of
from edgeglm.bundle.goldens import golden_check
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.calibration.variants import Verdict
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.retrieval import evaluate_tracks
from edgeglm.evaluate.towers import TextSettings, image_embeddings, text_embeddings, towers_on_tracks
from edgeglm.runtime.retrieval import Retriever
from tests.build.conftest import Project, Said


@pytest.fixture(scope="module")
def pairs(project: Project, cold: Said) -> PairSet:
    found = [
        path.parent / "files"
        for path in (project.store / "entries").glob("*/entry.json")
        if json.loads(path.read_text())["kind"] == "pairs"
    ]
    return PairSet.open(found[0])


def test_a_first_build_runs_every_stage_and_says_how_good_each_step_is(cold: Said) -> None:
    assert len(cold.ran) == len(cold.json["stages"]) == 15
    evaluated = ["Teacher", "Student in torch", "Student, ONNX FP32", "Student, FP16", "Student, INT8"]
    titles = [row["title"] for row in cold.json["rows"]]
    assert titles == [*evaluated[:3], "Calibration set", *evaluated[3:], "Engines", "Bundle"]
    rows = {row["title"]: row for row in cold.json["rows"]}
    for title in evaluated:
        row = rows[title]
        assert 0.0 < row["metrics"]["held-out"]["map10"]["value"] <= 1.0
        assert row["metrics"]["held-out"]["gallery"] == 19
        assert row["size_bytes"] > 0
        for tower in ("image", "text"):
            assert all(row["latency_ms"][tower][batch] > 0 for batch in ("1", "8"))
    assert rows["Engines"]["note"] == "0 built here"
    assert rows["Bundle"]["size_bytes"] > rows["Student, ONNX FP32"]["size_bytes"]
    shown = sum(row["seconds"] for row in cold.json["rows"])
    ran = {stage["stage"]: stage["seconds"] for stage in cold.json["stages"]}
    assert shown == pytest.approx(sum(ran.values()) - ran["pairs"] - ran["latency"], abs=0.1)


def test_the_teacher_learnt_the_pictures(cold: Said) -> None:
    teacher = cold.json["rows"][0]["metrics"]["held-out"]
    assert teacher["map10"]["value"] > 0.4, "chance gives 0.15 for 19 pictures"


def test_the_export_is_as_good_as_the_student_in_torch(cold: Said) -> None:
    torch, onnx = (row["metrics"]["held-out"]["map10"]["value"] for row in cold.json["rows"][1:3])
    assert onnx == pytest.approx(torch, abs=0.06), "a query more or less"


def test_the_bundle_verifies_and_names_every_stage_and_source(bundle: Path, cold: Said) -> None:
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    assert {variant.name for variant in manifest.variants} == {"fp32", "fp16", "int8"}
    before_pack = [stage["stage"] for stage in cold.json["stages"]][:-1]
    assert [stage.name for stage in manifest.stages] == before_pack, "all 14 that led to it"
    for stage in manifest.stages:
        assert stage.libraries or stage.name == "compile"
        assert stage.artifact
    assert manifest.seeds == {"recipe": 0}
    assert {record.name for record in manifest.licences} == {"own", "vit", "bert"}
    assert all(record.licence and record.attribution for record in manifest.licences)
    notice = (bundle / "NOTICE.md").read_text()
    assert all(record.attribution in notice for record in manifest.licences)


def test_no_file_of_the_bundle_names_a_folder_of_this_machine(bundle: Path, project: Project) -> None:
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for folder in (project.root, project.store):
                assert str(folder).encode() not in content, path.relative_to(bundle)


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_the_figures_of_a_variant_were_measured_on_the_files_that_it_names(
    variant: str, bundle: Path, pairs: PairSet
) -> None:
    with open_bundle(bundle) as opened:
        record = opened.variant(variant)
        towers = {tower: opened.model(variant, tower) for tower in ("image", "text")}
        text = opened.preprocessing.text
        metrics, rows = towers_on_tracks(
            towers,
            pairs.tracks,
            pairs.images,
            preprocessing=opened.preprocessing.image,
            text=TextSettings(tokenizer=Tokenizer(opened.tokenizer_path), max_length=text.max_length),
            threads=1,
        )
        gallery = opened.gallery(variant)
    for track, found in metrics.items():
        assert record.metrics[track]["map10"]["value"] == pytest.approx(found.map10.value, abs=1e-9)
        assert record.metrics[track]["r10"] == pytest.approx(found.r10, abs=1e-9)
    evaluated = sorted({i for track in pairs.tracks for i in track.gallery})
    np.testing.assert_allclose(gallery.embeddings[evaluated], rows[evaluated], atol=1e-5)
    assert [item.id for item in gallery.items] == [row.id for row in pairs.rows], "all of one's own"


def test_an_index_made_with_one_variant_is_known_to_fit_another(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        space = opened.manifest.space
    assert set(space.agreement) == {"fp16", "int8"}
    for variant, agreement in space.agreement.items():
        shared = space.fingerprints[variant] == space.fingerprints["fp32"]
        assert shared == (agreement >= space.gate), (
            "an index of the other variant finds what it should, or is refused"
        )
        assert agreement > 0.25, "chance gives 0.16 for ten of 64 pictures"


def test_run_names_the_variant_whose_file_answered(bundle: Path, project: Project) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for asked in (None, "fp16", "int8", "fp32"):
        more = () if asked is None else ("--variant", asked)
        said = project.edgeglm("run", bundle, "--query", "a red circle", "-k", "3", "--json", *more)
        assert said.code == 0, said.err
        variant = asked or manifest["default_variant"]
        assert said.json["variant"] == variant
        record = next(entry for entry in manifest["variants"] if entry["name"] == variant)
        assert said.json["model"] == record["files"]["text"]
        assert sha256_file(bundle / said.json["model"]) == manifest["files"][said.json["model"]]["sha256"]
        assert len(said.json["hits"]) == 3


def test_a_search_answers_with_the_gallery_and_its_pictures(bundle: Path, pairs: PairSet) -> None:
    with open_bundle(bundle) as opened, Retriever(opened, threads=1) as retriever:
        found = retriever.search_text("a red circle", len(pairs))
        assert {hit.id for hit in found.hits} == {row.id for row in pairs.rows}
        scores = [hit.score for hit in found.hits]
        assert scores == sorted(scores, reverse=True)
        for hit in found.hits:
            assert hit.thumbnail is not None
            assert hit.thumbnail.is_file()


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_the_goldens_come_out_again_from_raw_files(variant: str, bundle: Path) -> None:
    with open_bundle(bundle) as opened, Retriever(opened, variant=variant, threads=1) as retriever:
        result = golden_check(opened, retriever.embed_images, retriever.embed_text, variant=variant)
    assert (result.images, result.texts, result.variant) == (3, 3, variant)
    assert result.agrees(cosine=0.9999, top_k=0.99)


def test_calibration_saw_nothing_that_is_evaluated(bundle: Path, pairs: PairSet) -> None:
    record = json.loads((bundle / "calibration.json").read_text())
    for part in record["towers"].values():
        assert part["disjointness"]["overlap"] == 0
        assert part["disjointness"]["evaluation_samples"] > 0
        assert len(part["samples"]) > 0
    by_id = {row.id: i for i, row in enumerate(pairs.rows)}
    drawn = [by_id[sample["id"]] for sample in record["towers"]["image"]["samples"]]
    assert {pairs.rows[i].role for i in drawn} == {"labelled"}
    held = {pairs.image_sha256[i] for i in pairs.by_role("held").tolist()}
    assert held.isdisjoint(pairs.image_sha256[i] for i in drawn)
    asked = {query.text for track in pairs.tracks for query in track.queries}
    assert asked.isdisjoint(sample["id"] for sample in record["towers"]["text"]["samples"])


def test_the_recipe_in_the_bundle_has_no_path_and_can_be_read_again(bundle: Path) -> None:
    from edgeglm.core.recipe import recipe_from_toml

    recipe = recipe_from_toml((bundle / "recipe.toml").read_text(), origin="the bundle")
    assert recipe.teacher.image == ("vit",)
    assert recipe.data.path == "data"
    assert recipe.student.max_length == 6


class _References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_report_opens_without_a_network(bundle: Path) -> None:
    page = (bundle / "report.html").read_text("utf-8")
    parser = _References()
    parser.feed(page)
    assert parser.found, "the report shows pictures"
    loaded = [found[:60] for found in parser.found if found.split()[1][:5] != "data:" and "#" not in found]
    assert loaded == []
    assert "@import" not in page
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["content_digest"] in page


def test_the_default_variant_is_the_fastest_that_was_measured(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    cost = {
        entry["name"]: entry["latency"]["image_b1_ms"] + entry["latency"]["text_b1_ms"]
        for entry in manifest["variants"]
    }
    assert manifest["default_variant"] == min(cost, key=cost.__getitem__)


def test_a_second_build_runs_no_stage_and_leaves_the_bundle_as_it_is(
    project: Project, cold: Said, bundle: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    again = project.build("cpu")
    assert again.code == 0, again.err
    assert again.ran == []
    assert again.json["content_digest"] == cold.json["content_digest"]
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    arguments = project.arguments("build", "cpu", "--threads", "1", "--output", str(bundle))
    words = project.edgeglm(*arguments).out
    assert "0 of 15 stages ran, 15 reused" in words
    assert "With one relevant image a query, mAP@10 equals MRR@10." in words


def test_a_damaged_bundle_is_put_right_by_the_same_command(project: Project, bundle: Path) -> None:
    model = bundle / "models" / "fp32" / "text.onnx"
    content = model.read_bytes()
    model.chmod(0o644)
    model.write_bytes(content[:-1])
    again = project.build("cpu")
    assert again.code == 0, again.err
    assert again.ran == []
    assert sha256_bytes(model.read_bytes()) == sha256_bytes(content)


def map10_as_written(opened: Bundle, variant: str, pairs: PairSet) -> dict[str, float]:
    """Evaluate the files of a variant as TensorRT computes them."""
    images = sorted({image for track in pairs.tracks for image in track.gallery})
    shown, text = opened.preprocessing.image, opened.preprocessing.text
    settings = TextSettings(tokenizer=Tokenizer(opened.tokenizer_path), max_length=text.max_length)
    model = opened.model(variant, "image")
    found = image_embeddings(model, pairs.images, images, preprocessing=shown, threads=1, integers=False)
    rows = np.zeros((len(pairs), found.shape[1]), np.float32)
    rows[images] = found

    def embedded(texts: list[str]) -> npt.NDArray[np.float32]:
        return text_embeddings(opened.model(variant, "text"), texts, settings, threads=1, integers=False)

    return {name: one.map10.value for name, one in evaluate_tracks(pairs.tracks, embedded, rows).items()}


def as_written(path: Path, threads: int) -> OnnxRuntimeEngine:
    """Compute INT8 as TensorRT does: ONNX Runtime's integer kernels saturate on a CPU without VNNI."""
    return OnnxRuntimeEngine(path, threads=threads, integers=False)


def test_another_kind_of_target_makes_new_variants_and_a_bundle_for_all_its_boards(
    project: Project, cold: Said, pairs: PairSet
) -> None:
    said = project.build("jetson-agx", "--set", "quantize.calibration_samples=9")
    assert said.code == 0, said.err
    # On a CPU an INT8 graph computes in FP32 besides, on a GPU in FP16.
    assert said.ran == ["quantize", "latency", "compile", "pack"]
    with open_bundle(Path(said.json["bundle"])) as opened:
        manifest = opened.manifest
        assert len(manifest.target.members) > 1
        members = json.loads(opened.file("compile.json").read_text())["members"]
        assert {member["name"] for member in members} == set(manifest.target.members)
        assert all(member["reason"] for member in members)
        with Retriever(opened, threads=1) as retriever:
            assert len(retriever.search_text("a blue ring", 5).hits) == 5
            result = golden_check(opened, retriever.embed_images, retriever.embed_text)
        assert result.agrees(cosine=0.9999, top_k=0.99)
        fits = json.loads(opened.file("preflight.json").read_text())
        for member in members:
            mine = [fit for fit in fits if fit["member"] == member["name"]]
            assert {fit["variant"] for fit in mine} == {variant.name for variant in manifest.variants}
            assert any(fit["fits"] and fit["floor_ms"] > 0 for fit in mine)
            assert all(fit["fits"] or fit["refusals"] for fit in mine)
        # The family holds a board with TensorRT 8.5, which parses nothing newer than opset 16.
        old = {variant.name: variant for variant in manifest.variants if variant.lane == "A"}
        assert set(old) == {"fp16-lane-a", "int8-lane-a"}
        script = opened.file("finalize.sh").read_text()
        for name, variant in old.items():
            for tower in variant.files:
                assert onnx.load(opened.model(name, tower)).opset_import[0].version == 16
                assert f"{name} {tower} A {name[:4]} {variant.files[tower]} " in script
            with Retriever(opened, variant=name, threads=1, engine=as_written) as retriever:
                result = golden_check(opened, retriever.embed_images, retriever.embed_text, variant=name)
            assert result.agrees(cosine=0.9999, top_k=0.99)
            # The figures of a variant are those of the very files, though lane B has figures too.
            figures = {track: metrics["map10"]["value"] for track, metrics in variant.metrics.items()}
            assert figures == pytest.approx(map10_as_written(opened, name, pairs), abs=1e-9)
            assert f'<th scope="row">{name} / FP32, worst pool' in opened.file("report.html").read_text()
            # Else an index of the FP16 variant would be refused on a Xavier.
            measured = manifest.space.agreement[name] >= manifest.space.gate
            assert (fingerprint_of(manifest, name) == fingerprint_of(manifest, "fp32")) == measured
        assert manifest.space.agreement["fp16-lane-a"] > 0.99
    other = project.build("jetson-orin-nano", "--set", "quantize.calibration_samples=9")
    assert other.code == 0, other.err
    assert other.ran == ["compile", "pack"], "only the target changed"
    asked = ("--set", "engine.refit=true", "--set", "engine.largest_batch=64")
    refit = project.build("jetson-orin-nano", "--set", "quantize.calibration_samples=9", *asked)
    assert refit.code == 0, refit.err
    assert refit.ran == ["compile", "pack"], "only what is asked of the builder changed"
    with open_bundle(Path(refit.json["bundle"])) as opened:
        assert "B ok 8 64 --refit" in opened.file("finalize.sh").read_text()
        words = project.edgeglm("plan", opened.origin, "--target", "jetson-orin-nano", "--trtexec").out
    assert "--refit" in words
    assert "--maxShapes=pixels:64x3x" in words
    narrow = project.build("jetson-agx", "--set", "engine.weight_streaming=true")
    assert narrow.code == 2, "a board with TensorRT 8.5 is among them"
    assert "weight_streaming begins with TensorRT 10.0" in narrow.err


def test_files_of_lane_a_that_keep_too_little_do_not_travel(
    project: Project, cold: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = ("--set", "quantize.calibration_samples=9")
    assert project.build("jetson-agx", *same).code == 0
    judged = TowerScores.judged
    asked: list[Verdict] = []

    def strict(self: TowerScores, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> Verdict:
        """The real verdict on FP16, which is asked of first; INT8 is said to miss."""
        asked.append(judged(self, metrics, baseline))
        return Verdict(passed=False, score=0.5, reason="said to miss") if len(asked) == 2 else asked[-1]

    monkeypatch.setattr(TowerScores, "judged", strict)
    said = project.build("jetson-agx", *same, "--set", "pack.goldens=7")
    assert said.code == 0, said.err
    assert said.ran == ["pack"]
    with open_bundle(Path(said.json["bundle"])) as opened:
        manifest, page = opened.manifest, opened.file("report.html").read_text()
        assert not opened.names("models/int8-lane-a")
    assert [variant.name for variant in manifest.variants if variant.lane == "A"] == ["fp16-lane-a"]
    (left,) = [left for left in manifest.left_out if left.name == "int8-lane-a"]
    assert left.reason == "said to miss"
    assert 0 < left.metrics["held-out"]["map10"]["value"] <= 1
    assert "<dt>int8-lane-a</dt><dd>said to miss</dd>" in page
    assert "left out" in page.partition('<th scope="row">INT8, lane A')[2].partition("</th>")[0]


def test_a_build_leaves_nothing_in_the_working_folder(project: Project, cold: Said) -> None:
    assert list(project.here.iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_a_bundle_in_one_file_is_the_same_bundle(
    kind: str, project: Project, bundle: Path, tmp_path: Path
) -> None:
    said = project.build("cpu", "--set", f"pack.archive={kind}", output=tmp_path / "one")
    assert said.code == 0, said.err
    assert said.ran == ["pack"]
    archive = Path(said.json["archive"])
    assert archive == tmp_path / f"one.{kind}"
    with open_bundle(archive) as opened, Retriever(opened, threads=1) as retriever:
        assert retriever.search_text("a grey bar", 1).hits
