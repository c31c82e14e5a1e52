"""Named icons of other domains, for heads to be trained on before one's own pairs. Stage "auxiliary-pairs".

What an evaluation holds out stays held out: an icon whose name says all words of a text that nothing labelled
carries ("dragon fruit" where "dragon" is an unseen concept), one that is called as a query is worded, and one
that looks like an image of an evaluation are left out, and counted.
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
from edgeglm.data.unseen_names import forms_of, unseen_names, words_of

KIND = "auxiliary-pairs"
_ROLES = frozenset({"icons", "auxiliary-icons"})
# How a thing is drawn, which the name of an icon ends with and which says nothing of the thing.
_MANNER = re.compile(
    r"(-(outline|outlined|filled|fill|solid|line|flat|duo|duotone|bold|light|thin|negative|rounded|sharp"
    r"|\d+(px)?))+$"
)


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
        "edgeglm.data.unseen_names",
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
            raise self._nothing_left()
        size = pairs.image_size
        with context.store.scratch() as scratch:
            drawn = empty_images(scratch, count=len(chosen), size=size)
            pixels = rendered(documents, size, threads=context.threads, progress=context.progress)
            for i, image in enumerate(pixels):
                drawn[i] = image
            evaluated = sorted(_evaluated(pairs))
            shown = near_pairs(
                thumbnails_of(drawn, range(len(chosen))), thumbnails_of(pairs.images, evaluated)
            )
            copies = {i for i, _ in shown}
            kept = [i for i in range(len(chosen)) if i not in copies]
            if not kept:
                raise self._nothing_left()
            images = empty_images(out, count=len(kept), size=size)
            for place, i in enumerate(kept):
                images[place] = drawn[i]
            images.flush()
        rows = [_row(*chosen[i]) for i in kept]
        summary = {
            "images": len(rows),
            "margin": pairs.margin,
            "concepts": len({row.concept for row in rows}),
            "by_domain": dict(Counter(row.domain for row in rows)),
            "left_out": {**counts, "looks like an evaluated image": len(copies)},
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
        evaluated = {pairs.image_sha256[i] for i in _evaluated(pairs)}
        assert evaluated.isdisjoint(made.image_sha256), "an evaluated image has a copy here"

    def _nothing_left(self) -> UserError:
        return UserError(
            f"no icon of {', '.join(self.config.icons)} may be trained on beside these pairs; name other "
            "sets in teacher.auxiliary.icons, or leave it out"
        )


def _evaluated(pairs: PairSet) -> frozenset[int]:
    """Return what no name may come with: held images, and unlabelled ones that a track seeks."""
    unlabelled = {*pairs.by_role("unlabelled").tolist()}
    return pairs.evaluation_images() | {i for track in pairs.tracks for i in track.gallery if i in unlabelled}


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
    asked = {folded(query.text) for track in pairs.tracks for query in track.queries} - trained
    held = unseen_names(pairs)
    asked_as = frozenset[str]().union(*(forms_of("".join(words_of(text))) for text in asked))

    def reason(text: str) -> str:
        if held.said_by(text):
            return "says an unseen name"
        if folded(text) not in trained and not asked_as.isdisjoint(forms_of("".join(words_of(text)))):
            return "is worded as a query"
        return ""

    return reason


def _row(name: str, icon: str, text: str) -> Pair:
    return Pair(
        id=f"{name}/{icon}", text=text, captions=(text,), concept=folded(text), domain=name, role="labelled"
    )
