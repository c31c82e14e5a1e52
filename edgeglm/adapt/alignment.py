"""Alignment of image features with texts: heads, LoRA on the text tower, heads again.

The order matters. Heads trained on frozen text features give LoRA a space to pull towards; LoRA
moves the features; the heads then go on with what LoRA made, on cached features, in seconds. Where the
recipe asks for it, unlabelled images of the target take part (:mod:`edgeglm.adapt.domains`).

Shapes: V views, N images, F features, K concepts, B batch, D embedding dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgeglm.adapt.auxiliary import Auxiliary
from edgeglm.adapt.batches import Batch, Replay, batches_in_pass, batches_of, drawn_batch
from edgeglm.adapt.conse import NamedClasses, conse_heads
from edgeglm.adapt.domains import Domains, DomainTerms, cached, concept_prototypes, mutual_neighbours
from edgeglm.adapt.frozen_prefix import kept_prefix
from edgeglm.adapt.image_tuning import TunedBlocks
from edgeglm.adapt.meta import reptile
from edgeglm.adapt.multitask import Kinds, Multitask
from edgeglm.adapt.text_teacher import TextTeacher
from edgeglm.adapt.tuning import enable_tuning, merge_tuning
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.models.conse import ImageHead, TextHead
from edgeglm.models.projection import LearnedHead, ProjectionHead, ScaledHeads, normalized
from edgeglm.train.checkpoint import Carried, CarriedTensor, Checkpoint
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import FitOptions, Group, fit
from edgeglm.train.losses import concept_contrastive

AUXILIARY_PHASE = "auxiliary"
#: A small domain gets more epochs: fewer steps than this leave the heads untrained.
MIN_STEPS = 200
MIN_LORA_STEPS = 20
#: A round of pseudo-labels goes on with trained heads, and needs fewer.
MIN_PSEUDO_STEPS = 100
#: Pictures are slow, and the blocks that they tune were trained long ago.
MIN_IMAGE_STEPS = 50
_TUNING_CLIP = 1.0
_HEAD_RATE = 0.3  # of the heads' own rate, while tuning moves the features under them

_LOWER_HEADS = "teacher.batch_size"
_LOWER_IMAGES = "teacher.image_batch_size, or teacher.image_blocks so that fewer blocks keep activations"
_LOWER_TUNING = "teacher.lora_batch_size, or teacher.tuned_blocks so that fewer blocks keep activations"


class Alignment:
    """The two heads, the text tower, and the phases that train them."""

    def __init__(
        self,
        features_VNF: Tensor,
        concepts: Concepts,
        text: TextTeacher,
        config: TeacherConfig,
        *,
        seed: int,
        progress: Progress,
        domains: Domains | None = None,
        kinds: Sequence[Kinds] = (),
        meta_tasks: Sequence[Tensor] = (),
        checkpoints: Callable[[str], Checkpoint] | None = None,
        widths: Sequence[int] = (),
        auxiliary: Auxiliary | None = None,
        named: NamedClasses | None = None,
        title: str = "Teacher",
    ) -> None:
        self.features_VNF = features_VNF
        self.read = cached(features_VNF)
        self.labelled = concepts
        self.auxiliary = auxiliary
        self.concepts = concepts if auxiliary is None else auxiliary.concepts
        self.text = text
        self.config = config
        self.named = named
        self.seed = seed
        self.progress = progress
        self.title = title
        self.curves: dict[str, list[float]] = {}
        self.trainable = 0
        self.merge_difference = 0.0
        self.text_features = text.all_features(self.concepts.texts)
        self.checkpoints = checkpoints
        self._ended: Path | None = None
        self.pseudo_labels: list[int] = []
        self._new_heads(widths)
        self.meta_tasks = meta_tasks
        self.multitask = (
            Multitask(config.multitask, kinds, self.image_head, config.embedding_dim) if kinds else None
        )
        self.domains = domains
        self.terms: DomainTerms | None = None
        if domains is not None:
            self.terms = DomainTerms(
                config.domain, features_VNF, concepts, domains, embedding_dim=config.embedding_dim, seed=seed
            )

    def run(self) -> None:
        """Go through all phases. The heads and the merged text tower are the result."""
        config = self.config
        if self.meta_tasks:
            self._fit_first_state()
        if self.auxiliary is not None:
            self._fit_auxiliary(self.auxiliary)
        if self.multitask is not None:
            self.multitask.start_there()
        self._fit_heads("warm-up", config.warmup_epochs if config.lora_epochs else config.epochs)
        if config.lora_epochs:
            self._fit_lora()
            self.text_features = self.text.all_features(self.concepts.texts)
            self._fit_heads("heads", config.epochs)
        if self.domains is not None:
            self._fit_pseudo_labels(self.domains)
        self.image_head.eval()
        self.text_head.eval()

    def tune_images(self, blocks: TunedBlocks) -> None:
        """Train the last blocks of an image backbone with the heads over them, by the same loss.

        Where the recipe has rounds of pseudo-labels, those of the heads as they are take part.
        """
        original, config = self.concepts, self.config
        if self.domains is not None and config.domain.pseudo_label_rounds:
            self._take_matched(original, self.domains)
        self.read = blocks.read
        if self.terms is not None:
            self.terms.show(blocks.read, config.image_batch_size)
        self._fit_heads(
            "images",
            config.image_epochs,
            least=MIN_IMAGE_STEPS,
            others=[
                Group(
                    parameters=blocks.parameters(),
                    learning_rate=config.image_rate,
                    weight_decay=config.weight_decay,
                )
            ],
        )
        self.concepts = original
        self.image_head.eval()
        self.text_head.eval()

    def image_embeddings(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Return float32 [V, N, D] of every view of every image."""
        return embedded_views(self.image_head, self.features_VNF)

    def _new_heads(self, widths: Sequence[int]) -> None:
        config = self.config

        def head(features: int, input_dropout: float) -> ProjectionHead:
            return ProjectionHead(
                features,
                config.embedding_dim,
                hidden=config.hidden,
                input_dropout=input_dropout,
                dropout=config.dropout,
            )

        named = self.named
        read = self.features_VNF.shape[2] - (named.classes if named else 0)
        learned: LearnedHead
        members = widths[:-1] if named else widths
        if config.ensemble == "scaled" and len(members) > 1:
            learned = ScaledHeads([head(width, config.input_dropout) for width in members], members)
        else:
            learned = head(read, config.input_dropout)
        text_head = head(self.text.width, 0.0)
        self.image_head: ImageHead = learned
        self.text_head: TextHead = text_head
        if named is not None:
            told, said = conse_heads(learned, text_head, named, config)
            self.image_head, self.text_head = told, said
        self.image_head.standardise(self.features_VNF[0][self.labelled.image_N])
        self.text_head.standardise(self.text_features)
        if named is not None:
            told.call(said.names(self.text.all_features(named.names)))

    def _fit_first_state(self) -> None:
        """Find where the heads start (:mod:`edgeglm.adapt.meta`)."""
        wanted = self.config.multitask

        def batches(place_M: Tensor, rng: np.random.Generator) -> Iterator[Batch]:
            for _ in range(wanted.reptile_steps):
                count = min(self.config.batch_size, len(place_M))
                chosen = place_M[torch.from_numpy(rng.choice(len(place_M), count, replace=False))]
                yield drawn_batch(self.concepts, chosen, views=len(self.features_VNF), rng=rng)

        def loss_of(batch: Batch) -> Tensor:
            text_CD = self.text_head(self.text_features[batch.caption_C])
            image_BD = self.image_head(self._features(batch))
            return concept_contrastive(
                image_BD, text_CD, batch.concept_B, temperature=self.config.temperature
            )

        self.image_head.train()
        self.text_head.train()
        self.curves["first state"] = reptile(
            [*self.image_head.parameters(), *self.text_head.parameters()],
            self.meta_tasks,
            batches,
            loss_of,
            rounds=wanted.reptile_rounds,
            reach=wanted.reptile_reach,
            learning_rate=self.config.learning_rate,
            seed=self.seed,
            progress=self.progress,
        )

    def _fit_heads(self, phase: str, epochs: int, *, least: int = 0, others: Sequence[Group] = ()) -> None:
        """Train the heads, and with them ``others`` that move the features: then on pictures, and slower."""
        config = self.config
        size, rate = config.batch_size, config.learning_rate
        if others:
            size, rate = config.image_batch_size, rate * _HEAD_RATE

        def loss_of(batch: Batch) -> Tensor:
            text_CD = self.text_head(self.text_features[batch.caption_C])
            return self._contrast(batch, text_CD)

        steps = batches_in_pass(self.concepts, size, self._replay(phase))
        epochs = max(epochs, -(-(least or MIN_STEPS) // steps))
        groups = [*others, self._heads(rate)]
        if self.terms is not None:
            self.terms.begin(epochs * steps)
            if parameters := self.terms.parameters():
                groups.append(Group(parameters=parameters, learning_rate=rate))
        carried: list[Carried] = [] if self.terms is None else [self.terms]
        if self.multitask is not None:
            groups.extend(self.multitask.groups(rate))
            carried.append(self.multitask)
            self.multitask.train(True)
        self.image_head.train()
        self.text_head.train()
        self.curves[phase] = fit(
            groups,
            lambda epoch: self._batches(phase, epoch, size),
            loss_of,
            epochs=epochs,
            steps_per_epoch=steps,
            clip=_TUNING_CLIP if others else None,
            title=f"{self.title}: {phase}",
            progress=self.progress,
            options=self._options(phase, carried),
        )

    def _fit_auxiliary(self, auxiliary: Auxiliary) -> None:
        """Train the heads on all named pictures alike, then go on without the auxiliary ones or with few."""
        terms, multitask, self.terms, self.multitask = self.terms, self.multitask, None, None
        self._fit_heads(AUXILIARY_PHASE, self.config.auxiliary.epochs)
        self.terms, self.multitask = terms, multitask
        if not auxiliary.replay.share:
            self.auxiliary, self.concepts = None, self.labelled
            self.text_features = self.text_features[: len(self.labelled.texts)]

    def _fit_lora(self) -> None:
        config = self.config
        before = None if self.named is None else copy.deepcopy(self.text.tower)
        adapters: Sequence[nn.Parameter] = enable_tuning(self.text, config)
        self.trainable = sum(parameter.numel() for parameter in adapters)
        first_caption, untuned_TF = self.concepts.names(), self.text_features
        bank_KF = untuned_TF[first_caption].clone()

        def loss_of(batch: Batch) -> Tensor:
            """Embed the captions of the batch anew; all other concepts keep their last features."""
            present, place_B = torch.unique(batch.concept_B, return_inverse=True)
            fresh = self.text.features([self.concepts.texts[i] for i in batch.caption_C[present].tolist()])
            fresh = fresh.float().to(bank_KF.device)  # the tower alone may be on a GPU
            concept_P = batch.chosen_C[present]
            bank_KF[concept_P] = fresh.detach()
            others = torch.ones(len(batch.chosen_C), dtype=torch.bool)
            others[present] = False
            features_CF = torch.cat([fresh, bank_KF[batch.chosen_C[others]]])
            if before is not None:
                caption_C = torch.cat([batch.caption_C[present], first_caption[batch.chosen_C[others]]])
                features_CF = torch.cat([features_CF, untuned_TF[caption_C]], dim=1)
            image_BD = self.image_head(self._features(batch))
            return concept_contrastive(
                image_BD, self.text_head(features_CF), place_B, temperature=config.temperature
            )

        steps = batches_in_pass(self.concepts, config.lora_batch_size, self._replay("lora"))
        for module in (self.image_head, self.text_head, self.text.tower):
            module.train()
        with kept_prefix(self.text, self.concepts.texts, config.tuned_blocks):
            self.curves["lora"] = fit(
                [
                    Group(
                        parameters=adapters,
                        learning_rate=config.tuned_rate if self._tunes_whole() else config.lora_learning_rate,
                    ),
                    self._heads(config.learning_rate * _HEAD_RATE),
                ],
                lambda epoch: self._batches("lora", epoch, config.lora_batch_size),
                loss_of,
                epochs=max(config.lora_epochs, -(-MIN_LORA_STEPS // steps)),
                steps_per_epoch=steps,
                warmup=10,
                clip=_TUNING_CLIP,
                title="Teacher: LoRA" if config.tuning == "lora" else f"Teacher: {config.tuning}",
                progress=self.progress,
                options=self._options("lora", [CarriedTensor(bank_KF)]),
            )
        self.merge_difference = merge_tuning(self.text, self.concepts.texts[:64])
        self.text.before = before

    def _fit_pseudo_labels(self, domains: Domains) -> None:
        """Let heads choose pairs of unlabelled images and concepts, and train on them too, in rounds."""
        original = self.concepts
        for round_ in range(self.config.domain.pseudo_label_rounds):
            self._take_matched(original, domains)
            epochs = self.config.domain.pseudo_label_epochs
            self._fit_heads(f"pseudo-labels {round_ + 1}", epochs, least=MIN_PSEUDO_STEPS)
        self.concepts = original

    def _take_matched(self, original: Concepts, domains: Domains) -> None:
        """Let images and concepts that choose each other train beside the labelled ones."""
        chosen_P, concept_P = self._matched(self.labelled, domains)
        self.pseudo_labels.append(len(chosen_P))
        self.concepts = replace(
            original,
            image_N=torch.cat([original.image_N, domains.unlabelled_M[chosen_P]]),
            concept_N=torch.cat([original.concept_N, concept_P]),
        )

    def _matched(self, labelled: Concepts, domains: Domains) -> tuple[Tensor, Tensor]:
        self.image_head.eval()
        self.text_head.eval()
        with torch.no_grad():
            image_ND = normalized(torch.from_numpy(self.image_embeddings()).mean(0))
            text_TD = self.text_head(self.text_features)
            text_KD = normalized(torch.stack([text_TD[list(own)].mean(0) for own in labelled.captions]))
        prototype_KD = concept_prototypes(image_ND[labelled.image_N], labelled.concept_N, len(labelled))
        return mutual_neighbours(image_ND[domains.unlabelled_M], text_KD, prototype_KD)

    def _contrast(self, batch: Batch, text_CD: Tensor) -> Tensor:
        features_BF = self._features(batch)
        if self.terms is not None:
            features_BF = self.terms.labelled(features_BF, batch.place_B)
        image_BD = self.image_head(features_BF)
        read_BD = image_BD if self.multitask is None else self.multitask.shown(image_BD)
        loss = concept_contrastive(read_BD, text_CD, batch.concept_B, temperature=self.config.temperature)
        if self.multitask is not None:
            loss = self.multitask.joined(loss, features_BF, image_BD, batch.place_B)
        if self.terms is None:
            return loss
        own_BD = image_BD if self.auxiliary is None else image_BD[batch.image_B < self.auxiliary.replay.first]
        return loss + self.terms.loss(self.image_head, own_BD)

    def _features(self, batch: Batch) -> Tensor:
        if self.auxiliary is None:
            return self.read(batch.view_B, batch.image_B)
        return self.auxiliary.read(self.read, batch.view_B, batch.image_B)

    def _replay(self, phase: str) -> Replay | None:
        """Return what is replayed in a phase. The one that auxiliary pairs begin goes through all alike."""
        return None if self.auxiliary is None or phase == AUXILIARY_PHASE else self.auxiliary.replay

    def _options(self, phase: str, carried: Sequence[Carried]) -> FitOptions:
        wanted = self.config.optimisation
        kept = None if self.checkpoints is None else self.checkpoints(phase)
        if kept is not None:
            kept = replace(kept, carried=carried, before=self._ended)
            self._ended = kept.path
        rate, lower = "teacher.learning_rate", _LOWER_HEADS
        if phase == "lora":
            rate = "teacher.tuned_rate" if self._tunes_whole() else "teacher.lora_learning_rate"
            lower = _LOWER_TUNING
        elif phase == "images":
            rate, lower = "teacher.image_rate", _LOWER_IMAGES
        return FitOptions(
            schedule=wanted.schedule,
            adaptive_clip=wanted.adaptive_clip,
            accumulate=wanted.accumulate,
            precision=wanted.precision,
            patience=wanted.patience,
            checkpoint=kept,
            rate=rate,
            lower=lower,
        )

    def _tunes_whole(self) -> bool:
        return self.config.tuning in ("partial", "full")

    def _heads(self, rate: float) -> Group:
        parameters = [*self.image_head.parameters(), *self.text_head.parameters()]
        return Group(parameters=parameters, learning_rate=rate, weight_decay=self.config.weight_decay)

    def _batches(self, phase: str, epoch: int, size: int) -> Iterator[Batch]:
        rng = np.random.default_rng((self.seed, len(phase), epoch))
        views = len(self.features_VNF)
        return batches_of(self.concepts, size=size, views=views, rng=rng, replay=self._replay(phase))


@torch.no_grad()
def embedded_views(
    head: nn.Module, features_VNF: Tensor
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return what a head makes of every view of every image, float32 [V, N, D]."""
    views = [torch.cat([head(rows.float()) for rows in view.split(1024)]) for view in features_VNF]
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = torch.stack(views).numpy()
    return found
