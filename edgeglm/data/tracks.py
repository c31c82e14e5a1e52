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

Each has a ``-keywords`` twin with the same gallery. A keyword is a CLDR keyword that is neither
the name of a concept nor, as a whole string, a caption that training may see. All images of the gallery whose
concept carries it are relevant, so nothing right is counted as wrong. The two catalogue twins share the
keywords of known concepts out between them by what training may have seen: a keyword is *inductive* if
every relevant image is held, and *transductive* if at least one trains unlabelled.

With several languages each has all of these; tracks of those after the first begin with the language:
``zh-unseen-keywords``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from edgeglm.data.languages import LANGUAGES, Spoken, folded, keywords_from_cldr
from edgeglm.data.pairs import Pair, Query, Track

__all__ = ["folded", "icon_tracks", "keywords_from_cldr"]

_TITLES = {
    "catalogue-transductive": "Known concepts; target images were trained on without names",
    "catalogue-inductive": "Known concepts; target images never seen in any form",
    "unseen": "Concepts held out of all training",
}


def icon_tracks(
    rows: Sequence[Pair],
    digests: Sequence[str],
    *,
    target: str | None,
    unseen: frozenset[str],
    spoken: Sequence[Spoken],
) -> tuple[Track, ...]:
    """Return the tracks that have a query, names before keywords.

    Args:
        rows: All pairs; indices in tracks refer to them.
        digests: A digest of the pixels of each row's image.
        target: The target style, or None.
        unseen: Names of the unseen concepts.
        spoken: Names and keywords in each language.
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
    tracks = []
    for said in spoken:
        names = {concept: texts[0] for concept, texts in said.captions.items()}
        forbidden = trained | {folded(text) for text in names.values()}
        prefix = "" if said is spoken[0] else f"{said.language}-"
        tongue = "" if said.language == "en" else f"; in {LANGUAGES[said.language]}"
        for name, title in _TITLES.items():
            if name not in sides:
                continue
            gallery = galleries[name]
            named = _name_queries(rows, digests, sides[name], gallery, names)
            worded = _keyword_queries(rows, name, sides[name], gallery, said.keywords, forbidden)
            for suffix, kind, queries in (("", "names", named), ("-keywords", "keywords", worded)):
                if queries:
                    words = "" if not suffix else "; keywords not trained on"
                    tracks.append(
                        Track(
                            name=f"{prefix}{name}{suffix}",
                            title=f"{title}{words}{tongue}",
                            query_kind="names" if kind == "names" else "keywords",
                            queries=queries,
                            gallery=gallery,
                            language=said.language,
                        )
                    )
    return tuple(sorted(tracks, key=lambda track: track.query_kind != "names"))


def _name_queries(
    rows: Sequence[Pair],
    digests: Sequence[str],
    side: Sequence[int],
    gallery: Sequence[int],
    names: Mapping[str, str],
) -> tuple[Query, ...]:
    by_digest: dict[str, set[int]] = defaultdict(set)
    by_text: dict[str, set[int]] = defaultdict(set)
    for i in gallery:
        by_digest[digests[i]].add(i)
    for i in gallery:
        if rows[i].concept in names:
            by_text[names[rows[i].concept]] |= by_digest[digests[i]]
    texts = sorted({names[rows[i].concept] for i in side if rows[i].concept in names})
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
            if folded(word) not in forbidden:
                by_word[word].append(i)
    mine = set(side)
    queries = []
    for word, relevant in sorted(by_word.items()):
        touched = any(rows[i].role == "unlabelled" for i in relevant)
        if mine.isdisjoint(relevant) or (track == "catalogue-inductive" and touched):
            continue
        queries.append(Query(text=word, relevant=tuple(relevant)))
    return tuple(queries)
