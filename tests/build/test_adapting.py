"""If these fail, `edgeglm adapt` gives another teacher than a build does, or starts over after a kill."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment as room
from edgeglm.adapt.image_tuning_stage import ImageTuningStage
from edgeglm.build.adapting import adapt_teacher
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import OptimisationConfig, Recipe, TeacherConfig, recipe_from_file
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.evaluate.teacher_towers import TeacherTowers
from edgeglm.train import checkpoint, loop
from tests.synthetic import COLOURS, drawn
from tests.tiny_towers import write_clip, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 12)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 4)


def recipe(project: Path, *overrides: str) -> Recipe:
    return recipe_from_file(project / "recipe.toml", overrides=overrides)


def context(store: Path) -> Context:
    return Context(store=Store(store), progress=QuietProgress(), threads=1)


def test_the_command_writes_a_whole_teacher_and_reuses_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    out = tmp_path / "teacher"
    arguments = ["adapt", "--recipe", str(project / "recipe.toml"), "--threads", "1", "--json", "--output"]
    assert exit_code([*arguments, str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    written = {path.name for path in out.iterdir()}
    assert {"text.onnx", "image-head.onnx", "image-0.onnx", "tokenizer.json", "metrics.json"} <= written
    assert json.loads((out / "metrics.json").read_text()) == said["metrics"]
    assert exit_code([*arguments, str(out)]) == 2
    assert "is there already; choose another --output or move it away" in capsys.readouterr().err
    assert exit_code([*arguments, str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == said["digest"]


def test_a_place_for_the_teacher_that_cannot_be_is_told_before_anything_is_trained(
    project: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is no folder, .*choose another --output"):
        adapt_teacher(recipe(project), tmp_path / "file" / "teacher", context(tmp_path / "store"))
    assert not Store(tmp_path / "store").entries()


def test_an_empty_folder_is_filled_under_whatever_name_it_is_given_and_nothing_that_came_meanwhile_is_lost(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "disk", "late"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "here")
    for place, folder in ((Path(), "here"), (tmp_path / "link", "disk")):
        adapt_teacher(recipe(project), place, context(tmp_path / "store"))
        assert (tmp_path / folder / "teacher.json").is_file()
    assert (tmp_path / "link").is_symlink()

    def another_writes(result: Any) -> None:
        (tmp_path / "late" / "thesis.txt").write_text("all of it")

    with pytest.raises(UserError, match="is there already; choose another --output"):
        adapt_teacher(
            recipe(project), tmp_path / "late", context(tmp_path / "store"), on_stage=another_writes
        )
    assert (tmp_path / "late" / "thesis.txt").read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "here", "late", "link", "store"]


def test_what_of_ones_own_pairs_is_not_read_is_told(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with captions in another language gave a teacher that tells none apart, and not a word."""
    shutil.copytree(project / "data", tmp_path / "data")
    listed = tmp_path / "data" / "pairs.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    lines[0]["text"], lines[1]["text"] = "\U0001f534\u2b55", "круг"
    lines[2]["text"] = "a red circle and a blue ring and a green bar"
    listed.write_text("\n".join([*map(json.dumps, lines), '{"image": "gone.png", "text": "gone"}']))
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    command = ["adapt", "--recipe", str(project / "recipe.toml"), "--data", str(tmp_path / "data"),
               "--skip-bad", "--set", "data.target=noto", "--set", "data.unseen_fraction=0"]  # fmt: skip
    for output in ("made", "reused"):
        assert exit_code([*command, "--threads", "1", "--output", str(tmp_path / output)]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "data.target: not read, as the pairs are your own" in said
        assert "1 pairs left out: 1 missing image" in said
        assert "1 of 64 captions are longer than 6 tokens" in said
        assert "2 of 64 captions hold nothing that the text tower knows" in said


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_after(writings: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End what is trained in the block, as ``kill -9`` would, once its state was kept so many times."""
    write, count = checkpoint.Checkpoint.write, 0

    def killing(self: Any, state: Any) -> bool:
        nonlocal count
        count += 1
        if count > writings:
            raise Killed
        return write(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "write", killing)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(("writings", "heads"), [(2, 1), (5, 1), (7, 3), (12, 3)])
def test_a_teacher_goes_on_from_its_checkpoints_and_ends_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writings: int, heads: int
) -> None:
    wanted = recipe(
        project, "teacher.optimisation.checkpoint_epochs=1", "teacher.epochs=3", f"teacher.heads={heads}"
    )
    whole = adapt_teacher(wanted, tmp_path / "whole", context(tmp_path / "one"))
    with killed_after(writings, monkeypatch):
        adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert list((tmp_path / "two" / "checkpoints").glob("*/*.pt"))
    resumed = adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert resumed.teacher.digest == whole.teacher.digest
    assert not list((tmp_path / "two" / "checkpoints").glob("*/*")), "nothing is left of them"


def test_a_teacher_of_several_heads_is_as_wide_as_one_and_its_first_pair_is_that_ones(
    project: Path, tmp_path: Path
) -> None:
    adapt_teacher(recipe(project, "teacher.heads=1"), tmp_path / "one", context(tmp_path / "store"))
    adapt_teacher(recipe(project, "teacher.heads=2"), tmp_path / "two", context(tmp_path / "store"))
    one, two = (np.load(tmp_path / name / "image_embeddings.npy") for name in ("one", "two"))
    assert one.shape == two.shape
    assert not np.allclose(one, two, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(two, axis=2), 1.0, atol=1e-5)
    said = [json.loads((tmp_path / name / "teacher.json").read_text()) for name in ("one", "two")]
    assert {**said[0]["curves"], "heads 2: warm-up": said[1]["curves"]["heads 2: warm-up"]} == said[1][
        "curves"
    ]
    assert said[1]["parameters"]["image_head"] > 2 * said[0]["parameters"]["image_head"] - 1
    assert said[1]["parity"]["text"] < 1e-4


def test_a_teacher_shows_a_file_with_the_margin_that_it_was_measured_with(
    project: Path, tmp_path: Path
) -> None:
    work = context(tmp_path / "store")
    adapt_teacher(recipe(project, "data.margin=0.2"), tmp_path / "teacher", work)
    (kept,) = [entry for entry in work.store.entries() if entry.kind == "pairs"]
    found = work.store.get(kept.key)
    assert found is not None
    pairs = PairSet.open(found)
    assert pairs.margin == 0.2
    files = []
    for pixels in pairs.images[:6]:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    measured = np.load(tmp_path / "teacher" / "image_embeddings.npy")[0, :6]
    with TeacherTowers(tmp_path / "teacher") as towers:
        np.testing.assert_allclose(towers.embed_images(files), measured, atol=0.02)
        record = json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    (tmp_path / "teacher" / "teacher.json").write_text(json.dumps({**record, "margin": 0.0}))
    with TeacherTowers(tmp_path / "teacher") as towers:
        assert np.abs(towers.embed_images(files) - measured).max() > 0.05, "the margin was to matter"


def test_a_tuning_that_diverges_names_the_warm_up_which_a_lower_rate_goes_on_from(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(value: float) -> Recipe:
        return recipe(project, "teacher.tuning=full", f"teacher.tuned_rate={value}")

    whole = adapt_teacher(rate(1e-3), tmp_path / "whole", context(tmp_path / "one"))
    with pytest.raises(UserError, match=r"is nan at .* kept in .*warm-up\.pt; lower teacher\.tuned_rate"):
        adapt_teacher(rate(1e30), tmp_path / "never", context(tmp_path / "two"))
    trained = list[str]()

    def watched(*arguments: Any, **named: Any) -> Any:
        keeper = named["options"].checkpoint
        trained.extend([named["title"]] if not keeper.path.exists() else [])
        return loop.fit(*arguments, **named)

    monkeypatch.setattr(room, "fit", watched)
    resumed = adapt_teacher(rate(1e-3), tmp_path / "resumed", context(tmp_path / "two"))
    assert trained == ["Teacher: full", "Teacher: heads"]
    assert resumed.teacher.digest == whole.teacher.digest
    assert not list((tmp_path / "two" / "checkpoints").glob("*/*")), "nothing is left of them"


def test_a_clip_is_adapted_with_the_recipe_as_it_is(project: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    wanted = recipe(project, f'teacher.text="{clip}"', f'teacher.image=["{clip}"]', "teacher.resolution=0")
    made = adapt_teacher(wanted, tmp_path / "out", context(tmp_path / "store"))
    assert made.teacher.provenance["measured"]["parameters"]["lora"] == 2 * 2 * 2 * 8 * 32


def test_a_layer_that_is_not_there_is_told_before_anything_is_computed(project: Path, tmp_path: Path) -> None:
    wanted = recipe(project, 'teacher.lora_targets=["q_proj"]')
    done = list[str]()
    with pytest.raises(UserError, match=r"names q_proj, .*choose from .*query"):
        adapt_teacher(
            wanted, tmp_path / "out", context(tmp_path / "store"), on_stage=lambda s: done.append(s.stage)
        )
    assert done == []


def with_unlabelled(project: Path, data: Path) -> Path:
    """Copy the project's data, with sixteen pictures of another style beside it; return ``data``."""
    shutil.copytree(project / "data", data)
    (data / "unlabelled").mkdir()
    for i, colour in enumerate(COLOURS):
        for shape in ("circle", "ring"):
            picture = Image.fromarray(drawn(shape, colour, 32, target=True))
            picture.save(data / "unlabelled" / f"{shape}-{i}.png")
    return data


def test_unlabelled_pictures_of_ones_own_folder_take_part(project: Path, tmp_path: Path) -> None:
    options = ("teacher.domain.mmd_weight=1.0", "teacher.domain.pseudo_label_rounds=1")
    wanted = recipe(project, f'data.path="{with_unlabelled(project, tmp_path / "data")}"', *options)
    made = adapt_teacher(wanted, tmp_path / "out", context(tmp_path / "store"))
    assert made.teacher.provenance["measured"]["pseudo_labels"][0] > 0


def test_rounds_of_pseudo_labels_asked_for_after_a_teacher_was_cut_off_do_not_trip_over_what_it_kept(
    project: Path, tmp_path: Path
) -> None:
    data = f'data.path="{with_unlabelled(project, tmp_path / "data")}"'
    broken = recipe(project, data, "teacher.tuning=full", "teacher.tuned_rate=1e30")
    with pytest.raises(UserError, match=r"kept in .*warm-up\.pt"):
        adapt_teacher(broken, tmp_path / "never", context(tmp_path / "one"))
    wanted = recipe(project, data, "teacher.tuning=full", "teacher.domain.pseudo_label_rounds=1")
    made = adapt_teacher(wanted, tmp_path / "made", context(tmp_path / "one"))
    fresh = adapt_teacher(wanted, tmp_path / "fresh", context(tmp_path / "two"))
    assert made.teacher.digest == fresh.teacher.digest


def test_a_tower_that_read_first_is_another_and_comes_back_after_a_kill(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    lines = [f"a {colour} {shape}\nriver {shape} stone\n" for colour in COLOURS for shape in ("ring", "bar")]
    (tmp_path / "texts" / "shop.txt").write_text("\n".join([*lines, "call 13812345678, a red stone"]))
    (tmp_path / "texts" / "terms.tsv").write_text("ring\tcircle\nriver stone\nred\n")
    shutil.copy(project / "recipe.toml", tmp_path / "texts" / "recipe.toml")
    more = [
        f'data.path="{project / "data"}"',
        "teacher.pretraining.epochs=3",
        "teacher.pretraining.term_weight=1",
    ]
    more += ['teacher.pretraining.corpus=["shop.txt"]', 'teacher.pretraining.glossary="terms.tsv"']
    more += ["teacher.pretraining.order_weight=1.0", "teacher.pretraining.learning_rate=0.001"]
    wanted = recipe_from_file(tmp_path / "texts" / "recipe.toml", overrides=more)
    plain = adapt_teacher(recipe(project), tmp_path / "plain", context(tmp_path / "one"))
    whole = adapt_teacher(wanted, tmp_path / "whole", context(tmp_path / "one"))
    assert whole.teacher.digest != plain.teacher.digest
    read = next(result for result in whole.results if result.stage == "pretraining").artifact
    measured = read.provenance["measured"]
    assert measured["curve"][-1] < measured["curve"][0]
    assert measured["cleaning"]["PHONE"] == 1
    assert (
        measured["cleaning"].get("about an unseen concept", 0)
        + measured["cleaning"].get("asked for by an evaluation", 0)
        > 0
    ), "a held caption is in the corpus"
    with killed_after(2, monkeypatch):
        adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert list((tmp_path / "two" / "checkpoints").glob("*/reading.pt"))
    resumed = adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert resumed.teacher.digest == whole.teacher.digest
    shutil.move(tmp_path / "texts", tmp_path / "moved")
    moved = recipe_from_file(tmp_path / "moved" / "recipe.toml", overrides=more)
    again = adapt_teacher(moved, tmp_path / "again", context(tmp_path / "two"))
    assert all(result.reused for result in again.results), "where the texts lie is no part of a key"


def test_a_reading_that_asks_for_no_terms_looks_for_none(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for thousands of captions takes minutes before the first step."""

    def sought(_: Any) -> Any:
        raise AssertionError("captions were to be found in the corpus")

    monkeypatch.setattr("edgeglm.adapt.pretraining_stage.glossary_from_pairs", sought)
    lines = [f"the {one} {other} by a window" for one in COLOURS for other in ("river", "stone")]
    (tmp_path / "shop.txt").write_text("\n".join(lines))
    more = ("teacher.pretraining.epochs=1", f'teacher.pretraining.corpus=["{tmp_path / "shop.txt"}"]')
    made = adapt_teacher(recipe(project, *more), tmp_path / "out", context(tmp_path / "store"))
    read = next(result for result in made.results if result.stage == "pretraining").artifact
    assert read.provenance["measured"]["terms"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs=1"], r"nothing to read; name text files in teacher\.pretraining\.corpus"),
        (["epochs=1", 'corpus=["none.txt"]'], r"no file at .*none\.txt .*give the path of a text file"),
        (["epochs=1", 'corpus=["cldr"]', "mlm_weight=0.0"], r"has no objective; set mlm_weight"),
    ],
)
def test_a_reading_that_cannot_be_says_what_to_set(
    overrides: list[str], message: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.adapt.pretraining_stage.pretraining_assets", lambda _: {})
    wanted = recipe(project, *(f"teacher.pretraining.{one}" for one in overrides))
    with pytest.raises(UserError, match=message):
        adapt_teacher(wanted, tmp_path / "out", context(tmp_path / "store"))


def test_a_teacher_of_several_tasks_is_written_with_its_classes(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "data", tmp_path / "data")
    listed = tmp_path / "data" / "pairs.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    told = [
        {**line, "category": line["text"].split()[2], "subcategory": line["text"].split()[1]}
        for line in lines
    ]
    listed.write_text("\n".join(map(json.dumps, told)))
    options = [f'data.path="{tmp_path / "data"}"', "teacher.multitask.category_weight=1.0"]
    options += ["teacher.multitask.subcategory_weight=1.0", 'teacher.multitask.balance="gradnorm"']
    options += ["teacher.multitask.reptile_rounds=3", 'teacher.multitask.reptile_over="categories"']
    options += ["teacher.optimisation.checkpoint_epochs=1"]
    made = adapt_teacher(recipe(project, *options, "data.unseen_fraction=0.1"), tmp_path / "out",
                         context(tmp_path / "store"))  # fmt: skip
    measured = made.teacher.provenance["measured"]
    assert (tmp_path / "out" / "kinds.onnx").is_file()
    assert measured["parity"]["kinds"] < 1e-3
    assert set(measured["classes"]["subcategory"]) <= set(COLOURS)
    assert measured["classification"]["category"]["images"] == 6
    assert len(measured["curves"]["first state"]) == 3


@pytest.fixture(scope="module")
def classifying(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A teacher with both classifiers, its record, and its held pictures as pairs of their own."""
    root = tmp_path_factory.mktemp("classifying")
    shutil.copytree(project / "data", root / "data")
    listed = root / "data" / "pairs.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    told = [
        {**line, "category": line["text"].split()[2], "subcategory": line["text"].split()[1]}
        for line in lines
    ]
    listed.write_text("\n".join(map(json.dumps, told)))
    options = [f'data.path="{root / "data"}"', "teacher.multitask.category_weight=1.0"]
    options += ["teacher.multitask.subcategory_weight=1.0", "teacher.warmup_epochs=8"]
    made = adapt_teacher(recipe(project, *options), root / "teacher", context(root / "store"))
    (pairs,) = (result.artifact for result in made.results if result.stage == "pairs")
    held = {row.id.removeprefix("own/") for row in PairSet.open(pairs).rows if row.role == "held"}
    shutil.copytree(root / "data", root / "held")
    rows = [row for row in told if row["image"] in held]
    (root / "held" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root, made.teacher.provenance["measured"]["classification"]


@pytest.mark.parametrize("task", ["category", "subcategory"])
def test_a_teachers_classifiers_are_judged_as_they_were_when_they_learned(
    classifying: Any, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recorded = classifying
    arguments = ["evaluate", str(root / "teacher"), "--pairs", str(root / "held"), "--classify", "heads"]
    arguments += ["--metrics", "map@10,accuracy,macro-f1", "--by", task, "--calls", "20", "--json"]
    assert exit_code(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    figures = {figure["metric"]: figure for figure in said["figures"]}
    assert figures["accuracy"]["all"]["value"] == pytest.approx(recorded[task]["accuracy"], abs=1e-4)
    assert figures["macro-f1"]["all"]["value"] == pytest.approx(recorded[task]["macro_f1"], abs=1e-4)
    counts = figures["accuracy"]["counts"]
    assert sum(counts.values()) == recorded[task]["images"]
    shares = figures["accuracy"]["categories"]
    right = sum(shares[one]["value"] * counts[one] for one in counts)
    assert right / sum(counts.values()) == pytest.approx(recorded[task]["accuracy"], abs=1e-4)
    kept = json.loads((root / "teacher" / "metrics.json").read_text())["held-out"]["map10"]["value"]
    assert figures["map@10"]["all"]["value"] == pytest.approx(kept, abs=1e-6), "as its own stage judged it"
    assert said["checks"] == {"largest_deviation": pytest.approx(0, abs=1e-3), "passed": True}


@pytest.mark.parametrize(
    ("more", "last"),
    [
        (["--variant", "fp32"], "leave --variant out"),
        (["--metrics", "accuracy", "--classify", "heads"], "or classify by prompt or centroid"),
    ],
)
def test_what_a_teacher_cannot_be_judged_by_says_what_to_do(
    classifying: Any, more: list[str], last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = classifying
    shutil.copytree(root / "teacher", tmp_path / "plain")
    (tmp_path / "plain" / "kinds.onnx").unlink()
    (tmp_path / "plain" / "teacher.json").write_text("{}")
    assert exit_code(["evaluate", str(tmp_path / "plain"), "--pairs", str(root / "held"), *more]) == 2
    assert " ".join(capsys.readouterr().err.split()).endswith(last)


def test_a_whole_teacher_is_made_in_mixed_precision(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(project / "data", folder)
    (folder / "unlabelled").mkdir()
    for i, colour in enumerate(COLOURS):
        Image.fromarray(drawn("ring", colour, 32, target=True)).save(folder / "unlabelled" / f"{i}.png")
    options = ["teacher.optimisation.precision=bfloat16", f'data.path="{folder}"']
    terms = ("mmd_weight", "coral_weight", "dann_weight", "consistency_weight", "curriculum")
    options += [*(f"teacher.domain.{term}=0.1" for term in terms), "teacher.domain.pseudo_label_rounds=1"]
    made = adapt_teacher(recipe(project, *options), tmp_path / "out", context(tmp_path / "store"))
    measured = made.teacher.provenance["measured"]
    assert measured["parity"]["text"] < 1e-4
    assert measured["curves"]["heads"][-1] < measured["curves"]["warm-up"][0]


def test_options_that_keep_state_change_nothing_else(project: Path, tmp_path: Path) -> None:
    wanted = recipe(project, "teacher.optimisation.checkpoint_epochs=2")
    plain = adapt_teacher(recipe(project), tmp_path / "a", context(tmp_path / "store"))
    kept = adapt_teacher(wanted, tmp_path / "b", context(tmp_path / "another store"))
    assert plain.teacher.files == kept.teacher.files
    again = adapt_teacher(wanted, tmp_path / "c", context(tmp_path / "store"))
    assert all(result.reused for result in again.results), "a teacher that was finished is trained anew"


def test_how_often_a_state_is_kept_tunes_no_pictures_anew() -> None:
    tuned = TeacherConfig(image_blocks=2)
    often = msgspec.structs.replace(tuned, optimisation=OptimisationConfig(checkpoint_epochs=1))
    keys = {ImageTuningStage(one, seed=0, max_length=16).key({}) for one in (tuned, often)}
    assert len(keys) == 1


def test_a_domain_without_unlabelled_images_is_refused_and_nothing_is_written(
    project: Path, tmp_path: Path
) -> None:
    wanted = recipe(project, "teacher.domain.mmd_weight=1.0")
    with pytest.raises(UserError, match=r"hold 0; give at least 8"):
        adapt_teacher(wanted, tmp_path / "out", context(tmp_path / "store"))
    assert not (tmp_path / "out").exists()
