"""What the icon sets draw: concepts, which names mean the same one, and which are variants of another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeglm.data.iconsets import IconSet

# The catalogue is what these three draw alike; it does not depend on which of them train.
CATALOGUE_STYLES = ("noto", "openmoji", "twemoji")

_SKIN_TONE = re.compile(r"(^|-)((medium-light|medium-dark|light|medium|dark)-skin-tone|tone[1-5])(-|$)")
# Words that tell a variant from its base concept: who does it, which way, with which hair.
_GENDER = {
    "man", "woman", "person", "men", "women", "people", "adult", "boy", "girl", "male", "female",
    "mens", "womens", "mans", "womans",
}  # fmt: skip
_DIRECTION = {
    "left", "right", "up", "down", "leftwards", "rightwards", "upwards", "downwards", "north", "south",
    "east", "west", "northeast", "northwest", "southeast", "southwest",
}  # fmt: skip
_HAIR = re.compile(r"-(blond|blonde|red|curly|white)-hair(ed)?$|-(bald|beard)$|^(blond|bearded)(-haired)?-")
_SAME_BASE = {
    "princess": "prince",
    "mermaid": "merperson",
    "merman": "merperson",
    "mrs-claus": "claus",
    "mx-claus": "claus",
    "santa-claus": "claus",
    "boy": "child",
    "girl": "child",
    "man-dancing": "dancer",
    "woman-dancing": "dancer",
    "breast-feeding": "feeding-baby",
    "man-with-skullcap": "with-skullcap",
    "older-person": "old",
}
_PERSON = "person"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing that is drawn.

    Attributes:
        name: Its name in the first catalogue style, with hyphens.
        base: The concept it is a variant of, often itself.
        captions: Distinct texts for it; the first is the name with spaces.
        icons: The icon's name in each style that has it.
        codes: Its code point sequences without variation selectors, ``1f34e`` or ``1f468-200d-1f373``.
    """

    name: str
    base: str
    captions: tuple[str, ...]
    icons: Mapping[str, str]
    codes: frozenset[str]


def is_skin_tone_variant(name: str) -> bool:
    """Tell whether a name is of a skin tone variant. ``light-bulb`` and ``police-car-light`` are not."""
    return _SKIN_TONE.search(name) is not None


def base_concept(name: str) -> str:
    """Return the base concept of a name; variants of one thing share it, so a split can keep them together.

    The rule, in order: a family, couple or kiss is one concept whoever is in it; a few
    pairs with names of their own (princess and prince) are listed; a trailing ``-facing-right`` and every
    word of direction is dropped; hair and beard are dropped; every word of gender is dropped, so that
    ``man-cook``, ``woman-cook`` and ``cook`` are one; what is then empty is a person.

    >>> [base_concept(name) for name in ("woman-cook", "man-running-facing-right", "man-red-hair")]
    ['cook', 'running', 'person']
    """
    for group in ("family", "couple-with-heart", "holding-hands"):
        if name.startswith(group) or name.endswith(group):
            return group
    if name == "kiss" or (name.startswith("kiss-") and name != "kiss-mark"):
        return "kiss"
    if name in _SAME_BASE:
        return _SAME_BASE[name]
    words = _HAIR.sub("", name.removesuffix("-facing-right")).split("-")
    kept = [word for word in words if word not in _DIRECTION and word not in _GENDER]
    return "-".join(kept) or (_PERSON if _GENDER.intersection(words) else name)


def _is_letter(codes: frozenset[str]) -> bool:
    return any(re.fullmatch("1f1(e[6-9a-f]|f[0-9a-f])", code) for code in codes)


def text_of(name: str) -> str:
    """Return the text of a name: hyphens as spaces."""
    return name.replace("-", " ")


def concepts_of(sets: Mapping[str, IconSet]) -> tuple[Concept, ...]:
    """Return the catalogue: concepts that all of ``CATALOGUE_STYLES`` draw, with their icons in every set.

    A concept's icon in a set is the one of the same name; else the one with the same code point; else one
    under a name that some set lists as an alias of it. An icon serves one concept only. Skin
    tone variants, hidden icons and the letters that flags are spelt with do not take part. Sorted by name.
    """
    first = sets[CATALOGUE_STYLES[0]]
    names = sorted(
        name
        for name in first.icons
        if not is_skin_tone_variant(name) and not _is_letter(first.codes.get(name, frozenset()))
    )
    synonyms = _synonyms(names, sets.values())
    icons: dict[str, dict[str, str]] = {name: {} for name in names}
    for style, icon_set in sets.items():
        for name, icon in _matched(names, first, icon_set, synonyms).items():
            icons[name][style] = icon
    shared = [name for name in names if all(style in icons[name] for style in CATALOGUE_STYLES)]
    captions = _captions(shared, icons, synonyms)
    return tuple(
        Concept(
            name=name,
            base=base_concept(name),
            captions=captions[name],
            icons=icons[name],
            codes=first.codes.get(name, frozenset()),
        )
        for name in shared
    )


def _synonyms(names: Sequence[str], sets: Iterable[IconSet]) -> dict[str, frozenset[str]]:
    """Names that some set gives as another name of a concept, and of no other concept."""
    known = set(names)
    found: dict[str, set[str]] = defaultdict(set)
    for icon_set in sets:
        for alias, parent in icon_set.aliases.items():
            for concept, other in ((parent, alias), (alias, parent)):
                if concept in known and other not in known and not is_skin_tone_variant(other):
                    found[other].add(concept)
    by_concept: dict[str, set[str]] = defaultdict(set)
    for other, concepts in found.items():
        if len(concepts) == 1:
            by_concept[next(iter(concepts))].add(other)
    return {name: frozenset(by_concept[name]) for name in names}


def _matched(
    names: Sequence[str], first: IconSet, icon_set: IconSet, synonyms: Mapping[str, frozenset[str]]
) -> dict[str, str]:
    by_code = {code: name for name, codes in icon_set.codes.items() for code in codes}
    taken: set[str] = set()
    matched: dict[str, str] = {}

    def match(concept: str, candidates: Iterable[str]) -> None:
        for icon in candidates:
            if concept not in matched and icon in icon_set.icons and icon not in taken:
                matched[concept] = icon
                taken.add(icon)

    for name in names:
        match(name, [name])
    for name in names:
        match(name, (by_code[code] for code in sorted(first.codes.get(name, ())) if code in by_code))
    for name in names:
        match(name, sorted(synonyms[name]))
    return matched


def _captions(
    names: Sequence[str], icons: Mapping[str, Mapping[str, str]], synonyms: Mapping[str, frozenset[str]]
) -> dict[str, tuple[str, ...]]:
    own = {text_of(name) for name in names}
    claims: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for other in {*synonyms[name], *icons[name].values()}:
            claims[text_of(other)].add(name)
    captions: dict[str, tuple[str, ...]] = {}
    for name in names:
        others = {text_of(other) for other in {*synonyms[name], *icons[name].values()}}
        extra = sorted(text for text in others if text not in own and len(claims[text]) == 1)
        captions[name] = (text_of(name), *extra)
    return captions
