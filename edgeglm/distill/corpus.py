"""The texts a student's text tower learns from: the captions, and phrases of ordinary words.

Captions alone would teach a student the names of the domain and nothing of the words that people
search with. The teacher can embed any text, so phrases drawn from its own vocabulary carry the rest
of its space over. No text that any evaluation asks for is among them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edgeglm.data.tracks import folded
from edgeglm.distill.words import forbidden_texts

_WORD = re.compile(r"[^\W\d_]{3,}")
_HAN = "[\u3400-\u4dbf\u4e00-\u9fff]"
_HAN_WORD = re.compile(f"{_HAN}+")
_HAN_GAP = re.compile(f"(?<={_HAN}) (?={_HAN})")
_DOMAIN_WORD = re.compile(f"{_WORD.pattern}|{_HAN}+")
#: How many words a drawn phrase has, and how often.
_LENGTHS = (1, 2, 3)
_SHARES = (0.4, 0.4, 0.2)


def whole_words(vocabulary: Sequence[str]) -> list[str]:
    """Return the vocabulary's whole words of letters, lower case, in its order (frequent ones come first).

    WordPiece continues words with ``##``, SentencePiece starts them with a mark; the pieces of byte-level
    vocabularies that start no word are left out by the same rule.
    """
    marked = any(entry.startswith(("\u2581", "\u0120")) for entry in vocabulary)
    found: dict[str, None] = {}
    for entry in vocabulary:
        if marked and not entry.startswith(("\u2581", "\u0120")):
            continue
        word = entry.lstrip("\u2581\u0120")
        if not entry.startswith("##") and _WORD.fullmatch(word):
            found.setdefault(word.lower())
    return list(found)


def ordinary_words(vocabulary: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Return the vocabulary's words that suit the captions.

    Where captions are Chinese, its Chinese words too, which nothing marks as whole, single characters only
    where a caption has them; and of a vocabulary of many languages only words in scripts of the captions.
    """
    words = whole_words(vocabulary)
    known = {character for text in captions for character in text if _HAN_WORD.match(character)}
    if not known:
        return words
    scripts = {_script(letter) for text in captions for letter in text if letter.isalpha()}
    words = [word for word in words if {_script(letter) for letter in word} <= scripts]
    bare = (entry.lstrip("\u2581\u0120") for entry in vocabulary)
    chinese = (word for word in bare if _HAN_WORD.fullmatch(word) and (len(word) > 1 or word in known))
    return list(dict.fromkeys((*words, *chinese)))


def distillation_texts(
    captions: Sequence[str],
    words: Sequence[str],
    *,
    count: int,
    excluded: Collection[str],
    seed: int,
) -> list[str]:
    """Return the captions and up to ``count`` phrases of one to three words, all distinct.

    Half of a phrase's words come from the captions where it has several, so that the words of the
    domain meet in new company.

    Args:
        captions: What training may see.
        words: Ordinary words.
        count: How many phrases to draw.
        excluded: Texts of every evaluation; none of them is drawn, whatever its case or hyphens.
        seed: Of the draw.
    """
    forbidden = forbidden_texts(excluded, captions)
    domain = sorted({word for text in captions for word in _DOMAIN_WORD.findall(text.lower())})
    rng = np.random.default_rng((seed, 1))
    found = dict.fromkeys(captions)
    known = {folded(text) for text in captions}
    if words or domain:
        for _ in range(count):
            phrase = _phrase(rng, words or domain, domain or words)
            if folded(phrase) not in forbidden and folded(phrase) not in known:
                known.add(folded(phrase))
                found[phrase] = None
    return list(found)


def _phrase(rng: np.random.Generator, words: Sequence[str], domain: Sequence[str]) -> str:
    length = int(rng.choice(_LENGTHS, p=_SHARES))
    chosen: list[str] = []
    for place in range(length):
        pool: Any = domain if length > 1 and (place == 0 or rng.random() < 0.5) else words
        chosen.append(str(pool[int(rng.integers(len(pool)))]))
    rng.shuffle(chosen)
    return _HAN_GAP.sub("", " ".join(chosen))


def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name: LATIN, CJK, CYRILLIC."""
    return unicodedata.name(letter, "").partition(" ")[0]
