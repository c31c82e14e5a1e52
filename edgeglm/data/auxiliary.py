"""Named icons of other domains, for heads to be trained on before one's own pairs. Stage "auxiliary-pairs".

What an evaluation holds out stays held out: an icon whose name says all words of a text that nothing labelled
carries ("dragon fruit" where "dragon" is an unseen concept), one that is called as a query is worded, and one
that looks like a held image are left out, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.assets.catalogue import catalogue
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.concepts import is_skin_tone_variant, text_of
from edgeglm.data.copies import near_pairs, thumbnails_of
from edgeglm.data.icon_assets import icon_set_of, licence_of_set
from edgeglm.data.iconsets import IconSet
from edgeglm.data.languages import folded
from edgeglm.data.pairs import Pair, PairSet, empty_images, write_pairs
from edgeglm.data.rendering import rendered

KIND = "auxiliary-pairs"
_ROLES = frozenset({"icons", "auxiliary-icons"})
# How a thing is drawn, which the name of an icon ends with and which says nothing of the thing.
_MANNER = re.compile(
    r"(-(outline|outlined|filled|fill|solid|line|flat|duo|duotone|bold|light|thin|negative|rounded|sharp"
    r"|\d+(px)?))+$"
)
_WORD = re.compile(r"[^\W_]+")


class AuxiliaryPairsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which icon sets, in what order."""

    icons: tuple[str, ...]


def auxiliary_assets(icons: tuple[str, ...]) -> dict[str, str]:
    """Return what is fetched, by the name of the input. Raises UserError for what is no icon set."""
    known = [name for name, asset in catalogue().items() if _ROLES.intersection(asset.roles)]
    for name in icons:
        if name not in known:
            raise unknown_name("icon set", name, known)
    return {name: name for name in dict.fromkeys(icons)}


class AuxiliaryPairsStage(Stage[AuxiliaryPairsConfig]):
    """Icon sets by name, and the ``pairs`` that are evaluated, to a pairs artifact without tracks.

    Every row is labelled; its domain is its set. Icons of one set that differ in how they are drawn alone
    (``bat``, ``bat-outline``) count once.
    """

    name = KIND
    code = (
        "edgeglm.data.auxiliary",
        "edgeglm.data.concepts",
        "edgeglm.data.copies",
        "edgeglm.data.icon_assets",
        "edgeglm.data.iconsets",
        "edgeglm.data.languages",
        "edgeglm.data.pairs",
        "edgeglm.data.rendering",
    )
    libraries = ("numpy", "pillow", "resvg-py")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Render every icon that may be trained on, and write the artifact. Returns counts."""
        pairs, counts = PairSet.open(inputs["pairs"]), Counter[str]()
        held_back = held_back_in(pairs)
        chosen: list[tuple[str, str, str]] = []
        documents: list[str] = []
        for name in auxiliary_assets(self.config.icons):
            icon_set = icon_set_of(name, inputs[name])
            for icon, text in named_icons(icon_set):
                if reason := held_back(text):
                    counts[reason] += 1
                else:
                    chosen.append((name, icon, text))
                    documents.append(icon_set.icons[icon])
        if not chosen:
            raise UserError(
                f"no icon of {', '.join(self.config.icons)} may be trained on beside these pairs; name other "
                "sets in teacher.auxiliary.icons, or leave it out"
            )
        size = pairs.image_size
        with context.store.scratch() as scratch:
            drawn = empty_images(scratch, count=len(chosen), size=size)
            pixels = rendered(documents, size, threads=context.threads, progress=context.progress)
            for i, image in enumerate(pixels):
                drawn[i] = image
            held = sorted(pairs.evaluation_images())
            shown = near_pairs(thumbnails_of(drawn, range(len(chosen))), thumbnails_of(pairs.images, held))
            copies = {i for i, _ in shown}
            kept = [i for i in range(len(chosen)) if i not in copies]
            images = empty_images(out, count=len(kept), size=size)
            for place, i in enumerate(kept):
                images[place] = drawn[i]
            images.flush()
        rows = [_row(*chosen[i]) for i in kept]
        summary = {
            "images": len(rows),
            "concepts": len({row.concept for row in rows}),
            "by_domain": dict(Counter(row.domain for row in rows)),
            "left_out": {**counts, "looks like a held image": len(copies)},
        }
        licences = [licence_of_set(name, inputs[name]) for name in auxiliary_assets(self.config.icons)]
        write_pairs(out, rows=rows, tracks=(), licences=licences, summary=summary)
        return summary

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        """Check that nothing of an evaluation is in it, by text and by pixels."""
        pairs, made = PairSet.open(inputs["pairs"]), PairSet.open(out)
        held_back = held_back_in(pairs)
        said = [row.text for row in made.rows if held_back(row.text)]
        assert not said, f"held out of training, and named: {said[:5]}"
        held = {pairs.image_sha256[i] for i in pairs.evaluation_images()}
        assert held.isdisjoint(made.image_sha256), "a held image has a copy here"


def named_icons(icon_set: IconSet) -> Iterator[tuple[str, str]]:
    """Yield each icon that has a name in words, with that name: skin tones and manners of drawing once."""
    for icon in sorted(icon_set.icons):
        plain = _MANNER.sub("", icon)
        if is_skin_tone_variant(icon) or (plain != icon and plain in icon_set.icons):
            continue
        text = text_of(plain)
        if all(len(word) > 1 for word in text.split()) and any(letter.isalpha() for letter in text):
            yield icon, text


def held_back_in(pairs: PairSet) -> Callable[[str], str]:
    """Return what says why a text may not be trained on beside these pairs; empty where it may."""
    trained = {folded(text) for text in pairs.training_texts()}
    held = {folded(text) for row in pairs.rows if row.role == "held" for text in row.captions}
    asked = {folded(query.text) for track in pairs.tracks for query in track.queries}
    by_first: dict[str, list[frozenset[str]]] = {}
    for text in held - trained:
        if unseen := _words(text):
            by_first.setdefault(min(unseen), []).append(unseen)

    def reason(text: str) -> str:
        said = _words(text)
        if any(unseen <= said for word in said for unseen in by_first.get(word, ())):
            return "says an unseen name"
        return "is worded as a query" if folded(text) in asked - trained else ""

    return reason


def _words(text: str) -> frozenset[str]:
    """Return the words of a text without the endings of English plurals."""
    return frozenset(_singular(word) for word in _WORD.findall(folded(text)))


def _singular(word: str) -> str:
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _row(name: str, icon: str, text: str) -> Pair:
    return Pair(
        id=f"{name}/{icon}", text=text, captions=(text,), concept=folded(text), domain=name, role="labelled"
    )
