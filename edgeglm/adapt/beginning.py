"""How an alignment begins, and what tells its phases apart, for heads on features and on pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeglm.adapt.pretraining_stage import take_encoder
from edgeglm.adapt.unlabelled import require_unlabelled
from edgeglm.core.digest import sha256_json
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs
from edgeglm.core.teacher_config import MultitaskConfig
from edgeglm.data.pairs import PairSet

if TYPE_CHECKING:
    from torch import Tensor

    from edgeglm.adapt.alignment import Alignment
    from edgeglm.adapt.auxiliary import Auxiliary
    from edgeglm.adapt.conse import NamedClasses
    from edgeglm.adapt.domains import Domains
    from edgeglm.adapt.multitask import Kinds
    from edgeglm.adapt.text_teacher import TextTeacher
    from edgeglm.train.checkpoint import Checkpoint
    from edgeglm.train.concepts import Concepts

#: Options that are of the image tuning alone.
IMAGE_OPTIONS = ("image_blocks", "image_epochs", "image_rate", "image_batch_size")


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What every pair of heads of a teacher is trained on, and the text tower that they share."""

    features_VNF: Tensor
    text: TextTeacher
    concepts: Concepts
    domains: Domains | None
    kinds: tuple[Kinds, ...]
    tasks: tuple[Tensor, ...]
    widths: Sequence[int]
    auxiliary: Auxiliary | None
    named: NamedClasses | None
    progress: Progress

    def alignment(
        self,
        config: TeacherConfig,
        *,
        seed: int,
        checkpoints: Callable[[str], Checkpoint],
        first_state: bool = True,
        title: str = "Teacher",
    ) -> Alignment:
        """Return an alignment of one pair of heads with the text tower as it is by now.

        Args:
            config: What is trained.
            seed: Of every draw.
            checkpoints: Phase -> where its state is kept.
            first_state: Whether heads start where the recipe's rounds of Reptile lead.
            title: What its progress is called.
        """
        from edgeglm.adapt.alignment import Alignment

        return Alignment(
            self.features_VNF,
            self.concepts,
            self.text,
            config,
            seed=seed,
            progress=self.progress,
            domains=self.domains,
            kinds=self.kinds,
            meta_tasks=self.tasks if first_state else (),
            checkpoints=checkpoints,
            widths=self.widths,
            auxiliary=self.auxiliary,
            named=self.named,
            title=title,
        )


def begun(
    config: TeacherConfig,
    pairs: PairSet,
    inputs: Inputs,
    scratch: Path,
    progress: Progress,
    *,
    max_length: int,
) -> Beginning:
    """Read cached features and the text tower as it was published, or as it is after it read.

    Args:
        config: What the stage trains.
        pairs: The images and their texts.
        inputs: ``features``, ``text``, and perhaps ``pretraining``, ``class-names``, and
            ``auxiliary-pairs`` with their ``auxiliary-features``.
        scratch: A folder for the text tower's files.
        progress: Where what is trained says how far it is.
        max_length: The most tokens of a text.

    Raises:
        UserError: A copy of an evaluated image would train, or the recipe asks for what the data lacks.
    """
    import torch

    from edgeglm.adapt.auxiliary import auxiliary_beside
    from edgeglm.adapt.conse import named_classes
    from edgeglm.adapt.domains import Domains, refuse_leakage
    from edgeglm.adapt.meta import tasks_of
    from edgeglm.adapt.multitask import kinds_of
    from edgeglm.adapt.text_teacher import keep_entries, load_text_teacher
    from edgeglm.train.concepts import Concepts

    named = named_classes(inputs["class-names"], pairs) if config.conse.weight else None
    refuse_leakage(pairs, pairs.by_role("labelled", "unlabelled").tolist())
    concepts, multitask = Concepts.of(pairs), config.multitask
    text = load_text_teacher(config.text, inputs["text"], scratch / "text", max_length=max_length)
    if "pretraining" in inputs:
        take_encoder(text.tower.encoder, inputs["pretraining"])
    auxiliary = None
    if "auxiliary-features" in inputs:
        others = PairSet.open(inputs["auxiliary-pairs"])
        more = np.load(inputs["auxiliary-features"].path / "features.npy", mmap_mode="c")
        auxiliary = auxiliary_beside(
            concepts, len(pairs), others, torch.from_numpy(more), share=config.auxiliary.replay
        )
    trained = concepts.texts if auxiliary is None else auxiliary.concepts.texts
    keep_entries(text, said_texts(trained, named), config.vocabulary, scratch / "kept")
    from_tasks = multitask.reptile_rounds > 0
    return Beginning(
        features_VNF=torch.from_numpy(np.load(inputs["features"].path / "features.npy", mmap_mode="c")),
        text=text,
        concepts=concepts,
        domains=Domains.of(pairs, concepts) if config.domain.uses_unlabelled() else None,
        kinds=kinds_of(multitask, pairs, concepts),
        tasks=tuple(tasks_of(pairs, concepts, multitask.reptile_over)) if from_tasks else (),
        widths=inputs["features"].provenance.get("measured", {}).get("widths", ()),
        auxiliary=auxiliary,
        named=named,
        progress=progress,
    )


