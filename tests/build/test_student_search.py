"""If these fail, a budget is broken silently, or a user is not told which student comes nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from hypothesis import given
from hypothesis import strategies as st

from edgeglm.build.shipped import load_recipe
from edgeglm.build.student_budget import Budget, budget_of
from edgeglm.build.student_choice import Choice, chosen_student, resolutions_about, searched_recipe
from edgeglm.build.student_costs import Cost, judged_by, peaks_of
from edgeglm.build.student_search import (
    SPACE,
    Search,
    SearchConfig,
    Tried,
    on_front,
    proposals,
    smallest_size,
)
from edgeglm.cli import main as cli
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.models.student_shapes import FAMILY, spelled, student_shape
from edgeglm.targets.schema import load_target
from edgeglm.train.loop import DivergedError
from tests.build.conftest import Project, Said


def tried(size: str, ms: float, map10: float, megabytes: float = 10.0, floor: float | None = None) -> Tried:
    return Tried(
        size=size, resolution=64, map10=map10, here_ms=ms, floor_ms=floor, parameters=1_000_000,
        flops=1, file_bytes=round(megabytes * 1e6),
    )  # fmt: skip


def search_of(*students: Tried) -> Search:
    return Search(
        judged="measured here", trials=4, steps=5, seed=0, queries=9, teacher_map10=0.9,
        students=on_front(students),
    )  # fmt: skip


XS, S, M = tried("xs", 1.0, 0.4, 8), tried("s", 2.0, 0.5, 12), tried("m", 4.0, 0.6, 24)
TRIED = st.builds(
    tried, st.sampled_from("abc"), st.floats(0.1, 50.0), st.floats(0.0, 1.0), st.floats(1.0, 30.0)
)


@pytest.mark.parametrize(
    ("latency", "memory", "expected"),
    [
        ("10ms", None, "m"),
        ("3 ms", None, "s"),
        ("1500us", None, "xs"),
        (None, "13MB", "s"),
        ("9ms", "9MB", "xs"),
    ],
)
def test_the_most_accurate_student_within_all_budgets_is_taken(
    latency: str | None, memory: str | None, expected: str
) -> None:
    budget = budget_of(latency, memory)
    assert budget is not None
    assert chosen_student(search_of(XS, S, M), budget).size == expected


@given(students=st.lists(TRIED, min_size=1, max_size=8), latency=st.floats(0.05, 100.0))
def test_what_is_taken_meets_the_budget_lies_on_the_front_and_nothing_within_is_better(
    students: list[Tried], latency: float
) -> None:
    search, budget = search_of(*students), Budget(latency_ms=latency)
    try:
        chosen = chosen_student(search, budget)
    except UserError:
        assert all(each.judged_ms > latency for each in students)
        return
    assert chosen.judged_ms <= latency
    assert chosen.front
    assert not any(each.map10 > chosen.map10 and each.judged_ms <= latency for each in students)


def test_a_student_that_is_slower_worse_and_larger_is_not_on_the_front() -> None:
    worse, smaller = tried("worse", 3.0, 0.45, 20), tried("smaller", 3.0, 0.45, 7)
    front = {each.size: each.front for each in on_front((XS, S, M, worse, smaller))}
    assert front == {"xs": True, "s": True, "m": True, "worse": False, "smaller": True}


def test_a_budget_that_no_student_meets_names_the_nearest_and_the_remedy() -> None:
    with pytest.raises(
        UserError, match=r"the nearest is xs at 64 pixels with 1 ms .* raise the budget to that, or lower"
    ):
        chosen_student(search_of(XS, S, M), Budget(latency_ms=0.5))
    with pytest.raises(UserError, match=r"latency 9 ms, memory 1 MB\): the nearest is xs"):
        chosen_student(search_of(XS, S, M), Budget(latency_ms=9.0, memory_bytes=1e6))


def test_the_budget_that_a_refusal_names_is_met() -> None:
    search = search_of(tried("one", 1.23456, 0.5, 12.3449))
    with pytest.raises(UserError, match=r"with 1\.24 ms .* and 12\.4 MB"):
        chosen_student(search, Budget(latency_ms=0.5))
    assert chosen_student(search, Budget(latency_ms=1.24, memory_bytes=12.4e6)).size == "one"


def test_a_floor_is_what_a_budget_is_held_against_where_the_peaks_are_known_and_is_called_one() -> None:
    assert tried("one", 9.0, 0.5, floor=0.1).judged_ms == 0.1
    assert peaks_of(load_target("cpu")) == ()
    boards = peaks_of(load_target("jetson-agx"))
    assert {board.name for board in boards} >= {"jetson-agx-xavier", "jetson-agx-thor"}
    assert judged_by(boards).startswith("floor: ")
    assert "measured" in judged_by(())


def test_budgets_are_read_in_their_units() -> None:
    assert budget_of("0.01 s", "2MiB") == Budget(latency_ms=10.0, memory_bytes=2 * 2**20)
    assert budget_of(None, None) is None


@pytest.mark.parametrize("text", ["", "fast", "-1ms", "0ms", "10mb", "1e3 ms"])
def test_an_unreadable_budget_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="write it as 10ms"):
        budget_of(text, None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "student.size=edge-m", "--latency-budget", "10ms"], "leave one of them out"),
        (["--trials", "9"], "give --latency-budget or --memory-budget"),
        (["--latency-budget", "9ms", "--trials", "2"], "give at least --trials 4"),
    ],
)
def test_options_of_a_search_that_say_nothing_together_exit_with_2(
    capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert cli.exit_code(["build", "--target", "cpu", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_named_family_lies_in_the_space_and_keeps_its_names() -> None:
    for name in FAMILY:
        shape = student_shape(name)
        parts = {key: getattr(shape, key) for key in SPACE}
        assert all(parts[key] in values for key, values in SPACE.items())
        assert spelled(**parts) == name
    smallest = student_shape(smallest_size())
    assert all(getattr(smallest, key) == min(values) for key, values in SPACE.items())
    assert student_shape("b11c64-f64w160l2") == student_shape("edge-s")
    assert resolutions_about(64) == (48, 64, 96)
    assert resolutions_about(64, 144) == (48, 64, 96)
    assert resolutions_about(128, 144) == (96, 128), "pictures kept at 144 pixels are no sharper at 192"
    assert resolutions_about(64, 32) == (48, 64)


@pytest.mark.parametrize("size", ["b17c64-f64w160l2", "b11c0-f64w160l2", "b11c64-f64w161l2"])
def test_a_size_that_cannot_be_built_is_refused_before_anything_is_trained(size: str) -> None:
    with pytest.raises(UserError, match=r"set student\.size to 'edge-s'"):
        student_shape(size)


def searched(project: Project, name: str, *more: str) -> tuple[Said, Path]:
    bundle = project.root / "bundles" / name
    return project.build("cpu", "--trials", "5", *more, output=bundle), bundle


def search_in(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "student_search.json").read_text())
    return found


def test_a_budget_is_searched_once_built_drawn_and_carried_along(
    project: Project, cold: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.build.student_choice.STEPS", 3)
    said, bundle = searched(project, "searched", "--latency-budget", "10s", "--memory-budget", "1GB")
    assert said.code == 0, said.err
    assert "teacher" not in said.ran, "the teacher of the plain build is reused"
    search = search_in(bundle)
    assert 4 <= len(search["students"]) <= 5
    best = max(search["students"], key=lambda one: one["map10"])
    recipe = (bundle / "recipe.toml").read_text()
    assert f'size = "{best["size"]}"' in recipe
    assert f"resolution = {best['resolution']}" in recipe
    page = (bundle / "report.html").read_text()
    assert "Students to choose from" in page
    assert f"chosen: {best['size']} at {best['resolution']}" in page
    asked = " --latency-budget 10000ms --memory-budget 1GB --trials 5"  # of a recipe file, about its own side
    assert f"--recipe recipe.toml{asked if best['resolution'] == 32 else ''}</code>" in page
    assert project.edgeglm("verify", bundle).code == 0
    assert project.edgeglm("run", bundle, "--query", "a red circle", "--json").code == 0

    # Another budget searches nothing anew, and takes another student.
    least = min(one["file_bytes"] for one in search["students"])
    before = project.stored()
    choice = chosen_in(project, project.store, Budget(memory_bytes=least))
    assert choice.chosen.size == smallest_size()
    assert choice.recipe.student.size == smallest_size()
    assert [msgspec.to_builtins(one) for one in choice.search.students] == search["students"]
    assert project.stored() == before

    # Nor does what no search reads. The recipe's size is not asked whether it suits the teacher.
    unread = ("student.size=edge-heir", "student.image_epochs=9", "student.views=2", "student.patience=3")
    again = chosen_in(project, project.store, Budget(memory_bytes=least), unread)
    assert again.artifact.digest == choice.artifact.digest
    assert again.recipe.student.image_epochs == 9
    assert project.stored() == before


def test_a_size_that_does_not_suit_the_teacher_forbids_no_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["build", "--target", "cpu", "--dry-run", "--set", "teacher.vocabulary=8000"]
    assert cli.exit_code(asked) == 2, "its own size is an heir, which takes the whole table"
    capsys.readouterr()
    assert cli.exit_code([*asked, "--memory-budget", "20MB", "--trials", "5"]) == 0
    assert "the best of 5 within memory 20 MB" in capsys.readouterr().out


def chosen_in(project: Project, store: Path, budget: Budget, overrides: tuple[str, ...] = ()) -> Choice:
    context = Context(store=Store(store), progress=QuietProgress(), threads=1)
    recipe = load_recipe(str(project.root / "recipe.toml"), overrides)
    return searched_recipe(recipe, load_target("cpu"), budget, context, trials=5)


class Shapes:
    """Stands for trainings and exports: what is asked here is which students Optuna proposes."""

    def __init__(self) -> None:
        self.trained: list[str] = []

    def map10(self, size: str, resolution: int) -> float:
        self.trained.append(f"{size} {resolution}")
        return student_shape(size).blocks / 100 + resolution / 1000

    def cost(self, size: str, resolution: int) -> Cost:
        shape = student_shape(size)
        work = shape.blocks * shape.width * resolution**2
        return Cost(
            size=size, resolution=resolution, parameters=work, file_bytes=4 * shape.width * shape.factor,
            flops=work, floor_ms=None, here_ms=0.0,
        )  # fmt: skip


def test_the_same_seed_proposes_the_same_students_and_what_was_killed_goes_on(tmp_path: Path) -> None:
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    config = SearchConfig(
        student=StudentConfig(), embedding_dim=8, resolutions=(48, 64, 96), trials=20, steps=1, seed=3,
        opset=20,
    )  # fmt: skip
    kept = tmp_path / "one" / "trials.json"
    first, again, other, resumed = Shapes(), Shapes(), Shapes(), Shapes()
    found = proposals(config, first, first, kept, context)
    assert proposals(config, again, again, tmp_path / "two" / "trials.json", context) == found
    assert again.trained == first.trained
    reseeded = msgspec.structs.replace(config, seed=4)
    proposals(reseeded, other, other, tmp_path / "three" / "trials.json", context)
    assert other.trained[:4] == first.trained[:4], "it begins with the smallest and the named ones"
    assert other.trained != first.trained
    # Cut off after seven students: those are not trained again, and the others are the same.
    whole = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: whole[name] for name in first.trained[:7]}))
    assert proposals(config, resumed, resumed, kept, context) == found
    assert resumed.trained == first.trained[7:]


class Diverging(Shapes):
    """Shapes of which every other one learns to no number."""

    def map10(self, size: str, resolution: int) -> float:
        found = super().map10(size, resolution)
        if len(self.trained) % 2:
            raise DivergedError("the loss of batch 0 is nan")
        return found


def test_a_student_that_diverges_is_counted_as_failed_and_the_search_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    config = SearchConfig(
        student=StudentConfig(), embedding_dim=8, resolutions=(48, 64), trials=9, steps=1, seed=3, opset=20
    )
    kept = tmp_path / "one" / "trials.json"
    shapes, resumed = Diverging(), Diverging()
    found = proposals(config, shapes, shapes, kept, context)
    assert len(shapes.trained) > 6
    assert [value is None for value in found.values()] == [place % 2 == 0 for place in range(len(found))]
    assert proposals(config, resumed, resumed, kept, context) == found
    assert resumed.trained == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "content", [b"", b'{"b6c32-f32w96l1 48": 0.', b"[1]", b'{"a 48": "good"}', b"\xff\x00"]
)
def test_trials_that_nobody_can_read_are_set_aside(tmp_path: Path, content: bytes) -> None:
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    config = SearchConfig(
        student=StudentConfig(), embedding_dim=8, resolutions=(48, 64), trials=4, steps=1, seed=3, opset=20
    )
    kept = tmp_path / "trials.json"
    kept.write_bytes(content)
    shapes = Shapes()
    assert len(proposals(config, shapes, shapes, kept, context)) == len(shapes.trained) == 4
    assert kept.with_suffix(".damaged").read_bytes() == content
    assert len(json.loads(kept.read_text())) == 4


def test_a_budget_below_the_smallest_student_is_refused_before_a_teacher_is_trained(
    project: Project, tmp_path: Path
) -> None:
    fresh = Project(project.root, tmp_path / "store")
    said, bundle = searched(fresh, "refused", "--latency-budget", "0.0001us")
    assert said.code == 2
    assert "the nearest is" in " ".join(said.err.split())
    assert not bundle.exists()
    assert "teacher" not in fresh.stored()


def test_a_budget_where_nothing_could_be_evaluated_is_refused_before_a_teacher_is_trained(
    project: Project, tmp_path: Path
) -> None:
    fresh = Project(project.root, tmp_path / "store")
    more = ("--memory-budget", "1GB", "--set", "data.unseen_fraction=0.0")
    said, bundle = searched(fresh, "unheld", *more)
    assert said.code == 2
    assert "raise data.unseen_fraction" in " ".join(said.err.split())
    assert not bundle.exists()
    assert not {"teacher", "features", "student-search"} & fresh.stored()
