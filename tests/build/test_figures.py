"""If these fail, a table or a gate shows another figure than was measured."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edgeglm.build.pack_manifest import fastest_variant, portable_recipe
from edgeglm.build.pools import gate_pools, pool_gates, pooled_map10, ratios_of, required_pools
from edgeglm.build.report_data import track_note
from edgeglm.build.table import Row, language_rows, summary_of
from edgeglm.core.recipe import recipe_from_toml
from edgeglm.data.pairs import Query, Track
from edgeglm.evaluate.retrieval import Interval, TrackMetrics


def metrics(value: float, queries: int) -> TrackMetrics:
    return TrackMetrics(
        map10=Interval(value=value, low=value, high=value),
        r1=value / 2,
        r10=value,
        r1_i2t=value / 4,
        r10_i2t=value,
        queries=queries,
        gallery=50,
    )


FOUND = {
    "catalogue-transductive": metrics(0.8, 30),
    "catalogue-inductive": metrics(0.4, 10),
    "unseen": metrics(0.5, 5),
    "catalogue-transductive-keywords": metrics(0.2, 6),
    "unseen-keywords": metrics(0.6, 2),
}


def track(name: str) -> Track:
    kind = "keywords" if name.endswith("-keywords") else "names"
    query = Query(text="x", relevant=(0,))
    return Track(name=name, title=name, query_kind=kind, queries=(query,), gallery=(0,))  # type: ignore[arg-type]


def test_a_row_weighs_each_query_alike() -> None:
    names, unseen, keywords, r1, r10, r1_i2t, r10_i2t = summary_of(FOUND)
    assert names == pytest.approx(0.7)
    assert unseen == pytest.approx(0.5)
    assert keywords == pytest.approx((0.2 * 6 + 0.6 * 2) / 8)
    assert r1 == pytest.approx(0.35)
    assert r1_i2t == pytest.approx(0.175)
    assert r10 == r10_i2t == pytest.approx(0.7)


def test_what_was_not_measured_is_absent_and_not_zero() -> None:
    assert summary_of({"held-out": metrics(0.5, 2)})[:3] == (0.5, None, None)
    assert summary_of({}) == (None,) * 7


def test_pools_hold_every_track_once() -> None:
    pools = gate_pools([track(name) for name in FOUND])
    assert {pool: set(members) for pool, members in pools.items()} == {
        "names": {"catalogue-transductive", "catalogue-inductive"},
        "unseen names": {"unseen"},
        "keywords": {"catalogue-transductive-keywords", "unseen-keywords"},
    }
    assert gate_pools([track("held-out")]) == {"names": ("held-out",)}


def test_the_worst_pool_decides() -> None:
    worse = {**FOUND, "unseen": metrics(0.25, 5)}
    gates = pool_gates("kept", worse, FOUND, gate_pools([track(name) for name in FOUND]), 0.99)
    assert {gate.name: gate.passed for gate in gates} == {
        "kept, names": True,
        "kept, unseen names": False,
        "kept, keywords": True,
    }
    assert min(gate.value for gate in gates) == pytest.approx(0.5)
    assert pooled_map10(worse, ["unseen"]) == pytest.approx(0.25)


def test_the_fastest_variant_counts_both_towers() -> None:
    latency = {
        "fp32": {"image": {"1": 2.0}, "text": {"1": 1.0}},
        "int8": {"image": {"1": 1.0}, "text": {"1": 3.0}},
        "teacher": {"image": {"1": 0.1}, "text": {"1": 0.1}},
    }
    assert fastest_variant(latency, ["fp32", "int8"]) == "fp32"


@pytest.mark.parametrize("given", ["/home/me/models/vit", "file:/home/me/models/vit"])
def test_a_packed_recipe_keeps_only_the_names_of_folders(given: str) -> None:
    text = f'[teacher]\nimage = ["{given}", "hf:a/b"]\ntext = "minilm-l6"\n[data]\npath = "/data/shop"\n'
    recipe = portable_recipe(recipe_from_toml(text, origin="test"))
    assert recipe.teacher.image == ("vit", "hf:a/b")
    assert (recipe.teacher.text, recipe.data.path) == ("minilm-l6", "shop")


def test_a_packed_recipe_has_no_path_anywhere() -> None:
    text = """
    [teacher.pretraining]
    corpus = ["cldr", "/data/notes.txt"]
    glossary = "/data/terms.toml"
    [quantize]
    image_plan = "/data/plan.toml"
    """
    recipe = portable_recipe(recipe_from_toml(text, origin="test"))
    assert recipe.teacher.pretraining.corpus == ("cldr", "notes.txt")
    assert (recipe.teacher.pretraining.glossary, recipe.quantize.image_plan) == ("terms.toml", "plan.toml")


def test_a_ratio_is_over_all_queries_of_a_pool_and_its_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    teacher = {name: rng.random(found.queries) for name, found in FOUND.items()}
    same = ratios_of(teacher, teacher, [track(name) for name in FOUND])
    for interval in (*same.tracks.values(), *same.pools.values()):
        assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0), "each query against itself"
    assert set(same.tracks) == set(FOUND)
    assert set(same.pools) == {"names", "unseen names", "all names", "keywords"}
    worse = {**teacher, "unseen": teacher["unseen"] * 0.5}
    found = ratios_of(worse, teacher, [track(name) for name in FOUND])
    assert found.tracks["unseen"].value == pytest.approx(0.5)
    lost = teacher["unseen"].sum() / 2
    names = sum(teacher[name].sum() for name in FOUND if not name.endswith("-keywords"))
    assert found.pools["all names"].value == pytest.approx(1 - lost / names)


def test_a_track_where_the_teacher_finds_nothing_has_no_ratio() -> None:
    nothing = {name: np.zeros(found.queries) for name, found in FOUND.items()}
    found = ratios_of(nothing, nothing, [track(name) for name in FOUND])
    assert not found.tracks
    assert not found.pools


def test_each_language_has_pools_of_its_own_and_its_names_are_required() -> None:
    tracks = [msgspec.structs.replace(track(name), language="zh") for name in FOUND]
    tracks += [msgspec.structs.replace(track(f"en-{name}"), language="en") for name in FOUND]
    pools = gate_pools(tracks)
    assert list(pools) == [
        "names", "unseen names", "keywords", "en names", "en unseen names", "en keywords"
    ]  # fmt: skip
    assert set(pools["en names"]) == {"en-catalogue-transductive", "en-catalogue-inductive"}
    assert pools["en unseen names"] == ("en-unseen",)
    assert required_pools(pools) == ("names", "en names")
    both = {**FOUND, **{f"en-{name}": metrics(0.1, 3) for name in FOUND}}
    row = Row(title="Teacher", seconds=1.0, reused=False, metrics=both)
    bare = Row(title="Bundle", seconds=1.0, reused=False, metrics={})
    assert language_rows([row, bare], tracks) == [
        ("Teacher", "0.700", "0.500", "0.300", "0.100", "0.100", "0.100")
    ]
    assert language_rows([row], [track(name) for name in FOUND]) == [], "one language needs no such table"
    precisions = {name: np.ones(found.queries) for name, found in both.items()}
    found = ratios_of(precisions, precisions, tracks)
    assert {"all names", "en all names"} <= found.pools.keys()
    assert track_note(tracks[-1]).title == "Unseen, keywords"
    assert track_note(tracks[0]).title == "Catalogue, Chinese"
