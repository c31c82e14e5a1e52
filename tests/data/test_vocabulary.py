"""If these fail, a student with a smaller vocabulary reads texts otherwise than its teacher did."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.data.vocabulary import trimmed_tokenizer  # noqa: E402

SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
CORPUS = [
    "a red apple on a wooden table", "the reddest apples", "wooden tables and chairs", "an unredeemed table",
    "applesauce", "retable the table", "chairs stacked on chairs", "sand and stand", "understanding sand",
] * 4  # fmt: skip
CAPTIONS = ["red apple", "wooden table"]
WORDS = sorted({word for text in CORPUS for word in text.split()})


@cache
def whole(kind: str) -> Path:
    """Train a small tokenizer of a kind on the corpus."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    shared: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    alphabet: dict[str, Any] = {"initial_alphabet": list("abcdefghijklmnopqrstuvwxyz")}
    if kind == "WordPiece":
        backend: Any = Backend(models.WordPiece(unk_token="[UNK]"))
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, **shared, **alphabet)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "BPE":
        backend = Backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Backend(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=110, unk_token="[UNK]", **shared, **alphabet)
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, backend.token_to_id(name)) for name in SPECIAL[2:]]
    )
    path = Path(mkdtemp()) / f"{kind}.json"
    backend.save(str(path))
    return path


@cache
def trimmed(kind: str) -> tuple[Tokenizer, Tokenizer, np.ndarray]:
    """Return the whole tokenizer, one with two thirds of what may go taken away, and the ids kept."""
    path = whole(kind)
    full = Tokenizer(path)
    least = len(trimmed_tokenizer(path, CAPTIONS, count=full.vocabulary_size, lowercase=False).kept)
    assert least == full.vocabulary_size, "as many as there are: all are kept"
    count = next(n for n in range(1, 400) if not refused(path, n))
    count += (full.vocabulary_size - count) // 3
    found = trimmed_tokenizer(path, CAPTIONS, count=count, lowercase=False)
    assert len(found.kept) <= count < full.vocabulary_size
    (path.parent / "trimmed.json").write_text(found.text, "utf-8")
    return full, Tokenizer(path.parent / "trimmed.json"), found.kept


def refused(path: Path, count: int) -> bool:
    try:
        trimmed_tokenizer(path, CAPTIONS, count=count, lowercase=False)
    except UserError:
        return True
    return False


texts = st.lists(st.sampled_from([*WORDS, "tab", "les", "q", "zred", "standing"]), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
@settings(deadline=None)
@given(words=texts)
def test_a_text_whose_tokens_were_kept_is_split_as_before(kind: str, words: list[str]) -> None:
    full, small, kept = trimmed(kind)
    text = " ".join(words)
    before, after = full.encode([text])[0][0], small.encode([text])[0][0]
    if np.isin(before, kept).all():
        assert kept[after].tolist() == before.tolist()
    unknown = full.vocabulary().index("[UNK]")
    if unknown not in before.tolist():
        assert unknown not in kept[after].tolist(), "a text that had tokens still has them"


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_the_captions_keep_their_tokens_and_something_was_taken_away(kind: str) -> None:
    full, small, kept = trimmed(kind)
    for caption in CAPTIONS:
        assert kept[small.encode([caption])[0][0]].tolist() == full.encode([caption])[0][0].tolist()
    assert small.vocabulary() == [full.vocabulary()[i] for i in kept]
    assert small.pad_id == small.vocabulary().index("[PAD]")


def test_too_small_a_vocabulary_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(UserError, match=r"student.vocabulary is 5, but .* take (\d+); raise it"):
        trimmed_tokenizer(whole("WordPiece"), CAPTIONS, count=5, lowercase=False)


def test_an_unknown_kind_of_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    tree = json.loads(whole("WordPiece").read_text())
    tree["model"]["type"] = "Wordpieces"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="did you mean 'WordPiece'"):
        trimmed_tokenizer(tmp_path / "tokenizer.json", CAPTIONS, count=5, lowercase=False)
