"""Texts to token ids with a ``tokenizer.json``: one way for training, evaluation and devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError

Ids = npt.NDArray[np.int64]
MAX_LENGTH = 32

# What is worth a call that lets go of the interpreter lock. Below, the lock is held for microseconds, and to
# get it back takes a thread longer than that where others want it.
_LONG, _MANY = 2048, 16  # characters of one text, texts of one batch
_AT_ONCE = 512  # texts whose encodings are in memory together


class TextPreprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``text`` table of a bundle's ``preprocessing.json``."""

    max_length: Annotated[int, msgspec.Meta(ge=3)] = MAX_LENGTH
    lowercase: bool = False


class Tokenizer:
    """A Hugging Face ``tokenizers`` file with this project's rules for length and padding.

    Truncation and padding written in the file are replaced: sequences are cut at ``max_length`` ids,
    special ones included, and padded at the end to the longest in the batch. Safe to share by threads.
    """

    def __init__(self, path: Path, *, lowercase: bool = False) -> None:
        from tokenizers import Tokenizer as Backend

        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; give the path of a tokenizer.json")
        try:
            self._backend: Any = Backend.from_buffer(path.read_bytes())  # it opens no path that is not UTF-8
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}; give one of `tokenizers`") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._pad = self._pad_id()
        self._lowercase = lowercase

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def largest_id(self) -> int:
        """The largest id; not their number less one where the file leaves some out."""
        entries: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return max(entries.values(), default=0)

    def vocabulary(self) -> list[str]:
        """Return all entries in the order of their ids."""
        entries: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return sorted(entries, key=entries.__getitem__)

    def lone_tokens(self) -> Ids:
        """Return int64 [W, l]: each entry of the vocabulary between the special tokens of an empty text."""
        special = list(self._backend.encode("", add_special_tokens=True).ids)
        before = special[: len(special) // 2]
        after = special[len(before) :]
        count = self.vocabulary_size
        ids = np.tile(np.array([*before, 0, *after], np.int64), (count, 1))
        ids[:, len(before)] = np.arange(count)
        return ids

    def pieces(self, text: str) -> list[tuple[int, int, int]]:
        """Return each token of a text, special ones left out: its id, and the characters it stands for."""
        text = text.lower() if self._lowercase else text
        found = self._backend.encode(text, add_special_tokens=False)
        places = zip(found.ids, found.offsets, strict=True)
        return [(int(one), int(start), int(end)) for one, (start, end) in places]

    def frame(self) -> tuple[list[int], list[int]]:
        """Return the special ids before a text and those after it."""
        special = list(self._backend.encode("", add_special_tokens=True).ids)
        return special[: len(special) // 2], special[len(special) // 2 :]

    @property
    def mask_id(self) -> int | None:
        """The id that stands for a masked token, or None where the tokenizer has none."""
        found = (self._backend.token_to_id(token) for token in ("[MASK]", "<mask>"))
        return next((int(one) for one in found if one is not None), None)

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary lacks, or None where the tokenizer has none."""
        found = (self._backend.token_to_id(token) for token in ("[UNK]", "<unk>"))
        return next((int(one) for one in found if one is not None), None)

    @property
    def pad_id(self) -> int:
        """The id that fills up short sequences; masked, so its value changes no embedding."""
        return self._pad

    def encode(self, texts: Sequence[str], *, max_length: int = MAX_LENGTH) -> tuple[Ids, Ids]:
        """Return ``(input_ids, attention_mask)``, both int64 [B, L] with L <= ``max_length``.

        A longer text loses tokens at its end and keeps its special tokens. An empty text, or one of
        white space, becomes its special tokens alone; a tokenizer without any gives it one pad id that
        is attended to, so that no row of the mask is empty. No texts give two [0, 1] arrays.
        """
        rows = self._rows(texts, max_length)
        length = max((len(row) for row in rows), default=1)
        ids = np.full((len(rows), length), self._pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask

    def _rows(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        if self._lowercase:
            texts = [text.lower() for text in texts]
        if len(texts) < _MANY and max(map(len, texts), default=0) <= _LONG:
            encode = self._backend.encode  # holds the interpreter lock
            return [self._ids(encode(text, add_special_tokens=False), max_length) for text in texts]
        rows = []
        for start in range(0, len(texts), _AT_ONCE):
            part = list(texts[start : start + _AT_ONCE])
            plain = self._backend.encode_batch_fast(part, add_special_tokens=False)
            rows += [self._ids(one, max_length) for one in plain]
        return rows

    def _ids(self, plain: Any, max_length: int) -> list[int]:
        plain.truncate(max(max_length - self._backend.num_special_tokens_to_add(is_pair=False), 0))
        ids: list[int] = self._backend.post_process(plain, add_special_tokens=True).ids
        return ids[:max_length] or [self._pad]

    def _pad_id(self) -> int:
        for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
            found = self._backend.token_to_id(token)
            if found is not None:
                return int(found)
        return 0


def is_unicode(text: str) -> bool:
    """Say whether a text can be written as UTF-8: half a pair of surrogates, as of a command line, cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def teacher_tokenizer(folder: Path) -> tuple[Tokenizer, TextPreprocessing]:
    """Open the tokenizer of a teacher artifact and how it is used."""
    settings = msgspec.json.decode((folder / "text.json").read_bytes(), type=TextPreprocessing)
    return Tokenizer(folder / "tokenizer.json", lowercase=settings.lowercase), settings
