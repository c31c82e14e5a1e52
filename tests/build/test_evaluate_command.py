"""If these fail, a user's own figures of a bundle are wrong, or a bundle that sees other pixels passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeglm.bundle.verify import open_bundle
from edgeglm.cli.evaluate import items_of
from edgeglm.data.records import BadRecords
from edgeglm.data.transforms import ImagePreprocessing, decoded_image
from edgeglm.runtime.evaluation import Embedded, Item, checks_of, embedded, percentiles, retrieval_task
from edgeglm.runtime.retrieval import Retriever
from tests.build.conftest import Project


def lines_of(project: Project) -> list[dict[str, str]]:
    listed = (project.root / "data" / "pairs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in listed]


@pytest.fixture(scope="module")
def pairs(project: Project, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tasks of the project's own pictures; a category is the colour that the caption names."""
    folders = []
    for name, part in (("first", slice(0, 40)), ("second", slice(40, 64))):
        folder = tmp_path_factory.mktemp("pairs") / name
        shutil.copytree(project.root / "data", folder)
        rows = [{**row, "category": row["text"].split()[1]} for row in lines_of(project)[part]]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        folders.append(folder)
    return folders


def evaluated(project: Project, bundle: Path, pairs: list[Path], *more: str) -> Any:
    sources = [part for folder in pairs for part in ("--pairs", str(folder))]
    said = project.edgeglm("evaluate", bundle, *sources, "--calls", "20", *more, "--json")
    assert said.code == 0, said.err
    return said.json


def test_any_metrics_come_by_task_and_by_category_with_times_memory_and_checks(
    project: Project, bundle: Path, pairs: list[Path]
) -> None:
    metrics = "map@10,recall@5,hit@1,mrr@3,accuracy,macro-f1"
    said = evaluated(project, bundle, pairs, "--metrics", metrics, "--by", "category")
    figures = {figure["metric"]: figure for figure in said["figures"]}
    assert list(figures) == metrics.split(",")
    for figure in figures.values():
        tasks = figure["tasks"]
        assert set(tasks) == {"first", "second"}
        mean = sum(task["value"] for task in tasks.values()) / 2
        assert figure["all"]["value"] == pytest.approx(mean)
        assert figure["all"]["low"] <= mean <= figure["all"]["high"]
        assert len(figure["categories"]) > 1
    assert sum(figures["accuracy"]["counts"].values()) == 64
    assert said["latency"]["text"]["calls"] == 20
    for times in said["latency"].values():
        assert 0 < times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
    assert said["memory"]["peak_resident_bytes"] > said["memory"]["model_bytes"] > 0
    # Training keeps these pictures as large as they are, so that nothing but the way there could differ.
    assert said["checks"]["passed"]
    assert said["checks"]["largest_deviation"] < 1e-3


def test_the_figures_of_a_bundle_are_those_that_trec_eval_computes_from_its_embeddings(
    project: Project, bundle: Path, pairs: list[Path]
) -> None:
    import ir_measures
    from ir_measures import AP, RR, R, Success

    said = evaluated(project, bundle, pairs[:1], "--metrics", "map@10,recall@5,hit@3,mrr@10")
    rows = [json.loads(line) for line in (pairs[0] / "pairs.jsonl").read_text().splitlines()]
    with open_bundle(bundle) as opened, Retriever(opened) as retriever:
        names = list(dict.fromkeys(row["image"] for row in rows))
        images = retriever.embed_images([pairs[0] / name for name in names])
        texts = list(dict.fromkeys(row["text"] for row in rows))
        scores = retriever.embed_text(texts) @ images.T
    pixels = {name: decoded_image(pairs[0] / name).tobytes() for name in names}
    right = {(row["text"], name) for row in rows for name in names if pixels[name] == pixels[row["image"]]}
    qrels = [ir_measures.Qrel(text, name, 1) for text, name in sorted(right)]
    run = [  # ranks for scores, since equal pictures are equally near, and trec_eval orders those by name
        ir_measures.ScoredDoc(text, names[place], float(-rank))
        for text, order in zip(texts, np.argsort(-scores, axis=1, kind="stable"), strict=True)
        for rank, place in enumerate(order.tolist())
    ]
    asked = [AP @ 10, R @ 5, Success @ 3, RR @ 10]
    theirs = ir_measures.calc_aggregate(asked, qrels, run)
    assert [figure["all"]["value"] for figure in said["figures"]] == pytest.approx(
        [theirs[measure] for measure in asked], abs=1e-6
    )


