"""Every text becomes ids a model can take, as the original tokenizer would make them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.data.tokenization import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "##s"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-like tokenizer file, with the fixed padding that real ones carry."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_padding(length=128)
    backend.enable_truncation(max_length=128)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(file))
    return file


def test_short_texts_are_padded_to_the_longest_and_masked(path: Path) -> None:
    ids, mask = Tokenizer(path).encode(["a red apples", "apple"])
    assert ids.tolist() == [[2, 4, 5, 6, 7, 3], [2, 6, 3, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_long_text_is_cut_and_keeps_its_last_special_token(path: Path) -> None:
    ids, mask = Tokenizer(path).encode(["a " * 1000], max_length=6)
    assert ids.tolist() == [[2, 4, 4, 4, 4, 3]]
    assert mask.all()


def test_an_empty_text_still_attends_to_something(path: Path) -> None:
    ids, mask = Tokenizer(path).encode(["", " \n"])
    assert ids.tolist() == [[2, 3], [2, 3]]
    assert mask.all()


def test_an_empty_text_without_special_tokens_attends_to_something(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]")).save(str(file))
    ids, mask = Tokenizer(file).encode([""])
    assert ids.tolist() == [[0]]
    assert mask.tolist() == [[1]]


def test_no_texts_are_no_rows(path: Path) -> None:
    ids, mask = Tokenizer(path).encode([])
    assert ids.shape == mask.shape == (0, 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_gives_ids_of_the_vocabulary(path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(path)
    ids, mask = tokenizer.encode(texts, max_length=8)
    assert ids.shape == mask.shape
    assert ids.shape[1] <= 8
    assert ((ids >= 0) & (ids < tokenizer.vocabulary_size)).all()
    assert mask.any(axis=1).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("ard es.é\u4e2d", max_size=12), min_size=1, max_size=20), st.booleans())
def test_a_text_has_the_same_ids_alone_and_in_a_large_batch(
    path: Path, texts: list[str], lowercase: bool
) -> None:
    tokenizer = Tokenizer(path, lowercase=lowercase)
    ids, mask = tokenizer.encode(texts * 30, max_length=8)  # 600 of them are encoded in parts
    for row, text in enumerate(texts):
        alone = tokenizer.encode([text], max_length=8)[0][0].tolist()
        assert ids[row][mask[row] == 1].tolist() == alone
        assert (ids[row] == ids[row - len(texts)]).all()


class _Lockless:
    """A backend whose quick way, which lets go of the interpreter lock, is all there is."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        assert name != "encode", "this call holds the interpreter lock"
        return getattr(self._backend, name)


@pytest.mark.parametrize("texts", [["apple " * 500], ["apple"] * 16])
def test_what_takes_long_is_encoded_without_the_interpreter_lock(path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(path)
    tokenizer._backend = _Lockless(tokenizer._backend)
    ids, _ = tokenizer.encode(texts, max_length=4)
    assert set(map(tuple, ids.tolist())) <= {(2, 6, 6, 3), (2, 6, 3)}


def test_the_largest_id_counts_and_not_how_many_there_are(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "red": 9}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").largest_id == 9


def test_a_tokenizer_is_found_under_a_path_that_is_not_utf8(path: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    shutil.copy(path, folder / "tokenizer.json")
    assert Tokenizer(folder / "tokenizer.json").vocabulary() == WORDS


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(file)
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path / "absent.json")
