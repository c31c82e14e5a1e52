"""The founding pairs: icons that several sets draw alike, with their names. Stage "pairs"."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeglm.assets.catalogue import catalogue
from edgeglm.assets.members import asset_member
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.recipe import DataConfig, Section
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.categories import CATEGORIES_ASSET, Kinds, kind_of, kinds_from_emoji_json
from edgeglm.data.concepts import CATALOGUE_STYLES, Concept, concepts_of
from edgeglm.data.icon_assets import icon_set_of, licence_of_set
from edgeglm.data.languages import Spoken, spoken_in
from edgeglm.data.pairs import KIND, Pair, PairSet, Role, empty_images, pixels_sha256, write_pairs
from edgeglm.data.rendering import rendered
from edgeglm.data.splits import drawn_groups, hashed_order, joined_groups
from edgeglm.data.tracks import folded, icon_tracks

KEYWORDS_ASSET = "cldr-annotations"
_NO_ICONS = (KEYWORDS_ASSET, CATEGORIES_ASSET)


class PairsConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The recipe's ``data`` table and seed."""

    seed: int = 0
    data: DataConfig = DataConfig()


def icon_asset_names(data: DataConfig) -> tuple[str, ...]:
    """Return the catalogue names of the assets that the stage takes. Raises UserError for no icon set."""
    icon_sets = [name for name, asset in catalogue().items() if "icons" in asset.roles]
    styles = _styles(data)
    for style in styles:
        if style not in icon_sets:
            raise unknown_name("icon set", style, icon_sets)
    kinds = (CATEGORIES_ASSET,) if data.categories else ()
    return (*dict.fromkeys((*styles, *CATALOGUE_STYLES)), KEYWORDS_ASSET, *kinds)


