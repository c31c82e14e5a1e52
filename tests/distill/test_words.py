"""If these fail, a student starts from what its teacher answers to the very queries it is judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.distill import words as room  # noqa: E402
from edgeglm.distill.words import asked_entries, forbidden_texts, foretold, input_table, word_rows  # noqa: E402
from edgeglm.evaluate.towers import token_embeddings  # noqa: E402
from tests.tiny_towers import SPECIAL, WORDS, write_wordpiece  # noqa: E402

helper, types = onnx.helper, onnx.TensorProto
WIDTH = 5


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_wordpiece(tmp_path / "tokenizer.json"))


def table() -> np.ndarray:
    count = len(SPECIAL) + len(WORDS)
    return np.random.default_rng(0).normal(size=(count, WIDTH)).astype(np.float32)


def write_tower(path: Path, *, lookup: bool = True) -> Path:
    """Write a text tower whose answer is three times the mean row of its tokens, plus one."""
    rows = table()
    first = (
        helper.make_node("Gather", ["table", "input_ids"], ["rows"])
        if lookup
        else helper.make_node("GatherND", ["table", "places"], ["rows"])
    )
    before = [] if lookup else [helper.make_node("Unsqueeze", ["input_ids", "last"], ["places"])]
    graph = helper.make_graph(
        [
            *before,
            first,
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=types.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["rows", "mask3"], ["seen"]),
            helper.make_node("ReduceMean", ["seen", "middle"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "three"], ["scaled"]),
            helper.make_node("Add", ["scaled", "one"], ["embedding"]),
        ],
        "text",
        [
            helper.make_tensor_value_info(name, types.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embedding", types.FLOAT, ["batch", WIDTH])],
        [
            helper.make_tensor("table", types.FLOAT, rows.shape, rows.ravel()),
            helper.make_tensor("last", types.INT64, [1], [2]),
            helper.make_tensor("middle", types.INT64, [1], [1]),
            helper.make_tensor("three", types.FLOAT, [], [3.0]),
            helper.make_tensor("one", types.FLOAT, [], [1.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def entry(word: str) -> int:
    return len(SPECIAL) + WORDS.index(word)


def test_an_asked_word_is_found_whatever_its_case_and_a_caption_is_not_withheld(tokenizer: Tokenizer) -> None:
    forbidden = forbidden_texts(["River", "music", "a stone", "apple"], ["apple"])
    assert forbidden == {"river", "music", "a stone"}
    found = np.flatnonzero(asked_entries(tokenizer, forbidden)).tolist()
    assert found == sorted([entry("river"), entry("music")])


def test_pieces_that_spell_an_asked_word_are_withheld_too(tmp_path: Path) -> None:
    path = write_wordpiece(
        tmp_path / "tokenizer.json", ("##river", "river", "\u0120river", "\u2581River", "rivers")
    )
    found = np.flatnonzero(asked_entries(Tokenizer(path), {"river"}))
    assert found.tolist() == [len(SPECIAL) + i for i in range(4)]


def test_the_teacher_is_never_asked_for_an_evaluated_word(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tower(tmp_path / "text.onnx")
    put: list[int] = []
    real = token_embeddings

    def watched(path: Path, tokenizer: Tokenizer, entries: np.ndarray, *, threads: int) -> np.ndarray:
        put.extend(entries.tolist())
        return real(path, tokenizer, entries, threads=threads)

    monkeypatch.setattr(room, "token_embeddings", watched)
    rows = word_rows(path, tokenizer, {"river", "music"}, threads=1)
    withheld = {entry("river"), entry("music")}
    assert set(put) == set(range(len(rows))) - withheld
    whole = real(path, tokenizer, np.arange(len(rows)), threads=1)
    others = sorted(set(put))
    np.testing.assert_array_equal(rows[others], whole[others])
    assert np.abs(rows[sorted(withheld)] - whole[sorted(withheld)]).max() > 1e-4


def test_what_is_foretold_follows_the_other_words() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(900, 6)).astype(np.float32)
    said = np.tanh(inputs @ rng.normal(size=(6, 4))).astype(np.float32)
    said /= np.linalg.norm(said, axis=1, keepdims=True)
    asked = np.arange(900) % 10 == 0
    found = foretold(said[~asked], inputs[~asked], inputs[asked])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert (found * said[asked]).sum(1).mean() > 0.9
    again = foretold(said[~asked], inputs[~asked], inputs[asked])
    np.testing.assert_array_equal(found, again)


def test_a_tower_without_a_table_starts_asked_words_from_the_mean(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_tower(tmp_path / "text.onnx", lookup=False)
    assert input_table(path, len(SPECIAL) + len(WORDS)) is None
    rows = word_rows(path, tokenizer, {"river"}, threads=1)
    others = np.delete(rows, entry("river"), 0)
    np.testing.assert_allclose(rows[entry("river")], others.mean(0), atol=1e-6)


def test_the_table_is_the_one_that_tokens_are_looked_up_in(tmp_path: Path) -> None:
    found = input_table(write_tower(tmp_path / "text.onnx"), 7)
    assert found is not None
    np.testing.assert_array_equal(found, table()[:7])
