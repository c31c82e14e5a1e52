from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeglm.bundle.goldens import golden_check
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.runtime.retrieval import Retriever, best_rows
from scripts.fixtures.colours import COLOURS, SIDE, colour_bundle, colour_engine, npy, picture


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(colour_bundle(tmp_path / "colours"))


def test_a_text_finds_its_picture_and_the_result_names_the_very_file(bundle):
    with Retriever(bundle, engine=colour_engine) as retriever:
        result = retriever.search_text("red", k=2)
    assert (result.variant, result.model) == ("fp32", "models/fp32/text.onnx")
    assert bundle.file(result.model).is_file()
    best, second = result.hits
    assert (best.id, best.text, best.row) == ("set/red", "a red thing", 0)
    assert best.score == pytest.approx(1)
    assert best.thumbnail == bundle.path / "gallery" / "thumbnails" / "red.png"
    assert second.score < best.score


def test_a_picture_file_finds_its_like(bundle, tmp_path):
    path = tmp_path / "query.png"
    path.write_bytes(picture(COLOURS["blue"]))
    with Retriever(bundle, engine=colour_engine) as retriever:
        assert retriever.search_image(path).hits[0].id == "set/blue"
        assert retriever.search_image(path.read_bytes()).model == "models/fp32/image.onnx"


def test_a_variant_searches_the_gallery_that_it_embedded_itself(bundle):
    with Retriever(bundle, variant="int8", engine=colour_engine) as retriever:
        result = retriever.search_text("red")
    assert (result.variant, result.model) == ("int8", "models/int8/text.onnx")
    assert result.hits[0].id == "set/blue"


def test_an_unknown_variant_is_named_with_the_nearest(bundle):
    with pytest.raises(UserError, match="did you mean 'int8'"):
        Retriever(bundle, variant="int4", engine=colour_engine)


def test_batches_are_cut_and_keep_their_order(bundle):
    words = [list(COLOURS)[number % 3] for number in range(70)]
    with Retriever(bundle, engine=colour_engine) as retriever:
        rows = retriever.embed_text(words)
        images = retriever.embed_images([picture(COLOURS[word]) for word in words])
        assert rows.dtype == images.dtype == np.float32
        assert np.array_equal(rows, images)
        assert retriever.embed_text([]).shape == retriever.embed_images([]).shape == (0, 3)


def test_only_the_needed_tower_is_loaded_and_all_are_closed(bundle):
    made: list[FakeEngine] = []

    def engine(path: Path, threads: int) -> FakeEngine:
        assert threads == 3
        made.append(colour_engine(path, threads))
        return made[-1]

    with Retriever(bundle, engine=engine, threads=3) as retriever:
        retriever.search_text("red")
        retriever.search_text("blue")
        assert [one.name for one in made] == ["fp32 text"]
        retriever.search_image(picture(COLOURS["red"]))
        assert [one.loaded for one in made] == [True, True]
    assert [one.loaded for one in made] == [False, False]


def test_the_goldens_pass_from_raw_inputs(bundle):
    with Retriever(bundle, engine=colour_engine) as retriever:
        result = golden_check(bundle, retriever.embed_images, retriever.embed_text, variant=retriever.variant)
    assert result.agrees(cosine=0.9999)


@pytest.mark.parametrize(("query", "k"), [("", 1), ("  ", 1), ("red", 0), ("red", -1)])
def test_a_query_that_asks_for_nothing_is_a_clear_error(bundle, query, k):
    with (
        Retriever(bundle, engine=colour_engine) as retriever,
        pytest.raises(UserError, match=r"empty|at least 1"),
    ):
        retriever.search_text(query, k)


def test_a_picture_that_cannot_be_read_is_named(bundle, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with Retriever(bundle, engine=colour_engine) as retriever:
        with pytest.raises(UserError, match=r"broken\.png"):
            retriever.search_image(tmp_path / "broken.png")
        with pytest.raises(UserError, match=r"absent\.png"):
            retriever.search_image(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gallery/items.jsonl", b'{"id": "a", "text": "b"}\n{"id"\n', "line 2"),
        ("gallery/items.jsonl", b'{"id": "a", "text": "b"}', "for 1 items"),
        (
            "gallery/embeddings-fp32.npy",
            npy(np.eye(3, 2, dtype=np.float32)),
            "have 2 dimensions, the query 3",
        ),
        ("gallery/embeddings-fp32.npy", npy(np.full((3, 3), np.nan, dtype=np.float32)), "NaN"),
        ("gallery/embeddings-fp32.npy", npy(np.array([{}] * 3)), "Python objects in dtype"),
        ("gallery/embeddings-fp32.npy", b"", "cannot read gallery/embeddings-fp32"),
        ("preprocessing.json", b'{"image": {}}', r"cannot read preprocessing\.json"),
        ("tokenizer/tokenizer.json", b"{", "tokenizer"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = colour_bundle(tmp_path / "b", **{name: content})
    with (
        open_bundle(path) as bundle,
        pytest.raises(UserError, match=message),
        Retriever(bundle, engine=colour_engine) as retriever,
    ):
        retriever.search_text("red")


@pytest.mark.parametrize(
    "name",
    [
        "models/fp32/text.onnx",
        "gallery/items.jsonl",
        "gallery/embeddings-fp32.npy",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_bundle_that_another_replaced_meanwhile_is_not_read_with_it(bundle, name):
    """Files are read when they are needed: names of one bundle stood beside the rows of another."""
    with Retriever(bundle, engine=colour_engine) as retriever:
        with (bundle.path / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(UserError, match=f"{name} is gone or another since .*; open the bundle that is"):
            retriever.search_text("red")


def test_nan_from_a_tower_is_an_error_and_not_a_ranking(bundle):
    def engine(path: Path, threads: int) -> FakeEngine:
        made = colour_engine(path, threads)
        made._function = lambda _: [np.full((1, 3), np.nan, dtype=np.float32)]
        return made

    with Retriever(bundle, engine=engine) as retriever, pytest.raises(UserError, match="NaN or infinity"):
        retriever.search_text("red")


def test_a_model_that_gives_something_else_is_named(bundle):
    class Odd:
        def infer(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {"logits": np.zeros((1, 3))}

        def __enter__(self) -> Odd:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    with (
        Retriever(bundle, engine=lambda *_: Odd()) as retriever,
        pytest.raises(UserError, match=r"models/fp32/text\.onnx.*'logits'"),
    ):
        retriever.search_text("red")


@given(
    arrays.arrays(np.float32, st.integers(0, 30), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    st.integers(1, 40),
)
def test_the_best_rows_are_those_of_a_whole_stable_sort(scores, k):
    assert best_rows(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


def test_retrieval_runs_through_onnx_runtime(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the host half makes the model of this test")
    pytest.importorskip("onnxruntime", reason="this test runs a model")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0)],
        "colour",
        [helper.make_tensor_value_info("pixels", kinds.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", kinds.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", kinds.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = colour_bundle(tmp_path / "b", **{"models/fp32/image.onnx": model.SerializeToString()})
    with open_bundle(path) as bundle, Retriever(bundle, threads=1) as retriever:
        assert retriever.search_image(picture(COLOURS["green"])).hits[0].id == "set/green"


def test_a_hit_can_be_written_as_json(bundle):
    with Retriever(bundle, engine=colour_engine) as retriever:
        result = retriever.search_text("green", k=1)
    tree = json.loads(msgspec.json.encode(result, enc_hook=str))
    assert tree["variant"] == "fp32"
    assert tree["hits"][0]["id"] == "set/green"