class PairsStage(Stage[PairsConfig]):
    """Icon set assets by name, and the keywords, to a pairs artifact.

    Roles: the concepts of ``unseen_fraction`` (whole groups of base concepts) are held in every style. Of
    the rest, source styles are labelled; ``inductive_fraction`` of the target images are held, the others
    unlabelled. Concepts that one set draws with identical pixels (Fluent's cat face and grinning cat) count
    as one group, so no held image has a copy in training.
    """

    name = KIND
    code = (
        "edgeglm.data.categories",
        "edgeglm.data.concepts",
        "edgeglm.data.icons",
        "edgeglm.data.icon_assets",
        "edgeglm.data.iconsets",
        "edgeglm.data.languages",
        "edgeglm.data.pairs",
        "edgeglm.data.rendering",
        "edgeglm.data.splits",
        "edgeglm.data.tracks",
    )
    libraries = ("numpy", "pillow", "resvg-py")

    def requires(self, inputs: Inputs) -> None:
        """Check that styles are known and given, and that the target is not labelled."""
        data = self.config.data
        if data.target is not None and data.target in data.labelled:
            raise UserError(
                f"the target style {data.target!r} is also labelled, so its names would be trained on; "
                "take it out of data.labelled"
            )
        if not data.languages():
            raise UserError('data.language names no language; give "en", "zh" or a list of them')
        if not data.labelled:
            raise UserError("data.labelled names no icon set; name at least one")
        if missing := [name for name in icon_asset_names(data) if name not in inputs]:
            raise UserError(f"the stage pairs lacks the assets {missing}; fetch them first")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Render every chosen icon and write the artifact. Returns counts and seconds."""
        data, seed = self.config.data, self.config.seed
        names = icon_asset_names(data)
        sets = {name: icon_set_of(name, inputs[name]) for name in names if name not in _NO_ICONS}
        drawn = concepts_of(sets)
        spoken = spoken_in(data.languages(), drawn, _annotations(inputs[KEYWORDS_ASSET], data))
        drawn = tuple(concept for concept in drawn if _captions(concept, spoken))
        concepts = _chosen(drawn, data.concepts, seed)
        icons = [(style, c) for style in _styles(data) for c in concepts if style in c.icons]

        started = time.perf_counter()
        documents = [sets[style].icons[concept.icons[style]] for style, concept in icons]
        images = empty_images(out, count=len(icons), size=data.image_size)
        digests = []
        pixels = rendered(documents, data.image_size, threads=context.threads, progress=context.progress)
        for i, image in enumerate(pixels):
            images[i] = image
            digests.append(pixels_sha256(image))
        images.flush()
        seconds = time.perf_counter() - started

        split = _split_of(concepts, icons, digests, data, seed)
        kinds: Kinds = {}
        if data.categories:
            member = catalogue()[CATEGORIES_ASSET].members["emoji"]
            kinds = kinds_from_emoji_json(asset_member(inputs[CATEGORIES_ASSET], member))
        rows = [
            _row(style, concept, split.role(style, concept, data.target), kinds, _captions(concept, spoken))
            for style, concept in icons
        ]
        tracks = icon_tracks(rows, digests, target=data.target, unseen=split.unseen, spoken=spoken)
        summary = {
            "concepts": len(concepts),
            "base_concepts": len({concept.base for concept in concepts}),
            "groups": len(set(split.groups.values())),
            "unseen_concepts": len(split.unseen),
            "images": len(rows),
            "margin": data.margin,
            "by_domain": dict(Counter(row.domain for row in rows)),
            "by_role": dict(Counter(row.role for row in rows)),
            "by_domain_and_role": dict(Counter(f"{row.domain}/{row.role}" for row in rows)),
            "identical_images": len(digests) - len(set(digests)),
            "copies_across_sides": len(_copies_across_sides(rows, digests)),
            "named": {said.language: sum(c.name in said.captions for c in concepts) for said in spoken},
            "tracks": {t.name: {"queries": len(t.queries), "gallery": len(t.gallery)} for t in tracks},
        }
        licences = [
            licence_of_set(name, inputs[name]) for name in names if name in (*_styles(data), *_NO_ICONS)
        ]
        write_pairs(out, rows=rows, tracks=tracks, licences=licences, summary=summary)
        return {**summary, "render_seconds": round(seconds, 2)}

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        """Check the artifact as any reader would, and that nothing leaks from training into evaluation."""
        pairs = PairSet.open(out)
        assert measured["copies_across_sides"] == 0, "a held image has a copy in training"
        labelled = {row.concept for row in pairs.rows if row.role == "labelled"}
        unseen = {row.concept for row in pairs.rows if row.role == "held"} - labelled
        touched = {row.concept for row in pairs.rows if row.role != "held"}
        assert unseen.isdisjoint(touched), f"unseen and trained on: {sorted(unseen & touched)[:5]}"
        trained = {folded(text) for text in pairs.training_texts()}
        names = {folded(text) for row in pairs.rows if row.concept in unseen for text in row.captions}
        assert names.isdisjoint(trained), f"names trained on: {sorted(names & trained)[:5]}"


@dataclass(frozen=True, kw_only=True)
class _Split:
    unseen: frozenset[str]
    inductive: frozenset[str]
    groups: Mapping[str, str]

    def role(self, style: str, concept: Concept, target: str | None) -> Role:
        if concept.name in self.unseen:
            return "held"
        if style != target:
            return "labelled"
        return "held" if concept.name in self.inductive else "unlabelled"


def _split_of(
    concepts: Sequence[Concept],
    icons: Sequence[tuple[str, Concept]],
    digests: Sequence[str],
    data: DataConfig,
    seed: int,
) -> _Split:
    by_base, by_digest = defaultdict(list), defaultdict(list)
    for concept in concepts:
        by_base[concept.base].append(concept.name)
    for (_, concept), digest in zip(icons, digests, strict=True):
        by_digest[digest].append(concept.name)
    groups = joined_groups([*by_base.values(), *by_digest.values()])
    sizes = Counter(groups.values())
    unseen = drawn_groups(sizes, data.unseen_fraction, seed=seed, purpose="unseen")
    known = {group: size for group, size in sizes.items() if group not in unseen}
    held = drawn_groups(known, data.inductive_fraction, seed=seed, purpose="inductive")
    return _Split(
        unseen=frozenset(name for name, group in groups.items() if group in unseen),
        inductive=frozenset(name for name, group in groups.items() if group in held),
        groups=groups,
    )


def _styles(data: DataConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*data.labelled, *([data.target] if data.target else []))))


def _annotations(asset: Artifact, data: DataConfig) -> dict[str, bytes]:
    members = catalogue()[KEYWORDS_ASSET].members
    return {language: asset_member(asset, members[language]) for language in data.languages()}


def _captions(concept: Concept, spoken: Sequence[Spoken]) -> tuple[str, ...]:
    """Return a concept's texts in all languages; none where no language has a name for it."""
    texts = (text for said in spoken for text in said.captions.get(concept.name, ()))
    return tuple(dict.fromkeys(texts))


def _chosen(concepts: Sequence[Concept], count: int | None, seed: int) -> tuple[Concept, ...]:
    """Take the first ``count`` concepts in the hashed order of their base, so that variants stay together."""
    if count is None:
        return tuple(concepts)
    bases = hashed_order({concept.base for concept in concepts}, seed=seed, purpose="subset")
    rank = {base: i for i, base in enumerate(bases)}
    ordered = sorted(concepts, key=lambda concept: (rank[concept.base], concept.name))
    return tuple(sorted(ordered[:count], key=lambda concept: concept.name))


def _row(style: str, concept: Concept, role: Role, kinds: Kinds, captions: tuple[str, ...]) -> Pair:
    category, subcategory = kind_of(concept.codes, kinds)
    return Pair(
        id=f"{style}/{concept.name}",
        text=captions[0],
        captions=captions,
        concept=concept.name,
        domain=style,
        role=role,
        category=category,
        subcategory=subcategory,
    )


def _copies_across_sides(rows: Sequence[Pair], digests: Sequence[str]) -> set[str]:
    held = {digest for row, digest in zip(rows, digests, strict=True) if row.role == "held"}
    return held & {digest for row, digest in zip(rows, digests, strict=True) if row.role != "held"}