@pytest.mark.parametrize("direction", ["text-to-image", "image-to-text"])
def test_pictures_of_equal_pixels_are_equally_right_as_in_a_build(
    project: Project, bundle: Path, tmp_path: Path, direction: str
) -> None:
    lines = lines_of(project)[:12]
    for line in lines:
        shutil.copy(project.root / "data" / line["image"], tmp_path / Path(line["image"]).name)
    rows = [{"image": Path(line["image"]).name, "text": line["text"]} for line in lines]
    rows += [{"image": "again.bmp", "text": "something round"}]
    with Image.open(tmp_path / rows[0]["image"]) as picture:
        picture.save(tmp_path / "again.bmp")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    items = items_of(tmp_path, "category", BadRecords(skip=False))
    with open_bundle(bundle) as opened, Retriever(opened) as retriever:
        task = retrieval_task(embedded(retriever, "one", items), direction)  # type: ignore[arg-type]
    assert list(task.relevant[0]) == list(task.relevant[12]) == [0, 12]
    assert [len(right) for right in task.relevant[1:12]] == [1] * 11


def test_a_text_counts_for_its_category_though_its_first_picture_says_none() -> None:
    """Where half of the lines lack the key, a breakdown lost queries whose category other lines tell."""
    kinds = ("", "fruit", "tool", "")
    texts = ("apple", "apple", "saw", "sky")
    items = tuple(
        Item(image=b"", texts=(text,), category=kind) for text, kind in zip(texts, kinds, strict=True)
    )
    rows = np.eye(4, dtype=np.float32)
    found = Embedded(name="one", items=items, image_ND=rows, texts=("apple", "saw", "sky"), text_TD=rows[:3])
    assert list(retrieval_task(found, "text-to-image").category_Q) == ["fruit", "tool", ""]


