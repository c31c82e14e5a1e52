"""What is asked of the icon sets: which queries, which gallery, which images are right.

Every gallery holds images of the target style only (of all styles where a recipe has no target).

==========================  ==================================  ===================================
track                       queries                             gallery
==========================  ==================================  ===================================
``catalogue-transductive``  names of known concepts whose       all target images, those of unseen
                            target image trains unlabelled      concepts too
``catalogue-inductive``     names of known concepts whose       the same
                            target image is held
``unseen``                  names of unseen concepts            their target images only
==========================  ==================================  ===================================

A name's relevant image is its concept's; images with the very same pixels (one set draws eight families
alike) are right too, since nothing can tell them apart.

Each has a ``-keywords`` twin with the same gallery. A keyword is an English CLDR keyword that is neither the
name of a concept nor, as a whole string, a caption that training may see. All images of the gallery whose
concept carries it are relevant, so nothing right is counted as wrong. The two catalogue twins share the
keywords of known concepts out between them by what training may have seen: a keyword is *inductive* if
every relevant image is held, and *transductive* if at least one trains unlabelled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.data.iconsets import plain_code
from edgeglm.data.pairs import Pair, Query, Track

_TITLES = {
    "catalogue-transductive": "Known concepts; target images were trained on without names",
    "catalogue-inductive": "Known concepts; target images never seen in any form",
    "unseen": "Concepts held out of all training",
}


class _Keywords(msgspec.Struct, frozen=True):
    default: tuple[str, ...] = ()


class _Annotations(msgspec.Struct, frozen=True):
    annotations: dict[str, _Keywords]


class _CldrFile(msgspec.Struct, frozen=True):
    annotations: _Annotations


def keywords_from_cldr(data: bytes) -> dict[str, frozenset[str]]:
    """Read ``annotations.json`` of CLDR: code point sequence (no variation selectors) to keywords, folded.

    The format: https://unicode.org/reports/tr35/tr35-general.html#Annotations . Raises UserError.
    """
    try:
        parsed = msgspec.json.decode(data, type=_CldrFile)
    except msgspec.DecodeError as error:
        raise UserError(f"not a CLDR annotations file: {error}; fetch it again") from error
    found: dict[str, frozenset[str]] = {}
    for characters, entry in parsed.annotations.annotations.items():
        code = plain_code("-".join(f"{ord(character):x}" for character in characters))
        found[code] = frozenset(
            folded(word) for word in entry.default if any(letter.isalpha() for letter in word)
        )
    return found


def folded(text: str) -> str:
    """Return the form in which two texts are compared: case folded, single spaces, hyphens as spaces."""
    return " ".join(text.casefold().replace("-", " ").split())


def icon_tracks(
    rows: Sequence[Pair],
    digests: Sequence[str],
    *,
    target: str | None,
    unseen: frozenset[str],
    keywords: Mapping[str, Iterable[str]],
) -> tuple[Track, ...]:
    """Return the tracks that have a query, names before keywords.

    Args:
        rows: All pairs; indices in tracks refer to them.
        digests: A digest of the pixels of each row's image.
        target: The target style, or None.
        unseen: Names of the unseen concepts.
        keywords: Keywords of each concept, folded.
    """
    shown = [i for i, row in enumerate(rows) if row.domain == target or target is None]
    sides: dict[str, list[int]] = {"unseen": [i for i in shown if rows[i].concept in unseen]}
    galleries = {"unseen": tuple(sides["unseen"])}
    if target is not None:
        known = [i for i in shown if rows[i].concept not in unseen]
        sides["catalogue-transductive"] = [i for i in known if rows[i].role == "unlabelled"]
        sides["catalogue-inductive"] = [i for i in known if rows[i].role == "held"]
        galleries["catalogue-transductive"] = galleries["catalogue-inductive"] = tuple(shown)
    trained = {folded(text) for row in rows if row.role == "labelled" for text in row.captions}
    forbidden = trained | {folded(row.text) for row in rows}
    tracks = []
    for name, title in _TITLES.items():
        if name not in sides:
            continue
        gallery = galleries[name]
        named = _name_queries(rows, digests, sides[name], gallery)
        worded = _keyword_queries(rows, name, sides[name], gallery, keywords, forbidden)
        for suffix, kind, queries in (("", "names", named), ("-keywords", "keywords", worded)):
            if queries:
                tracks.append(
                    Track(
                        name=f"{name}{suffix}",
                        title=title if not suffix else f"{title}; keywords not trained on",
                        query_kind="names" if kind == "names" else "keywords",
                        queries=queries,
                        gallery=gallery,
                    )
                )
    return tuple(sorted(tracks, key=lambda track: track.query_kind != "names"))


def _name_queries(
    rows: Sequence[Pair], digests: Sequence[str], side: Sequence[int], gallery: Sequence[int]
) -> tuple[Query, ...]:
    by_digest: dict[str, set[int]] = defaultdict(set)
    by_text: dict[str, set[int]] = defaultdict(set)
    for i in gallery:
        by_digest[digests[i]].add(i)
    for i in gallery:
        by_text[rows[i].text] |= by_digest[digests[i]]
    texts = sorted({rows[i].text for i in side})
    return tuple(Query(text=text, relevant=tuple(sorted(by_text[text]))) for text in texts)


def _keyword_queries(
    rows: Sequence[Pair],
    track: str,
    side: Sequence[int],
    gallery: Sequence[int],
    keywords: Mapping[str, Iterable[str]],
    forbidden: set[str],
) -> tuple[Query, ...]:
    by_word: dict[str, list[int]] = defaultdict(list)
    for i in gallery:
        for word in keywords.get(rows[i].concept, ()):
            if word not in forbidden:
                by_word[word].append(i)
    mine = set(side)
    queries = []
    for word, relevant in sorted(by_word.items()):
        touched = any(rows[i].role == "unlabelled" for i in relevant)
        if mine.isdisjoint(relevant) or (track == "catalogue-inductive" and touched):
            continue
        queries.append(Query(text=word, relevant=tuple(relevant)))
    return tuple(queries)
