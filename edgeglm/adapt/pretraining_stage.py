"""The stage in which a text tower reads the domain's texts, before the teacher is aligned."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgeglm.adapt.cleaning import cleaned, replacer
from edgeglm.adapt.corpora import (
    CLDR,
    CLDR_ASSET,
    Glossary,
    corpus_artifacts,
    documents_of,
    evaluated_texts,
    glossary_from_file,
    glossary_from_pairs,
    languages_of,
    without_unseen,
)
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.core.teacher_config import PretrainingConfig
from edgeglm.data.pairs import PairSet

ENCODER_FILE = "encoder.safetensors"


def pretraining_assets(config: TeacherConfig) -> dict[str, str]:
    """Return what is fetched for the reading, by the name of the input."""
    wanted = config.pretraining
    return {CLDR_ASSET: CLDR_ASSET} if wanted.epochs and CLDR in wanted.corpus else {}


def pretraining_files(config: TeacherConfig) -> dict[str, Artifact]:
    """Hash the local files of the reading, by the name of the input.

    Raises:
        UserError: A file is missing, or there is nothing to read.
    """
    wanted = config.pretraining
    if not wanted.epochs:
        return {}
    if not wanted.corpus:
        raise UserError(
            f"teacher.pretraining.epochs is {wanted.epochs} and there is nothing to read; "
            'name text files in teacher.pretraining.corpus, or "cldr"'
        )
    if not (wanted.mlm_weight or wanted.order_weight or wanted.term_weight):
        raise UserError("teacher.pretraining has no objective; set mlm_weight, order_weight or term_weight")
    return corpus_artifacts(wanted)


class PretrainingStage(Stage[PretrainingConfig]):
    """A text tower and a corpus to ``encoder.safetensors``, the tower's encoder after the reading."""

    name = "pretraining"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.adapt",
        "edgeglm.train",
        "edgeglm.models",
        "edgeglm.data.languages",
        "edgeglm.data.tokenization",
        "edgeglm.data.unseen_names",
    )
    libraries: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers",
        "tokenizers",
        "presidio-analyzer",
        "spacy",
    )

    def __init__(self, config: TeacherConfig, *, seed: int, max_length: int) -> None:
        wanted = config.pretraining
        places = tuple(name if name == CLDR else "file" for name in wanted.corpus)
        glossary = "file" if wanted.glossary else ""
        super().__init__(msgspec.structs.replace(wanted, corpus=places, glossary=glossary))
        self.text = config.text
        # How often a state is kept decides nothing; here it is after every epoch.
        self.stepping = msgspec.structs.replace(config.optimisation, checkpoint_epochs=0)
        self.seed = seed
        self.max_length = max_length

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Add what is no part of the table."""
        parts = {**super().key_parts(inputs), "seed": self.seed, "max_length": self.max_length}
        return {**parts, "optimisation": msgspec.to_builtins(self.stepping)}

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Clean the corpus, read it, and write the encoder."""
        from safetensors.torch import save_file

        from edgeglm.adapt.pretraining import pretrained
        from edgeglm.adapt.text_teacher import load_text_teacher
        from edgeglm.train.checkpoint import Checkpoint
        from edgeglm.train.loop import seeded

        pairs, counts, config = PairSet.open(inputs["pairs"]), Counter[str](), self.config
        found = without_unseen(documents_of(inputs, config, languages_of(pairs)), pairs, counts)
        replace = replacer(config.deidentify, config.name_model)
        documents = list(cleaned(found, replace, counts, forbidden=evaluated_texts(pairs)))
        if config.glossary:
            artifact = inputs["glossary"]
            glossary = glossary_from_file(artifact.path / next(iter(artifact.files)))
        elif config.term_weight:
            glossary = glossary_from_pairs(pairs)
        else:  # to look for every caption in every sentence takes long, and nothing asks for them
            glossary = Glossary(())
        key = self.key(inputs)
        folder = context.store.checkpoints / key
        with context.store.scratch() as scratch, seeded(self.seed, threads=context.threads):
            text = load_text_teacher(self.text, inputs["text"], scratch / "text", max_length=self.max_length)
            told = pretrained(
                text,
                documents,
                glossary,
                config,
                seed=self.seed,
                progress=context.progress,
                checkpoint=Checkpoint(path=folder / "reading.pt", identity=key),
                stepping=self.stepping,
            )
        state = {name: value.contiguous() for name, value in text.tower.encoder.state_dict().items()}
        save_file(state, out / ENCODER_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        return {**told, "documents": len(documents), "cleaning": dict(sorted(counts.items()))}


def take_encoder(encoder: Any, artifact: Artifact) -> None:
    """Put what was read into an encoder of the same text model."""
    from safetensors.torch import load_file

    encoder.load_state_dict(load_file(artifact.path / ENCODER_FILE))