def said_texts(trained: Sequence[str], named: NamedClasses | None) -> tuple[str, ...]:
    """Return every text that the text tower is asked for: what trains, and what classes are called."""
    return (*trained, *(() if named is None else named.names))


def require_told(config: TeacherConfig, pairs: PairSet) -> None:
    """Raise UserError for pairs that do not tell what the recipe's teacher is to learn from them.

    What :func:`begun` would say when all features are made is asked of the pairs alone. A recipe that asks
    for no other tasks imports nothing heavy here, so that a build that reuses everything waits for no torch.
    """
    if config.domain.uses_unlabelled():
        require_unlabelled(pairs)
    named = {row.concept for row in pairs.rows if row.role == "labelled"}
    if len(named) > 1 and config.multitask == MultitaskConfig():
        return
    from edgeglm.adapt.meta import tasks_of
    from edgeglm.adapt.multitask import kinds_of
    from edgeglm.train.concepts import Concepts

    concepts = Concepts.of(pairs)
    kinds_of(config.multitask, pairs, concepts)
    if config.multitask.reptile_rounds:
        tasks_of(pairs, concepts, config.multitask.reptile_over)


def phase_checkpoints(
    parts: Mapping[str, Any], config: TeacherConfig, context: Context, used: list[Path]
) -> Callable[[str], Checkpoint]:
    """Return what makes the checkpoint of a phase; the folders it names are added to ``used``.

    A phase is known by what decides it alone: where a rate of the tuning is lowered, the warm-up before
    it is not trained again.
    """
    from edgeglm.train.checkpoint import Checkpoint

    every = config.optimisation.checkpoint_epochs

    def of(phase: str) -> Checkpoint:
        key = sha256_json({**parts, "config": decisive(config, phase), "phase": phase})
        folder = context.store.checkpoints / key
        used.append(folder)
        return Checkpoint(path=folder / f"{phase}.pt", identity=f"{key} {phase}", every=every)

    return of


#: Options that decide nothing before a phase is over, by the phase.
_AFTER_HEADS = {"domain.pseudo_label_rounds", "domain.pseudo_label_epochs"}
_AFTER_TUNING = {*_AFTER_HEADS, "epochs"}
_TUNING = {"tuning", "tuned_blocks", "tuned_rate", "virtual_tokens"}
_LORA = {"epochs", "batch_size", "learning_rate", "rank", "alpha", "dropout", "targets"}
_AFTER_WARM_UP = {*_AFTER_TUNING, *_TUNING, *(f"lora_{name}" for name in _LORA)}
_AFTER_AUXILIARY = {*_AFTER_WARM_UP, "warmup_epochs", "auxiliary.replay"}
_LATER = {
    "auxiliary": _AFTER_AUXILIARY,
    "warm-up": _AFTER_WARM_UP,
    "lora": _AFTER_TUNING,
    "heads": _AFTER_HEADS,
}


def decisive(config: TeacherConfig, phase: str) -> dict[str, Any]:
    """Return the options that decide the state in which a phase ends, by dotted name."""
    later = _LATER.get(phase, set()) if config.lora_epochs or phase != "warm-up" else set()
    left_out = {*later, "heads", "optimisation.checkpoint_epochs"} | (
        set(IMAGE_OPTIONS) if phase != "images" else set()
    )
    flat: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(config).items():
        children = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{child}".rstrip("."): found for child, found in children}
    flat["unlabelled"] = config.domain.uses_unlabelled()  # then every phase keeps how they are drawn
    return {name: value for name, value in flat.items() if name not in left_out}
