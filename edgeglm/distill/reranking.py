"""The re-ranker's training: on the student's own candidates, from the teacher's similarities and the labels.

A query's candidates are the images of one drawing style that the student puts first, so that what is learnt
is to tell apart what the student confuses: hard negatives from the dual encoder itself, as in ALBEF (Li et
al., 2021) and BLIP (2022), whose image-text matching head this is. The teacher's similarities are asked for
as a distribution over the candidates (Hinton et al., 2015), the labels where there are some.

Shapes: V views, U used images, N patches, C channels, T texts, K concepts, Q queries, A candidates a query,
D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeglm.core.progress import Progress
from edgeglm.core.reranker_config import RerankerConfig
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.distill.text_student import padded
from edgeglm.models.projection import normalized
from edgeglm.models.reranker import FusedReranker, PatchTower
from edgeglm.models.students import ImageTower, StudentTextTower
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import FitOptions, Group, fit, stretch_of
from edgeglm.train.views import Views

VIEWS = 2
_BLOCK = 256
_STRETCH = 25  # most steps between two losses in the curve
_WEIGHT_DECAY = 0.05
TextIds = Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What both sides say of everything that trains.

    Attributes:
        patch_VUNC: float16, the student's patches of each view.
        image_VUD: The student's embeddings of the same.
        target_UD: The teacher's embeddings of the images.
        concept_U: int64, -1 where training may not know it.
        domain_U: int64, the drawing style.
        text_TD: The student's embeddings of the texts.
        said_TD: The teacher's.
        ids: The tokens of each text.
        right_TK: bool, whether a caption is one of a concept's; captions come first.
    """

    patch_VUNC: Tensor
    image_VUD: Tensor
    target_UD: Tensor
    concept_U: Tensor
    domain_U: Tensor
    text_TD: Tensor
    said_TD: Tensor
    ids: TextIds
    right_TK: Tensor


def seen_by_both(
    image: ImageTower,
    text: StudentTextTower,
    tokenizer: Tokenizer,
    pairs: PairSet,
    *,
    teacher_VND: Tensor,
    texts: Sequence[str],
    said_TD: Tensor,
    resolution: int,
    max_length: int,
    seed: int,
    progress: Progress,
) -> Seen:
    """Ask the student of everything that trains, once.

    Args:
        image: The student's image tower.
        text: Its text tower.
        tokenizer: Of the text tower.
        pairs: Labelled and unlabelled images are used, held ones are not.
        teacher_VND: The teacher's embeddings of every view; their mean is what is asked for.
        texts: What the teacher embedded, the captions first.
        said_TD: The teacher's embeddings of them.
        resolution: Of the student's images.
        max_length: Of a text.
        seed: Of the views.
        progress: Shows the task.
    """
    concepts = Concepts.of(pairs)
    used = torch.from_numpy(np.sort(pairs.by_role("labelled", "unlabelled")))
    domains = sorted({row.domain for row in pairs.rows})
    concept_N = torch.full((len(pairs),), -1)
    concept_N[concepts.image_N] = concepts.concept_N
    right_TK = torch.zeros(len(concepts.texts), len(concepts), dtype=torch.bool)
    for concept, own in enumerate(concepts.captions):
        right_TK[list(own), concept] = True
    ids = [tokenizer.encode([one], max_length=max_length)[0][0] for one in texts]
    with progress.task("Re-ranker: what the student says", total=None):
        patches, rows = patches_of_views(image, pairs, used, resolution=resolution, seed=seed)
        text_TD = embedded_texts(text, tokenizer, ids)
    return Seen(
        patch_VUNC=patches,
        image_VUD=rows,
        target_UD=normalized(teacher_VND.mean(0))[used],
        concept_U=concept_N[used],
        domain_U=torch.tensor([domains.index(pairs.rows[i].domain) for i in used.tolist()]),
        text_TD=text_TD,
        said_TD=said_TD,
        ids=ids,
        right_TK=right_TK,
    )


