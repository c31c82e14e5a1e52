"""What each concept is called, and by which words it is sought, in each language of a recipe.

English names are the icon sets' own; in other languages they are Unicode's (CLDR's ``tts``). Keywords are
CLDR's everywhere. The format: https://unicode.org/reports/tr35/tr35-general.html#Annotations .
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.data.concepts import Concept
from edgeglm.data.iconsets import plain_code

LANGUAGES = {"en": "English", "zh": "Chinese"}


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """One language.

    Attributes:
        language: Its BCP 47 tag.
        captions: Distinct texts of each concept, its name first; a concept without a name is absent.
        keywords: Keywords of each concept, in lower case.
    """

    language: str
    captions: Mapping[str, tuple[str, ...]]
    keywords: Mapping[str, frozenset[str]]


class _Entry(msgspec.Struct, frozen=True):
    default: tuple[str, ...] = ()
    tts: tuple[str, ...] = ()


class _Annotations(msgspec.Struct, frozen=True):
    annotations: dict[str, _Entry]


class _CldrFile(msgspec.Struct, frozen=True):
    annotations: _Annotations


def spoken_in(
    languages: Sequence[str], concepts: Sequence[Concept], cldr: Mapping[str, bytes]
) -> tuple[Spoken, ...]:
    """Return the languages in order.

    A name that two concepts share, in its language or with a caption of a language before it, is the name of
    neither: a concept that is held out of training must not be called as one that trains.

    Args:
        languages: Tags of ``LANGUAGES``.
        concepts: The catalogue.
        cldr: ``annotations.json`` of CLDR for each language.
    """
    owner: dict[str, str] = {}
    found: list[Spoken] = []
    for language in languages:
        by_code = keywords_from_cldr(cldr[language])
        captions = (
            {concept.name: concept.captions for concept in concepts}
            if language == "en"
            else _named(concepts, names_from_cldr(cldr[language]), owner)
        )
        owner |= {folded(text): name for name, texts in captions.items() for text in texts}
        keywords = {c.name: frozenset().union(*(by_code.get(code, ()) for code in c.codes)) for c in concepts}
        found.append(Spoken(language=language, captions=captions, keywords=keywords))
    return tuple(found)


def keywords_from_cldr(data: bytes) -> dict[str, frozenset[str]]:
    """Read ``annotations.json`` of CLDR: code point sequence (no variation selectors) to keywords.

    They are in lower case. Raises UserError.
    """
    return {
        code: frozenset(_worded(word) for word in entry.default if any(letter.isalpha() for letter in word))
        for code, entry in _entries(data).items()
    }


def names_from_cldr(data: bytes) -> dict[str, str]:
    """Read ``annotations.json`` of CLDR: code point sequence (no variation selectors) to name.

    Raises UserError.
    """
    return {
        code: " ".join(entry.tts[0].split())
        for code, entry in _entries(data).items()
        if entry.tts and any(letter.isalpha() for letter in entry.tts[0])
    }


def folded(text: str) -> str:
    """Return the form in which two texts are compared: case folded, single spaces, hyphens as spaces.

    Letters that look the same are the same (Unicode's NFKC): composed or not, as file systems and keyboards
    differ, and in full width; characters of no width do not count.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _worded("".join(letter for letter in plain if unicodedata.category(letter) != "Cf"))


def _worded(text: str) -> str:
    return " ".join(text.casefold().replace("-", " ").split())


def _entries(data: bytes) -> dict[str, _Entry]:
    try:
        parsed = msgspec.json.decode(data, type=_CldrFile)
    except msgspec.DecodeError as error:
        raise UserError(f"not a CLDR annotations file: {error}; fetch it again") from error
    return {
        plain_code("-".join(f"{ord(character):x}" for character in characters)): entry
        for characters, entry in parsed.annotations.annotations.items()
    }


def _named(
    concepts: Sequence[Concept], names: Mapping[str, str], owner: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    called = {
        concept.name: next((names[code] for code in sorted(concept.codes) if code in names), "")
        for concept in concepts
    }
    claims = Counter(folded(name) for name in called.values())
    return {
        concept: (name,)
        for concept, name in called.items()
        if name and claims[folded(name)] == 1 and owner.get(folded(name), concept) == concept
    }
