"""Whether an English text says a name that nothing labelled carries, however both are spelt.

Words count the same in singular and plural, with and without accents, in full width, and as one word or two
(``post box`` says ``postbox``). What is told apart wrongly would be trained on: in doubt words are the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise

from edgeglm.data.concepts import text_of
from edgeglm.data.languages import folded
from edgeglm.data.pairs import PairSet

_WORD = re.compile(r"[^\W_]+")
_APOSTROPHE = re.compile("['\u2019\u02bc]")
_IRREGULAR = {
    "children": "child",
    "dice": "die",
    "feet": "foot",
    "geese": "goose",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "teeth": "tooth",
    "women": "woman",
}


class UnseenNames:
    """Texts of which none may be said."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._by_form: dict[str, list[tuple[frozenset[str], ...]]] = {}
        for text in texts:
            words = words_of(text)
            for spelt in {tuple(words), ("".join(words),)} if words else ():
                wanted = tuple(forms_of(word) for word in spelt)
                for form in max(wanted, key=lambda forms: len(min(forms))):
                    self._by_form.setdefault(form, []).append(wanted)

    def said_by(self, text: str) -> bool:
        """Return whether a text says all words of one of them."""
        words = words_of(text)
        joined = ["".join(pair) for pair in pairwise(words)]
        said = frozenset[str]().union(*(forms_of(word) for word in (*words, *joined)))
        return any(_all_said(wanted, said) for form in said for wanted in self._by_form.get(form, ()))


def unseen_names(pairs: PairSet) -> UnseenNames:
    """Return the names of held images that nothing labelled carries.

    A concept has a name of its own besides what it is called in the languages of the pairs: that of icons is
    English, whatever they are captioned in.
    """
    labelled = {row.concept for row in pairs.rows if row.role == "labelled"}
    trained = {folded(text) for text in pairs.training_texts()}
    held = [row for row in pairs.rows if row.role == "held"]
    texts = {folded(text) for row in held for text in row.captions}
    own = {folded(text_of(row.concept)) for row in held if row.concept not in labelled}
    return UnseenNames((texts | own) - trained)


def words_of(text: str) -> list[str]:
    """Return the words of a text in order, without case, accents and width."""
    plain = unicodedata.normalize("NFKD", _APOSTROPHE.sub("", folded(text)))
    return _WORD.findall("".join(letter for letter in plain if not unicodedata.combining(letter)).casefold())


def forms_of(word: str) -> frozenset[str]:
    """Return a word and what it may be the plural of; two words are the same where they share a form."""
    found = {word, _IRREGULAR.get(word, word)}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(f"{word[:-3]}y")
        if word.endswith("ves"):
            found |= {f"{word[:-3]}f", f"{word[:-3]}fe"}
    return frozenset(found)


def _all_said(wanted: Sequence[frozenset[str]], said: frozenset[str]) -> bool:
    return all(not forms.isdisjoint(said) for forms in wanted)