@torch.no_grad()
def patches_of_views(
    tower: ImageTower, pairs: PairSet, used: Tensor, *, resolution: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the student's patches float16 [V, U, N, C] and embeddings [V, U, D] of the used images."""
    cut = PatchTower(tower).eval()
    drawn = Views(pairs, VIEWS, seed=seed, resolution=resolution)
    patches: list[list[Tensor]] = [[] for _ in range(VIEWS)]
    rows: list[list[Tensor]] = [[] for _ in range(VIEWS)]
    for start in range(0, len(used), _BLOCK):
        chosen = used[start : start + _BLOCK]
        for view, x in enumerate(drawn.every(chosen)):
            found = cut(x)
            patches[view].append(found.half())
            rows[view].append(cut.embedding(found))
    return torch.stack([torch.cat(one) for one in patches]), torch.stack([torch.cat(one) for one in rows])


@torch.no_grad()
def embedded_texts(tower: StudentTextTower, tokenizer: Tokenizer, ids: TextIds) -> Tensor:
    """Return the student's embeddings of texts given as ids: [T, D]."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    for start in range(0, len(order), _BLOCK):
        chosen = order[start : start + _BLOCK]
        for place, row in zip(
            chosen, tower(*padded([ids[i] for i in chosen], tokenizer.pad_id)), strict=True
        ):
            out[place] = row
    return torch.stack(out)


def fit_reranker(
    model: FusedReranker,
    seen: Seen,
    config: RerankerConfig,
    *,
    pad: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train the re-ranker in place; return the mean loss of each stretch of steps.

    Every query is a caption or, as often, an ordinary phrase; it is asked of one style, in one view. Half of
    its candidates are the very first, the others are drawn from those after them.
    """
    pools = [torch.nonzero(seen.domain_U == d).flatten() for d in sorted(set(seen.domain_U.tolist()))]
    captions, texts = len(seen.right_TK), len(seen.text_TD)
    steps = stretch_of(config.steps, _STRETCH)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rng = np.random.default_rng((seed, 5, epoch))
        for _ in range(steps):
            view = int(rng.integers(len(seen.image_VUD)))
            pool = pools[int(rng.integers(len(pools)))]
            of_captions = rng.integers(0, captions, config.queries)
            of_phrases = rng.integers(captions, texts, config.queries) if texts > captions else of_captions
            text_Q = torch.from_numpy(
                np.where(rng.random(config.queries) < 0.5, of_captions, of_phrases).astype(np.int64)
            )
            chosen_QA = candidates(seen, text_Q, view, pool, config, rng)
            yield text_Q, torch.tensor(view), chosen_QA

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        text_Q, view, chosen_QA = batch
        count = chosen_QA.shape[1]
        ids, mask = padded([seen.ids[i] for i in text_Q.tolist()], pad)
        flat = chosen_QA.flatten()
        image_BD = seen.image_VUD[view, flat]
        cosine_B = (image_BD * seen.text_TD[text_Q].repeat_interleave(count, 0)).sum(1)
        score_QA = model(
            seen.patch_VUNC[view, flat].float(),
            ids.repeat_interleave(count, 0),
            mask.repeat_interleave(count, 0),
            cosine_B,
        ).view(len(text_Q), count)
        said_QA = (seen.target_UD[chosen_QA] @ seen.said_TD[text_Q][:, :, None])[:, :, 0]
        log_QA = F.log_softmax(score_QA / config.temperature, 1)
        loss = F.kl_div(log_QA, F.softmax(said_QA / config.temperature, 1), reduction="batchmean")
        concept_QA = seen.concept_U[chosen_QA]
        known_Q = text_Q < captions
        right_QA = seen.right_TK[text_Q.clamp(max=captions - 1)].gather(1, concept_QA.clamp(min=0))
        right_QA = right_QA & (concept_QA >= 0) & known_Q[:, None]
        answered = right_QA.any(1)
        if config.label_weight and bool(answered.any()):
            inside = log_QA[answered].masked_fill(~right_QA[answered], -torch.inf).logsumexp(1)
            loss = loss - config.label_weight * inside.mean()
        return loss

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    curve = fit(
        [Group(parameters=trained, learning_rate=config.learning_rate, weight_decay=_WEIGHT_DECAY)],
        batches,
        loss_of,
        epochs=config.steps // steps,
        steps_per_epoch=steps,
        warmup=50,
        clip=1.0,
        title="Re-ranker",
        progress=progress,
        options=FitOptions(lower="reranker.queries or reranker.negatives", rate="reranker.learning_rate"),
    )
    model.eval()
    return curve


def candidates(
    seen: Seen,
    text_Q: Tensor,
    view: int,
    pool: Tensor,
    config: RerankerConfig,
    rng: np.random.Generator,
) -> Tensor:
    """Return the images that each query is asked of: int64 [Q, A], places among the used ones."""
    cosine_QP = seen.text_TD[text_Q] @ seen.image_VUD[view, pool].T
    best_QA = cosine_QP.topk(min(config.candidates, len(pool)), dim=1).indices
    first = min(config.negatives // 2, best_QA.shape[1])
    more = min(config.negatives - first, best_QA.shape[1] - first)
    drawn = [first + rng.permutation(best_QA.shape[1] - first)[:more] for _ in range(len(text_Q))]
    others_QA = best_QA.gather(1, torch.from_numpy(np.stack(drawn).astype(np.int64)))
    return pool[torch.cat([best_QA[:, :first], others_QA], 1)]
