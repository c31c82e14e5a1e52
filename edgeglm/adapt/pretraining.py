"""A text tower reads the domain's texts: masked words, the order of sentences, whole terms masked.

Shapes: B batch, L tokens, H hidden size, M masked places, S masked terms, T terms, W words of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.adapt.corpora import Glossary
from edgeglm.adapt.text_teacher import TextTeacher
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.core.teacher_config import OptimisationConfig, PretrainingConfig
from edgeglm.train.checkpoint import Checkpoint
from edgeglm.train.loop import FitOptions, Group, fit
from edgeglm.train.losses import embedding_distance

#: Fresh heads learn faster than the tower by this.
_HEADS_FASTER = 20.0
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
#: Of the chosen tokens, as BERT has it: so many become the mask, so many of the rest another word.
_MASKED, _OTHER = 0.8, 0.5
#: How often a term that is named is masked as a whole.
_TERM_MASKED = 0.5
#: One document in so many is only asked about.
_HELD = 20


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One batch.

    Attributes:
        ids_BL: int64 tokens, some masked; ``mask_BL`` int64 is 0 where a row is filled up.
        place_M2: int64, row and column of each place to be told, ``word_M`` what stood there.
        swapped_B: int64, 1 where two sentences were swapped, 0 where not, -1 for one, or where nobody asks.
        term_S: int64, the masked terms; ``mean_SL`` float32, the mean over their places, and
            ``row_S`` their rows.
        sentences: The first sentence of each row, unmasked.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    place_M2: Tensor
    word_M: Tensor
    swapped_B: Tensor
    row_S: Tensor
    mean_SL: Tensor
    term_S: Tensor
    sentences: tuple[str, ...]


class Heads(nn.Module):
    """What reads the tower's hidden states: words (tied to its embeddings), the order, the terms."""

    def __init__(self, hidden: int, words_WH: Tensor, terms: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
        self.bias_W = nn.Parameter(torch.zeros(len(words_WH)))
        self.order = nn.Linear(hidden, 2)
        self.term = nn.Linear(hidden, max(1, terms))


class Reader:
    """Makes batches of a corpus, and losses of batches."""

    def __init__(
        self,
        teacher: TextTeacher,
        documents: Sequence[Sequence[str]],
        glossary: Glossary,
        config: PretrainingConfig,
        *,
        seed: int,
    ) -> None:
        tower = teacher.tower
        mask_id = teacher.tokenizer.mask_id
        if tower.mask != "bidirectional" or mask_id is None:
            causal = tower.mask != "bidirectional"
            why = f"reads with {tower.mask} masks" if causal else "has no token for a mask"
            raise UserError(
                f"the text tower {why}, so nothing can be masked in it; leave teacher.pretraining out"
            )
        encoder: Any = tower.encoder
        self.teacher, self.config, self.seed = teacher, config, seed
        self.mask_id = mask_id
        self.words: nn.Embedding = encoder.get_input_embeddings()
        self.glossary = glossary
        self.heads = Heads(int(encoder.config.hidden_size), self.words.weight, len(glossary.terms))
        rows = [pair for document in documents for pair in _neighbours(document)]
        self.length = min(config.max_length, tower.max_length)
        self.read = {text: self._pieces(text) for row in rows for text in row}
        self.held = [row for i, row in enumerate(rows) if i % _HELD == 0 and len(rows) >= 2 * _HELD]
        self.rows = [row for i, row in enumerate(rows) if i % _HELD or len(rows) < 2 * _HELD]
        self.before: dict[str, Tensor] = {}
        if config.anchor_weight:
            texts = sorted({row[0] for row in self.rows})
            self.before = dict(zip(texts, teacher.all_features(texts), strict=True))

    def _pieces(self, text: str) -> list[tuple[int, int]]:
        """Return each token with a mark of the term that it is a part of, -1 for none.

        A mark is the place of the term in the text times the count of terms, plus the term.
        """
        spans = self.glossary.spans(text)
        found = []
        for token, start, end in self.teacher.tokenizer.pieces(text):
            inside = (i for i, span in enumerate(spans) if start < span.end and end > span.start)
            place = next(inside, -1)
            mark = -1 if place < 0 else place * len(self.glossary.terms) + spans[place].term
            found.append((token, mark))
        return found

    def has_cases(self) -> bool:
        """Return whether some row that is read has a case of an objective with a weight."""
        config = self.config
        return any(
            config.mlm_weight
            or (config.order_weight and len(row) == 2)
            or (config.term_weight and any(mark >= 0 for text in row for _, mark in self.read[text]))
            for row in self.rows
        )

    def batches(self, epoch: int) -> Iterator[Reading]:
        """Yield the batches of an epoch, drawn by seed and epoch."""
        rng = np.random.default_rng((self.seed, 909, epoch))
        order = rng.permutation(len(self.rows)).tolist()
        for start in range(0, len(order), self.config.batch_size):
            yield self.reading([self.rows[i] for i in order[start : start + self.config.batch_size]], rng)

    def reading(self, rows: Sequence[tuple[str, ...]], rng: np.random.Generator) -> Reading:
        """Mask and swap: one batch of rows of one or two sentences."""
        config, terms = self.config, len(self.glossary.terms)
        before, after = self.teacher.tokenizer.frame()
        most = (self.length - len(before) - 2 * len(after)) // 2
        ids: list[list[int]] = []
        places: list[tuple[int, int]] = []
        words: list[int] = []
        swapped: list[int] = []
        masked_terms: list[tuple[int, int, list[int]]] = []
        for row_number, row in enumerate(rows):
            swap = len(row) == 2 and bool(config.order_weight) and bool(rng.random() < 0.5)
            swapped.append(int(swap) if len(row) == 2 and config.order_weight else -1)
            line = list(before)
            for text in row[::-1] if swap else row:
                pieces = self.read[text][:most]
                named = sorted({mark for _, mark in pieces if mark >= 0})
                whole = {mark for mark in named if config.term_weight and rng.random() < _TERM_MASKED}
                chance = rng.random(len(pieces))
                for offset, (token, mark) in enumerate(pieces):
                    column = len(line)
                    if mark in whole or chance[offset] < config.mask_fraction:
                        places.append((row_number, column))
                        words.append(token)
                        token = self._replaced(token, rng, always=mark in whole)
                    line.append(token)
                start = len(line) - len(pieces)
                for mark in sorted(whole):
                    columns = [start + i for i, (_, own) in enumerate(pieces) if own == mark]
                    masked_terms.append((row_number, mark % terms, columns))
                line += after
            ids.append(line)
        length = max(map(len, ids))
        ids_BL = torch.full((len(ids), length), self.teacher.tokenizer.pad_id)
        mask_BL = torch.zeros((len(ids), length), dtype=torch.int64)
        for i, line in enumerate(ids):
            ids_BL[i, : len(line)] = torch.tensor(line)
            mask_BL[i, : len(line)] = 1
        mean_SL = torch.zeros(len(masked_terms), length)
        for i, (_, _, columns) in enumerate(masked_terms):
            mean_SL[i, columns] = 1.0 / len(columns)
        return Reading(
            ids_BL=ids_BL,
            mask_BL=mask_BL,
            place_M2=torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
            word_M=torch.tensor(words, dtype=torch.int64),
            swapped_B=torch.tensor(swapped, dtype=torch.int64),
            row_S=torch.tensor([row for row, _, _ in masked_terms], dtype=torch.int64),
            mean_SL=mean_SL,
            term_S=torch.tensor([term for _, term, _ in masked_terms], dtype=torch.int64),
            sentences=tuple(row[0] for row in rows),
        )

    def _replaced(self, token: int, rng: np.random.Generator, *, always: bool) -> int:
        if always or rng.random() < _MASKED:
            return self.mask_id
        return int(rng.integers(self.words.num_embeddings)) if rng.random() < _OTHER else token

    def told(self, batch: Reading) -> dict[str, tuple[Tensor, Tensor]]:
        """Return, for each objective that the batch has a case of, logits and what was right."""
        encoder, tower = self.teacher.tower.encoder, self.teacher.tower
        hidden_BLH = encoder(
            input_ids=batch.ids_BL, attention_mask=tower.additive(batch.mask_BL)
        ).last_hidden_state
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if len(batch.word_M):
            hidden_MH = self.heads.transform(hidden_BLH[batch.place_M2[:, 0], batch.place_M2[:, 1]])
            found["mlm"] = (hidden_MH @ self.words.weight.T + self.heads.bias_W, batch.word_M)
        pairs_B = batch.swapped_B >= 0
        if bool(pairs_B.any()):
            found["order"] = (self.heads.order(hidden_BLH[pairs_B, 0]), batch.swapped_B[pairs_B])
        if len(batch.term_S):
            hidden_SH = torch.einsum("sl,slh->sh", batch.mean_SL, hidden_BLH[batch.row_S])
            found["term"] = (self.heads.term(hidden_SH), batch.term_S)
        return found

    def loss(self, batch: Reading) -> Tensor:
        """Return the weighted sum of the objectives; nothing for a batch without a case of any."""
        config = self.config
        weights = {"mlm": config.mlm_weight, "order": config.order_weight, "term": config.term_weight}
        total = self.heads.bias_W.sum() * 0.0
        for name, (logits, right) in self.told(batch).items():
            if weights[name]:
                total = total + weights[name] * F.cross_entropy(logits, right)
        if config.anchor_weight:
            now_BF = F.normalize(self.teacher.features(batch.sentences), dim=1)
            then_BF = F.normalize(torch.stack([self.before[text] for text in batch.sentences]), dim=1)
            total = total + config.anchor_weight * embedding_distance(now_BF, then_BF)
        return total

    @torch.no_grad()
    def judged(self) -> dict[str, dict[str, float]]:
        """Return loss and accuracy of each objective on the rows that were not read."""
        self.teacher.tower.eval()
        rng = np.random.default_rng((self.seed, 910))
        sums: dict[str, list[float]] = {}
        for start in range(0, len(self.held), self.config.batch_size):
            batch = self.reading(self.held[start : start + self.config.batch_size], rng)
            for name, (logits, right) in self.told(batch).items():
                loss = float(F.cross_entropy(logits, right, reduction="sum"))
                hits = int((logits.argmax(1) == right).sum())
                row = sums.setdefault(name, [0.0, 0.0, 0.0])
                sums[name] = [row[0] + loss, row[1] + hits, row[2] + len(right)]
        return {
            name: {"loss": round(loss / count, 4), "accuracy": round(hits / count, 4)}
            for name, (loss, hits, count) in sorted(sums.items())
        }


def _neighbours(document: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield each two sentences that follow one another; a document of one sentence yields that alone."""
    if len(document) == 1:
        yield (document[0],)
    yield from itertools.pairwise(document)


def pretrained(
    teacher: TextTeacher,
    documents: Sequence[Sequence[str]],
    glossary: Glossary,
    config: PretrainingConfig,
    *,
    seed: int,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    stepping: OptimisationConfig | None = None,
) -> dict[str, Any]:
    """Let the tower read in place; return the curve, the counts and how well it tells what it did not read.

    It steps as the recipe's other loops do, by ``stepping``; a state is kept after every epoch.

    Raises:
        UserError: The tower cannot be asked for masked words, or the corpus holds fewer than two rows, or
            no case of what is asked for.
    """
    reader = Reader(teacher, documents, glossary, config, seed=seed)
    if len(reader.rows) < 2:
        raise UserError(
            f"the corpus holds {len(reader.rows)} usable sentences; name larger files in "
            "teacher.pretraining.corpus"
        )
    if not reader.has_cases():
        raise UserError(
            "no two sentences of the corpus follow one another and none names a term, as far as "
            "teacher.pretraining asks for them; set teacher.pretraining.mlm_weight above 0"
        )
    first = reader.judged()
    tower = teacher.tower
    tower.encoder.requires_grad_(True)
    tower.train()
    reader.heads.train()
    tuned = [parameter for parameter in tower.encoder.parameters() if parameter.requires_grad]
    rate, stepping = config.learning_rate, stepping or OptimisationConfig()
    curve = fit(
        [
            Group(parameters=tuned, learning_rate=rate, weight_decay=_WEIGHT_DECAY),
            Group(parameters=list(reader.heads.parameters()), learning_rate=rate * _HEADS_FASTER),
        ],
        reader.batches,
        reader.loss,
        epochs=config.epochs,
        steps_per_epoch=-(-len(reader.rows) // config.batch_size),
        clip=_CLIP,
        title="Teacher: reading",
        progress=progress,
        options=FitOptions(
            schedule=stepping.schedule,
            adaptive_clip=stepping.adaptive_clip,
            accumulate=stepping.accumulate,
            precision=stepping.precision,
            patience=stepping.patience,
            checkpoint=checkpoint,
            lower="teacher.pretraining.batch_size",
            rate="teacher.pretraining.learning_rate",
        ),
    )
    tower.encoder.requires_grad_(False)
    tower.eval()
    return {
        "curve": curve,
        "rows": len(reader.rows),
        "held_rows": len(reader.held),
        "terms": len(glossary.terms),
        "before": first,
        "after": reader.judged(),
    }
