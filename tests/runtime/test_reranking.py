"""The second look of a bundle, over an engine that says what it is told to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import TensorSpec
from edgeglm.runtime.reranking import Reranker
from edgeglm.runtime.retrieval import Retriever
from scripts.fixtures.colours import colour_bundle, colour_engine, npy


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def bundle(folder: Path, candidates: int = 2) -> Path:
    parts = {
        "reranker/model.onnx": b"onnx",
        "reranker/patches.npy": npy(np.arange(3, dtype=np.float32).reshape(3, 1, 1)),
        "reranker/settings.json": b'{"candidates": %d}' % candidates,
    }
    return colour_bundle(folder / "b", **parts)


def engine(_: Path, __: int) -> FakeEngine:
    """Score a candidate by its only patch, which is its row."""
    shapes = {"patches": (None, None), "input_ids": ("L",), "attention_mask": ("L",), "cosine": ()}
    dtypes = {"input_ids": "int64", "attention_mask": "int64"}
    inputs = [
        TensorSpec(name=name, dtype=dtypes.get(name, "float32"), shape=("B", *shape))
        for name, shape in shapes.items()
    ]
    outputs = [TensorSpec(name="score", dtype="float32", shape=("B", 1))]
    return FakeEngine(inputs=inputs, outputs=outputs, function=lambda feeds: [feeds["patches"][:, :, 0]])


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_the_first_are_ordered_anew_and_the_rest_stays_behind_them(tmp_path: Path, k: int):
    with (
        open_bundle(bundle(tmp_path)) as opened,
        Retriever(opened, engine=colour_engine) as retriever,
        Reranker(opened, engine=engine) as reranker,
    ):
        before = [hit.row for hit in retriever.search_text("red", 3).hits]
        hits = reranker.search_text(retriever, "red", k).hits
    assert before[:2] == [0, 1]
    assert [hit.row for hit in hits] == [1, 0, 2][:k]


@pytest.mark.parametrize("name", ["reranker/model.onnx", "reranker/patches.npy"])
def test_a_bundle_that_another_replaced_meanwhile_lends_no_second_look(tmp_path: Path, name: str):
    """The patches of one bundle's pictures ordered the gallery of another."""
    with open_bundle(bundle(tmp_path)) as opened:
        with (opened.path / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(UserError, match=f"{name} is gone or another since"):
            Reranker(opened, engine=engine)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_a_number_of_results_that_makes_no_sense_is_refused_with_a_second_look_too(tmp_path: Path, k: int):
    with (
        open_bundle(bundle(tmp_path)) as opened,
        Retriever(opened, engine=colour_engine) as retriever,
        Reranker(opened, engine=engine) as reranker,
    ):
        for search in (retriever.search_text, lambda text, k: reranker.search_text(retriever, text, k)):
            with pytest.raises(UserError, match="at least 1"):
                search("red", k)


def test_a_reranker_of_no_candidates_is_a_broken_bundle(tmp_path: Path):
    with (
        open_bundle(bundle(tmp_path, candidates=-5)) as opened,
        pytest.raises(EdgeglmError, match=r"reranker/settings\.json"),
    ):
        Reranker(opened, engine=engine)