def test_a_text_that_is_spelled_in_two_ways_is_one_query_as_in_a_build(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "c.png", "b.png")
    for name in set(names):
        (tmp_path / name).write_bytes(b"not looked at")
    texts = ("Café-red", "cafe\u0301 red", "CAFÉ  RED", "blue")
    rows = [{"image": name, "text": text} for name, text in zip(names, texts, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    items = items_of(tmp_path, "category", BadRecords(skip=False))
    assert [item.texts for item in items] == [("Café-red",), ("Café-red", "blue"), ("Café-red",)]


def test_pairs_that_are_left_out_are_counted_pictures_that_cannot_be_decoded_among_them(
    project: Project, bundle: Path, pairs: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(pairs[1], folder)
    (folder / "broken.png").write_bytes(b"no picture")
    more = ({"image": "broken.png", "text": "a"}, {"image": "broken.png", "text": "b"},
            {"image": "absent.png", "text": "c"})  # fmt: skip
    with (folder / "pairs.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    refused = project.edgeglm("evaluate", bundle, "--pairs", folder, "--calls", "20")
    assert refused.code == 2
    assert "--skip-bad" in refused.err
    whole = evaluated(project, bundle, [pairs[1]])
    said = evaluated(project, bundle, [folder], "--skip-bad")
    assert said["skipped_pairs"] == {"corrupt image": 1, "missing image": 1}
    assert said["figures"][0]["all"] == whole["figures"][0]["all"]
    told = project.edgeglm("evaluate", bundle, "--pairs", folder, "--calls", "20", "--skip-bad")
    assert "2 pairs left out: 1 corrupt image, 1 missing image" in told.err


def test_without_by_no_category_is_told_and_the_other_direction_asks_for_texts(
    project: Project, bundle: Path, pairs: list[Path]
) -> None:
    said = evaluated(project, bundle, pairs[:1], "--metrics", "hit@1", "--direction", "image-to-text")
    (figure,) = said["figures"]
    assert "categories" not in figure
    with open_bundle(bundle) as opened, Retriever(opened) as retriever:
        rows = [json.loads(line) for line in (pairs[0] / "pairs.jsonl").read_text().splitlines()]
        texts = list(dict.fromkeys(row["text"] for row in rows))
        images = retriever.embed_images([pairs[0] / row["image"] for row in rows])
        best = (images @ retriever.embed_text(texts).T).argmax(axis=1)
    hits = [texts[place] == row["text"] for place, row in zip(best, rows, strict=True)]
    assert figure["all"]["value"] == pytest.approx(float(np.mean(hits)), abs=0.02)


def test_a_table_is_printed_for_people(project: Project, bundle: Path, pairs: list[Path]) -> None:
    said = project.edgeglm(
        "evaluate", bundle, "--pairs", pairs[0], "--metrics", "map@5,macro-f1", "--classify", "centroid",
        "--by", "category", "--calls", "20",
    )  # fmt: skip
    assert said.code == 0, said.err
    for words in ("map@5", "macro-f1", "p99 ms", "checks passed", "memory: models"):
        assert words in said.out, words


def test_a_table_names_every_task_also_one_of_which_the_first_metric_knows_nothing(
    project: Project, bundle: Path, pairs: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(pairs[1], tmp_path / "bare")
    rows = [json.loads(line) for line in (pairs[1] / "pairs.jsonl").read_text().splitlines()]
    bare = [{key: row[key] for key in ("image", "text")} for row in rows]
    (tmp_path / "bare" / "pairs.jsonl").write_text("\n".join(map(json.dumps, bare)))
    sources = ("--pairs", pairs[0], "--pairs", tmp_path / "bare", "--classify", "centroid", "--calls", "20")
    said = project.edgeglm("evaluate", bundle, *sources, "--metrics", "accuracy,map@5")
    assert said.code == 0, said.err
    assert "mean over tasks, each counting the same" in said.out
    assert all(name in said.out for name in (pairs[0].name, "bare"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metrics", "map@"], "write map@10"),
        (["--metrics", "macro-f1", "--by", "subcategory"], "give the pairs the key category"),
        (["--metrics", "accuracy", "--classify", "heads"], "or --classify prompt or centroid"),
        (["--metrics", "accuracy", "--prompt", "a picture"], "write {} where its name is to stand"),
    ],
)
def test_what_cannot_be_judged_exits_with_2(
    project: Project, bundle: Path, pairs: list[Path], more: list[str], words: str
) -> None:
    said = project.edgeglm("evaluate", bundle, "--pairs", pairs[0], *more)
    assert said.code == 2
    assert words in " ".join(said.err.split())


def test_deployment_that_sees_other_pixels_than_training_fails_the_check(
    project: Project, bundle: Path, pairs: list[Path]
) -> None:
    with open_bundle(bundle) as opened, Retriever(opened) as retriever:
        images = [pairs[0] / row["image"] for row in lines_of(project)[:8]]
        items = tuple(Item(image=image, texts=("a",)) for image in images)
        found = Embedded(
            name="one", items=items, image_ND=retriever.embed_images(images), texts=("a",),
            text_TD=retriever.embed_text(["a"]),
        )  # fmt: skip
        own: ImagePreprocessing = opened.preprocessing.image
        same = checks_of([found], retriever, own, side=own.resolution)
        assert same.passed
        assert same.same_tensor == same.images == 8
        assert same.largest_difference == 0
        coarse = checks_of([found], retriever, own, side=2)
        assert coarse.same_tensor < 8
        assert coarse.least_cosine < same.least_cosine
        assert not coarse.passed


def test_percentiles_are_those_of_the_calls() -> None:
    found = percentiles([float(value) for value in range(1, 102)])
    assert (found.p50_ms, found.p90_ms, found.p99_ms, found.calls) == (51.0, 91.0, 100.0, 101)
